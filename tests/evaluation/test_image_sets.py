"""Image sets: what they hold, in shares that together are all of it; labels of samples; an index as a reference."""

import numpy as np
import pytest
import torch
from PIL import Image

import inception as inception_net
from benchmarks import photographs
from fastdit import cli
from fastdit.config import InputError
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
