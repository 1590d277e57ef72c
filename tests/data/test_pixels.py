"""The pixels of encoded images: orientation, transparency, depth, first pages, and what is refused."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

import special_images
from benchmarks import photographs
from fastdit.data import pixels
from fastdit.data.pixels import DEEP, ORIENTATION, PILLOW, TRANSPARENT, BadImage
from special_images import encode, exif, xmp


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "._x.jpg", "@eaDir", "__MACOSX", "#recycle", "lost+found", "Thumbs.db"])
def test_hidden_and_system_names(name):
    assert pixels.is_hidden(name)


@pytest.mark.parametrize("name", ["a.jpg", "macosx", "_cache", "x.", "ähnlich", "@ea"])
def test_names_of_data(name):
    assert not pixels.is_hidden(name)


def rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def transposed_by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return rgb(ImageOps.exif_transpose(image))


FORMS = {
    "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "JPEG": {"quality": 95}, "MPO": {"quality": 95, "save_all": True},
    "lzw": {"compression": "tiff_lzw"}, "pages": {"save_all": True},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(form, orientation):
    upright = rgb(special_images.photograph(60, 40))
    as_stored = special_images.stored(upright, orientation)
    tag = Image.Exif()
    tag[0x112] = orientation
    more = [Image.fromarray(as_stored)] if "save_all" in FORMS[form] else []
    options = {**FORMS[form], "exif": tag, **({"append_images": more} if more else {})}
    data = encode(as_stored, {"lzw": "TIFF", "pages": "TIFF"}.get(form, form), **options)
    header = pixels.inspect(data)
    assert header[:2] == as_stored.shape[:2] and header.flags & ORIENTATION == (orientation if orientation > 1 else 0)
    turned, untouched = pixels.load(data, exif=True), pixels.load(data, exif=False)
    assert np.array_equal(rgb(turned), transposed_by_pillow(data))
    if form in ("JPEG", "MPO"):
        assert np.abs(rgb(turned).astype(int) - upright).mean() < 3
    else:
        assert np.array_equal(rgb(turned), upright)
    assert np.array_equal(special_images.stored(rgb(turned), orientation), rgb(untouched))


def jpeg_with(*segments: tuple[int, bytes], after: tuple[int, bytes] | None = None) -> bytes:
    """A JPEG of 60x40 pixels with segments (marker, content) at its start, and one `after` the frame header."""
    plain = photographs.encoded(special_images.photograph(60, 40))
    segment = lambda marker, content: struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
    start = b"".join(segment(*each) for each in segments)
    scan = plain.index(b"\xff\xda")
    return plain[:2] + start + plain[2:scan] + (segment(*after) if after else b"") + plain[scan:]


APP1_XMP = b"http://ns.adobe.com/xap/1.0/\0"
THUMBNAIL = exif(1)[:-4] + struct.pack("<I", 8 + 2 + 4 * 12 + 4) + exif(6)[14:]  # the second directory describes the thumbnail
ODD = {
    "big endian": (jpeg_with((0xE1, exif(6, ">"))), 6),
    "a long": (jpeg_with((0xE1, exif(6, kind=4))), 6),
    "a big-endian long": (jpeg_with((0xE1, exif(8, ">", kind=4))), 8),
    "0": (jpeg_with((0xE1, exif(0))), 0),
    "9": (jpeg_with((0xE1, exif(9))), 0),
    "65535": (jpeg_with((0xE1, exif(65535))), 0),
    "after JFIF and a profile": (jpeg_with((0xE2, b"ICC_PROFILE\0" + bytes(100)), (0xE1, exif(3))), 3),
    "after the frame header": (jpeg_with(after=(0xE1, exif(5))), 5),
    "in XMP only": (jpeg_with((0xE1, APP1_XMP + xmp(6))), 6),
    "in XMP, EXIF is upright": (jpeg_with((0xE1, exif(1)), (0xE1, APP1_XMP + xmp(6))), 0),
    "of a thumbnail": (jpeg_with((0xE1, THUMBNAIL)), 0),
    "cut off": (jpeg_with((0xE1, exif(6)[:30])), None),
    "directory past the end": (jpeg_with((0xE1, b"Exif\0\0II*\0\xff\xff\0\0")), None),
    "no directory": (jpeg_with((0xE1, b"Exif\0\0")), None),
    "another byte order": (jpeg_with((0xE1, b"Exif\0\0XX*\0" + bytes(40))), None),
    "fill bytes": (jpeg_with((0xE1, exif(6))).replace(b"\xff\xe1", b"\xff\xff\xff\xe1", 1), 6),
}


@pytest.mark.parametrize("name", ODD)
def test_orientation_in_odd_jpegs(name):
    """None: Pillow itself may fail, and the image counts as it is stored."""
    data, orientation = ODD[name]
    assert pixels.inspect(data) == (40, 60, orientation or 0)
    if orientation is not None:
        assert np.array_equal(rgb(pixels.load(data, exif=True)), transposed_by_pillow(data))
    assert np.array_equal(rgb(pixels.load(data, exif=False)), rgb(pixels.load(jpeg_with(), exif=True)))


def test_upright_jpegs_are_not_opened(monkeypatch):
    camera = (exif(1, others=16), exif(1, ">"), THUMBNAIL)
    files = [jpeg_with(), *(jpeg_with((0xE1, content)) for content in camera)]
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("Pillow opened it"))
    for data in files:
        assert pixels.inspect(data) == (40, 60, 0)


@pytest.mark.parametrize("quality", [50, 95])
def test_sizes_from_headers_are_pillows(quality):
    for image in photographs.crops(8):
        data = photographs.encoded(image, quality=quality, exif=b"Exif\0\0" + bytes(300))
        assert pixels.inspect(data)[:2] == (image.height, image.width)


TRANSPARENT_IMAGES, OPAQUE = special_images.transparent(), special_images.opaque()


@pytest.mark.parametrize("name", TRANSPARENT_IMAGES)
def test_transparency_is_composited_on_white(name):
    data, seen = TRANSPARENT_IMAGES[name]
    flags = pixels.inspect(data).flags
    assert flags & TRANSPARENT and flags & PILLOW and bool(flags & DEEP) == ("16" in name)
    loaded = pixels.load(data, exif=True)
    assert loaded.mode == ("L" if name.startswith(("la.", "grey")) else "RGB")
    assert np.abs(rgb(loaded) - seen).max() <= 1
    assert (rgb(loaded)[np.all(seen == 255, 2)] == 255).all()


@pytest.mark.parametrize("name", OPAQUE)
def test_opaque_images_keep_their_pixels(name):
    """16 bits lose their low byte; DALI decodes what it always did."""
    data, wanted = OPAQUE[name]
    flags = pixels.inspect(data).flags
    assert not flags & TRANSPARENT and bool(flags & DEEP) == ("16" in name)
    by_dali = name.endswith((".png", ".webp")) and "16" not in name and "animated" not in name
    assert bool(flags & PILLOW) != by_dali
    assert np.abs(rgb(pixels.load(data, exif=True)) - wanted).max() <= (1 if "16" in name else 0)


def test_hidden_colours_make_no_difference():
    mask = np.zeros((40, 40), np.uint8)
    mask[10:30, 10:30] = 255
    seen = [
        rgb(pixels.load(encode(np.dstack((np.full((40, 40, 3), color, np.uint8), mask)), "PNG"), exif=True))[mask == 0]
        for color in (0, 128, 255)
    ]
    assert all((each == 255).all() for each in seen)


def test_tiny_images():
    for form in ("PNG", "JPEG", "BMP", "TIFF", "WEBP"):
        data = encode(np.full((1, 1, 3), 200, np.uint8), form, **({"exif": exif(6)} if form == "JPEG" else {}))
        assert pixels.inspect(data)[:2] == (1, 1) and abs(int(rgb(pixels.load(data, exif=True))[0, 0, 0]) - 200) <= 2


NOISE = encode(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8), "PNG")


def huge(width: int, height: int) -> bytes:
    data = bytearray(photographs.encoded(special_images.photograph(60, 40)))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"no image", "it is no image"),
        (huge(60_000, 50_000), "60000x50000 pixels are more than 178,956,970"),
        (encode(np.zeros((9, 9), np.float32), "TIFF"), "no known range"),
        (encode(np.zeros((9, 9), np.int32), "TIFF"), "no known range"),
        (encode(Image.new("L", (9, 9)), "GIF"), "GIF images cannot be read"),
        (special_images.png(np.zeros((9, 9, 3), np.uint16), 16, (1, 2, 3)), "a transparent colour of 16 bits"),
        (NOISE[:-60], "truncated"),
        (NOISE[:5000] + bytes(200) + NOISE[5200:], "data stream"),
    ],
)
def test_what_is_refused(data, reason):
    with pytest.raises(BadImage, match=reason):
        pixels.inspect(data)


def test_flags_are_described():
    flags = np.array([0, 6, 3, TRANSPARENT | PILLOW, DEEP | PILLOW | 8, PILLOW], np.uint32)
    assert pixels.describe_flags(flags, exif=True) == (
        "EXIF orientation applied: 3 images; transparency composited on white: 1 images; 16 bits per channel scaled to 8: 1 images"
    )
    assert pixels.describe_flags(flags[:2], exif=False) == "EXIF orientation ignored: 1 images"
    assert pixels.describe_flags(flags[:1], exif=True) == pixels.describe_flags(flags[5:], exif=True) == ""
