"""Encoded images: which files are images, their size, and whether they can be decoded."""

import io
import struct
from typing import NamedTuple

from PIL import Image

IMAGE_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
IMAGE_FORMATS = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF"}  # that both Pillow and DALI decode

SYSTEM_NAMES = {  # of files and folders that operating systems, NAS boxes and archivers leave behind
    "__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db",
}  # fmt: skip


class BadImage(Exception):
    """An image that cannot be used, and why."""


class Header(NamedTuple):
    """What an index records of an encoded image."""

    height: int  # pixels, as stored
    width: int
    flags: int = 0


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is not part of a data set: it is hidden, or a system's own."""
    return name.startswith(".") or name in SYSTEM_NAMES


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) from a JPEG's frame header (ITU T.81, B.2.2), None without one or if the data are no JPEG."""
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


def inspect(data: bytes) -> Header:
    """Return the header of an encoded image. Raises BadImage.

    The frame header of a JPEG that also has its end marker is trusted; everything else is decoded in full.
    """
    if not data:
        raise BadImage("the file is empty")
    size = jpeg_size(data)
    return Header(*(size if size and 0 not in size and data[-2:] == b"\xff\xd9" else decode(data)))


def decode(data: bytes) -> tuple[int, int]:
    """Decode an image in full and return (height, width). Raises BadImage."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in IMAGE_FORMATS:
                raise BadImage(f"{image.format} images cannot be read")
            image.load()
            return image.height, image.width
    except Image.UnidentifiedImageError as error:
        raise BadImage("it is no image") from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise BadImage(" ".join(str(error).split())) from error
