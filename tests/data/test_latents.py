"""Batches of cached latents, and training on them."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

import autoencoders
from commands import complains
from fastdit import autoencoder, checkpoint, cli, kernels
from fastdit.config import InputError
from fastdit.data.latents import LatentLoader, open_latents, read_manifest
from fastdit.distributed import World
from fastdit.sampling.sampler import Sampler
from latent_sets import SIZE, config, encode_command, moments_of, train

CPU = torch.device("cpu")


@pytest.mark.parametrize("resident", ["true", "false"])
def test_batches_are_the_orders_moments(index, vae, latents, resident):
    """And the same at 2 ranks, with accumulation and from the middle on."""
    wanted, rows = moments_of(latents), index.rows("train")
    for ranks, accumulation in ((1, 1), (2, 2)):
        settings = config(latents, vae, {"resident": resident, "flip": True}, batch_size=2, accumulation=accumulation)
        for rank in range(ranks):
            loader = LatentLoader(latents, settings, World(rank, ranks, CPU, None))
            assert (loader.resident is not None) == (resident == "true")
            for step in (0, 1, 2, 7, 9, 30):
                for micro in range(accumulation):
                    moments, labels = loader.batch(step, micro)
                    chosen, epoch = loader.order.images(step, micro)
                    flips = loader.order.flips(torch.from_numpy(chosen), epoch).long().numpy()
                    assert np.array_equal(moments.numpy(), wanted[chosen, flips])
                    assert labels.tolist() == rows["label"][chosen].tolist()


def test_a_posterior_sample_is_drawn_afresh(vae, latents):
    loader = LatentLoader(latents, config(latents, vae), World(0, 1, CPU, None))
    codec = autoencoder.KL(vae, SIZE, CPU)
    moments, _ = loader.batch(0, 0)
    noise = [kernels.counter_normal(0, 3, torch.arange(4) + (step << 32), (4, 16, 16)) for step in (0, 1)]
    one, other = (codec.posterior_sample(moments, n) for n in noise)
    mean, logvar = moments.float().unbind(1)
    torch.testing.assert_close(one, (mean + (0.5 * logvar).exp() * noise[0]) * 0.5)
    assert (one != other).all()


def test_training_on_latents_online_and_resumed(index, vae, latents, tmp_path):
    """The same losses with latents in memory or not, and after a resume; online the same to the moments' fp16 rounding."""
    given = [f"data.autoencoder={vae}", "data.flip=true", "train.total_steps=10", "train.precision=fp32"]
    resident = train(tmp_path / "a", f"data.source={latents}", *given)
    assert len(resident) == 10
    assert train(tmp_path / "b", f"data.source={latents}", "data.resident=false", *given) == resident
    online = train(tmp_path / "c", f"data.source={index.folder}", *given)
    np.testing.assert_allclose(online, resident, rtol=2**-9)
    for source, folder, wanted in ((latents, "d", resident), (index.folder, "e", online)):
        train(tmp_path / folder, f"data.source={source}", *given, "train.total_steps=7")  # in mid-epoch, of 8 steps
        assert train(tmp_path / folder, f"data.source={source}", *given) == wanted


def test_class_names_are_in_the_checkpoint(latents, vae, tmp_path, capsys):
    train(tmp_path, f"data.source={latents}", f"data.autoencoder={vae}", "train.total_steps=1")
    state = checkpoint.open_checkpoint(tmp_path / "r").state
    names = read_manifest(latents)["classes"]
    assert state.class_names == names
    picture = tmp_path / "named.png"
    assert cli.main(["sample", "--checkpoint", str(tmp_path / "r"), "--class", f"{names[2]},0", "--out", str(picture)]) == 0
    assert re.search(rf"\n\s*2\s+{names[2]} .*\n\s*0\s+{names[0]} ", capsys.readouterr().out)
    assert cli.main(["sample", "--checkpoint", str(tmp_path / "r"), "--class", "9", "--out", str(picture)]) == 0  # without a name


def test_wrong_latents_are_one_sentence(latents, vae, tmp_path, capsys):
    other = autoencoders.tiny(tmp_path / "other", seed=1)
    base = ["train", "model.preset=test/4", "model.in_channels=4", "model.input_size=16", "train.batch_size=4"]
    base += [f"data.source={latents}", f"train.out={tmp_path / 'out'}"]
    size = f"data.image_size={SIZE}"
    complains(capsys, [*base, size, f"data.autoencoder={other}"], str(other), "not the one that the latents were made with", vae)
    ignoring = [*base, size, f"data.autoencoder={vae}", "data.exif=ignore"]
    complains(capsys, ignoring, "data.exif=ignore", "orientation applied", "leave it out")
    complains(capsys, [*base, size], "holds latents", f"set data.autoencoder={vae}")
    complains(capsys, [*base, "data.image_size=64", f"data.autoencoder={vae}"], "data.image_size=64", "set data.image_size=32")
    copy = tmp_path / "copy"
    shutil.copytree(latents, copy)
    with (copy / "moments_00001.npy").open("r+b") as file:
        file.truncate(1000)
    complains(capsys, [*base, f"data.source={copy}", size, f"data.autoencoder={vae}"], "moments_00001.npy is missing or truncated")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "channels", "size"),
    [
        pytest.param("f32", 32, 8, marks=pytest.mark.slow),
        pytest.param("f16d32", 32, 16, marks=pytest.mark.slow),
        ("distilled", 4, 128),
    ],
)
def test_other_autoencoders_from_images_to_samples(index, tmp_path, kind, channels, size):
    """A deep-compression autoencoder (8x8x32 at 256 pixels), one of VA-VAE's kind (16x16x32) and a distilled one: encode, train 20
    steps, resume to the same losses, sample; online the same to the moments' fp16 rounding."""
    if kind == "f32":
        vae = autoencoders.dc(tmp_path / "vae", depth=6, latent_channels=32)
    else:
        vae = {"f16d32": autoencoders.f16d32, "distilled": autoencoders.distilled}[kind](tmp_path / "vae")
    latents = tmp_path / "latents"
    assert cli.main(encode_command(index.folder, latents, str(vae), "--image-size", 256)) == 0
    shape = (channels, size, size)
    assert moments_of(latents).shape == (35, 2, *((2, *shape) if kind == "f16d32" else shape))
    given = [f"data.autoencoder={vae}", "data.image_size=256", "data.flip=true", "train.precision=fp32", "train.total_steps=20"]
    given += [f"model.in_channels={channels}", f"model.input_size={size}", f"model.patch_size={max(1, size // 16)}"]
    wanted = train(tmp_path / "a", f"data.source={latents}", *given)
    assert len(wanted) == 20
    train(tmp_path / "b", f"data.source={latents}", *given, "train.total_steps=13")
    assert train(tmp_path / "b", f"data.source={latents}", *given) == wanted
    if kind != "distilled":  # whose images of 128x128 latents take long
        online = train(tmp_path / "c", f"data.source={index.folder}", *given, "train.total_steps=3")
        np.testing.assert_allclose(online, wanted[:3], rtol=2**-9)
    images = Sampler(tmp_path / "b" / "r").images("1", steps=2)
    assert images.shape == (1, 256, 256, 3) and len(np.unique(images)) > 50


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("no files", {"files": None}), ("a list of files", {"files": ["moments_00000.npy"]}),
        ("a size of text", {"image_size": "32"}),
        ("classes of numbers", {"classes": [1, 2]}), ("no hash", {"autoencoder_sha256": None}),
        ("no bytes", {"files": {"moments_00000.npy": {}}}), ("nothing", {"files": {}}), ("another count", {"images": 36}),
    ],
)  # fmt: skip
def test_manifests_of_another_shape_are_one_sentence(latents, vae, tmp_path, capsys, name, entries):
    copy = tmp_path / "copy"
    shutil.copytree(latents, copy)
    (copy / "manifest.json").write_text(json.dumps(read_manifest(latents) | entries))
    words = ["train", "model.preset=test/4", "model.in_channels=4", "model.input_size=16", f"train.out={tmp_path / 'out'}"]
    words += [f"data.source={copy}", f"data.autoencoder={vae}", f"data.image_size={SIZE}"]
    complains(capsys, words, f"latent set {copy} is damaged", "manifest.json", "delete it")


def test_a_file_of_the_right_size_that_holds_no_array(latents, vae, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(latents, copy)
    (copy / "labels_00001.npy").write_bytes(b"x" * (copy / "labels_00001.npy").stat().st_size)
    with pytest.raises(InputError, match="is damaged"):
        open_latents(copy)
