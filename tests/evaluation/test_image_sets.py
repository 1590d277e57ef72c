"""Image sets: what they hold, in shares that together are all of it; labels of samples; an index as a reference."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import inception as inception_net
import special_images
from benchmarks import photographs
from fastdit import cli
from fastdit.config import InputError
from fastdit.data import pixels, prepare
from fastdit.distributed import World
from fastdit.evaluation import image_sets, metrics

CPU = torch.device("cpu")


def test_labels_are_balanced_or_drawn_from_the_seed():
    balanced = image_sets.evaluation_labels("balanced", 40, 10, 0)
    assert balanced.bincount().tolist() == [4] * 10
    drawn = image_sets.evaluation_labels("random", 4000, 10, 0)
    assert torch.equal(drawn[:100], image_sets.evaluation_labels("random", 100, 10, 0)) and drawn.max() == 9
    assert ((drawn.bincount() - 400).abs() < 5 * 400**0.5).all() and len(set(drawn.bincount().tolist())) > 1
    assert not torch.equal(drawn, image_sets.evaluation_labels("random", 4000, 10, 1))


@pytest.mark.parametrize("kind", ["array", "npz", "folder"])
def test_ranks_read_each_image_once(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(image_sets, "BATCH", 4)
    images = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), np.uint8)
    if kind == "array":
        held = image_sets.of_array(images, None, {})
    elif kind == "npz":
        np.savez(tmp_path / "images.npz", arr_0=images)
        held = image_sets.of_npz(tmp_path / "images.npz")
    else:
        for i, pixels in enumerate(images):
            Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
        held = image_sets.of_folder(tmp_path)
    assert (held.count, held.shape) == (11, (8, 8, 3))
    for size in (1, 2, 3):
        batches = [batch for rank in range(size) for batch in held.batches(World(rank, size, CPU, None))]
        ids = np.concatenate([ids for ids, _ in batches])
        assert sorted(ids.tolist()) == list(range(11)) and max(len(ids) for ids, _ in batches) == 4
        assert np.array_equal(np.concatenate([part for _, part in batches]), images[ids])


def test_images_that_are_no_set_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((4, 32, 32, 1)))
    for path, message in (("empty", "no images"), ("floats.npz", "not uint8"), ("nowhere", "does not exist")):
        with pytest.raises(InputError, match=message):
            image_sets.open_images(str(tmp_path / path), None, "train", CPU)


@pytest.fixture
def pictures_of(tmp_path):
    """A function that writes files by name to a folder and returns it."""

    def write(**files):
        folder = tmp_path / "samples"
        for name, data in files.items():
            path = folder / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return folder

    return write


def contents(held):
    return np.concatenate([part for _, part in held.batches(World(0, 1, CPU, None))])


def test_folders_are_read_by_the_contract(tmp_path):
    """Turned, transparent and 16-bit files, as an index reads them at their full size."""
    made = {**special_images.opaque(), **special_images.transparent()}
    files = {f"{i:02d}_{name}": data for i, (name, (data, _)) in enumerate(made.items())}
    upright = np.asarray(special_images.photograph(48, 48))
    tag = Image.Exif()
    tag[0x112] = 6
    files["turned.tif"] = special_images.encode(special_images.stored(upright, 6), "TIFF", exif=tag)
    (tmp_path / "d" / "class").mkdir(parents=True)
    for name, data in files.items():
        (tmp_path / "d" / "class" / name).write_bytes(data)
    held = contents(image_sets.of_folder(tmp_path / "d"))
    assert held.shape == (len(files), 48, 48, 3)
    for (name, data), image in zip(sorted(files.items()), held, strict=True):
        assert np.array_equal(image, np.asarray(pixels.load(data, exif=True).convert("RGB"))), name
    assert np.array_equal(held[-1], upright)
    index = prepare.prepare([tmp_path / "d"])
    assert np.array_equal(contents(image_sets.of_index(index, 48, "train", CPU)), held)


def test_grey_folders_are_grey(pictures_of):
    grey = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    deep = special_images.png(grey[..., None].astype(np.uint16) * 257, 16)
    held = image_sets.of_folder(pictures_of(a_png=special_images.encode(grey, "PNG"), b_png=deep))
    assert held.shape == (8, 8, 1) and not held.warnings
    assert np.array_equal(contents(held), np.stack([grey, grey])[..., None])
    held = image_sets.of_folder(pictures_of(c_png=special_images.encode(np.dstack([grey] * 3), "PNG")))
    assert held.shape == (8, 8, 3) and any("2 of 3 images are grey" in warning for warning in held.warnings)


NOISE = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
LOSSLESS = {
    "png": special_images.encode(NOISE, "PNG"), "webp": special_images.encode(NOISE, "WEBP", lossless=True),
    "extended_webp": special_images.encode(NOISE, "WEBP", lossless=True, exif=special_images.exif(1)),
    "tif": special_images.encode(NOISE, "TIFF", compression="tiff_lzw"),
}  # fmt: skip
LOSSY = {
    "jpg": special_images.encode(NOISE, "JPEG"), "jpeg_png": special_images.encode(NOISE, "JPEG"),
    "webp": special_images.encode(NOISE, "WEBP"),
    "extended_webp": special_images.encode(NOISE, "WEBP", exif=special_images.exif(1)),
    "animated_webp": special_images.encode(NOISE, "WEBP", save_all=True, append_images=[Image.fromarray(NOISE.T.reshape(8, 8, 3))]),
    "tif": special_images.encode(NOISE, "TIFF", compression="jpeg"),
}  # fmt: skip


@pytest.mark.parametrize(("lossy", "name"), [(True, name) for name in LOSSY] + [(False, name) for name in LOSSLESS])
def test_lossy_samples_are_said(pictures_of, lossy, name):
    """By what is in the file, whatever its suffix says."""
    data = (LOSSY if lossy else LOSSLESS)[name]
    held = image_sets.of_folder(pictures_of(**{f"a_{name}": data, f"b_{name}": data}))
    assert held.about["lossy"] == (2 if lossy else 0) and sum(held.about["formats"].values()) == 2
    assert [("lossy compression" in warning and "PNG" in warning) for warning in held.warnings] == [True] * lossy


def test_mixed_formats_and_what_is_left_out_are_said(pictures_of):
    jpeg, png = LOSSY["jpg"], LOSSLESS["png"]
    folder = pictures_of(
        a_png=png, b_jpg=jpeg, sub__c_png=png, d_gif=b"GIF89a", e_txt=b"x", __MACOSX__a_png=b"x", _hidden_png=b"x", Thumbs_db=b"x"
    )
    held = image_sets.of_folder(folder)
    assert held.count == 3 and held.about["formats"] == {"PNG": 2, "JPEG": 1} and held.about["left_out"] == {".gif": 1, ".txt": 1}
    said = "\n".join(held.warnings)
    assert "1 JPEG of 3 images with lossy" in said and "several formats (2 PNG, 1 JPEG)" in said and "1 .gif, 1 .txt" in said


def test_lossy_samples_are_in_the_result(pictures_of, tmp_path, capsys):
    grey = np.random.default_rng(0).integers(0, 256, (40, 32, 32), np.uint8)
    folder = pictures_of(**{f"{i}_jpg": special_images.encode(image, "JPEG") for i, image in enumerate(grey)})
    assert cli.main(["evaluate", str(folder), "--features", "digits", "--out", str(tmp_path / "e.json")]) == 0
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["samples"]["formats"] == {"JPEG": 40} and result["samples"]["lossy"] == 40
    assert any("40 JPEG of 40 images with lossy compression" in warning for warning in result["warnings"])
    assert "lossy compression" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no image", "b.png cannot be read: it is no image"),
        (special_images.encode(NOISE[:4], "PNG"), r"b.png is 8x4, .*a.png is 8x8: images must be of one size"),
        (special_images.encode(np.zeros((8, 8), np.float32), "TIFF"), "b.png cannot be read: its numbers have no known range"),
        (special_images.encode(NOISE, "GIF"), "b.png cannot be read: GIF images"),
        (None, "b.png cannot be read: it is a link to a file that is not there"),
    ],
)
def test_files_that_are_no_samples_are_named(pictures_of, data, message):
    folder = pictures_of(a_png=LOSSLESS["png"])
    if data is None:
        (folder / "b.png").symlink_to("nowhere")
    else:
        (folder / "b.png").write_bytes(data)
    with pytest.raises(InputError, match=message):
        contents(image_sets.of_folder(folder))


def test_names_that_are_not_utf8(pictures_of):
    folder = pictures_of(a_png=LOSSLESS["png"])
    odd = os.path.join(os.fsencode(folder), b"\xff\xfe.png")
    with open(odd, "wb") as file:
        file.write(LOSSLESS["png"])
    assert image_sets.of_folder(folder).count == 2
    with open(odd, "wb") as file:
        file.write(b"no image")
    with pytest.raises(InputError, match="it is no image"):
        image_sets.of_folder(folder)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((4, 3, 8, 8), np.uint8)}, r"uint8 \[4, 3, 8, 8\], not uint8 \[n,S,S,1 or 3\]"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.float32)}, r"float32 \[4, 8, 8, 3\], not uint8"),
        ({"arr_0": np.zeros((4, 8, 8, 4), np.uint8)}, r"not uint8 \[n,S,S,1 or 3\]"),
        ({"arr_0": np.zeros((4, 8, 9, 3), np.uint8)}, r"not uint8 \[n,S,S,1 or 3\]"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, r"not uint8 \[n,S,S,1 or 3\]"),
        ({"arr_0": np.zeros((4, 8, 8, 3), object)}, r"object"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.dtype([("名", np.uint8)]))}, r"named fields"),
        ({"images": np.zeros((4, 8, 8, 3), np.uint8)}, r"arr_0"),
        ({"arr_0": np.asfortranarray(np.zeros((4, 8, 8, 3), np.uint8))}, "Fortran order"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.uint8), "arr_1": np.zeros(3, np.int64)}, r"int64 \[3\], not whole numbers \[4\]"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.uint8), "arr_1": np.zeros((4, 10), np.int64)}, r"not whole numbers \[4\]"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.uint8), "arr_1": np.zeros(4)}, r"float64 \[4\], not whole numbers"),
    ],
)
def test_arrays_of_another_form_are_one_sentence(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=message):
        image_sets.of_npz(tmp_path / "x.npz")


@pytest.mark.slow
def test_an_index_is_a_reference(tmp_path, capsys):
    train_tar, val_tar, devkit = photographs.imagenet(tmp_path / "archives")
    index, network = tmp_path / "index", inception_net.save(tmp_path / "net.pt")
    words = ["prepare", str(train_tar), "--val", str(val_tar), "--devkit", str(devkit), "--out", str(index)]
    assert cli.main(words) == 0
    reference = ["--reference", str(index), "--image-size", "32", "--save-reference", str(tmp_path / "ref.npz")]
    assert cli.main(["evaluate", "--features", str(network), *reference]) == 0
    statistics = metrics.load(tmp_path / "ref.npz")
    assert statistics.about["kind"] == "index" and len(statistics.features) == statistics.about["images"] > 20
    reference = ["--reference", str(index), "--save-reference", str(tmp_path / "other.npz")]
    assert cli.main(["evaluate", "--features", str(network), *reference]) == 2
    assert "--image-size" in capsys.readouterr().err


def resampled(image, length, kernel, support):
    """`image` uint8 [n,...] resampled along its first axis as Pillow documents it: weights rounded to 22 bits, the sum to 8."""
    scale = len(image) / length
    stretch = max(scale, 1)
    out = []
    for center in (np.arange(length) + 0.5) * scale:
        first = max(int(center - support * stretch + 0.5), 0)
        last = min(int(center + support * stretch + 0.5), len(image))
        weights = kernel((np.arange(first, last) - center + 0.5) * (1 / stretch))
        fixed = np.trunc(weights / weights.sum() * 2**22 + np.copysign(0.5, weights)).astype(np.int64)
        out.append((np.tensordot(fixed, image[first:last].astype(np.int64), 1) + 2**21 >> 22).clip(0, 255))
    return np.stack(out).astype(np.uint8)


def box(x):
    return ((x > -0.5) & (x <= 0.5)) * 1.0


def cubic(x):  # Keys, a = -1/2
    x = abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def adm_crop(image, size):
    """The resize of ADM's references in numpy: columns before rows, as Pillow."""
    both = lambda image, rows, columns, *kernel: resampled(
        resampled(image.swapaxes(0, 1), columns, *kernel).swapaxes(0, 1), rows, *kernel
    )
    while min(image.shape[:2]) >= 2 * size:
        image = both(image, image.shape[0] // 2, image.shape[1] // 2, box, 0.5)
    rows, columns = (round(length * (size / min(image.shape[:2]))) for length in image.shape[:2])
    image = both(image, rows, columns, cubic, 2)
    top, left = (rows - size) // 2, (columns - size) // 2
    return image[top : top + size, left : left + size]


SIZES = [(40, 48), (143, 95), (131, 260), (24, 24), (17, 33), (129, 64)]  # from below 32 pixels to above four times that


def test_adm_crops_equal_an_independent_implementation():
    generator = np.random.default_rng(0)
    for size in (32, 21, 64):
        for rows, columns in SIZES:
            image = generator.integers(0, 256, (rows, columns, 3), np.uint8)
            assert np.array_equal(image_sets.adm_crop(Image.fromarray(image), size), adm_crop(image, size)), (rows, columns, size)


@pytest.mark.slow
def test_a_published_adm_reference_and_ours_agree(tmp_path, capsys):
    """Of the same pictures, to the rounding of fp32 features, in statistics and in distances; another resize is said."""
    pictures = [image.resize((SIZES[i % 6][1], SIZES[i % 6][0])) for i, image in enumerate(photographs.crops(36))]
    (tmp_path / "d" / "class").mkdir(parents=True)
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / "d" / "class" / f"{i:02d}.png")
    index = prepare.prepare([tmp_path / "d"])
    path = inception_net.save(tmp_path / "net.pt")
    crops = np.stack([adm_crop(np.asarray(picture), 32) for picture in pictures])
    with torch.no_grad():
        x = torch.jit.load(str(path))(torch.from_numpy(crops).permute(0, 3, 1, 2), return_features=True).numpy()
    np.savez(tmp_path / "adm.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False), arr_0=crops)
    np.savez(tmp_path / "samples.npz", arr_0=crops[::-1, ::-1] // 2)
    words = ["evaluate", "--features", str(path), "--image-size", "32"]
    ours = ["--reference", str(index), "--resize", "adm", "--save-reference", str(tmp_path / "ours.npz")]
    assert cli.main([*words, *ours]) == 0
    statistics = metrics.load(tmp_path / "ours.npz")
    assert statistics.about["resize"] == "adm" and statistics.about["images"] == 36
    np.testing.assert_allclose(statistics.mu, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.sigma, np.cov(x, rowvar=False), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(statistics.features, x, rtol=1e-5)
    found = []
    for source, reference in (("samples.npz", "adm.npz"), ("samples.npz", "ours.npz"), (index, "ours.npz")):
        more = [str(tmp_path / source), "--reference", str(tmp_path / reference), "--out", str(tmp_path / "e.json")]
        assert cli.main([*words, *more]) == 0
        found.append(json.loads((tmp_path / "e.json").read_text()))
    assert found[0]["metrics"] == pytest.approx(found[1]["metrics"], rel=1e-4) and found[0]["metrics"]["fid"] > 0.01
    said = [[warning for warning in result["warnings"] if "resized by" in warning] for result in found]
    assert said[:2] == [[], []] and "samples are images resized by dali, the reference by adm" in said[2][0]
    capsys.readouterr()
    assert cli.main([*words, "mnist5k", "--reference", "mnist5k", "--resize", "adm"]) == 2
    assert "--resize adm is for the images of an index" in capsys.readouterr().err
