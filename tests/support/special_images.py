"""Encoded images whose pixels a reader may get wrong, with the pixels that they have: turned, transparent, of 16 bits, animated.

Expected pixels are computed with numpy from what was written. H height, W width.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from benchmarks import photographs


def photograph(width: int, height: int, number: int = 1) -> Image.Image:
    """Return a photograph in a size, number of `photographs`."""
    return photographs.photographs()[number].resize((width, height))


def stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """Return the pixels [H,W,...] as a file of an EXIF orientation stores them, by the sides that the standard gives to row 0 and
    column 0 (Exif 2.3, table 6)."""
    row_side, column_side = {
        1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"), 5: ("left", "top"),
        6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
    }[orientation]  # fmt: skip
    turned = upright if row_side in ("top", "bottom") else upright.swapaxes(0, 1)
    if row_side in ("bottom", "right"):
        turned = turned[::-1]
    if column_side in ("bottom", "right"):
        turned = turned[:, ::-1]
    return np.ascontiguousarray(turned)


def exif(orientation: int, order: str = "<", kind: int = 3, others: int = 2) -> bytes:
    """Return EXIF with an orientation between `others` other tags. kind: of the value, 3 a short, 4 a long."""
    value = struct.pack(order + ("HH" if kind == 3 else "I"), *((orientation, 0) if kind == 3 else (orientation,)))
    tags = [(0x0100 + i, 3, 1, struct.pack(order + "HH", 6, 0)) for i in range(others)]
    tags += [(0x0112, kind, 1, value), (0x0128, 3, 1, struct.pack(order + "HH", 2, 0))]
    directory = struct.pack(order + "H", len(tags)) + b"".join(struct.pack(order + "HHI4s", *tag) for tag in tags)
    return b"Exif\0\0" + (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8) + directory + bytes(4)


def xmp(orientation: int) -> bytes:
    """Return XMP with an orientation."""
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        f'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/></rdf:RDF></x:xmpmeta>'
    ).encode()


def encode(pixels: np.ndarray | Image.Image, form: str, **options) -> bytes:
    """Return pixels in a format of Pillow's."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(pixels: np.ndarray, bits: int, transparent: tuple[int, ...] = ()) -> bytes:
    """Return a PNG of pixels [H,W,1 to 4 channels] with 1 to 16 bits per channel, and a transparent colour in tRNS."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, channels = pixels.shape
    shifts = np.arange(bits - 1, -1, -1)
    rows = np.packbits((pixels.reshape(height, -1, 1) >> shifts & 1).astype(np.uint8).reshape(height, -1), axis=1)
    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    trns = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b""
    scan = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + trns + chunk(b"IDAT", scan) + chunk(b"IEND", b"")


def tiff(pixels: np.ndarray, white_is_zero: bool = False) -> bytes:
    """Return an uncompressed TIFF of pixels uint16 [H,W,1 or 3]."""
    height, width, channels = pixels.shape
    data = pixels.astype("<u2").tobytes()
    tags = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, 1, 16), (259, 3, 1, 1),
        (262, 3, 1, 2 if channels == 3 else 1 - white_is_zero),
        (273, 4, 1, 8), (277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, len(data)),
    ]  # fmt: skip
    after = 8 + len(data)
    if channels == 3:
        tags[2] = (258, 3, 3, after + 2 + 12 * len(tags) + 4)
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", after) + data + directory + struct.pack("<HHH", 16, 16, 16)


def on_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return colors [H,W,C] on white, fp64. alpha [H,W]: 0 to 255."""
    share = alpha[..., None] / 255
    return colors * share + 255 * (1 - share)


def transparent(size: int = 48) -> dict[str, tuple[bytes, np.ndarray]]:
    """Return images [size,size] with transparency, by name: encoded, and what is seen on white, fp64 [H,W,3]."""
    colors = np.asarray(photograph(size, size))
    grey = np.asarray(photograph(size, size).convert("L"))
    alpha = np.add.outer(np.arange(size), np.arange(size)) * 255 // (2 * size - 2)
    alpha = alpha.astype(np.uint8)
    rgba, la = np.dstack((colors, alpha)), np.dstack((grey, alpha))
    seen, seen_grey = on_white(colors, alpha), np.repeat(on_white(grey[..., None], alpha), 3, 2)
    keyed = np.where((grey == grey[0, 0])[..., None], 255.0, grey[..., None]).repeat(3, 2)
    two_bits, hidden = grey >> 6, int(grey[0, 0] >> 6)
    flat = np.where((np.arange(size) < size // 2)[:, None, None], colors, np.uint8([10, 20, 30]))
    palette = Image.fromarray(colors).quantize(64)
    index, table = np.asarray(palette), np.asarray(palette.convert("RGB"))
    alphas = (np.arange(64) * 4).astype(np.uint8)
    frames = {"save_all": True, "append_images": [Image.fromarray(colors)]}
    deep = {name: a.astype(np.uint16) * 257 for name, a in (("rgba", rgba), ("la", la), ("grey", grey[..., None]))}
    return {
        "rgba.png": (encode(rgba, "PNG"), seen),
        "la.png": (encode(la, "PNG"), seen_grey),
        "palette.png": (encode(palette, "PNG", transparency=bytes(alphas)), on_white(table, alphas[index])),
        "palette_index.png": (encode(palette, "PNG", transparency=5), on_white(table, np.where(index == 5, 0, 255))),
        "grey_trns.png": (png(grey[..., None], 8, (int(grey[0, 0]),)), keyed),
        "grey_2_bits_trns.png": (
            png(two_bits[..., None], 2, (hidden,)),
            np.where(two_bits == hidden, 255.0, two_bits * 85.0)[..., None].repeat(3, 2),
        ),
        "grey_1_bit_trns.png": (png(grey[..., None] >> 7, 1, (0,)), np.full((size, size, 3), 255.0)),
        "rgb_trns.png": (png(flat, 8, (10, 20, 30)), np.where((flat == [10, 20, 30]).all(2)[..., None], 255.0, flat)),
        "rgba_16.png": (png(deep["rgba"], 16), seen),
        "la_16.png": (png(deep["la"], 16), seen_grey),
        "grey_16_trns.png": (png(deep["grey"], 16, (int(deep["grey"][0, 0, 0]),)), keyed),
        "rgba.webp": (encode(rgba, "WEBP", lossless=True, exact=True), seen),
        "rgba.tif": (encode(rgba, "TIFF"), seen),
        "animated.webp": (encode(rgba, "WEBP", lossless=True, exact=True, **frames), seen),
    }  # fmt: skip


def opaque(size: int = 48) -> dict[str, tuple[bytes, np.ndarray]]:
    """Return images [size,size] without transparency, by name: encoded, and their pixels, fp64 [H,W,3]. Lossless."""
    picture, other = photograph(size, size), photograph(size, size, 2)
    colors, grey = np.asarray(picture), np.asarray(picture.convert("L"))
    full = np.full((size, size), 255, np.uint8)
    levels = np.random.default_rng(0).integers(0, 65536, (size, size, 3), np.uint16)
    greys = levels[..., :1].repeat(3, 2)
    bits, few = picture.convert("1"), picture.quantize(12)
    rgb = lambda image: np.asarray(image.convert("RGB"))
    grey3 = grey[..., None].repeat(3, 2)
    return {
        "rgb.png": (encode(colors, "PNG"), colors),
        "grey.png": (encode(grey, "PNG"), grey3),
        "bits.png": (encode(bits, "PNG"), rgb(bits)),
        "palette.png": (encode(few, "PNG"), rgb(few)),
        "palette_4_bits.png": (encode(few, "PNG", bits=4), rgb(few)),
        "rgba_opaque.png": (encode(np.dstack((colors, full)), "PNG"), colors),
        "la_opaque.png": (encode(np.dstack((grey, full)), "PNG"), grey3),
        "animated.png": (encode(picture, "PNG", save_all=True, append_images=[other], default_image=True), colors),
        "grey_16.png": (png(levels[..., :1], 16), greys / 257),
        "rgb_16.png": (png(levels, 16), levels / 257),
        "grey_16.tif": (tiff(levels[..., :1]), greys / 257),
        "grey_16_inverted.tif": (tiff(levels[..., :1], white_is_zero=True), 255 - greys / 257),
        "rgb_16.tif": (tiff(levels), levels / 257),
        "rgb.tif": (encode(colors, "TIFF"), colors),
        "lzw.tif": (encode(colors, "TIFF", compression="tiff_lzw"), colors),
        "bits.tif": (encode(bits, "TIFF"), rgb(bits)),
        "palette.tif": (encode(few, "TIFF"), rgb(few)),
        "cmyk.tif": (encode(picture.convert("CMYK"), "TIFF"), colors),
        "pages.tif": (encode(picture, "TIFF", save_all=True, append_images=[other]), colors),
        "rgb.webp": (encode(colors, "WEBP", lossless=True), colors),
        "animated.webp": (encode(picture, "WEBP", lossless=True, save_all=True, append_images=[other]), colors),
        "rgb.bmp": (encode(colors, "BMP"), colors),
        "palette.bmp": (encode(few, "BMP"), rgb(few)),
    }  # fmt: skip
