"""Images in archives and class folders: which there are, where their bytes lie, how large they are, which class they have."""

import io
import json
import mmap
import os
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image

from fastdit.config import InputError
from fastdit.data.index import Source

PART = 4096  # images
SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
FORMATS = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF"}  # that both Pillow and DALI decode
LABEL_KEYS = ("label", "cls", "class", "class_id")  # of a .json beside an image


class BadImage(Exception):
    """An image that cannot be used, and why."""


class Found(NamedTuple):
    """An image that was found: its name, byte offset and length, pixels and class."""

    name: str
    offset: int
    bytes: int
    height: int
    width: int
    label: str | None


@dataclass(frozen=True)
class Unit:
    """A tar, from byte `start` of a source on, or a class folder."""

    source: int
    start: int
    weight: int  # in the progress bar: bytes, or 1 for a folder
    label: str | None  # of all its images


class Part(NamedTuple):
    """Some images of a unit; `next`: where the next part begins, None after the last."""

    images: list[Found]
    bad: list[tuple[str, str]]
    next: int | None


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) from a JPEG's frame header (ITU T.81, B.2.2), None where there is none or it is no JPEG."""
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return struct.unpack(">HH", data[at + 5 : at + 9])
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def measure(data: bytes) -> tuple[int, int]:
    """(height, width) of an encoded image. A JPEG with a frame header and an end marker is taken at its word; everything else is
    decoded in full. Raises BadImage."""
    if not data:
        raise BadImage("the file is empty")
    size = jpeg_size(data)
    return size if size and 0 not in size and data[-2:] == b"\xff\xd9" else decode(data)


def decode(data: bytes) -> tuple[int, int]:
    """(height, width) of an image, decoded in full. Raises BadImage."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in FORMATS:
                raise BadImage(f"{image.format} images cannot be read")
            image.load()
            return image.height, image.width
    except Image.UnidentifiedImageError as error:
        raise BadImage("it is no image") from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise BadImage(" ".join(str(error).split())) from error


def _label_beside(member: tarfile.TarInfo, data: bytes) -> str | None:
    """The class in a .cls (text) or .json file beside an image."""
    if member.name.endswith(".cls"):
        return data.decode().strip()
    found = json.loads(data)
    return next((str(found[key]) for key in LABEL_KEYS if isinstance(found, dict) and key in found), None)


def _samples(tar: tarfile.TarFile, path: str) -> Iterator[list[tarfile.TarInfo]]:
    """Runs of files that share their name up to its first dot: an image and what lies beside it. Raises InputError for a tar that
    is damaged or ends too soon."""
    run: list[tarfile.TarInfo] = []
    key = last = None
    while True:
        try:
            member = tar.next()  # checks the header's checksum
        except tarfile.ReadError as error:
            raise InputError(f"archive {path} is cut off or damaged after {last}: {error}; fetch it again") from error
        tar.members.clear()  # tarfile would keep them all
        if member is None:
            break
        last = member.name
        if not member.isreg():
            continue
        folder, _, base = member.name.rpartition("/")
        if run and (folder, base.split(".")[0]) != key:
            yield run
            run = []
        key = (folder, base.split(".")[0])
        run.append(member)
    if run:
        yield run
    # tarfile takes a damaged header, and the end of the file, for the end of the archive; the real end is a block of zeros
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        where = f"after {last}" if last else "at its start"
        raise InputError(f"archive {path} is cut off or damaged {where}, at byte {tar.offset}: fetch it again")


def _open_tar(path: str, file: io.BufferedReader, start: int = 0) -> tarfile.TarFile:
    file.seek(start)
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except tarfile.ReadError as error:
        raise InputError(f"{path} is not a tar archive, or a compressed one: give an uncompressed .tar") from error


def scan_tar(path: str, unit: Unit, start: int) -> Part:
    """The images of a tar from byte `start`, the header of a file, on."""
    images, bad = [], []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        for run in _samples(_open_tar(path, file, start), path):
            if len(images) + len(bad) >= PART:
                return Part(images, bad, run[0].offset)
            content = lambda member: data[member.offset_data : member.offset_data + member.size]
            label = unit.label
            try:
                for beside in run:
                    if label is None and beside.name.endswith((".cls", ".json")):
                        label = _label_beside(beside, content(beside))
            except ValueError:  # neither UTF-8 nor JSON
                bad.append((beside.name, "the label beside the image cannot be read"))
                continue
            for member in run:
                name = PurePosixPath(member.name)
                if name.suffix.lower() in SUFFIXES:
                    try:
                        size = measure(content(member))
                    except BadImage as error:
                        bad.append((member.name, str(error)))
                    else:
                        images.append(Found(member.name, member.offset_data, member.size, *size, label or name.parent.name or None))
    return Part(images, bad, None)


def scan_folder(path: str, unit: Unit, start: int) -> Part:
    """The images of a folder from the `start`th in the order of their names on."""
    files = sorted(
        os.path.relpath(os.path.join(folder, file), path)
        for folder, _, names in os.walk(path)
        for file in names
        if os.path.splitext(file)[1].lower() in SUFFIXES
    )
    images, bad = [], []
    for file in files[start : start + PART]:
        data = Path(path, file).read_bytes()
        try:
            images.append(Found(file, 0, len(data), *measure(data), unit.label))
        except BadImage as error:
            bad.append((file, str(error)))
    return Part(images, bad, start + PART if start + PART < len(files) else None)


def find_sources(paths: list[Path]) -> list[Source]:
    """The archives, or the class folders, at some paths. Raises InputError."""
    found: list[Path] = []
    for path in paths:
        try:
            entries = sorted(path.iterdir()) if path.is_dir() else [path]
            folders, tars = [p for p in entries if p.is_dir()], [p for p in entries if p.suffix == ".tar"]
            found += (folders or tars) if path.is_dir() else [path]
            if not (folders or tars) and path.is_dir():
                raise InputError(f"{path} holds neither class folders nor .tar archives: give the folder above the images' folders")
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return [Source.of(path) for path in found]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error


def find_units(sources: list[Source]) -> Iterator[Unit]:
    """What the sources are made of: the inner tars of a tar of tars, named by their class; else the sources themselves."""
    for i, source in enumerate(sources):
        if os.path.isdir(source.path):
            yield Unit(i, 0, 1, os.path.basename(source.path))
            continue
        with open(source.path, "rb") as file:
            tar = _open_tar(source.path, file)
            first = next(iter(tar), None)
            if first is None or not first.name.endswith(".tar"):
                yield Unit(i, 0, source.size, None)
                continue
            for run in _samples(_open_tar(source.path, file), source.path):
                for member in run:
                    if member.name.endswith(".tar"):
                        yield Unit(i, member.offset_data, member.size, PurePosixPath(member.name).stem)
