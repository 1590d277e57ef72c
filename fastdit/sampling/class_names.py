"""Class ids from the ids and names that a user gives."""

import torch

from fastdit import kernels
from fastdit.config import InputError, nearest
from fastdit.flow import Stream


def _class_of_name(name: str, names: list[str]) -> int:
    """Return the class that has `name` among its names (ImageNet's have several, "tench, Tinca tinca"). Raises InputError."""
    ids: dict[str, list[int]] = {}
    for i, synonyms in enumerate(names):
        for synonym in synonyms.lower().split(", "):
            ids.setdefault(synonym, []).append(i)
    matches = ids.get(name.lower(), [])
    if len(matches) != 1:
        several = f"it names classes {' and '.join(map(str, matches))}: give the id"
        fix = several if matches else nearest(name.lower(), list(ids))
        raise InputError(f"--class {name!r} is not one class of this model: {fix}")
    return matches[0]


def parse_classes(text: str, num_classes: int, names: list[str] | None = None, seed: int = 0) -> list[int]:
    """Return the class ids of "3", "207,360", "golden retriever,otter", "all" or "-1" (a random class, drawn from the seed).

    names: names of the classes, if they are known. Raises InputError for anything else or an id out of range.
    """
    if text == "all":
        return list(range(num_classes))
    classes = []
    for i, part in enumerate(map(str.strip, text.split(","))):
        if part == "-1":
            u = kernels.counter_uniform(seed, Stream.SAMPLE_CLASS, torch.tensor([i]), ()).item()
            classes.append(int(u * num_classes))
        elif part.lstrip("-").isdecimal():
            if not 0 <= int(part) < num_classes:
                raise InputError(
                    f"--class {part} is out of range: this model's classes are 0 to {num_classes - 1}, and -1 is a random one"
                )
            classes.append(int(part))
        elif names:
            classes.append(_class_of_name(part, names))
        else:
            raise InputError(f"--class {text!r} must be 'all' or class ids such as 3 or 207,360")
    return classes
