"""Class ids from the ids and names that a user gives."""

import re
from collections.abc import Callable

import torch

from fastdit import kernels
from fastdit.config import InputError, nearest
from fastdit.flow import Stream

FEW_CLASSES = 100  # up to here, all classes are drawn if none is named
NUMBER = re.compile(r"-?[0-9]+")  # not \d, which also matches the digits of other scripts
SHOWN = 10  # ids in a sentence, at most


def with_images(num_classes: int, counts: list[int] | None, names: list[str] | None) -> list[int]:
    """Return the classes that a model learned: those with images, or else with names; all classes if neither is known.

    counts: training images of classes 0, 1, …; names: of classes 0, 1, …. Both may be shorter than `num_classes`.
    """
    if counts is not None:
        return [c for c, count in enumerate(counts[:num_classes]) if count]
    return list(range(min(num_classes, len(names)) if names else num_classes))


def _key(name: str) -> str:
    return re.sub(r"\s*,\s*", ", ", name.strip())


class _Names:
    """The classes by their names, of which ImageNet's have several, "tench, Tinca tinca"."""

    def __init__(self, names: list[str]) -> None:
        self.exact: dict[str, set[int]] = {}
        self.folded: dict[str, set[int]] = {}  # without case, for names that are not exact
        self.full = [_key(name) for name in names]
        self.whole = {name.casefold() for name in self.full}
        self.parts = 1 + max((name.count(",") for name in self.full), default=0)  # of the text between commas, in one name
        for i, name in enumerate(self.full):
            for synonym in {name, *name.split(", ")}:
                self.exact.setdefault(synonym, set()).add(i)
                self.folded.setdefault(synonym.casefold(), set()).add(i)

    def classes(self, text: str) -> set[int]:
        """Return the classes that a name may mean."""
        return self.exact.get(_key(text)) or self.folded.get(_key(text).casefold()) or set()

    def equal_number(self, number: int) -> str | None:
        """Return a name such as "01" that is a number, written in another way."""
        return next((name for name in self.full if re.fullmatch(r"0*" + str(number), name)), None)

    def longest(self, parts: list[str]) -> int:
        """Return how many of the first parts, between commas, are one name; 0 if none. Raises InputError if they may be several."""
        for count in range(min(self.parts, len(parts)), 0, -1):
            text = _key(",".join(parts[:count]))
            whole = self.classes(text)
            if whole and count > 1 and all(part.casefold() in self.whole for part in parts[:count]):
                raise InputError(f"--class {text!r} may be one class or {count} classes of this model: give ids")
            if whole:
                return count
        return 0


def _id(text: str, num_classes: int, names: _Names) -> int:
    """Return the class of a number that is no name. Raises InputError."""
    digits = text.lstrip("-0") or "0"
    number = int(digits) if len(digits) < 10 else num_classes  # Python refuses to read thousands of digits
    if not text.startswith("-") and (name := names.equal_number(number)):
        raise InputError(f"--class {text} may be the class called {name!r} or the class with id {text}: give its name")
    if number >= num_classes or (text.startswith("-") and number):
        raise InputError(
            f"--class {text[:20]} is out of range: this model's classes are 0 to {num_classes - 1}, and -1 is a random one"
        )
    return number


def some(classes: list[int]) -> str:
    """Return class ids as text, at most SHOWN of them."""
    return ", ".join(map(str, classes[:SHOWN])) + f", … ({len(classes)} classes)" * (len(classes) > SHOWN)


def parse_classes(
    text: str | None, num_classes: int, names: list[str] | None = None, seed: int = 0, counts: list[int] | None = None,
    say: Callable[[str], object] = lambda note: None,
) -> list[int]:  # fmt: skip
    """Return the class ids of "3", "207,360", "golden retriever,otter", "all" or "-1" (a random class, drawn from the seed).

    A name wins over a number: if classes are called 01 and 02, "01" is the first of them. "all" and "-1" choose among the classes
    `with_images`.

    Args:
        text: ids and names, separated by commas; None: all classes if they are at most FEW_CLASSES, else a random one.
        names: names of classes 0, 1, …, if they are known.
        seed: seed of random classes.
        counts: training images of classes 0, 1, …, if they are known.
        say: function that is called with a sentence for each choice that may not be expected.

    Raises InputError for anything else or an id out of range.
    """
    learned = with_images(num_classes, counts, names)
    left_out = sorted({*range(num_classes)}.difference(learned))
    known = _Names((names or [])[:num_classes])
    if text is None:
        text = "all" if num_classes <= FEW_CLASSES else "-1"
    elif text == "all" and known.classes(text):
        raise InputError("--class all may be the class of that name or all classes: give ids")
    if text == "all":
        if left_out:
            say(f"classes without images in training are left out: {some(left_out)}")
        return learned
    classes: list[int] = []
    parts = [part.strip() for part in text.split(",")]
    position = 0
    while position < len(parts):
        part = parts[position]
        if count := known.longest(parts[position:]):
            name = ", ".join(parts[position : position + count])
            classes.append(_only(known.classes(name), name))
            if NUMBER.fullmatch(name) and name != str(classes[-1]):
                say(f"--class {name} is the name of class {classes[-1]}, not an id")
        elif not part:
            raise InputError(f"--class {text!r} has an empty entry: give ids or names such as 3 or 207,360, or leave --class out")
        elif part == "-1":
            u = kernels.counter_uniform(seed, Stream.SAMPLE_CLASS, torch.tensor([len(classes)]), ()).item()
            classes.append(learned[int(u * len(learned))])
        elif NUMBER.fullmatch(part):
            classes.append(_id(part, num_classes, known))
        elif names:
            choices = list(known.folded)
            raise InputError(f"--class {part!r} is not one class of this model: {nearest(part.casefold(), choices)}")
        else:
            raise InputError(f"--class {text!r} must be 'all' or class ids such as 3 or 207,360")
        position += count or 1
    if unlearned := sorted(set(classes).intersection(left_out)):
        say(f"warning: the model has seen no images of {'class' if len(unlearned) == 1 else 'classes'} {some(unlearned)}")
    return classes


def _only(matches: set[int], name: str) -> int:
    """Return the only match of a name. Raises InputError if there are several."""
    if len(matches) > 1:
        several = " and ".join(map(str, sorted(matches)))
        raise InputError(f"--class {name!r} is not one class of this model: it names classes {several}: give the id")
    return next(iter(matches))
