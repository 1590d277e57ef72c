"""Validation while training: held-out loss and FID in the log, the same in every run, from every source, by the fast path."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import autoencoders
import fast_paths
from benchmarks import photographs
from fastdit import autoencoder, cli
from fastdit.config import InputError, parse
from fastdit.distributed import World
from fastdit.training.loop import train
from fastdit.training.validation import _held_out
from runs import TINY_RUN

VALIDATION = ["validate.steps=2", "validate.images=20"]
FID = ["validate.features=digits", "validate.samples=20"]


def validations(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "val_loss" in line]


def test_validation_is_logged_drawn_and_deterministic(tmp_path):
    train(parse(None, [*TINY_RUN, *VALIDATION, *FID, f"train.out={tmp_path}", "train.name=r"]))
    first, second = validations(tmp_path / "r")
    assert [first["step"], second["step"]] == [2, 4] and all(len(line["val_losses"]) == 8 for line in (first, second))
    assert all(line["val_loss"] == pytest.approx(np.mean(line["val_losses"])) for line in (first, second))
    assert second["val_loss"] < first["val_loss"] and first["fid"] > 1 and "accuracy" in first
    assert "accuracy_by_class" not in first
    assert Image.open(tmp_path / "r/validation.png").size == (1620, 480)
    # the same training once more, without FID: the same losses to the bit
    train(parse(None, [*TINY_RUN, *VALIDATION, f"train.out={tmp_path}", "train.name=again", "train.total_steps=2"]))
    (line,) = validations(tmp_path / "again")
    assert line["val_losses"] == first["val_losses"] and "fid" not in line


def test_fid_and_previews_are_drawn_by_the_fast_path(tmp_path, monkeypatch):
    """The numbers of the plain path within what the features' distances allow; previews to one level of 255."""
    settings = [*TINY_RUN, *VALIDATION, *FID, "train.total_steps=2", "train.sample_steps=2", f"train.out={tmp_path}"]
    features = fast_paths.recorded_features(monkeypatch)
    train(parse(None, [*settings, "train.name=plain"]))
    calls = fast_paths.install(monkeypatch)
    train(parse(None, [*settings, "train.name=fast"]))
    assert calls.prepared == 2 and calls.velocity == 2 * 2  # a preview and a validation, one batch of two steps each
    (plain,), (fast,) = validations(tmp_path / "plain"), validations(tmp_path / "fast")
    assert abs(plain["fid"] ** 0.5 - fast["fid"] ** 0.5) <= fast_paths.root_distance_bound(*features)
    assert plain["val_losses"] == fast["val_losses"]
    grids = [np.asarray(Image.open(tmp_path / name / "samples/step_00000002.png")).astype(int) for name in ("plain", "fast")]
    assert np.abs(grids[0] - grids[1]).max() <= 1


@pytest.mark.slow
def test_held_out_images_of_an_index_and_of_its_latents(tmp_path):
    """The same latents to fp16, on one rank or shared by two."""
    train_tar, val_tar, devkit = photographs.imagenet(tmp_path / "archives")
    index, latents, vae = tmp_path / "index", tmp_path / "val", autoencoders.tiny(tmp_path / "vae")
    prepared = ["prepare", str(train_tar), "--val", str(val_tar), "--devkit", str(devkit), "--out", str(index)]
    encoded = ["encode", str(index), "--split", "val", "--out", str(latents), "--autoencoder", str(vae), "--image-size", "32"]
    for words in (prepared, [*encoded, "--dtype", "fp32"]):
        assert cli.main(words) == 0
    settings = [
        *TINY_RUN, f"data.source={index}", f"data.autoencoder={vae}", "model.in_channels=4", "model.input_size=16",
        "validate.steps=2", "validate.images=8",
    ]  # fmt: skip
    config = parse(None, settings)
    cpu = torch.device("cpu")
    codec = autoencoder.load(config.data, config.model, 3, cpu)
    ids, x0, labels = _held_out(config, index, codec, World(0, 1, cpu, None))
    assert ids.tolist() == list(range(8)) and x0.shape == (8, 4, 16, 16)
    of_latents = parse(None, [*settings, f"validate.source={latents}"])
    for rank in range(2):
        mine, cached, cached_labels = _held_out(of_latents, index, codec, World(rank, 2, cpu, None))
        assert torch.allclose(cached, x0[mine], atol=5e-3) and torch.equal(cached_labels, labels[mine])
        assert mine.tolist() == list(range(rank, 8, 2))
    with pytest.raises(InputError, match=r"set validate\.source to those of"):
        _held_out(config, latents, codec, World(0, 1, cpu, None))
    with pytest.raises(InputError, match="another autoencoder"):
        _held_out(of_latents, index, autoencoder.Pixels(4, 16), World(0, 1, cpu, None))
