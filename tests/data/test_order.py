"""The order of images, and their crops: torchvision's."""

import math

import numpy as np
import pytest
import torch

from fastdit import kernels
from fastdit.config import InputError, from_dict
from fastdit.data.order import AREA, RATIO, Order, center_crops, check_classes
from fastdit.distributed import World
from fastdit.flow import Stream


def order_of(count, rank=0, ranks=1, **train):
    return Order(count, from_dict({"train": train}), World(rank, ranks, torch.device("cpu"), None))


def test_an_epoch_serves_every_image_once():
    order = order_of(35, batch_size=7)
    epochs = [np.concatenate([order.images(5 * epoch + step, 0)[0] for step in range(5)]) for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(35)) and epochs[0].tolist() != epochs[1].tolist()


def test_ranks_and_micro_steps_share_out_the_global_batch():
    """Of 37 images, which leaves a remainder of 5 an epoch; the slices on a device are the same."""
    whole = order_of(37, batch_size=8)
    orders = [order_of(37, rank, 2, batch_size=2, accumulation=2) for rank in (0, 1)]
    for step in (0, 3, 4, 9):
        shares = {order.first_index(micro): order.images(step, micro) for order in orders for micro in (0, 1)}
        assert sorted(shares) == [0, 2, 4, 6] and {epoch for _, epoch in shares.values()} == {step // 4}
        images, epoch = whole.images(step, 0)
        assert np.concatenate([shares[first][0] for first in sorted(shares)]).tolist() == images.tolist() and epoch == step // 4
        assert whole.images_on(torch.device("cpu"), step, 0)[0].tolist() == images.tolist()


def test_orders_of_one_process_do_not_mix():
    """Their permutations are cached by seed, epoch and number of images."""
    images = {
        (count, seed): order_of(count, batch_size=4, seed=seed).images(1, 0)[0].tolist() for count in (40, 41) for seed in (0, 1)
    }
    assert len({tuple(chosen) for chosen in images.values()}) == 4
    for (count, seed), chosen in images.items():
        assert chosen == np.random.default_rng([seed, 0]).permutation(count)[4:8].tolist()


def test_wrong_sizes_are_one_sentence():
    with pytest.raises(
        InputError, match=r"global batch of 36 images .* larger than the 35 images of mnist5k: lower train.batch_size"
    ):
        order_of(35, batch_size=36)
    config = from_dict({"model": {"num_classes": 4}})
    check_classes(4, config)
    with pytest.raises(InputError, match=r"model.num_classes=4.*has class ids up to 4: set model.num_classes=5"):
        check_classes(5, config)


def test_random_crops_follow_torchvisions_rules():
    order = order_of(10_000, batch_size=1)
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


def test_classes_of_the_model_without_images_are_said(capsys):
    config = from_dict({"model": {"num_classes": 10}, "data": {"source": "d"}})
    check_classes(3, config, World(0, 2, torch.device("cpu"), None))
    said = capsys.readouterr().err
    assert "d has 3 classes, and model.num_classes=10: the model's classes from 3 on are never trained" in said
    check_classes(3, config, World(1, 2, torch.device("cpu"), None))  # the first rank has said it
    check_classes(3, config)  # validation images may have fewer
    check_classes(10, config, World(0, 2, torch.device("cpu"), None))
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match=r"model.num_classes=10, but d has class ids up to 10: set model.num_classes=11"):
        check_classes(11, config)
