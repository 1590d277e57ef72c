"""Batches from an index through DALI: pixels, order, crops, bad files."""

import io
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import photographs
from fastdit import kernels
from fastdit.config import InputError, from_dict
from fastdit.data import prepare
from fastdit.data.index import open_index
from fastdit.data.loader import ImageLoader
from fastdit.data.order import AREA, RATIO, Order, center_crops
from fastdit.distributed import World
from fastdit.flow import Stream


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """5 classes of 6 images, 5 odd ones that can be decoded."""
    folder = tmp_path_factory.mktemp("imagenet")
    return open_index(prepare.prepare([photographs.imagenet(folder)[0]], folder / "index"))


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


def test_pixels_are_those_of_pillow(index):
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
    print("largest mean and maximum difference in levels:", *np.array(list(seen.values())).max(0))
    assert max(mean for mean, _ in seen.values()) <= 0.5 and max(largest for _, largest in seen.values()) <= 10


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


def test_an_epoch_serves_every_image_once(index):
    batches = loader(index, batch_size=7)
    epochs = [np.concatenate([batches.order.images(5 * epoch + step, 0)[0] for step in range(5)]) for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(35)) and epochs[0].tolist() != epochs[1].tolist()


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


def test_random_crops_follow_torchvisions_rules(index):
    config = from_dict({"train": {"batch_size": 1}})
    order = Order(10_000, config, World(0, 1, torch.device("cpu"), None))
    images = np.arange(10_000)
    heights, widths = np.full(10_000, 375), np.full(10_000, 500)
    start, end = order.random_crops(images, 0, heights, widths)
    extent = (end - start).astype(np.float64)
    assert (start >= 0).all() and (end <= [375, 500]).all() and (start == np.rint(start)).all() and (extent >= 1).all()
    area, ratio = extent.prod(1) / (375 * 500), extent[:, 1] / extent[:, 0]
    assert AREA[0] * 0.97 < area.min() and area.max() <= 1 and 0.4 < area.mean() < 0.54  # 0.54: before large ones did not fit
    assert RATIO[0] * 0.97 < ratio.min() and ratio.max() < RATIO[1] * 1.03
    # one image at a time, as torchvision writes it
    u = kernels.counter_uniform(0, Stream.CROP, torch.arange(300), (10, 4)).double().tolist()
    for image, tries in enumerate(u):
        for a, r, y, x in tries:
            area, ratio = 375 * 500 * (0.08 + 0.92 * a), math.exp(math.log(3 / 4) + math.log(16 / 9) * r)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= 500 and 0 < h <= 375:
                top, left = int(y * (375 - h + 1)), int(x * (500 - w + 1))
                break
        assert start[image].tolist() == [top, left] and end[image].tolist() == [top + h, left + w]
    assert not np.array_equal(order.random_crops(images, 1, heights, widths)[0], start)
    # nothing fits into a strip: its middle, at the nearest ratio
    start, end = order.random_crops(images[:2], 0, np.array([10, 1000]), np.array([1000, 10]))
    assert start.tolist() == [[0, 493], [493, 0]] and end.tolist() == [[10, 506], [506, 10]]


def test_center_crops_are_torchvisions_integers():
    for h, w, size in [(375, 500, 256), (500, 333, 256), (500, 375, 224), (64, 64, 64), (1, 7, 32), (300, 1001, 256)]:
        oh, ow = (size, int(size * w / h)) if h < w else (int(size * h / w), size)
        top, left = round((oh - size) / 2), round((ow - size) / 2)
        start, end = center_crops(np.array([h]), np.array([w]), size)
        np.testing.assert_allclose(start[0], [top * h / oh, left * w / ow], rtol=1e-6)
        np.testing.assert_allclose(end[0], [(top + size) * h / oh, (left + size) * w / ow], rtol=1e-6)


def test_a_batch_stays_what_it_was_while_dali_runs_ahead(index):
    batches = loader(index)
    held, _ = batches.batch(0, 0)
    copy = held.clone()
    for step in range(1, 8):
        batches.batch(step, 0)
    assert torch.equal(held, copy)


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
