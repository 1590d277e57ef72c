"""Batches from an index through DALI: pixels, bits on any number of ranks, flips, bad files."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

import special_images
from benchmarks import photographs
from fastdit.config import InputError, from_dict
from fastdit.data import loader as loader_module
from fastdit.data import pixels, prepare
from fastdit.data.index import open_index
from fastdit.data.loader import ImageLoader, center_crop_decoder, grey
from fastdit.distributed import World


def loader(index, rank=0, ranks=1, size=64, accumulation=1, batch_size=4, **data):
    config = {
        "model": {"preset": "test/4"},
        "train": {"batch_size": batch_size, "accumulation": accumulation},
        "data": {"image_size": size, **data},
    }
    return ImageLoader(index, from_dict(config), World(rank, ranks, torch.device("cpu"), None))


def torchvision(data: bytes, size: int) -> np.ndarray:
    """Resize(size, bicubic), CenterCrop(size) of torchvision's PIL path, uint8 [S,S,3]."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    w, h = image.size
    w, h = (size, int(size * h / w)) if w < h else (int(size * w / h), size)
    top, left = round((h - size) / 2), round((w - size) / 2)
    return np.asarray(image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size)))


def test_pixels_are_those_of_pillow(index, record_property):
    """Mean difference at most 0.5, largest at most 10 of 255 levels: for each image, the odd ones too."""
    batches, rows = loader(index, size=256, batch_size=5), index.rows("train")
    seen = {}
    for step in range(7):
        chosen = batches.order.images(step, 0)[0]
        images, labels = batches.batch(step, 0)
        assert images.shape == (5, 3, 256, 256) and images.dtype == torch.float32
        assert labels.tolist() == rows["label"][chosen].tolist()
        for image, row in zip(images, rows[chosen], strict=True):
            levels = ((image + 1) * 127.5).permute(1, 2, 0).numpy()
            difference = np.abs(levels - torchvision(index.read(row), 256))
            seen[row["name"].decode()] = difference.mean(), difference.max()
    assert len(seen) == 35
    for word in ("png", "cmyk", "grey", "progressive", "trailing"):
        assert any(word in name for name in seen)
    record_property("largest mean and maximum difference in levels", np.array(list(seen.values())).max(0).tolist())
    assert max(mean for mean, _ in seen.values()) <= 0.5 and max(largest for _, largest in seen.values()) <= 10


def test_grey_images_are_the_luma_of_the_others(index):
    """As Pillow's to a level, and of grey pixels exactly their value."""
    (colour, _), (one, _) = loader(index).batch(0, 0), loader(index, grey=True).batch(0, 0)
    assert one.shape == (4, 1, 64, 64)
    level = lambda images: ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for image, luma in zip(level(colour), level(one), strict=True):
        assert np.abs(np.asarray(Image.fromarray(image).convert("L"), np.int16) - luma[..., 0]).max() <= 1
    pixels = torch.rand(2, 1, 8, 8)
    assert torch.equal(grey(pixels.expand(-1, 3, -1, -1)), pixels)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_ranks_micro_steps_and_resumes_serve_the_same_bits(index, crop):
    options = {"crop": crop, "flip": True}
    whole = loader(index, batch_size=8, **options)
    steps = range(3, 7)  # past the end of the first epoch, which has 4 steps
    wanted = {step: whole.batch(step, 0) for step in range(7) if step in steps or whole.batch(step, 0) is None}
    for ranks, accumulation in ((1, 1), (2, 1), (1, 2), (2, 2)):
        batch_size = 8 // ranks // accumulation
        loaders = [loader(index, r, ranks, accumulation=accumulation, batch_size=batch_size, **options) for r in range(ranks)]
        for step in steps:  # begins in mid-epoch, as a resume does
            parts = {one.order.first_index(micro): one.batch(step, micro) for micro in range(accumulation) for one in loaders}
            for i in (0, 1):
                assert torch.equal(torch.cat([parts[first][i] for first in sorted(parts)]), wanted[step][i])


def test_flips_mirror_half_of_the_images_and_change_with_the_epoch(index):
    plain, flipping = loader(index, batch_size=35), loader(index, batch_size=35, flip=True)
    mirrored = []
    for step in (0, 1):
        as_it_is, flipped = plain.batch(step, 0)[0], flipping.batch(step, 0)[0]
        same = (as_it_is == flipped).flatten(1).all(1)
        assert torch.equal(flipped[~same], as_it_is[~same].flip(3))
        order = plain.order.images(step, 0)[0]
        mirrored.append({int(i) for i in order[~same.numpy()]})
    assert 8 < len(mirrored[0]) < 27 and mirrored[0] != mirrored[1]


def test_a_batch_stays_what_it_was_while_dali_runs_ahead(index):
    batches = loader(index)
    held, _ = batches.batch(0, 0)
    copy = held.clone()
    for step in range(1, 8):
        batches.batch(step, 0)
    assert torch.equal(held, copy)


def index_of(folder, files):
    """Return the index of encoded images by name, in one class."""
    (folder / "class").mkdir(parents=True)
    for name, data in files.items():
        (folder / "class" / name).write_bytes(data)
    return open_index(prepare.prepare([folder]))


def center_crops(index, size, **options):
    """Return the center-cropped images of an index by name, in levels, fp32 [H,W,3]."""
    rows = index.rows("train")
    decoder = center_crop_decoder(index, rows, [np.arange(len(rows))], len(rows), size, torch.device("cpu"), 0, **options)
    images = ((decoder.next()[0] + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    return {row["name"].decode(): image for row, image in zip(rows, images, strict=True)}


def test_pixels_are_those_of_the_contract(tmp_path):
    """In full size, for each format, depth and kind of transparency: nothing is cropped or resized."""
    made = {**special_images.opaque(), **special_images.transparent()}
    files = {f"{i:02d}_{name}": data for i, (name, (data, _)) in enumerate(made.items())}
    jpegs = (photographs.encoded(special_images.photograph(48, 48), **options) for options in ({}, {"progressive": True}))
    files |= {f"{i}.jpg": data for i, data in enumerate(jpegs)}
    assert len(files) > 36
    for name, image in center_crops(index_of(tmp_path / "d", files), 48).items():
        wanted = np.asarray(pixels.load(files[name], exif=True).convert("RGB"))
        assert np.abs(image - wanted).max() < 1e-3, name  # fp32's rounding of levels in [-1,1]


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """Two indexes: of photographs in each orientation and format, odd sizes, and of the same upright, without EXIF."""
    folder, by_kind = tmp_path_factory.mktemp("turned"), {"turned": {}, "upright": {}}
    for orientation in range(1, 9):
        for i, form in enumerate(("png", "tiff", "webp", "jpeg")):
            upright = np.asarray(special_images.photograph(97 + orientation, 70 - 11 * i, i))
            as_stored = special_images.stored(upright, orientation)
            tag = Image.Exif()
            tag[0x112] = orientation
            lossless = {"lossless": True} if form == "webp" else {}
            name, data = f"{orientation}{i}.", special_images.encode(as_stored, form, exif=tag, **lossless)
            by_kind["turned"][name + form] = data
            by_kind["upright"][name + "png"] = special_images.encode(pixels.load(data, exif=True), "PNG")
    return [index_of(folder / kind, files) for kind, files in by_kind.items()]


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"crop": "random"}, {"crop": "random", "flip": True}])
def test_turned_images_are_served_as_upright_ones(turned, options):
    turned, upright = (loader(index, batch_size=8, size=32, **options) for index in turned)
    seen = []
    for step in range(12):  # three epochs
        (images, _), (wanted, _) = turned.batch(step, 0), upright.batch(step, 0)
        difference = (images - wanted).abs() * 127.5
        assert difference.max() < 1.1 and difference.mean() < 0.01  # DALI sums in another order: a level is rounded differently
        seen.append(images)
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) > (32 if options else 31)


def test_turned_images_are_those_of_pillow(turned):
    index, _ = turned
    crops, rows = center_crops(index, 32), index.rows("train")
    for row in rows:
        upright = special_images.encode(pixels.load(index.read(row), exif=True), "PNG")
        assert np.abs(crops[row["name"].decode()] - torchvision(upright, 32)).mean() <= 1


def test_orientations_are_ignored_if_asked_and_in_imagenet(turned, monkeypatch):
    turned, _ = turned
    stored = center_crops(turned, 32, exif="ignore")
    for row in turned.rows("train"):
        data = pixels.load(turned.read(row), exif=False)
        wanted = torchvision(special_images.encode(data, "PNG"), 32)
        assert np.abs(stored[row["name"].decode()] - wanted).mean() <= 1
    ignoring = loader(turned, batch_size=8, size=32, exif="ignore")
    shown = center_crops(turned, 32)
    monkeypatch.setattr(loader_module, "are_imagenet", lambda classes: classes == ["class"])
    of_imagenet = loader(turned, batch_size=8, size=32)
    assert torch.equal(ignoring.batch(0, 0)[0], of_imagenet.batch(0, 0)[0])
    again = center_crops(turned, 32)
    assert all(np.array_equal(again[name], stored[name]) for name in again)
    assert sum(not np.array_equal(again[name], shown[name]) for name in again) == 28  # all but orientation 1


def test_a_bad_file_that_pillow_decodes_is_named(tmp_path, capsys):
    files = {f"{i}.png": special_images.transparent()["rgba.png"][0] for i in range(4)}
    index = index_of(tmp_path / "d", files)
    path = tmp_path / "d" / "class" / "2.png"
    status = path.stat()
    path.write_bytes(path.read_bytes()[:100] + bytes(status.st_size - 100))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    batches = loader(index, batch_size=4, size=32)
    images, _ = batches.batch(0, 0)
    assert (images[0] == images).all()
    assert f"bad file {path}: " in capsys.readouterr().err


@pytest.fixture
def damaged(tmp_path):
    """An index, and a function that damages an image of it in its archive without changing the archive's size or time."""
    train = photographs.imagenet(tmp_path)[0]
    index = open_index(prepare.prepare([train]))

    def damage(image):
        row, time = index.rows("train")[image], train.stat().st_mtime_ns
        with train.open("r+b") as file:
            file.seek(int(row["offset"]) + 10)
            file.write(bytes(int(row["bytes"]) - 10))
        os.utime(train, ns=(time, time))
        return index.name(row)

    return index, damage


def test_a_bad_file_is_named_and_the_next_one_takes_its_place(damaged, capsys):
    index, damage = damaged
    whole = loader(index, batch_size=7, flip=True)
    wanted = {}
    for step in range(10):
        chosen, epoch = whole.order.images(step, 0)
        images, labels = whole.batch(step, 0)
        wanted |= {(epoch, int(i)): (image, int(label)) for i, image, label in zip(chosen, images, labels, strict=True)}
    names = [damage(9), damage(10)]
    for begin in (0, 3):  # a resumed run serves the same
        capsys.readouterr()
        batches = loader(index, batch_size=7, flip=True)
        for step in range(begin, 10):
            images, labels = batches.batch(step, 0)
            chosen, epoch = batches.order.images(step, 0)
            for i, image, label in zip(chosen, images, labels, strict=True):
                expected, expected_label = wanted[epoch, 11 if i in (9, 10) else int(i)]
                assert torch.equal(image, expected) and label == expected_label
        said = capsys.readouterr().err
        assert all(said.count(f"bad file {name}: ") == 1 for name in names) and said.count("takes its place") == 2


def test_too_many_bad_files_end_the_run(damaged):
    index, damage = damaged
    damage(3), damage(20)
    batches = loader(index, batch_size=7, max_bad_files=1)
    with pytest.raises(InputError, match=r"more than data.max_bad_files=1 files"):
        for step in range(5):
            batches.batch(step, 0)


def test_an_archive_that_shrinks_is_noticed(damaged):
    index, _ = damaged
    batches = loader(index, batch_size=7, max_bad_files=0)
    os.truncate(index.sources[0].path, 4096)
    with pytest.raises(InputError, match=r"max_bad_files=0"):
        batches.batch(0, 0)


def test_wrong_configs_are_one_sentence(index):
    with pytest.raises(InputError, match=r"batch of 36 images"):
        loader(index, batch_size=36)
    config = from_dict({"model": {"preset": "test/4", "num_classes": 4}})
    with pytest.raises(InputError, match=r"model.num_classes=4.*set model.num_classes=5"):
        ImageLoader(index, config, World(0, 1, torch.device("cpu"), None))
    with pytest.raises(InputError, match=r"no images for 'val'"):
        index.rows("val")
