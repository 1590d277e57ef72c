"""The pixels of encoded images, for training, encoding and evaluation: `load` says what they are.

An index records flags of each image: its EXIF orientation, and what `load` did to its pixels. The loader reads from them whether
DALI decodes the image as `load` would, apart from its orientation, or `load` decodes it for DALI.
"""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = {".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
IMAGE_FORMATS = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "PPM"}
DALI_FORMATS = {"JPEG", "MPO", "PNG", "WEBP"}  # whose ordinary images DALI decodes to the same bits as Pillow
SYSTEM_NAMES = {  # in lower case, of files and folders that operating systems, NAS boxes and archivers leave behind
    "__macosx", "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found",
    "thumbs.db", "ehthumbs.db", "desktop.ini",
}  # fmt: skip

# Flags of an image
ORIENTATION = 0b1111  # EXIF's orientation, 2 to 8, or 0: upright
TRANSPARENT = 1 << 4  # pixels were composited on white
DEEP = 1 << 5  # 16 bits per channel were scaled to 8
PILLOW = 1 << 6  # not decoded by DALI: one of the two, an animation, an extended WebP, or of a format not in DALI_FORMATS

# By EXIF orientation: whether the stored pixels are transposed, then mirrored, then turned upside down to be upright
TURNS = np.array(
    [(0, 0, 0), (0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 0), (1, 1, 0), (1, 1, 1), (1, 0, 1)], bool
)  # fmt: skip
METHODS = {  # the same for Pillow
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
INVERSE = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}

MOST_PIXELS = 178_956_970  # of an image: Pillow refuses more, and warns from half of it on
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "Corrupt EXIF data")  # which counts as none

ERRORS = (OSError, ValueError, TypeError, KeyError, SyntaxError, EOFError, OverflowError, struct.error)  # of damaged files


class BadImage(Exception):
    """An image that cannot be used, and why."""


class Header(NamedTuple):
    """What an index records of an encoded image."""

    height: int  # pixels, as stored
    width: int
    flags: int = 0


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is not part of a data set: it is hidden, or a system's own."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


@contextmanager
def reading() -> Iterator[None]:
    """Raise BadImage for what Pillow raises."""
    try:
        yield
    except Image.UnidentifiedImageError as error:
        raise BadImage("it is no image") from error
    except (*ERRORS, Image.DecompressionBombError) as error:
        raise BadImage(" ".join(str(error).split())) from error


def _may_turn(segment: bytes) -> bool:
    """Whether an APP1 segment of a JPEG may hold an orientation other than upright. Reading it by Pillow takes 100 times longer."""
    if not segment.startswith(b"Exif\0\0"):
        return b"tiff:Orientation" in segment  # XMP
    exif = segment[6:]
    order = "<" if exif[:2] == b"II" else ">"
    try:
        (first,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, first)
        entries = struct.iter_unpack(order + "HHI4s", exif[first + 2 : first + 2 + 12 * count])
        return any(entry[0] == 0x112 and entry[1:] != (3, 1, struct.pack(order + "HH", 1, 0)) for entry in entries)
    except struct.error:
        return True  # damaged: Pillow knows


def _jpeg_header(data: bytes) -> tuple[int, int, bool] | None:
    """Return (height, width, whether it may have an orientation) of a JPEG from the segments before its scan (ITU T.81, B.2).

    None if there is no frame header, or if the data are no JPEG.
    """
    if data[:2] != b"\xff\xd8":
        return None
    at, size, may_turn = 2, None, False
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:  # start of scan
            break
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xE1:
            may_turn = may_turn or _may_turn(data[at + 4 : end])
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            size = size or struct.unpack(">HH", data[at + 5 : at + 9])
        at = end
    return (*size, may_turn) if size else None


def inspect(data: bytes) -> Header:
    """Return the header of an encoded image. Raises BadImage.

    The frame header of a JPEG that also has its end marker is trusted; everything else is decoded in full.
    """
    if not data:
        raise BadImage("the file is empty")
    jpeg = _jpeg_header(data)
    if jpeg and 0 not in jpeg[:2] and data[-2:] == b"\xff\xd9":
        height, width, may_turn = jpeg
        if height * width > MOST_PIXELS:
            raise BadImage(f"{width}x{height} pixels are more than {MOST_PIXELS:,}")
        return Header(height, width, _jpeg_orientation(data) if may_turn else 0)
    image, flags = decode(data)
    return Header(image.height, image.width, flags)


def _jpeg_orientation(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _orientation(image)
    except ERRORS:
        return 0  # what else is wrong with the image is found when it is decoded


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image: 2 to 8, or 0 if it is upright, has none or an invalid one.

    As in ImageOps.exif_transpose, XMP's counts for an image without EXIF's.
    """
    try:
        value = image.getexif().get(0x112)
        return int(value) if value is not None and value in range(2, 9) else 0
    except ERRORS:
        return 0  # damaged EXIF


def load(data: bytes, exif: bool) -> Image.Image:
    """Return the pixels of an encoded image, mode "L" if it is grey, else "RGB". Raises BadImage.

    exif: whether its orientation is applied. Transparent pixels are composited on white; of 16 bits per channel the high byte is
    kept, as Pillow does for colours; of an animation or several pages the first is taken; colour profiles are ignored.
    """
    image, flags = decode(data)
    method = METHODS.get(flags & ORIENTATION)
    return image.transpose(method) if exif and method is not None else image


def decode(data: bytes) -> tuple[Image.Image, int]:
    """Return the pixels of `load` as they are stored, whatever the orientation, and the image's flags. Raises BadImage."""
    with reading(), Image.open(io.BytesIO(data)) as image:
        if image.format not in IMAGE_FORMATS:
            raise BadImage(f"{image.format} images cannot be read")
        turned = _orientation(image) if image.format == "TIFF" else 0  # Pillow turns these by itself
        bits = _bits(image, data)
        image.load()
        orientation = turned or _orientation(image)
        by_dali = image.format in DALI_FORMATS and not _is_extended(image, data)
        flags = orientation | (DEEP | PILLOW if bits > 8 else 0) | (0 if by_dali else PILLOW)
        pixels = image
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF"):
            pixels = _high_bytes(image, bits)
        if pixels.mode in ("I", "F"):
            raise BadImage("its numbers have no known range: write it again with 8 or 16 unsigned bits per channel")
        if pixels.has_transparency_data:
            pixels, seen_through = _on_white(pixels, data)
            flags |= TRANSPARENT | PILLOW if seen_through else 0
        if turned:
            pixels = pixels.transpose(METHODS[INVERSE[turned]])
        wanted = "L" if pixels.mode in ("1", "L") else "RGB"
        return pixels if pixels.mode == wanted else pixels.convert(wanted), flags


def _is_extended(image: Image.Image, data: bytes) -> bool:
    """Whether an image is an animated PNG, or a WebP with more chunks than its pixels, some of which DALI cannot read."""
    return data[12:16] == b"VP8X" if image.format == "WEBP" else image.format == "PNG" and getattr(image, "is_animated", False)


def _bits(image: Image.Image, data: bytes) -> int:
    """Return the bits per channel of an image."""
    if image.format == "PNG":
        return data[24]  # of IHDR, always the first chunk
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,)))  # pyright: ignore[reportAttributeAccessIssue]: BitsPerSample
    return 16 if image.mode == "I" else 8  # PPM


def _high_bytes(image: Image.Image, bits: int) -> Image.Image:
    """Return a grey image of 9 to 16 bits with 8, "LA" if it has a transparent level."""
    levels = np.asarray(image)
    if image.format == "TIFF" and image.tag_v2.get(262) == 0:  # pyright: ignore[reportAttributeAccessIssue]: 0 is white
        levels = 2**bits - 1 - levels
    grey = Image.fromarray((levels >> (bits - 8)).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(levels == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _on_white(image: Image.Image, data: bytes) -> tuple[Image.Image, bool]:
    """Return an image that may be transparent on white, mode "L" or "RGB", and whether it is transparent anywhere.

    Raises BadImage for a transparent colour of 16 bits: Pillow has lost its low bytes.
    """
    grey = image.mode in ("1", "L", "LA")
    if image.format == "PNG" and "transparency" in image.info:
        if image.mode == "RGB" and data[24] == 16:
            raise BadImage("a transparent colour of 16 bits cannot be read: write it again with an alpha channel")
        if image.mode == "L":  # tRNS has the level as stored, in 2, 4 or 8 bits
            image.info["transparency"] = image.info["transparency"] * 255 // (2 ** data[24] - 1)
    rgba = image.convert("RGBA")
    seen_through = rgba.getchannel("A").getextrema() != (255, 255)
    if seen_through:
        rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return rgba.convert("RGB").convert("L" if grey else "RGB"), seen_through


def upright_sizes(rows: np.ndarray, exif: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return heights and widths [n] of images in pixels, after orientation if `exif`. rows: records of an index, [n]."""
    heights, widths = np.array(rows["height"]), np.array(rows["width"])
    swapped = TURNS[rows["flags"] & ORIENTATION, 0] & exif
    return np.where(swapped, widths, heights), np.where(swapped, heights, widths)


def describe_flags(flags: np.ndarray, exif: bool) -> str:
    """Return one line on how many images `load` changes, and how; empty if it changes none. flags: of Header, [n]."""
    counts = {
        f"EXIF orientation {'applied' if exif else 'ignored'}": np.count_nonzero(flags & ORIENTATION),
        "transparency composited on white": np.count_nonzero(flags & TRANSPARENT),
        "16 bits per channel scaled to 8": np.count_nonzero(flags & DEEP),
    }
    return "; ".join(f"{change}: {count:,} images" for change, count in counts.items() if count)
