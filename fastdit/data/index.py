"""The index of a data set: where each image lies in its archive or folder, its size in pixels and its class. Nothing is unpacked.

An index is a folder that `fastdit prepare` makes:
    index.json          sources as they were (see `Content`); class ids in the order of labels, their names, counts
    train.npy, val.npy  one record per image (see `record`), read by memory map
    bad_files.csv       files that were left out, and why
"""

import errno
import hashlib
import json
import os
import resource
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastdit.config import InputError
from fastdit.data import discovery, folders, imagenet, parquet
from fastdit.data.archives import Source
from fastdit.data.pixels import BadImage
from fastdit.files import json_object, replacing

FILE = "index.json"
FORMAT = 2
SPLITS = ("train", "val")

SAMPLE = 10_000  # files of folders that are looked at whenever an index is opened


def _descriptor_limit() -> int:
    """Return how many archives this process keeps open: a quarter of its limit, as DALI, NCCL and the log need files too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 16 if soft == resource.RLIM_INFINITY else max(1, soft // 4)


class Descriptor:
    """A file that is open until nobody holds this object: not before the last thread that still reads from it lets it go."""

    def __init__(self, source: Source) -> None:
        """Raises OSError if the file cannot be opened."""
        self.number = os.open(source.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number)


_descriptor = lru_cache(_descriptor_limit())(Descriptor)


def record(name_length: int) -> np.dtype:
    """Return the dtype of an image's record: source (a number), byte offset and length in it, CRC-32 of the bytes, stored pixels,
    flags of pixels.Header, label, modification time of its file (0 in an archive), and name: its path in the archive or folder."""
    return np.dtype([
        ("source", "<i4"), ("offset", "<i8"), ("bytes", "<i8"), ("crc", "<u4"), ("height", "<i4"), ("width", "<i4"),
        ("flags", "<u4"), ("label", "<i4"), ("mtime_ns", "<i8"), ("name", f"S{max(1, name_length)}"),
    ])  # fmt: skip


@dataclass(frozen=True)
class Index:
    """An open index, which fits its sources."""

    folder: Path
    sources: list[Source]
    classes: list[str]  # of labels 0, 1, …: wnids, folder names
    class_names: list[str] | None  # for people, None if unknown

    def rows(self, split: str) -> np.ndarray:
        """Return the records [n] of a split ("train" | "val"), memory-mapped. Raises InputError if the index has no such split."""
        path = self.folder / f"{split}.npy"
        if not path.exists():
            raise InputError(f"index {self.folder} has no images for {split!r}: run `fastdit prepare` with --val")
        try:
            rows = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path} is damaged ({error}): run `fastdit prepare` again") from error
        if rows.dtype.names != record(1).names:
            raise InputError(f"{path} is not the file of an index: run `fastdit prepare` again")
        return rows

    def digest(self, split: str) -> str:
        """Return the `digest` of a split. Raises InputError if the index has no such split."""
        return digest(self.rows(split), self.classes)

    def read(self, row: np.void) -> bytes:
        """Return the encoded bytes of an image; threads may call it at once.

        Raises BadImage if its file is gone, cannot be opened or is shorter than it was, and InputError if reading fails for another
        reason, such as too many open files: then the image is not at fault.
        """
        source = self.sources[row["source"]]
        try:
            data = _read(source, row)
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno in folders.FAULTS_OF_A_FILE:
                raise BadImage(reason) from error
            fix = "raise the limit of `ulimit -n`" if error.errno in (errno.EMFILE, errno.ENFILE) else "repair that"
            raise InputError(
                f"{self.name(row)} cannot be read ({reason}), which is no fault of the image, so that none takes its place: {fix} "
                "and run the same command again"
            ) from error
        if len(data) < row["bytes"] and source.kind != "folder":
            raise BadImage(f"{source.path} ends inside of {os.fsdecode(row['name'])}")
        if len(data) != row["bytes"]:  # the crop was chosen for the picture that was there before
            raise BadImage("the file has changed since the index was made: run `fastdit prepare` again")
        return data

    def name(self, row: np.void) -> str:
        """Return an image's name for people: its archive or folder, and its path in there."""
        return f"{self.sources[row['source']].path}/{os.fsdecode(row['name'])}"


def _read(source: Source, row: np.void) -> bytes:
    """Return an image's bytes, fewer if its file has become shorter. Raises OSError."""
    if source.kind == "folder":
        return (Path(source.path) / os.fsdecode(row["name"])).read_bytes()
    if source.kind == "parquet":
        return parquet.read(source.path, source.mtime_ns, int(row["offset"]))
    archive = _descriptor(source)  # held while it is read: the cache may drop it meanwhile
    return os.pread(archive.number, int(row["bytes"]), int(row["offset"]))


def digest(rows: np.ndarray, classes: list[str]) -> str:
    """Return the SHA-256 of a split, wherever it lies: of the order, CRC-32, sizes and labels of its images, and the classes."""
    hashed = hashlib.sha256(json.dumps(classes).encode())
    for key in ("bytes", "crc", "height", "width", "label"):
        hashed.update(np.ascontiguousarray(rows[key]).data)
    return hashed.hexdigest()


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file whole or not at all. np.save does not notice a full disk: it writes through C's stdio."""
    array = np.ascontiguousarray(array)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.reshape(-1).view(np.uint8).data)


def is_index(path: Path) -> bool:
    """Whether `path` is a finished index. A folder of pictures may have an index.json of its own."""
    return os.path.exists(path / FILE) and os.path.exists(path / "train.npy")


class Content(NamedTuple):
    """What an index.json records."""

    images: dict[str, int]  # by split
    bad_files: int
    classes: list[str]  # of labels 0, 1, …
    class_names: list[str] | None
    request: dict[str, list]  # Sources by role: "train", "val", "devkit"
    paths: list[str]  # that were given: absolute
    val: str | None
    levels: list[tuple[str, int]]  # of discovery.Layout

    def to_json(self) -> str:
        """Return the text of the file."""
        request = {role: [asdict(source) for source in sources] for role, sources in self.request.items()}
        return json.dumps({"format": FORMAT, **self._asdict(), "request": request}, indent=1)


def read_content(folder: Path) -> Content | None:
    """Read an index.json, None if it has another format. Raises OSError, and ValueError if it is something else."""
    try:
        values = json_object((folder / FILE).read_bytes())
        version = values.pop("format")
        if isinstance(version, int) and version != FORMAT and "request" in values:
            return None
        content = Content(**values)
        request = {role: [Source(**source) for source in content.request[role]] for role in (*SPLITS, "devkit")}
        levels = [(str(path), int(mtime_ns)) for path, mtime_ns in content.levels]
        return content._replace(request=request, levels=levels, classes=list(content.classes), images=dict(content.images))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error


def _stale(folder: Path, path: str, change: str) -> InputError:
    return InputError(f"index {folder} is older than {path}, {change}: run `fastdit prepare` again")


def open_index(folder: Path) -> Index:
    """Open the index in `folder`. Raises InputError if it is none, or if what it was made of has changed.

    Archives are known by their size and modification time, folders by the modification times of all folders in them, and of the
    files in them SAMPLE are looked at, evenly spread: all of a small data set, while a million of them would take minutes on a file
    server, for every rank. `fastdit prepare` looks at all. Index.read refuses a file of another length.
    """
    try:
        content = read_content(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not an index: make one with `fastdit prepare SOURCE --out {folder}`") from error
    if content is None:
        raise InputError(f"index {folder} is not of format {FORMAT}, which this fastdit reads: run `fastdit prepare` again")
    sources = [source for split in SPLITS for source in content.request[split]]
    index = Index(folder, sources, content.classes, content.class_names)
    try:
        for source in sources:
            _check_source(folder, source)
    except OSError as error:
        raise InputError(
            f"index {folder} needs {error.filename}, which cannot be read ({error.strerror}): put it back, or run "
            "`fastdit prepare` again with its new path"
        ) from error
    _check_layout(folder, content)
    if any(source.kind == "folder" for source in sources):
        for split in content.images:
            _check_files(index, index.rows(split))
    return index


def _check_source(folder: Path, source: Source) -> None:
    """Raise InputError if an archive or a folder has changed. Raises OSError if it is gone."""
    if source.kind != "folder":
        now = os.stat(source.path)
        if (now.st_size, now.st_mtime_ns) != (source.size, source.mtime_ns):
            raise _stale(folder, source.path, "whose size or modification time has changed")
        return
    path_of = lambda inside: os.path.join(source.path, inside) if inside else source.path
    mtimes = (os.stat(path_of(inside)).st_mtime_ns == mtime_ns for inside, mtime_ns in source.mtimes)
    # a folder's time also changes with files that are no images
    if not all(mtimes) and folders.walk(source.path).digest != source.digest:
        raise _stale(folder, source.path, "in which images were added, removed or replaced")


def _check_layout(folder: Path, content: Content) -> None:
    """Raise InputError if a class folder or an archive has come to the folders that were given, or has gone."""
    if all(os.path.exists(path) and os.stat(path).st_mtime_ns == mtime_ns for path, mtime_ns in content.levels):
        return
    val = Path(content.val) if content.val else None
    lists = [Path(source.path) for source in content.request["devkit"]]
    layout = discovery.lay_out([Path(path) for path in content.paths], val, imagenet.label_val(lists))
    for split in SPLITS:
        before, now = {s.path for s in content.request[split]}, {item.path for item in layout.splits[split]}
        for path in sorted(now - before):
            raise _stale(folder, path, "which is new")
        for path in sorted(before - now):
            raise _stale(folder, path, "which is no longer part of the data")


def _check_files(index: Index, rows: np.ndarray) -> None:
    """Raise InputError if one of SAMPLE files of class folders has changed."""
    sample = rows[np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE), dtype=np.int64)]
    roots = [source.path if source.kind == "folder" else None for source in index.sources]
    files = list(zip(*(sample[key].tolist() for key in ("source", "name", "bytes", "mtime_ns")), strict=True))

    def first_changed(part: list[tuple[int, bytes, int, int]]) -> str | None:
        for source, name, size, mtime_ns in part:
            if root := roots[source]:
                path = f"{root}/{os.fsdecode(name)}"
                try:
                    now = os.stat(path)
                except OSError:
                    return path
                if (now.st_size, now.st_mtime_ns) != (size, mtime_ns):
                    return path
        return None

    with ThreadPoolExecutor(discovery.THREADS) as pool:
        for path in pool.map(first_changed, (files[i :: discovery.THREADS] for i in range(discovery.THREADS))):
            if path:
                raise _stale(index.folder, path, "which has changed")
