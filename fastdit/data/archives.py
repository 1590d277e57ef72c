"""Images in archives and class folders: their names, byte offsets, sizes in pixels and classes.

A source is an archive or a class folder, of one of the kinds in KINDS. It holds containers: the inner tars of a tar of tars, or
else the source itself. A container is scanned in chunks of CHUNK images. An archive format that stores images uncompressed is one
more entry in KINDS.
"""

import io
import json
import mmap
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fastdit.config import InputError
from fastdit.data import folders, parquet, pixels
from fastdit.data.pixels import IMAGE_SUFFIXES, BadImage, is_hidden

CHUNK = 4096  # images
HIDDEN = "images in hidden folders"
LINKS = "links to images"
LABEL_KEYS = ("label", "cls", "class", "class_id")  # of a .json beside an image


@dataclass(frozen=True)
class Source:
    """An archive, or a folder of images of one class, as it was when the index was made. Names hold any bytes, as surrogates."""

    path: str  # absolute; a link keeps its name
    size: int  # bytes, or images of a folder
    mtime_ns: int  # 0 of a folder
    kind: str  # key of KINDS
    label: str | None = None  # class of all images of a folder
    digest: str = ""  # of a folder's images: folders.Listing.digest
    mtimes: list[tuple[str, int]] = field(default_factory=list, compare=False)  # of a folder and the folders in it, ns

    @classmethod
    def of(cls, path: Path) -> "Source":
        """Describe the archive at `path` as it is now, one of unknown suffix as a tar. Raises OSError if it cannot be read."""
        status = path.stat()
        kind = next((name for name, kind in KINDS.items() if kind.suffix == path.suffix.lower()), "tar")
        return cls(absolute(path), status.st_size, status.st_mtime_ns, kind)

    @classmethod
    def of_folder(cls, path: str, label: str | None, listing: folders.Listing) -> "Source":
        """Describe a folder by what folders.walk found there."""
        return cls(path, len(listing.images), 0, "folder", label, listing.digest, listing.folders)


def absolute(path: Path) -> str:
    """Return an absolute path without links, but for the last part: a link names its data."""
    return str(path.parent.resolve() / path.name) if path.name not in ("", "..") else str(path.resolve())


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
    mtime_ns: int  # modification time of its file, 0 in an archive


def entry(name: str, offset: int, data: bytes, label: str | None, mtime_ns: int = 0) -> ImageEntry:
    """Return the entry of an encoded image, whose bytes begin at `offset` of its source. Raises BadImage."""
    return ImageEntry(name, offset, len(data), zlib.crc32(data), *pixels.inspect(data), label, mtime_ns)


@dataclass(frozen=True)
class Container:
    """A tar, or a class folder, that is scanned on its own."""

    source: int  # number of the source
    start: int  # where its first chunk begins: a byte of the source, or 0, the first image of a folder
    progress: int  # its share of the progress bar: bytes, or images of a folder
    label: str | None  # class of all its images


class Chunk(NamedTuple):
    """A scanned part of a container."""

    images: list[ImageEntry]
    bad: list[tuple[str, str]]  # name and reason
    next_start: int | None  # where the next chunk begins, None after the last
    others: dict[str, int] | None = None  # number of files that were left out by suffix, or by what else they are


class Kind(NamedTuple):
    """How sources of one kind are read."""

    suffix: str | None  # of archives, None for folders
    containers: Callable[[int, Source], Iterator[Container]]  # (number of the source, source)
    scan: Callable[[str, Container, int], Chunk]  # (path of the source, container, start)


def _label_beside(member: tarfile.TarInfo, data: bytes) -> str | None:
    """Return the class in a .cls (text) or .json file beside an image, None if the .json names none. Raises ValueError."""
    if member.name.lower().endswith(".cls"):
        return data.decode().strip()
    values = json.loads(data)
    label = next((values[key] for key in LABEL_KEYS if isinstance(values, dict) and values.get(key) is not None), None)
    if isinstance(label, (dict, list)):
        raise ValueError("a class is a name or a number")
    if label is not None:
        str(label).encode()  # raises: half a pair of surrogates is no text
    return None if label is None else str(label)


def _is_hidden(name: str) -> bool:
    """Whether a member of an archive, or a folder that it lies in, is hidden or a system's own."""
    return any(is_hidden(part) for part in name.split("/") if part not in (".", ".."))


def _grouped_members(
    tar: tarfile.TarFile, path: str, left_out: list[tuple[int, str]] | None = None
) -> Iterator[list[tarfile.TarInfo]]:
    """Yield groups of successive files whose names are equal up to the first dot: an image and the files beside it.

    Hidden files and links are left out; of images among them, the offset is added to `left_out` with what they are. Raises
    InputError if the tar is damaged or truncated.
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
        if not (member.isreg() or member.islnk() or member.issym()):
            continue
        folder, _, base = member.name.rpartition("/")
        reason = HIDDEN if _is_hidden(member.name) else None if member.isreg() else LINKS
        if reason:
            if left_out is not None and not is_hidden(base) and folders.suffix(base) in IMAGE_SUFFIXES:
                left_out.append((member.offset, reason))
            continue
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
        first = next(_grouped_members(_open_tar(source.path, file), source.path), None)
        if first is None or not first[0].name.endswith(".tar"):
            yield Container(number, 0, source.size, None)
            return
        for group in _grouped_members(_open_tar(source.path, file), source.path):
            for member in group:
                if member.name.endswith(".tar"):
                    yield Container(number, member.offset_data, member.size, PurePosixPath(member.name).stem)


def _scan_tar(path: str, container: Container, start: int) -> Chunk:
    """Scan a tar from byte `start`, the header of a member. Raises InputError if it is damaged."""
    images, bad, others = [], [], Counter[str]()
    left_out: list[tuple[int, str]] = []
    next_start = None
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        for group in _grouped_members(_open_tar(path, file, start), path, left_out):
            if len(images) + len(bad) >= CHUNK:
                next_start = group[0].offset
                break
            label = container.label
            try:
                for beside in group:
                    if label is None and beside.name.lower().endswith((".cls", ".json")):
                        label = _label_beside(beside, _content(data, beside))
            except (ValueError, RecursionError):  # neither UTF-8 nor JSON; JSON that is nested too deeply
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
                elif name.suffix.lower() not in (".cls", ".json"):
                    others[folders.suffix(name.name)] += 1
    others.update(reason for offset, reason in left_out if next_start is None or offset < next_start)
    return Chunk(images, bad, next_start, others)


def _folder_containers(number: int, source: Source) -> Iterator[Container]:
    """Yield the folder itself."""
    yield Container(number, 0, source.size, source.label)


@lru_cache(maxsize=1)
def _listing(path: str) -> folders.Listing:
    return folders.walk(path, with_state=False)


def _scan_folder(path: str, container: Container, start: int) -> Chunk:
    """Scan a folder from its `start`th image, in the order of their names."""
    if not start:  # a folder of a million images is listed once, not with every chunk
        _listing.cache_clear()
    listing = _listing(path)
    images, bad = [], [] if start else listing.bad
    for name in listing.images[start : start + CHUNK]:
        try:
            data, mtime_ns = folders.read(f"{path}/{name}")
            images.append(entry(name, 0, data, container.label, mtime_ns))
        except BadImage as error:
            bad.append((name, str(error)))
        except OSError as error:
            if error.errno not in folders.FAULTS_OF_A_FILE:
                raise
            bad.append((name, error.strerror or str(error)))
    return Chunk(images, bad, start + CHUNK if start + CHUNK < len(listing.images) else None)


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


def find_containers(sources: list[Source]) -> Iterator[Container]:
    """Yield the containers of all sources. Raises InputError if one cannot be opened."""
    for number, source in enumerate(sources):
        yield from KINDS[source.kind].containers(number, source)


def scan(source: Source, container: Container, start: int) -> Chunk:
    """Scan the chunk of a container that begins at `start`. Raises InputError if the archive is damaged."""
    return KINDS[source.kind].scan(source.path, container, start)
