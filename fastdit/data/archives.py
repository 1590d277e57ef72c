"""Images in archives and class folders: their names, byte offsets, sizes in pixels and classes.

A source is an archive or a class folder, of one of the kinds in KINDS. It holds containers: the inner tars of a tar of tars, or
else the source itself. A container is scanned in chunks of CHUNK images. An archive format that stores images uncompressed is one
more entry in KINDS.
"""

import io
import json
import mmap
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fastdit.config import InputError
from fastdit.data import parquet, pixels
from fastdit.data.pixels import IMAGE_SUFFIXES, BadImage

CHUNK = 4096  # images
LABEL_KEYS = ("label", "cls", "class", "class_id")  # of a .json beside an image


@dataclass(frozen=True)
class Source:
    """An archive, or a folder of images of one class, as it was when the index was made."""

    path: str
    size: int  # bytes, 0 of a folder
    mtime_ns: int
    kind: str  # key of KINDS

    @classmethod
    def of(cls, path: Path) -> "Source":
        """Describe the source at `path` as it is now, a file of unknown suffix as a tar. Raises OSError if it cannot be read."""
        status = path.stat()
        if path.is_dir():
            return cls(str(path.resolve()), 0, status.st_mtime_ns, "folder")
        kind = next((name for name, kind in KINDS.items() if kind.suffix == path.suffix), "tar")
        return cls(str(path.resolve()), status.st_size, status.st_mtime_ns, kind)

    @classmethod
    def from_json(cls, values: dict) -> "Source":
        """Read a source of an index.json. Indexes made before kinds were recorded hold folders, of size 0, and tars."""
        return cls(**{"kind": "tar" if values["size"] else "folder", **values})


class ImageEntry(NamedTuple):
    """An image of a container."""

    name: str  # its path in the archive or folder
    offset: int  # of its bytes in the source, 0 in a folder
    bytes: int
    crc: int  # CRC-32 of its bytes
    height: int  # pixels, as stored
    width: int
    flags: int  # of pixels.Header
    label: str | None  # class


def entry(name: str, offset: int, data: bytes, label: str | None) -> ImageEntry:
    """Return the entry of an encoded image, whose bytes begin at `offset` of its source. Raises BadImage."""
    return ImageEntry(name, offset, len(data), zlib.crc32(data), *pixels.inspect(data), label)


@dataclass(frozen=True)
class Container:
    """A tar, or a class folder, that is scanned on its own."""

    source: int  # number of the source
    start: int  # where its first chunk begins: a byte of the source, or 0, the first image of a folder
    progress: int  # its share of the progress bar: bytes, or 1 for a folder
    label: str | None  # class of all its images


class Chunk(NamedTuple):
    """A scanned part of a container."""

    images: list[ImageEntry]
    bad: list[tuple[str, str]]  # name and reason
    next_start: int | None  # where the next chunk begins, None after the last


class Kind(NamedTuple):
    """How sources of one kind are read."""

    suffix: str | None  # of archives, None for folders
    containers: Callable[[int, Source], Iterator[Container]]  # (number of the source, source)
    scan: Callable[[str, Container, int], Chunk]  # (path of the source, container, start)


def _label_beside(member: tarfile.TarInfo, data: bytes) -> str | None:
    """Return the class in a .cls (text) or .json file beside an image, None if the .json names none. Raises ValueError."""
    if member.name.endswith(".cls"):
        return data.decode().strip()
    values = json.loads(data)
    return next((str(values[key]) for key in LABEL_KEYS if isinstance(values, dict) and key in values), None)


def _grouped_members(tar: tarfile.TarFile, path: str) -> Iterator[list[tarfile.TarInfo]]:
    """Yield groups of successive files whose names are equal up to the first dot: an image and the files beside it.

    Raises InputError if the tar is damaged or truncated.
    """
    group: list[tarfile.TarInfo] = []
    key = last = None
    while True:
        try:
            member = tar.next()  # checks the header's checksum
        except tarfile.ReadError as error:
            raise InputError(f"archive {path} is cut off or damaged after {last}: {error}; fetch it again") from error
        tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]: tarfile would keep them all
        if member is None:
            break
        last = member.name
        if not member.isreg():
            continue
        folder, _, base = member.name.rpartition("/")
        if group and (folder, base.split(".")[0]) != key:
            yield group
            group = []
        key = (folder, base.split(".")[0])
        group.append(member)
    if group:
        yield group
    # tarfile takes a damaged header, and the end of the file, for the end of the archive; the real end is a block of zeros
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        where = f"after {last}" if last else "at its start"
        raise InputError(f"archive {path} is cut off or damaged {where}, at byte {tar.offset}: fetch it again")


def _open_tar(path: str, file: io.BufferedReader, start: int = 0) -> tarfile.TarFile:
    """Open the tar that begins at byte `start` of a file. Raises InputError if there is none."""
    file.seek(start)
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except tarfile.ReadError as error:
        raise InputError(f"{path} is not a tar archive, or a compressed one: give an uncompressed .tar") from error


def _content(data: mmap.mmap, member: tarfile.TarInfo) -> bytes:
    """Return a copy of a member's bytes."""
    return data[member.offset_data : member.offset_data + member.size]


def _tar_containers(number: int, source: Source) -> Iterator[Container]:
    """Yield the inner tars of a tar of tars, each named by its class, or else the tar itself. Raises InputError."""
    with open(source.path, "rb") as file:
        first = next(iter(_open_tar(source.path, file)), None)
        if first is None or not first.name.endswith(".tar"):
            yield Container(number, 0, source.size, None)
            return
        for group in _grouped_members(_open_tar(source.path, file), source.path):
            for member in group:
                if member.name.endswith(".tar"):
                    yield Container(number, member.offset_data, member.size, PurePosixPath(member.name).stem)


def _scan_tar(path: str, container: Container, start: int) -> Chunk:
    """Scan a tar from byte `start`, the header of a member. Raises InputError if it is damaged."""
    images, bad = [], []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        for group in _grouped_members(_open_tar(path, file, start), path):
            if len(images) + len(bad) >= CHUNK:
                return Chunk(images, bad, group[0].offset)
            label = container.label
            try:
                for beside in group:
                    if label is None and beside.name.endswith((".cls", ".json")):
                        label = _label_beside(beside, _content(data, beside))
            except ValueError:  # neither UTF-8 nor JSON
                bad.append((beside.name, "the label beside the image cannot be read"))
                continue
            for member in group:
                name = PurePosixPath(member.name)
                if name.suffix.lower() in IMAGE_SUFFIXES:
                    label_or_folder = label or name.parent.name or None
                    try:
                        images.append(entry(member.name, member.offset_data, _content(data, member), label_or_folder))
                    except BadImage as error:
                        bad.append((member.name, str(error)))
    return Chunk(images, bad, None)


def _folder_containers(number: int, source: Source) -> Iterator[Container]:
    """Yield the class folder itself."""
    yield Container(number, 0, 1, os.path.basename(source.path))


def _scan_folder(path: str, container: Container, start: int) -> Chunk:
    """Scan a folder from its `start`th image, in the order of their names."""
    files = sorted(
        os.path.relpath(os.path.join(folder, file), path)
        for folder, _, names in os.walk(path)
        for file in names
        if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES
    )
    images, bad = [], []
    for file in files[start : start + CHUNK]:
        try:
            images.append(entry(file, 0, Path(path, file).read_bytes(), container.label))
        except BadImage as error:
            bad.append((file, str(error)))
    return Chunk(images, bad, start + CHUNK if start + CHUNK < len(files) else None)


def _parquet_containers(number: int, source: Source) -> Iterator[Container]:
    """Yield the Parquet file itself."""
    yield Container(number, 0, source.size, None)


def _scan_parquet(path: str, container: Container, start: int) -> Chunk:
    """Scan whole row groups of a Parquet file from row `start`. An image's offset is its row. Raises InputError."""
    end = parquet.next_start(path, start, CHUNK)
    images, bad = [], []
    for row, data, label in parquet.scan(path, start, end):
        name = f"row {row}"
        if data is None:
            bad.append((name, "there are no bytes in it"))
        elif label is None or label == "" or (isinstance(label, int) and label < 0):
            bad.append((name, f"its label is {label!r}, which names no class"))
        else:
            try:
                images.append(entry(name, row, data, str(label)))
            except BadImage as error:
                bad.append((name, str(error)))
    return Chunk(images, bad, end)


KINDS = {
    "folder": Kind(None, _folder_containers, _scan_folder),
    "tar": Kind(".tar", _tar_containers, _scan_tar),
    "parquet": Kind(".parquet", _parquet_containers, _scan_parquet),
}


def find_sources(paths: list[Path]) -> list[Source]:
    """Return the sources at some paths: archives, and of a folder its class folders or else its archives. Raises InputError."""
    sources: list[Path] = []
    for path in paths:
        try:
            if not path.is_dir():
                sources.append(path)
                continue
            entries = sorted(path.iterdir())
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        suffixes = [kind.suffix for kind in KINDS.values() if kind.suffix]
        inside = [entry for entry in entries if entry.is_dir()] or [entry for entry in entries if entry.suffix in suffixes]
        if not inside:
            raise InputError(
                f"{path} holds neither class folders nor {', '.join(suffixes)} archives: give the folder above the images' folders"
            )
        sources += inside
    try:
        return [Source.of(path) for path in sources]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error


def find_containers(sources: list[Source]) -> Iterator[Container]:
    """Yield the containers of all sources. Raises InputError if one cannot be opened."""
    for number, source in enumerate(sources):
        yield from KINDS[source.kind].containers(number, source)


def scan(source: Source, container: Container, start: int) -> Chunk:
    """Scan the chunk of a container that begins at `start`. Raises InputError if the archive is damaged."""
    return KINDS[source.kind].scan(source.path, container, start)
