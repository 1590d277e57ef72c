"""README's benchmark tables and the figures in benchmarks/results, from the CSVs there: the suites', then those named in TABLES.

    python benchmarks/report.py [NAME.csv ...]      # default: all of them in benchmarks/results
    python benchmarks/report.py --check             # exit code 1 where the README's tables are not those of the CSVs

The tables stand between two marker lines of the README. Every number is a value of a row; what a CSV does not hold is left out.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import results_csv
from fastdit.checkpoint import replacing, write_atomically

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
TITLES = {
    "train_step": "Train step", "end_to_end": "Training from images and from latents", "sampling": "Sampling",
    "data": "Data, seconds of one image", "checkpoint": "Checkpoints", "blocks": "One block",
    "kernels": "Ops, forward and backward",
}  # fmt: skip
FASTER = ("train_step", "end_to_end", "sampling")  # the suites of the first figure
PERCENT = ("mfu", "bound_share", "copy_share")
HEADS = {
    "median_s": "median", "images_per_s": "images/s", "speedup": "", "mfu": "MFU", "bound_share": "share of the bound",
    "parity": "parity",
}  # fmt: skip
Row = dict[str, str]


def suites_in(rows: list[Row]) -> dict[str, list[Row]]:
    """Each suite's rows, in the order of TITLES, unknown ones last."""
    found = {suite: [row for row in rows if row["suite"] == suite] for suite in (*TITLES, *dict.fromkeys(r["suite"] for r in rows))}
    return {suite: own for suite, own in found.items() if own}


def title(suite: str) -> str:
    return TITLES.get(suite, suite.replace("_", " "))


def all_of(rows: list[Row], column: str) -> str:
    return ", ".join(dict.fromkeys(row.get(column) or "" for row in rows))


def where(rows: list[Row]) -> str:
    """On what and with what rows were measured."""
    threads = all_of(rows, "threads")
    return f"{all_of(rows, 'device')}, {threads} thread{'s' * (threads != '1')}, {all_of(rows, 'precision')}"


def duration(seconds: str) -> str:
    """Three digits, in the unit that reads best."""
    value = float(seconds)
    scale, unit = next(((s, u) for s, u in ((1, "s"), (1e-3, "ms")) if value >= s), (1e-6, "µs"))
    return f"{value / scale:.0f} {unit}" if value >= 100 * scale else f"{value / scale:.3g} {unit}"


def shown(row: Row, column: str) -> str:
    """A value as the README prints it."""
    value = row.get(column) or ""
    if not value:
        return ""
    if column == "median_s":
        return duration(value)
    if column == "speedup":
        return f"{float(value):.2f} x"
    if column in PERCENT:
        return f"{100 * float(value):.0f} %"
    return f"{float(value):,.0f}" if column == "images_per_s" and float(value) >= 1000 else value


def markdown(rows: list[dict[str, str]]) -> str:
    """A table; columns that are empty in all rows are left out."""
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row[column].replace("|", "/") for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def differing(rows: list[Row]) -> list[str]:
    """Those of the key columns above a table in which its rows differ: they need a column there."""
    return [column for column in ("precision", "device", "threads") if len({row.get(column) for row in rows}) > 1]


def plain_table(rows: list[Row]) -> str:
    reference: dict[str, str] = {}
    for row in rows:
        reference.setdefault(row["case"], row["provider"])
    names = set(reference.values())
    heads = HEADS | {"speedup": f"over {names.pop()}" if len(names) == 1 else "over the case's first"}
    table = []
    for row in rows:
        cells = {"case": ", ".join(row[key] for key in ("case", "size") if row.get(key)), "provider": row["provider"]}
        cells |= {column: row.get(column) or "" for column in ("direction", *differing(rows))}
        cells |= {head: shown(row, column) for column, head in heads.items()}
        table.append(cells | {"no numbers: why": row["error"]})
    return markdown(table)


def whole_ops(rows: list[Row]) -> list[dict[str, Row]]:
    """For each op and size: each provider's row of forward and backward, or of the forward where an op has no backward."""
    backward = {row["case"] for row in rows if row.get("direction") == "both"}
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row.get("direction") == ("both" if row["case"] in backward else "forward"):
            case = tuple(row.get(key) for key in results_csv.KEYS if key != "provider")
            found.setdefault(case, {})[row["provider"]] = row
    return list(found.values())


def op_name(row: Row) -> str:
    return f"{row['case']}, forward" if row["direction"] == "forward" else row["case"]


def kernels_table(rows: list[Row]) -> str:
    table = []
    for own in whole_ops(rows):
        first, *others = own
        cells = {"op": op_name(own[first]), **{c: own[first].get(c) or "" for c in ("size", *differing(rows))}}
        for name in others:
            cells[f"{name} over {first}"] = own[name]["error"] or shown(own[name], "speedup")
        for name in others[-1:]:  # ours
            cells[f"{name}: share of copy bandwidth"] = shown(own[name], "copy_share")
        table.append(cells)
    heads = dict.fromkeys(head for cells in table for head in cells)
    return markdown([{head: cells.get(head, "") for head in heads} for cells in table])


def section(link: Path, rows: list[Row], pictures: Iterable[str]) -> str:
    """A CSV's figures and tables, in Markdown. link: to it, from the README; pictures: names of files beside it."""
    parts = [f"![{name.removesuffix('.png').replace('_', ' ')}]({link.with_name(name)})" for name in pictures]
    for suite, own in suites_in(rows).items():
        commit = f"torch {all_of(own, 'torch')}, commit {all_of(own, 'commit')}, {all_of(own, 'date')}"
        table = kernels_table(own) if suite == "kernels" and whole_ops(own) else plain_table(own)
        parts += [f"**{title(suite)}**: {where(own)}; {commit} ([rows]({link})).", table]
    return "\n\n".join(parts)


def pivot(rows: list[Row], keys: tuple[str, ...], column: str, cell: Callable[[Row], str]) -> str:
    """A line for each value of the keys, with a cell for each value of `column`: those of all its rows, or why there is none."""
    cells: dict[tuple, dict[str, list[str]]] = {}
    for row in rows:
        line = cells.setdefault(tuple(row[key] for key in keys), {})
        line.setdefault(row[column], []).append(row.get("error") or cell(row))
    heads = dict.fromkeys(row[column] for row in rows)
    lines = [dict(zip(keys, key, strict=True)) | {h: " → ".join(line.get(h, ())) for h in heads} for key, line in cells.items()]
    return markdown(lines)


def host_table(rows: list[Row]) -> tuple[str, str]:
    launches = lambda row: sum(float(row[name]) for name in ("launches", "triton_launches", "graph_launches"))
    sentence = (
        f"**The host's side of a train step on CUDA**, ms of one core (launches), {all_of(rows, 'batch')} images: measured without "
        "a GPU, by torch's CUDA build on stub libraries that run no kernel; what a real driver adds to a launch is not in it. "
        f"None, blocks and graphs are fastdit's train.compile; {all_of(rows, 'device')}"
    )
    return sentence, pivot(rows, ("preset",), "provider", lambda row: f"{float(row['cpu_ms']):.1f} ({launches(row):.0f})")


def block_table(rows: list[Row]) -> tuple[str, str]:
    names = {"fused": "fused ops", "reference": "reference ops, fused by Inductor", "base": "eager reference, compiled"}
    mb = lambda row: f"{float(row['memory_bound_mb']):.0f}"
    first = rows[0]["preset"]
    found = {(row["version"], row["direction"]): mb(row) for row in rows if row["preset"] == first}
    of = lambda version, direction: f"{found.get((version, direction), '?')} MB"
    sentence = (
        "**A block under torch.compile for an H100**, MB (launches) of all but matmuls and attention, forward → backward, "
        f"{all_of(rows, 'batch')} images: derived without a GPU from Inductor's schedule, bytes that must move at least once, no "
        f"times. Forward, Inductor's own fusion of the reference ops moves as many as the fused ops ({of('reference', 'forward')} "
        f"against {of('fused', 'forward')} at {first}); the kernels gain backward ({of('fused', 'backward')} against "
        f"{of('base', 'backward')} of the eager reference, and {of('reference', 'backward')} of the reference ops, which sum the "
        "MLP bias's gradient from an fp32 tensor)"
    )
    named = [row | {"version": names.get(row["version"], row["version"])} for row in rows]
    return sentence, pivot(named, ("preset",), "version", lambda row: f"{mb(row)} ({row['launches']})")


def optimizer_table(rows: list[Row]) -> tuple[str, str]:
    sentence = (
        f"**Optimizer step**, ms (GB/s of the bytes that one pass must move), median of {all_of(rows, 'rounds')}: "
        f"{all_of(rows, 'device')}, {all_of(rows, 'threads')} threads"
    )
    cell = lambda row: f"{float(row['wall_ms']):.1f} ({float(row['gb_s']):.0f})"
    return sentence, pivot(rows, ("preset", "precision"), "provider", cell)


# How the names of CSVs begin that no suite writes -> their table and the sentence above it.
TABLES = {"cuda_host": host_table, "cuda_kernels": block_table, "optimizer_step": optimizer_table}


def table_of(path: Path) -> Callable[[list[Row]], tuple[str, str]] | None:
    return next((table for name, table in TABLES.items() if path.name.startswith(name)), None)


def table_section(link: Path, path: Path) -> str:
    """As `section`, of a CSV of TABLES. Raises ValueError where it does not hold what its name says."""
    rows = results_csv.read(path)
    try:
        sentence, table = table_of(path)(rows)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has no rows, or lacks a value ({error!r}): measure it again") from error
    commit = f"torch {all_of(rows, 'torch')}, commit {all_of(rows, 'commit')}, {all_of(rows, 'date')}"
    return f"{sentence}; {commit} ([rows]({link})).\n\n{table}"


def bars(axes: Axes, rows: list[Row], labels: list[str], column: str) -> None:
    """Speedups as bars with their values, a colour a value of the column."""
    values = list(dict.fromkeys(row[column] for row in rows))
    colours = [f"C{values.index(row[column]) % 10}" for row in rows]
    drawn = axes.barh(range(len(rows)), [float(row["speedup"]) for row in rows], color=colours)
    axes.bar_label(drawn, [shown(row, "speedup") for row in rows], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.01)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_title(f"{title(rows[0]['suite'])}, {where(rows)}", fontsize=9)


def speedup_figure(rows: list[Row]) -> Figure | None:
    """Every provider over its case's reference, a plot a suite."""
    found = {suite: [r for r in own if r.get("speedup")] for suite, own in suites_in(rows).items() if suite in FASTER}
    found = {suite: own for suite, own in found.items() if own}
    if not found:
        return None
    sizes = [len(own) + 2 for own in found.values()]  # with room for the title
    figure = Figure(figsize=(9, 0.6 + 0.27 * sum(sizes)), layout="constrained")
    plots = figure.subplots(len(found), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for axes, own in zip(plots, found.values(), strict=True):
        bars(axes, own, [f"{row['case']}: {row['provider']}" for row in own], "case")
    plots[-1].set_xlabel("times as fast as the eager reference")
    return figure


def kernels_figure(rows: list[Row]) -> Figure | None:
    """Every op's providers over the eager chain."""
    ops = whole_ops(suites_in(rows).get("kernels", []))
    own = [row for providers in ops for row in list(providers.values())[1:] if row.get("speedup")]
    if not own:
        return None
    figure = Figure(figsize=(9, 1.2 + 0.26 * len(own)), layout="constrained")
    axes = figure.subplots()
    bars(axes, own, [f"{op_name(row)} {row.get('size')}: {row['provider']}" for row in own], "provider")
    axes.set_xlabel("times as fast as the eager chain")
    return figure


def figures(path: Path, rows: list[Row]) -> dict[str, Figure]:
    """File name: figure, of what a CSV holds."""
    drawn = {"speedup": speedup_figure(rows), "kernels": kernels_figure(rows)}
    return {f"{path.stem}_{name}.png": figure for name, figure in drawn.items() if figure}


def inserted(text: str, sections: list[str]) -> str:
    """The README's text with these sections between the markers. Raises ValueError where it does not have each marker once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the README does not have {BEGIN} and then {END}, once each: put both lines where the tables shall be")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    return before + "\n\n".join([BEGIN, *sections, after])


def of_suites(path: Path) -> bool:
    """Whether a CSV is one that the suites write: it says of which suite a row is, and its time."""
    return any({"suite", "median_s"} <= row.keys() for row in results_csv.read(path)[:1])


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(words)
    try:
        known = [path for path in sorted((ROOT / "benchmarks" / "results").glob("*.csv")) if table_of(path) or of_suites(path)]
        sections, drawn = [], {}
        for path in sorted(options.csv or known, key=lambda path: table_of(path) is not None):  # the suites first
            link = Path(os.path.relpath(path, options.readme.parent))
            if table_of(path):
                sections.append(table_section(link, path))
                continue
            rows = results_csv.read_suites(path)
            pictures = figures(path, rows)
            sections.append(section(link, rows, pictures))
            drawn |= {path.with_name(name): figure for name, figure in pictures.items()}
        old = options.readme.read_text()
        new = inserted(old, sections)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.check:
        stale = [str(path) for path, is_old in ((options.readme, new != old), *((p, not p.exists()) for p in drawn)) if is_old]
        if stale:
            print(f"{', '.join(stale)}: not what the CSVs give: run python benchmarks/report.py", file=sys.stderr)
        return 1 if stale else 0
    for path, figure in drawn.items():
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=90, metadata={"Software": None})
    write_atomically(options.readme, new)
    print("\n".join(map(str, [*drawn, options.readme])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
