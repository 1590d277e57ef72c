"""Which sources lie at the paths that a user gives, and what is left out there.

A folder is, in this order: a root of splits (train/ and val/); a folder of class folders; a folder of archives, of several splits
if their names say so; pictures, which are one class. If only one of its folders holds data, and those lie deeper, that one is read.
"""

import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from fastdit.config import InputError
from fastdit.data import archives, folders, imagenet
from fastdit.data.archives import Source, absolute
from fastdit.data.classes import printable
from fastdit.data.folders import Listing
from fastdit.data.pixels import IMAGE_SUFFIXES, is_hidden
from fastdit.progress import progress_bar

SPLIT_OF = {
    "train": "train", "training": "train", "trainval": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
SPLIT_FOLDER = re.compile(rf"({'|'.join(SPLIT_OF)})([ _-]?(set|images?|data|split))?[ _-]?\d*", re.IGNORECASE)
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(SPLIT_OF, key=len, reverse=True))})(?-i:(?![a-z]))", re.IGNORECASE)
THREADS = 16  # that list folders: a file server answers many at once
LOCAL_S = 1e-4  # seconds per file to list a folder, at most, on a local disk: 1e-5 when it is in the page cache


class Item(NamedTuple):
    """An archive, or a folder of images of one class."""

    path: str
    label: str | None = None  # class, None of an archive or if only the names of the images tell it
    flat: bool = False  # whether the folder is not a class folder: the label may be another then


@dataclass
class Layout:
    """The sources at some paths."""

    splits: dict[str, list[Item]] = field(default_factory=lambda: defaultdict(list))  # by "train" | "val"
    bad: list[tuple[str, str, str]] = field(default_factory=list)  # folder, name and reason
    notes: list[str] = field(default_factory=list)  # for the user: what was chosen, what was left out and why
    levels: list[tuple[str, int]] = field(default_factory=list)  # folders whose entries decided, and their modification times, ns


class Found(NamedTuple):
    """The sources of an index, and what there is to say of them."""

    sources: dict[str, list[Source]]  # by "train" | "val"
    layout: Layout


@dataclass
class _Level:
    """The content of a folder, one level deep: names in the order of their bytes."""

    folders: list[str] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)  # number of other files by suffix
    hidden: list[str] = field(default_factory=list)  # folders with images in them
    outputs: list[str] = field(default_factory=list)  # folders that fastdit wrote
    loops: list[str] = field(default_factory=list)  # links to a folder that this one lies in
    dangling: list[str] = field(default_factory=list)  # links that lead nowhere


def _archive_suffixes() -> list[str]:
    return [kind.suffix for kind in archives.KINDS.values() if kind.suffix]


def _level(folder: str) -> _Level:
    """List a folder. Raises OSError."""
    level = _Level()
    real = f"{os.path.realpath(folder).rstrip('/')}/"
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    for entry in entries:
        if is_hidden(entry.name):
            if entry.is_dir(follow_symlinks=False) and folders.holds_images(entry.path):
                level.hidden.append(entry.name)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            level.dangling.append(entry.name)
        elif entry.is_dir():
            if entry.is_symlink() and real.startswith(f"{os.path.realpath(entry.path).rstrip('/')}/"):
                level.loops.append(entry.name)
            elif folders.is_output(entry.path):
                level.outputs.append(entry.name)
            else:
                level.folders.append(entry.name)
        elif folders.suffix(entry.name) in _archive_suffixes():
            level.archives.append(entry.name)
        elif folders.suffix(entry.name) in IMAGE_SUFFIXES:
            level.images.append(entry.name)
        else:
            level.others[folders.suffix(entry.name)] += 1
    return level


def _holds_data(folder: str) -> bool:
    """Whether an image, an archive or a link to a folder lies in a folder at any depth."""
    wanted = {*IMAGE_SUFFIXES, *_archive_suffixes()}
    for path, inside, names in os.walk(folder):
        inside[:] = [name for name in inside if not is_hidden(name)]
        if folders.are_outputs({*inside, *names}.__contains__):
            inside.clear()
            continue
        has_file = any(folders.suffix(name) in wanted for name in names if not is_hidden(name))
        if has_file or any(os.path.islink(os.path.join(path, name)) for name in inside):
            return True
    return False


def _listed(names: list[str], shown: int = 3) -> str:
    """Return the first names of a list, and the number of the others."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown:,} more" if len(names) > shown else "")


def _split_of_archive(name: str) -> str | None:
    """Return the split that an archive's name tells, "train" of imagenet-train-0001.tar, None if it tells none."""
    return next((SPLIT_OF[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_OF), None)


def _split_of_folder(name: str) -> str | None:
    """Return the split that a folder's name tells, None if it tells none."""
    match = SPLIT_FOLDER.fullmatch(name)
    return SPLIT_OF[match[1].lower()] if match else None


def splits_of_folders(names: list[str]) -> dict[str | None, list[str]]:
    """Return the names of the folders in one folder by the split that they tell, None for those that tell none.

    They may be called after their splits, or else they have names that are equal but for that word: seg_train and seg_test.
    """
    splits = _by_split(names, _split_of_folder)
    if "train" in splits:
        return splits
    stems = defaultdict(dict)
    for name in names:
        if match := SPLIT_WORD.search(name):
            stems[SPLIT_WORD.sub("", name, count=1).lower()][name] = SPLIT_OF[match[1].lower()]
    told = {}
    for of_stem in stems.values():
        told |= of_stem if "train" in of_stem.values() and len({*of_stem.values()}) > 1 else {}
    return _by_split(names, told.get) if told else splits


def _by_split(names: list[str], split_of: Callable[[str], str | None]) -> dict[str | None, list[str]]:
    splits = defaultdict(list)
    for name in names:
        splits[split_of(name)].append(name)
    return dict(splits)


def _chosen(folder: str, splits: dict[str | None, list[str]], layout: Layout) -> dict[str, list[str]]:
    """Return the names to take by "train" | "val", and note them. Raises InputError if there is nothing to train on."""
    # names that tell nothing are training data only if no other is
    train = splits.get("train") or splits.get(None)
    if not train:
        names = list(chain(*splits.values()))
        raise InputError(f"{folder} holds {_listed(names)} and nothing to train on: give the folder of the training images")
    val = splits.get("val", [])
    left_out = [name for names in splits.values() if names not in (train, val) for name in names]
    note = f"{folder} holds splits: {_listed(train)} to train on"
    if val:
        note += f", {_listed(val)} as validation images"
    if left_out:
        hint = "" if val else f" (--val {os.path.join(folder, splits.get('test', left_out)[0])} takes it as validation images)"
        note += f"; left out: {_listed(left_out)}{hint}"
    layout.notes.append(note)
    return {"train": train, "val": val}


def _note_left_out(folder: str, level: _Level, layout: Layout, **lists: list[str]) -> None:
    """Note what a folder holds beside what was taken. lists: further names, by what they are."""
    parts = [f"{noun.replace('_', ' ')}: {len(names):,} ({_listed(names)})" for noun, names in lists.items() if names]
    if level.others:
        parts.append(folders.counted(level.others))
    for names, reason in ((level.hidden, "hidden, with images"), (level.outputs, "made by fastdit"), (level.loops, "a link back")):
        parts += [f"{_listed(names)} ({reason})"] if names else []
    if parts:
        layout.notes.append(f"left out in {folder}: {'; '.join(parts)}")
    layout.bad += [(folder, name, folders.DANGLING) for name in level.dangling]


def _expand(folder: str, layout: Layout, label: str) -> None:
    """Add the sources in a folder to a layout. Raises InputError, OSError.

    label: class of its images if it has no class folders.
    """
    layout.levels.append((folder, os.stat(folder).st_mtime_ns))
    level = _level(folder)
    path_of = lambda name: os.path.join(folder, name)
    splits = splits_of_folders(level.folders)
    if "train" in splits and splits.keys() & {"val", "test"}:
        chosen = _chosen(folder, splits, layout)
        _note_left_out(folder, level, layout, archives=level.archives, loose_pictures=level.images)
        for split, names in chosen.items():
            if len(names) > 1:
                raise InputError(f"{folder} holds {_listed(names)}, each of which could be its {split} images: give one of them")
            for name in names:
                inside = Layout(bad=layout.bad, notes=layout.notes, levels=layout.levels)
                _expand(path_of(name), inside, label)
                layout.splits[split] += inside.splits["train"]
        return
    if len(level.folders) > 1 and not splits.keys() & {"train", None}:
        _chosen(folder, splits, layout)
    with_data = list(islice((name for name in level.folders if _holds_data(path_of(name))), 2))
    if with_data or (level.folders and not level.archives and not level.images):
        _note_left_out(folder, level, layout, archives=level.archives, loose_pictures=level.images)
        inner = _level(path_of(with_data[0])) if len(with_data) == 1 else _Level()
        if (inner.folders or inner.archives) and not inner.images:
            layout.notes.append(f"{path_of(with_data[0])} is read: no other folder in {folder} holds images")
            _expand(path_of(with_data[0]), layout, label)
        else:
            layout.splits["train"] += [Item(path_of(name), name) for name in level.folders]
    elif level.archives:
        kinds = sorted({folders.suffix(name) for name in level.archives})
        if len(kinds) > 1:
            raise InputError(f"{folder} holds {' and '.join(kinds)} archives, which may be the same images: give those of one kind")
        _note_left_out(folder, level, layout, folders=level.folders, loose_pictures=level.images)
        splits = _by_split(level.archives, _split_of_archive)
        several = len(splits) > 1 and splits.keys() & {"val", "test"}
        chosen = _chosen(folder, splits, layout) if several else {"train": level.archives}
        for split, names in chosen.items():
            layout.splits[split] += [Item(path_of(name)) for name in names]
    elif level.images:
        layout.splits["train"].append(Item(folder, label, flat=True))
    else:
        unread = f" (there are {folders.counted(level.others)} files)" if level.others else ""
        raise InputError(
            f"{folder} holds neither class folders nor {', '.join(_archive_suffixes())} archives nor pictures{unread}: give the "
            "folder of the class folders, and unpack compressed archives"
        )


def lay_out(paths: list[Path], val: Path | None, named: bool) -> Layout:
    """Return the sources at some paths, without looking into class folders or archives.

    val: path of the validation images, None if those that lie beside the training images are taken; named: whether the classes of
    validation images without folders are known by their names. Raises InputError.
    """
    layout, held_out = Layout(), Layout()
    try:
        for inside, given in ((layout, paths), (held_out, [val] if val else [])):
            for path in given:
                at = absolute(path)
                if path.is_dir():
                    _expand(at, inside, os.path.basename(at))
                else:
                    inside.splits["train"].append(Item(at))
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    if val:
        layout.splits["val"] = held_out.splits["val"] or held_out.splits["train"]
        layout.notes += held_out.notes
        layout.bad += held_out.bad
        layout.levels += held_out.levels
    labels = {item.label for item in layout.splits["train"]}
    only_label = labels.pop() if len(labels) == 1 else None
    layout.splits["val"] = [item._replace(label=only_label) if item.flat else item for item in layout.splits["val"]]
    if not val and not named:
        for item in [item for item in layout.splits["val"] if item.flat and not item.label]:
            layout.splits["val"].remove(item)
            of_imagenet = any(imagenet.VAL_NAME.search(name) for name in os.listdir(item.path))
            fix = f"; {imagenet.HOW_TO_LABEL}" if of_imagenet else ""
            layout.notes.append(f"{item.path} is left out: its pictures lie in no class folders{fix}")
    return layout


def find(paths: list[Path], val: Path | None = None, named: bool = False) -> Found:
    """Return the sources at some paths as they are now: arguments and errors as of `lay_out`."""
    layout = lay_out(paths, val, named)
    try:
        return Found({split: _sources(layout.splits[split], layout.notes) for split in ("train", "val")}, layout)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error


def _walk_all(paths: list[str]) -> Iterator[Listing]:
    """Yield the listing of each folder, of the first one alone to see how fast its files answer. Raises OSError."""
    begun = time.perf_counter()
    for path in paths[:1]:
        listing = folders.walk(path)
        remote = time.perf_counter() - begun > LOCAL_S * (1 + len(listing.images))
        yield listing
        pool = ThreadPoolExecutor(THREADS if remote else 1)  # threads of a local disk only wait for each other
        try:
            yield from pool.map(folders.walk, paths[1:])
        finally:  # after an error or Ctrl-C the folders that are left are not waited for
            pool.shutdown(cancel_futures=True)


def _sources(items: list[Item], notes: list[str]) -> list[Source]:
    """Return the sources of a split, and note what is left out of its folders. Raises InputError, OSError."""
    listings: dict[str, Listing] = {}
    class_folders = [item.path for item in items if os.path.isdir(item.path)]
    with progress_bar(len(class_folders), description="list", unit="folder", delay=2) as bar:
        for path, listing in zip(class_folders, _walk_all(class_folders), strict=True):
            listings[path] = listing
            bar.update()
    archives_in = [path for path, listing in listings.items() if listing.others.keys() & set(_archive_suffixes())]
    if archives_in and len(listings) == len(items) and not any(listing.images for listing in listings.values()):
        raise InputError(
            f"{_listed(archives_in)} hold archives and no pictures, so that they are no classes: give one of these folders"
        )
    sources, taken = [], []
    for item in items:
        listing = listings.get(item.path)
        if listing is None:
            sources.append(Source.of(Path(item.path)))
        elif listing.images or not listing.outputs:  # a folder of runs is no class
            sources.append(Source.of_folder(item.path, item.label, listing))
            taken.append((item, listing))
    _note_listings(taken, listings, notes)
    return sources


def _note_listings(taken: list[tuple[Item, Listing]], listings: dict[str, Listing], notes: list[str]) -> None:
    """Note what is left out of folders, and what they hold that their owner may not expect."""
    others, hidden, by_identity = Counter[str](), Counter[str](), defaultdict(list)
    for item, listing in taken:
        others += listing.others
        hidden += listing.hidden
        by_identity[listing.identity].append(item.label)
    if empty := [printable(str(item.label)) for item, listing in taken if not listing.images]:
        notes.append(f"class folders without images: {len(empty):,} ({_listed(empty)})")
    outputs = [os.path.join(path, name) for path, listing in listings.items() for name in listing.outputs]
    if others:
        read = ", ".join(sorted(IMAGE_SUFFIXES))
        notes.append(f"left out in the folders of images: {folders.counted(others)} files; only {read} files are read")
    if hidden:
        names = ", ".join(f"{name} ({count:,})" for name, count in sorted(hidden.items()))
        notes.append(f"left out in the folders of images: hidden or system folders with images, {names}")
    if outputs:
        notes.append(f"left out: {_listed(outputs)}, made by fastdit")
    if again := sum(listing.again for _, listing in taken):
        notes.append(f"left out in the folders of images: links to folders that had been read before, {again:,}")
    for labels in by_identity.values():
        if len(labels) > 1:
            notes.append(f"{_listed(labels)} are links to the same folder: its images are in each of these classes")
    nested = [(item, name) for item, listing in taken for name in listing.images if "/" in name]
    if nested:
        item, name = nested[0]
        notes.append(
            f"images in folders inside of class folders: {len(nested):,}, such as {item.path}/{name}: their class is the outer "
            f"folder, here {item.label}"
        )
    if len(taken) == 1 and taken[0][0].flat and taken[0][0].label:
        notes.append(f"{taken[0][0].path} has no class folders: all its images are of one class, {taken[0][0].label}")
