"""`fastdit prepare`: archives and folders of images to an index, in place.

A source is ImageNet's train archive (a tar of one tar per class), a class folder, a Parquet file, or a tar of images whose class
is named in a .cls or .json file beside the image (webdataset) or by the folder that they lie in; discovery.py finds them. Its
containers (inner tars, class folders, tars, files) are scanned in chunks. A scanned chunk is written to <index>/.parts at once, so
that a killed run resumes with the chunks that are missing.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import shutil
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastdit import files
from fastdit.config import InputError
from fastdit.data import archives, discovery, folders, imagenet, parquet, pixels
from fastdit.data.archives import Chunk, Container, ImageEntry, Source
from fastdit.data.classes import class_table, printable
from fastdit.data.index import FILE, SPLITS, Content, is_index, read_content, record, save_array
from fastdit.data.pixels import IMAGE_SUFFIXES
from fastdit.files import begin_or_match, path_argument, resumable, write_atomically
from fastdit.progress import progress_bar, warn


class ScannedSplit(NamedTuple):
    """All images of a split."""

    sources: list[Source]
    chunks: list[tuple[int, Chunk]]  # with the number of the chunk's source
    container_labels: set[str]  # classes of the containers, also of those without images


def _scan_chunk(journal_file: Path, source: Source, container: Container, start: int) -> Chunk:
    """Return a chunk from the journal, or scan it and add it to the journal."""
    if journal_file.exists():
        try:
            chunk = Chunk(*json.loads(journal_file.read_bytes()))
            return chunk._replace(images=[ImageEntry(*image) for image in chunk.images])
        except (ValueError, TypeError) as error:
            raise InputError(f"{journal_file} was not written by `fastdit prepare`: delete {journal_file.parent}") from error
    chunk = archives.scan(source, container, start)
    write_atomically(journal_file, json.dumps(chunk))
    return chunk


def _scan_split(split: str, sources: list[Source], journal: Path) -> ScannedSplit:
    """Scan all containers of a split's sources. Raises InputError if one is damaged."""
    containers = list(archives.find_containers(sources))
    total = sum(container.progress for container in containers)
    in_archives = any(source.kind != "folder" for source in sources)
    bar_unit: dict[str, Any] = {"unit": "B", "unit_scale": True} if in_archives else {"unit": "image"}
    chunks = []
    with progress_bar(total, description=f"scan {split}", **bar_unit) as bar:
        for number, container in enumerate(containers):
            done_before, start = bar.n, container.start
            while start is not None:
                journal_file = journal / f"{split}-{number:06d}-{start}.json"
                chunk = _scan_chunk(journal_file, sources[container.source], container, start)
                chunks.append((container.source, chunk))
                start = chunk.next_start
                progress = container.progress if start is None else min(container.progress, start - container.start)
                bar.update(done_before + progress - bar.n)
    return ScannedSplit(sources, chunks, {container.label for container in containers if container.label is not None})


def _check_inner_folders(scanned: ScannedSplit) -> None:
    """Look at the folders in archives and inside of class folders. Raises InputError if they are of several splits.

    Says so if the folders that are classes of a tar lie in several folders: those of one name are one class.
    """
    inside = {
        (source, image.name.rpartition("/")[0], image.label): None for source, chunk in scanned.chunks for image in chunk.images
    }
    children, above = defaultdict(set), set()
    for source, folder, label in inside:
        parts = tuple(part for part in folder.split("/") if part not in ("", "."))
        for depth, part in enumerate(parts):
            children[source, parts[:depth]].add(part)
        if parts and parts[-1] == label and scanned.sources[source].kind != "folder":
            above.add("/".join(parts[:-1]) or ".")
    for (source, parts), names in children.items():
        splits = discovery.splits_of_folders(sorted(names))
        if "train" in splits and splits.keys() & {"val", "test"}:
            train, held_out = splits["train"][0], splits.get("val", splits.get("test", [""]))[0]
            raise InputError(
                f"{'/'.join((scanned.sources[source].path, *parts))} holds {train}/ and {held_out}/, which would be mixed: give "
                "the training images as a folder or archive of their own, and the others as --val"
            )
    if len(above) > 1:
        first, second, *_ = sorted(above)
        _say(f"the class of an image in a tar is the innermost folder, also where those lie in several, here {first} and {second}")


def _labels(split: str, scanned: ScannedSplit, kit: imagenet.Devkit, known: set[str]) -> list[list[str]]:
    """Return the class of every image of every chunk. Raises InputError if an image has none.

    known: classes of the training images: a validation image that is not in one of them is looked up in the kit. If no training
    image has a class, all are of one.
    """
    images = [image for _, chunk in scanned.chunks for image in chunk.images]
    has_none = not any(image.label for image in images) and not any(imagenet.VAL_NAME.search(image.name) for image in images)
    if images and has_none and (split == "train" or len(known) == 1):
        only = next(iter(known), parquet.ONE_CLASS)
        _say(f"no {split} image has a class folder, nor a .cls or .json file that names one: all are of one class, {only}")
        return [[only] * len(chunk.images) for _, chunk in scanned.chunks]
    labels = []
    for source, chunk in scanned.chunks:
        chunk_labels = []
        for image in chunk.images:
            label = image.label
            if split == "val" and label not in known:
                label = kit.label_of(image.name) or label
            if label is None:
                fix = (
                    imagenet.HOW_TO_LABEL
                    if imagenet.VAL_NAME.search(image.name)
                    else "put it into a class folder, or a .cls file beside it"
                )
                raise InputError(f"{scanned.sources[source].path}: image {image.name} has no class: {fix}")
            chunk_labels.append(label)
        labels.append(chunk_labels)
    return labels


def _class_ids(labels: set[str]) -> list[str]:
    """Return the classes in the order of their ids 0, 1, …: by number if all are numbers, else by the bytes of their names."""
    if all(label.isascii() and label.isdecimal() for label in labels):
        digits = lambda label: label.lstrip("0")
        return sorted(labels, key=lambda label: (len(digits(label)), digits(label), label))
    return sorted(labels, key=os.fsencode)


def _note_gaps(classes: list[str]) -> None:
    """Say that class numbers are not the ids."""
    other = next((i for i, name in enumerate(classes) if name != str(i)), None)
    if other is not None and all(name.isascii() and name.isdecimal() for name in classes):
        last = len(classes) - 1
        _say(f"the class numbers are not 0 to {last}: ids count the classes that exist, {classes[other]!r} has id {other}")


def _say(note: str) -> None:
    print(f"fastdit: {printable(note)}", file=sys.stderr)


def _write_rows(
    path: Path, chunks: list[tuple[int, Chunk]], labels: list[list[str]], label_of: dict[str, int], first_source: int
) -> int:
    """Write a split's records, its sources numbered from `first_source`, and return their number."""
    names = [[os.fsencode(image.name) for image in chunk.images] for _, chunk in chunks]
    longest = max((len(name) for chunk_names in names for name in chunk_names), default=0)
    rows = np.zeros(sum(map(len, names)), record(longest))
    at = 0
    for (source, chunk), chunk_labels, chunk_names in zip(chunks, labels, names, strict=True):
        for image, label, name in zip(chunk.images, chunk_labels, chunk_names, strict=True):
            rows[at] = (
                first_source + source, image.offset, image.bytes, image.crc, image.height, image.width, image.flags,
                label_of[label], image.mtime_ns, name,
            )  # fmt: skip
            at += 1
    save_array(path, rows)
    return len(rows)


def check_md5(paths: dict[str, Path]) -> None:
    """Compare ImageNet's archives ("train" | "val" | "devkit") with the published MD5 sums. Raises InputError."""
    with progress_bar(sum(p.stat().st_size for p in paths.values()), description="MD5", unit="B", unit_scale=True) as bar:
        for role, path in paths.items():
            digest = hashlib.md5(usedforsecurity=False)
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
                    bar.update(len(block))
            if digest.hexdigest() != imagenet.MD5[role]:
                raise InputError(
                    f"{path} has the MD5 sum {digest.hexdigest()}, ImageNet's {role} archive has {imagenet.MD5[role]}: fetch it "
                    "again"
                )


def default_index(source: Path) -> Path:
    """Return the path of a source's index unless --out names another: beside the source. Raises InputError."""
    path = source.resolve()
    if not path.name:
        raise InputError(f"there is no folder beside {path}: give --out")
    return path.with_name(f"{path.name}.index")


def prepare(
    sources: list[Path], out: Path | None = None, val: Path | None = None, devkit: Path | None = None, verify: bool = False
) -> Path:
    """Make, or finish, the index of some sources and return its folder. Does nothing if it exists and fits them.

    out: folder of the index (default: beside the first source); val: archive or folder of the validation images (default: those
    that lie beside the training images in a root of splits); devkit: ImageNet's development kit, for the classes of its validation
    images and the names of all classes (default: the lists that Kaggle ships, in or above the images); verify: compare the MD5 sums
    of ImageNet's archives first. Raises InputError.
    """
    out = out or default_index(sources[0])
    sources = [imagenet.data_folder(path) for path in sources]
    lists = [devkit] if devkit else imagenet.find_lists([*sources, *([val] if val else [])])
    discovered = discovery.find(sources, val, named=imagenet.label_val(lists))
    if lists and not devkit:
        discovered.layout.notes.append(f"ImageNet's lists are read: {', '.join(map(str, lists))}")
    for note in discovered.layout.notes:
        _say(note)
    try:
        request = {**discovered.sources, "devkit": [Source.of(path) for path in lists]}
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    if verify:
        check_md5({role: p for role, p in (("train", sources[0]), ("val", val), ("devkit", devkit)) if p})
    journal = out / folders.JOURNAL
    if not journal.exists() and _fits(out, request):  # which may lie where nothing can be written
        return out
    with resumable(out):
        out.mkdir(parents=True, exist_ok=True)
        with files.lock(out / ".lock", f"another `fastdit prepare` makes {out}: wait for it, or use another --out"):
            if not _fits(out, request):
                _begin(journal, request)
                kit = imagenet.read_lists(lists)
                kit.names.update(_parquet_names(request))
                scanned = {split: _scan_split(split, request[split], journal) for split in SPLITS if request[split]}
                paths = [archives.absolute(path) for path in sources]
                content = Content(
                    {}, 0, [], None, request, paths, archives.absolute(val) if val else None, discovered.layout.levels
                )
                _write_index(out, scanned, kit, content, discovered.layout.bad)
            shutil.rmtree(journal, ignore_errors=True)
    return out


def _fits(out: Path, request: dict[str, list[Source]]) -> bool:
    """Whether `out` is the index of a request. Raises InputError if it has an index.json that is not of `fastdit prepare`."""
    if not (out / FILE).exists():
        return False
    try:
        content = read_content(out)
    except (OSError, ValueError) as error:
        raise InputError(f"{out / FILE} is not of an index ({error}): delete it, or use another --out") from error
    return content is not None and content.request == request and is_index(out)


def _begin(journal: Path, request: dict[str, list[Source]]) -> None:
    """Begin the journal of a request, or continue it; the journal of another request is deleted."""
    file = journal / "request.json"
    # without the times of folders, which change with files that are no images, too
    settings = {role: [asdict(replace(source, mtimes=[])) for source in sources] for role, sources in request.items()}
    if begin_or_match(file, settings):
        shutil.rmtree(journal)
        begin_or_match(file, settings)


def _parquet_names(request: dict[str, list[Source]]) -> dict[str, str]:
    """Return the class names of Parquet files by class, and say which of their columns are read. Raises InputError."""
    names, notes = parquet.describe([source.path for split in SPLITS for source in request[split] if source.kind == "parquet"])
    for note in notes:
        _say(note)
    return names


def _write_index(
    out: Path,
    scanned: dict[str, ScannedSplit],
    kit: imagenet.Devkit,
    content: Content,
    bad_links: list[tuple[str, str, str]],
) -> None:
    """Join the chunks of the splits to the files of an index, index.json last.

    content: with what is known before the scan; bad_links: folder, name and reason of files beside the sources.
    """
    labels: dict[str, list[list[str]]] = {}
    classes_of: dict[str, set[str]] = {}
    for split in scanned:  # train first
        _check_inner_folders(scanned[split])
        labels[split] = _labels(split, scanned[split], kit, classes_of.get("train", set()))
        classes_of[split] = {label for chunk_labels in labels[split] for label in chunk_labels} | scanned[split].container_labels
    sources = content.request["train"]
    if not any(labels["train"]):
        bad_files = [(name, reason) for _, chunk in scanned["train"].chunks for name, reason in chunk.bad]
        all_bad = f", only {len(bad_files):,} bad files, the first of which is {' ('.join(bad_files[0])})" if bad_files else ""
        raise InputError(f"there are no images in {', '.join(s.path for s in sources[:3])}{all_bad}: see `fastdit prepare --help`")
    classes = _class_ids(classes_of["train"])
    if unknown := sorted(classes_of.get("val", set()) - set(classes)):
        raise InputError(
            f"the validation images have a class {unknown[0]!r} that the training images do not have: give a --val of the same "
            "classes, or only the folder of the training images"
        )
    (out / FILE).unlink(missing_ok=True)  # from here to the end there is no index
    label_of = {name: i for i, name in enumerate(classes)}
    bad = [("", *link) for link in bad_links]
    others = Counter[str]()
    for split, (split_sources, chunks, _) in scanned.items():
        first_source = len(sources) if split == "val" else 0
        content.images[split] = _write_rows(out / f"{split}.npy", chunks, labels[split], label_of, first_source)
        bad += [(split, split_sources[source].path, name, reason) for source, chunk in chunks for name, reason in chunk.bad]
        for _, chunk in chunks:
            others.update(chunk.others or {})
    if others:
        _say(f"left out in the archives: {folders.counted(others)}; only {', '.join(sorted(IMAGE_SUFFIXES))} files are read")
    table = io.StringIO()
    rows = [[printable(text) for text in line] for line in bad]
    csv.writer(table, lineterminator="\n").writerows([("split", "source", "file", "reason"), *rows])
    write_atomically(out / "bad_files.csv", table.getvalue())
    names = None
    if set(classes) <= set(kit.names):
        names = [kit.names[c] for c in classes]
    elif imagenet.are_imagenet(classes):
        names = imagenet.imagenet_names()
    _note_gaps(classes)
    write_atomically(out / FILE, content._replace(bad_files=len(bad), classes=classes, class_names=names).to_json())
    for split, count in content.images.items():
        expected = imagenet.COUNTS[split]
        if imagenet.are_imagenet(classes) and count + sum(b[0] == split for b in bad) != expected:
            warn(f"ImageNet's {split} set has {expected:,} images, not {count:,}")


def describe(folder: Path) -> str:
    """Return some lines on the contents of an index, its table of classes among them."""
    content = read_content(folder)
    assert content is not None  # it was just made
    images = ", ".join(f"{count:,} {split} images" for split, count in content.images.items())
    bad = f"\n{content.bad_files} bad files were left out: {printable(str(folder / 'bad_files.csv'))}" if content.bad_files else ""
    flags = np.concatenate([np.load(folder / f"{split}.npy", mmap_mode="r")["flags"] for split in content.images])
    changed = pixels.describe_flags(flags, exif=not imagenet.are_imagenet(content.classes))
    changed = f"\n{changed}" if changed else ""
    labels = np.load(folder / "train.npy", mmap_mode="r")["label"]
    table = class_table(content.classes, content.class_names, np.bincount(labels, minlength=len(content.classes)).tolist())
    return f"index: {printable(str(folder))} ({images}, {len(content.classes):,} classes){changed}{bad}\n{table}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastdit prepare`."""
    parser.description = (
        "Make the index of a data set, in place: nothing is unpacked or copied. The same command resumes a run that was killed. "
        "Images that cannot be decoded are left out and listed in bad_files.csv."
    )
    parser.epilog = (
        "example:\n  fastdit prepare ILSVRC2012_img_train.tar --val ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz"
    )
    parser.add_argument(
        "sources", nargs="+", type=path_argument, metavar="SOURCE",
        help="Training images: ImageNet's train archive, a folder of class folders, tars of images, Parquet files, a folder of "
        "such tars or files, a folder that holds train/ and val/, or a folder of pictures of one class. The class of an image in a "
        "tar is its folder, or stands in a .cls or .json file beside it.",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=path_argument, metavar="INDEX", help="Folder of the index (default: SOURCE.index, beside SOURCE)."
    )
    parser.add_argument(
        "--val", type=path_argument, metavar="SOURCE",
        help="Validation images: ImageNet's archive (which needs --devkit), or as SOURCE (default: SOURCE's own val/).",
    )  # fmt: skip
    parser.add_argument(
        "--devkit", type=path_argument, metavar="TAR.GZ",
        help="ILSVRC2012_devkit_t12.tar.gz, for the classes of ImageNet's validation images and the names of all classes.",
    )  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="Compare the archives with ImageNet's published MD5 sums first.")


def run(arguments: argparse.Namespace) -> str:
    """Make the index, and return what it holds as text. Raises InputError."""
    return describe(prepare(arguments.sources, arguments.out, arguments.val, arguments.devkit, arguments.verify))
