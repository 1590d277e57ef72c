"""`fastdit prepare`: archives and folders of images -> an index, in place.

A source is ImageNet's train archive (a tar of one tar a class), a folder of class folders, or tars of images whose class stands in
a .cls or .json file beside the image (webdataset) or is the folder they lie in. It is cut into units (an inner tar, a class folder,
a tar), and each unit into parts of PART images; a part that was scanned is written to <index>/.parts at once, so that a run that
was killed goes on from there.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fastdit.config import InputError
from fastdit.data import imagenet
from fastdit.data.archives import Found, Part, find_sources, find_units, scan_folder, scan_tar
from fastdit.data.index import FILE, FORMAT, Source, is_index, record, save_array
from fastdit.files import write_atomically
from fastdit.progress import progress_bar


def _scan_all(split: str, sources: list[Source], journal: Path) -> tuple[list[tuple[int, Part]], set[str]]:
    """Every part of a split's units with its source, from the journal or scanned and added to it; the units' classes, those without
    images too."""
    units = list(find_units(sources))
    parts, total = [], sum(unit.weight for unit in units)
    unit_of_bar = {"unit": "B", "unit_scale": True} if total != len(units) else {"unit": "class"}
    with progress_bar(total, description=f"scan {split}", **unit_of_bar) as bar:
        for number, unit in enumerate(units):
            path, before = sources[unit.source].path, bar.n
            start: int | None = unit.start
            while start is not None:
                file = journal / f"{split}-{number:06d}-{start}.json"
                if file.exists():
                    images, bad, following = json.loads(file.read_text())
                    part = Part([Found(*image) for image in images], bad, following)
                else:
                    part = (scan_folder if os.path.isdir(path) else scan_tar)(path, unit, start)
                    write_atomically(file, json.dumps(part))
                parts.append((unit.source, part))
                start = part.next
                bar.update(before + min(unit.weight, unit.weight if start is None else start - unit.start) - bar.n)
    return parts, {unit.label for unit in units if unit.label is not None}


def _labels(split: str, parts: list[tuple[int, Part]], sources: list[Source], devkit: imagenet.Devkit | None) -> list[list[str]]:
    """The class of every image of every part. Raises InputError where one has none."""
    labels = []
    for source, part in parts:
        of_part = []
        for image in part.images:
            number = re.search(r"ILSVRC2012_val_(\d{8})\.", image.name)
            label = image.label
            if split == "val" and number and devkit and int(number[1]) <= len(devkit.val):
                label = devkit.val[int(number[1]) - 1]
            if label is None:
                fix = (
                    "give --devkit ILSVRC2012_devkit_t12.tar.gz"
                    if number
                    else "put it into a class folder, or a .cls file beside it"
                )
                raise InputError(f"{sources[source].path}: image {image.name} has no class: {fix}")
            of_part.append(label)
        labels.append(of_part)
    return labels


def _class_ids(named: set[str]) -> list[str]:
    """Class ids in the order of their labels: whole numbers are the labels themselves, anything else is sorted."""
    if all(label.isdecimal() for label in named) and not any(len(label) > 1 and label[0] == "0" for label in named):
        return [str(i) for i in range(max(map(int, named)) + 1)]
    return sorted(named)


def _write_rows(path: Path, parts: list[tuple[int, Part]], labels: list[list[str]], label_of: dict[str, int], first: int) -> int:
    """Write a split's RECORDs, sources numbered from `first` on; how many."""
    names = [[os.fsencode(image.name) for image in part.images] for _, part in parts]
    rows = np.zeros(sum(map(len, names)), record(max((len(n) for of_part in names for n in of_part), default=0)))
    at = 0
    for (source, part), of_part, part_names in zip(parts, labels, names, strict=True):
        for image, label, name in zip(part.images, of_part, part_names, strict=True):
            rows[at] = (first + source, image.offset, image.bytes, image.height, image.width, label_of[label], name)
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
    """Where the index of a source lies unless --out says otherwise: beside it."""
    return source.resolve().with_name(f"{source.resolve().name}.index")


@contextmanager
def mending(out: Path) -> Iterator[None]:
    """Turn an OSError, such as a full disk, into an InputError that says what is kept."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename or out}: {error.strerror or error}"
        raise InputError(
            f"{what}; what was done so far is kept: the same command goes on once that is mended, or use another --out"
        ) from error


def prepare(
    sources: list[Path], out: Path | None = None, val: Path | None = None, devkit: Path | None = None, verify: bool = False
) -> Path:
    """Make, or finish, the index of some sources; returns its folder. Does nothing when it is there and fits them.

    val: archive or folder of the validation images; devkit: ImageNet's, for the classes of its validation archive and the names of
    all; verify: compare the MD5 sums of ImageNet's archives first. Raises InputError.
    """
    out = out or default_index(sources[0])
    train_sources, val_sources = find_sources(sources), find_sources([val]) if val else []
    request = {"train": [asdict(s) for s in train_sources], "val": [asdict(s) for s in val_sources]}
    request["devkit"] = [asdict(s) for s in find_sources([devkit])] if devkit else []
    if verify:
        check_md5({role: p for role, p in (("train", sources[0]), ("val", val), ("devkit", devkit)) if p})
    with mending(out):
        out.mkdir(parents=True, exist_ok=True)
        journal = out / ".parts"
        if is_index(out) and json.loads((out / FILE).read_text())["request"] == request:
            shutil.rmtree(journal, ignore_errors=True)
            return out
        begun = journal / "request.json"
        if not begun.exists() or json.loads(begun.read_text()) != request:
            shutil.rmtree(journal, ignore_errors=True)
            journal.mkdir()
            write_atomically(begun, json.dumps(request))
        kit = imagenet.read_devkit(devkit) if devkit else None
        scanned = {"train": _scan_all("train", train_sources, journal)}
        if val:
            scanned["val"] = _scan_all("val", val_sources, journal)
        _write_index(out, scanned, {"train": train_sources, "val": val_sources}, kit, request)
        shutil.rmtree(journal)
    return out


def _write_index(
    out: Path, scanned: dict[str, tuple], sources: dict[str, list[Source]], devkit: imagenet.Devkit | None, request: dict
) -> None:
    """Join the parts of the splits to the files of an index, index.json last."""
    labels = {split: _labels(split, parts, sources[split], devkit) for split, (parts, _) in scanned.items()}
    of_split = {split: {label for part in labels[split] for label in part} | scanned[split][1] for split in scanned}
    if not any(labels["train"]):
        raise InputError(f"there are no images in {', '.join(s.path for s in sources['train'][:3])}: see `fastdit prepare --help`")
    classes = _class_ids(of_split["train"])
    if unknown := sorted(of_split.get("val", set()) - set(classes)):
        raise InputError(f"the validation images have a class {unknown[0]!r} that the training images do not have")
    (out / FILE).unlink(missing_ok=True)  # from here to the end there is no index
    label_of = {name: i for i, name in enumerate(classes)}
    counts, bad = {}, []
    for split, (parts, _) in scanned.items():
        counts[split] = _write_rows(out / f"{split}.npy", parts, labels[split], label_of, len(sources["train"]) * (split == "val"))
        bad += [(split, sources[split][source].path, name, reason) for source, part in parts for name, reason in part.bad]
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("split", "source", "file", "reason"), *bad])
    write_atomically(out / "bad_files.csv", table.getvalue())
    names = None
    if devkit and set(classes) <= set(devkit.names):
        names = [devkit.names[c] for c in classes]
    elif imagenet.are_imagenet(classes):
        names = imagenet.imagenet_names()
    found = {
        "format": FORMAT, "images": counts, "bad_files": len(bad), "classes": classes, "class_names": names, "request": request,
    }  # fmt: skip
    write_atomically(out / FILE, json.dumps(found, indent=1))
    for split, count in counts.items():
        if imagenet.are_imagenet(classes) and count + sum(b[0] == split for b in bad) != imagenet.COUNTS[split]:
            print(f"fastdit: warning: ImageNet's {split} set has {imagenet.COUNTS[split]:,} images, not {count:,}", file=sys.stderr)


def describe(folder: Path) -> str:
    """What an index holds, in one line or two."""
    found = json.loads((folder / FILE).read_text())
    images = ", ".join(f"{count:,} {split} images" for split, count in found["images"].items())
    bad = f"\n{found['bad_files']} bad files were left out: {folder / 'bad_files.csv'}" if found["bad_files"] else ""
    return f"index: {folder} ({images}, {len(found['classes']):,} classes){bad}"


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
        "sources", nargs="+", type=Path, metavar="SOURCE",
        help="Training images: ImageNet's train archive, a folder of class folders, tars of images, or a folder of such tars. The "
        "class of an image in a tar is its folder, or stands in a .cls or .json file beside it.",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="INDEX", help="Folder of the index (default: SOURCE.index, beside SOURCE).")
    parser.add_argument(
        "--val", type=Path, metavar="SOURCE", help="Validation images: ImageNet's archive (which needs --devkit), or as SOURCE."
    )
    parser.add_argument(
        "--devkit", type=Path, metavar="TAR.GZ",
        help="ILSVRC2012_devkit_t12.tar.gz, for the classes of ImageNet's validation images and the names of all classes.",
    )  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="Compare the archives with ImageNet's published MD5 sums first.")


def run(arguments: argparse.Namespace) -> str:
    """Make the index, and return what it holds as text. Raises InputError."""
    return describe(prepare(arguments.sources, arguments.out, arguments.val, arguments.devkit, arguments.verify))
