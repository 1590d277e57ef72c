"""The index of a data set: where each image lies in its archive or folder, its size in pixels and its class. Nothing is unpacked.

An index is a folder that `fastdit prepare` makes:
    index.json          the request: sources as they were (path, size, mtime); class ids in the order of labels, their names, counts
    train.npy, val.npy  one RECORD an image, read by memory map
    bad_files.csv       what was left out, and why
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastdit.config import InputError
from fastdit.files import replacing

FILE = "index.json"
FORMAT = 1


def record(name_length: int) -> np.dtype:
    """An image: its place (source, byte offset, bytes), pixels, label and name (path in the archive or folder, UTF-8)."""
    return np.dtype([
        ("source", "<i4"), ("offset", "<i8"), ("bytes", "<i8"), ("height", "<i4"), ("width", "<i4"), ("label", "<i4"),
        ("name", f"S{max(1, name_length)}"),
    ])  # fmt: skip


@dataclass(frozen=True)
class Source:
    """An archive, or a folder of images of one class, as it was when the index was made."""

    path: str
    size: int  # bytes; of a folder 0
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "Source":
        found = path.stat()
        return cls(str(path.resolve()), 0 if path.is_dir() else found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class Index:
    """An index that was opened and fits its sources."""

    folder: Path
    sources: list[Source]
    classes: list[str]  # of label 0, 1, …: wnids, folder names
    class_names: list[str] | None  # for people, where they are known
    _files: dict[int, int] = field(default_factory=dict, repr=False)  # descriptors of the archives

    def rows(self, split: str) -> np.ndarray:
        """RECORD [n] of a split ("train" | "val"), memory-mapped. Raises InputError when the index has no such split."""
        path = self.folder / f"{split}.npy"
        if not path.exists():
            raise InputError(f"index {self.folder} has no images for {split!r}: run `fastdit prepare` with --val")
        return np.load(path, mmap_mode="r")

    def read(self, row: np.void) -> bytes:
        """The encoded bytes of an image. Raises OSError where the file is gone or shorter than it was."""
        source, offset, size = int(row["source"]), int(row["offset"]), int(row["bytes"])
        if self.sources[source].size == 0:
            return (Path(self.sources[source].path) / os.fsdecode(row["name"])).read_bytes()
        if source not in self._files:
            self._files[source] = os.open(self.sources[source].path, os.O_RDONLY)
        data = os.pread(self._files[source], size, offset)
        if len(data) < size:
            raise OSError(f"{self.sources[source].path} ends inside of {os.fsdecode(row['name'])}")
        return data

    def name(self, row: np.void) -> str:
        """An image's name for people: its archive or folder, and its path in there."""
        return f"{self.sources[row['source']].path}/{os.fsdecode(row['name'])}"


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file whole or not at all. np.save takes no notice of a full disk: it writes through C's stdio."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def is_index(path: Path) -> bool:
    return os.path.exists(path / FILE)


def open_index(folder: Path) -> Index:
    """The index in `folder`. Raises InputError when it is none, or when an archive or folder has changed since it was made."""
    try:
        found = json.loads((folder / FILE).read_text())
        sources = [Source(**source) for split in ("train", "val") for source in found["request"][split]]
        classes, names, version = found["classes"], found["class_names"], found["format"]
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
                "`fastdit prepare` again where it lies now"
            ) from error
        if (now.size, now.mtime_ns) != (source.size, source.mtime_ns):
            raise InputError(
                f"index {folder} is older than {source.path}, whose size or time of change is another now: run `fastdit prepare` "
                "again"
            )
    return Index(folder, sources, classes, names)
