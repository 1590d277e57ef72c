"""The index of a data set: where each image lies in its archive or folder, its size in pixels and its class. Nothing is unpacked.

An index is a folder that `fastdit prepare` makes:
    index.json          the request: sources as they were (path, size, mtime); class ids in the order of labels, their names, counts
    train.npy, val.npy  one record per image (see `record`), read by memory map
    bad_files.csv       files that were left out, and why
"""

import errno
import hashlib
import json
import os
import resource
import weakref
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fastdit.config import InputError
from fastdit.data.archives import Source
from fastdit.data.pixels import BadImage
from fastdit.files import replacing

FILE = "index.json"
FORMAT = 2
SPLITS = ("train", "val")

# Errors of one file. Any other, such as too many open files or a stale handle of a file server, may hit every file.
FAULTS_OF_A_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}


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
    flags of pixels.Header, label, and name, which is its path in the archive or folder in UTF-8."""
    return np.dtype([
        ("source", "<i4"), ("offset", "<i8"), ("bytes", "<i8"), ("crc", "<u4"), ("height", "<i4"), ("width", "<i4"),
        ("flags", "<u4"), ("label", "<i4"), ("name", f"S{max(1, name_length)}"),
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
        return np.load(path, mmap_mode="r")

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
            if error.errno in FAULTS_OF_A_FILE:
                raise BadImage(reason) from error
            fix = "raise the limit of `ulimit -n`" if error.errno in (errno.EMFILE, errno.ENFILE) else "repair that"
            raise InputError(
                f"{self.name(row)} cannot be read ({reason}), which is no fault of the image, so that none takes its place: {fix} "
                "and run the same command again"
            ) from error
        if len(data) < row["bytes"]:
            raise BadImage(f"{source.path} ends inside of {os.fsdecode(row['name'])}")
        return data

    def name(self, row: np.void) -> str:
        """Return an image's name for people: its archive or folder, and its path in there."""
        return f"{self.sources[row['source']].path}/{os.fsdecode(row['name'])}"


def _read(source: Source, row: np.void) -> bytes:
    """Return an image's bytes, fewer if its file has become shorter. Raises OSError."""
    if source.kind == "folder":
        return (Path(source.path) / os.fsdecode(row["name"])).read_bytes()
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
    """Whether `path` is a finished index."""
    return os.path.exists(path / FILE)


def requested_sources(request: dict) -> dict[str, list[Source]]:
    """Return the sources by role ("train", "val", "devkit") of the request that an index.json records."""
    return {role: [Source.from_json(values) for values in sources] for role, sources in request.items()}


def open_index(folder: Path) -> Index:
    """Open the index in `folder`. Raises InputError if it is none, or if an archive or folder has changed since it was made."""
    try:
        content = json.loads((folder / FILE).read_text())
        requested = requested_sources(content["request"])
        sources = [source for split in SPLITS for source in requested[split]]
        classes, names, version = content["classes"], content["class_names"], content["format"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is not an index: make one with `fastdit prepare SOURCE --out {folder}`") from error
    if version != FORMAT:
        raise InputError(f"index {folder} has format {version}, this fastdit reads {FORMAT}: run `fastdit prepare` again")
    for source in sources:
        try:
            now = Source.of(Path(source.path))
        except OSError as error:
            raise InputError(
                f"index {folder} needs {source.path}, which cannot be read ({error.strerror}): put it back, or run "
                "`fastdit prepare` again with its new path"
            ) from error
        if (now.size, now.mtime_ns) != (source.size, source.mtime_ns):
            raise InputError(
                f"index {folder} is older than {source.path}, whose size or modification time has changed: run `fastdit prepare` "
                "again"
            )
    return Index(folder, sources, classes, names)
