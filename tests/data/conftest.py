"""What the data room's tests share: archives in ImageNet's format, their index, a tiny autoencoder and a latent set."""

import os
import random

import pytest

import autoencoders
import latent_sets
from benchmarks import photographs
from fastdit.data import prepare
from fastdit.data.index import open_index


@pytest.fixture
def seed(record_property):
    """Of a test's random choices: FASTDIT_TEST_SEED, or a new one that the report names."""
    chosen = int(os.environ.get("FASTDIT_TEST_SEED", random.randrange(1000)))
    record_property("seed", chosen)
    return chosen


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    """Train archive of 5 classes of 6 images and 9 odd ones, 4 of them bad; validation archive of 8; development kit. Read only."""
    return photographs.imagenet(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(scope="session")
def index(archives, tmp_path_factory):
    """The index of the train archive: 35 images that can be decoded."""
    return open_index(prepare.prepare([archives[0]], tmp_path_factory.mktemp("prepared") / "index"))


@pytest.fixture(scope="session")
def full_index(archives, tmp_path_factory):
    """The index of all archives: 35 training and 8 validation images."""
    train, val, devkit = archives
    return open_index(prepare.prepare([train], tmp_path_factory.mktemp("prepared") / "index", val, devkit))


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    return str(autoencoders.tiny(tmp_path_factory.mktemp("vae")))


@pytest.fixture(scope="session")
def latents(index, vae, tmp_path_factory):
    """The folder of the index's latents, in shards of 8 images."""
    out = tmp_path_factory.mktemp("encoded") / "latents"
    printed = latent_sets.finish(latent_sets.start(latent_sets.encode_command(index.folder, out, vae)))
    assert f"latents: {out} (35 images" in printed
    return out
