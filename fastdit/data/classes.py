"""Classes as text: the table of their ids, names and images. Imports nothing of the package."""

LINES = 20  # of a table
WIDTH = 40  # characters of a name


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as os.fsdecode keeps it
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def printable(text: str) -> str:
    """Return a name for people: bytes that are not UTF-8 and control characters are escaped."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def class_table(classes: list[str], names: list[str] | None, counts: list[int]) -> str:
    """Return one line per class, "id  class  name  images", under a header; at most LINES of them, and the number of the others.

    classes: of ids 0, 1, …; names: for people, None if the classes have no others; counts: images per class.
    """
    short = lambda text: text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"
    columns = [("id", range(len(classes))), ("class", classes), *([("name", names)] if names else []), ("images", counts)]
    shown = len(classes) if len(classes) <= LINES else LINES - 1
    rows = [[title for title, _ in columns]]
    for values in zip(*(values[:shown] for _, values in columns), strict=True):
        rows.append([short(printable(value)) if isinstance(value, str) else f"{value:,}" for value in values])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(columns) - 1
    aligned = lambda row: "  ".join(
        text.rjust(width) if i in (0, last) else text.ljust(width) for i, (text, width) in enumerate(zip(row, widths, strict=True))
    )
    more = [f"… {len(classes) - shown:,} more"] if shown < len(classes) else []
    return "\n".join([*map(aligned, rows), *more])
