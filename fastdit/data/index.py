"""The index of a data set: where each image lies in its archive or folder, its size in pixels and its class. Nothing is unpacked.

An index is a folder that `fastdit prepare` makes:
    index.json          the request: sources as they were (path, size, mtime); class ids in the order of labels, their names, counts
    train.npy, val.npy  one record per image (see `record`), read by memory map
    bad_files.csv       files that were left out, and why
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastdit.config import InputError
from fastdit.data.archives import Source
from fastdit.files import replacing

FILE = "index.json"
FORMAT = 2
SPLITS = ("train", "val")


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
    _descriptors: dict[int, int] = field(default_factory=dict, repr=False)  # of the archives, opened when first read

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
        """Return the encoded bytes of an image. Raises OSError if the file is gone or shorter than it was."""
        number, offset, size = int(row["source"]), int(row["offset"]), int(row["bytes"])
        source = self.sources[number]
        if source.kind == "folder":
            return (Path(source.path) / os.fsdecode(row["name"])).read_bytes()
        if number not in self._descriptors:
            self._descriptors[number] = os.open(source.path, os.O_RDONLY)
        data = os.pread(self._descriptors[number], size, offset)
        if len(data) < size:
            raise OSError(f"{source.path} ends inside of {os.fsdecode(row['name'])}")
        return data

    def name(self, row: np.void) -> str:
        """Return an image's name for people: its archive or folder, and its path in there."""
        return f"{self.sources[row['source']].path}/{os.fsdecode(row['name'])}"


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
