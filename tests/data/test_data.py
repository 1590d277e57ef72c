"""What data.source may name, and the contract of every loader."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import latent_sets
from fastdit import autoencoder, data
from fastdit.config import InputError, from_dict
from fastdit.data import builtin
from fastdit.data.index import open_index
from fastdit.distributed import World

CPU = torch.device("cpu")


def test_a_source_that_is_not_there_is_one_sentence():
    with pytest.raises(InputError, match=r"data.source=nowhere/imagenet.tar is neither 'mnist5k' nor an existing path"):
        data.locate(from_dict({"data": {"source": "nowhere/imagenet.tar"}}))


def test_digits_as_jpegs_go_through_prepare_and_dali(tmp_path):
    """Class folders of JPEGs, named as training data without an index: it is made; the model learns from them."""
    images, labels = builtin.mnist5k("train")
    for digit in range(10):
        (tmp_path / "digits" / str(digit)).mkdir(parents=True)
        for i in np.flatnonzero(labels == digit)[:40]:
            Image.fromarray(images[i, :, :, 0]).save(tmp_path / "digits" / str(digit) / f"{i}.jpg", quality=95)
    channels = ["model.in_channels=3", "model.input_size=32", "train.batch_size=16", "train.total_steps=40", "train.lr=3e-3"]
    losses = latent_sets.train(tmp_path / "runs", f"data.source={tmp_path / 'digits'}", *channels)
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:3])
    path = data.locate(from_dict({"data": {"source": str(tmp_path / "digits")}}))
    assert path == tmp_path / "digits.index" and open_index(path).classes == [str(i) for i in range(10)]
    settings = from_dict({"model": {"preset": "test/4"}, "train": {"batch_size": 16}})
    served, digits = data.load(settings, path, World(0, 1, CPU, None)).batch(0, 0)
    rows = open_index(path).rows("train")
    originals = {(int(row["label"]), i): int(row["name"].decode()[:-4]) for i, row in enumerate(rows)}
    order = data.load(settings, path, World(0, 1, CPU, None)).order.images(0, 0)[0]
    for image, digit, i in zip(served, digits, order, strict=True):
        original = torch.from_numpy(images[originals[int(digit), int(i)]]).permute(2, 0, 1).float() / 127.5 - 1
        assert (image - original).abs().mean() < 0.05 and torch.equal(image[0], image[1])


def test_settings_of_the_data_are_checked():
    for given, message in [
        ({"crop": "middle"}, r"data.crop=middle is unknown"),
        ({"resident": "maybe"}, r"data.resident=maybe is unknown"),
        ({"threads": 0}, r"data.threads=0 must be at least 1"),
        ({"max_bad_files": -1}, r"data.max_bad_files=-1 must be at least 0"),
    ]:
        with pytest.raises(InputError, match=message):
            from_dict({"data": given})
    assert from_dict({"data": {"resident": True}}).data.resident == "true"
    assert dataclasses.asdict(from_dict({}).data)["resident"] == "auto"


def test_every_loader_keeps_the_contract(index, latents, vae):
    """Every member of Loader, and the shapes and dtypes of a batch; a codec takes what the loader serves."""
    digits = from_dict({"model": {"preset": "test/4"}, "train": {"batch_size": 4}})
    for config, path, channels in (
        (digits, None, 1),
        (latent_sets.config(index.folder, vae), index.folder, 3),
        (latent_sets.config(latents, vae), latents, 3),
    ):
        loader = data.load(config, path, World(0, 1, CPU, None))
        members = {*data.Loader.__annotations__, "batch"}
        assert len(members) == 7 and all(hasattr(loader, name) for name in members)
        assert loader.channels == channels and (loader.manifest is not None) == (path == latents)
        assert len(loader.class_names) == len(loader.class_counts)
        x, labels = loader.batch(0, 0)
        assert labels.shape == (4,) and labels.dtype == torch.int64 and len(x) == 4
        codec = autoencoder.load(config.data, config.model, loader.channels, CPU, loader.manifest)
        noise = torch.zeros(4, codec.channels, codec.size, codec.size)
        x0 = codec.posterior_sample(x if loader.manifest else codec.encode(x), noise)
        assert x0.shape == noise.shape and x0.dtype == torch.float32
        assert x.dtype == (torch.float16 if loader.manifest else torch.float32)
