"""fastdit encode: the moments are the autoencoder's, on any number of ranks and after kills and full disks."""

import errno
import random
import signal
import time

import numpy as np
import pytest
import torch

from commands import complains
from fastdit import autoencoder, cli, files
from fastdit.config import InputError
from fastdit.data import encode
from fastdit.data.latents import read_manifest
from fastdit.data.loader import ImageLoader
from fastdit.distributed import World
from latent_sets import SIZE, config, encode_command, finish, labels_of, moments_of, start

CPU = torch.device("cpu")


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_moments_are_the_autoencoders(index, vae, latents):
    codec = autoencoder.KL(vae, SIZE, CPU)
    rows, found = index.rows("train"), moments_of(latents)
    assert found.dtype == np.float16 and found.shape == (35, 2, 2, 4, 16, 16)
    assert labels_of(latents) == rows["label"].tolist()
    plain = ImageLoader(index, config(index.folder, vae, batch_size=5), World(0, 1, CPU, None))
    for step in range(7):
        images, _ = plain.batch(step, 0)
        chosen = plain.order.images(step, 0)[0]
        for mirrored, view in enumerate((images, images.flip(3))):
            expected = codec.encode(view).numpy()
            # half a unit in the last place of fp16, and as much again for another batch size in fp32
            np.testing.assert_allclose(found[chosen, mirrored], expected, rtol=2**-10, atol=2**-14)


def test_manifest_says_what_it_was_made_of(index, vae, latents):
    manifest = read_manifest(latents)
    assert manifest["autoencoder_sha256"] == autoencoder.KL(vae, SIZE, CPU).sha256() and manifest["scaling_factor"] == 0.5
    assert manifest["images"] == 35 and manifest["classes"] == index.classes and manifest["dtype"] == "fp32"
    assert manifest["exif"] == "applied"
    assert manifest["files"]["moments_00004.npy"]["sha256"] == files.sha256(latents / "moments_00004.npy")
    assert len(manifest["files"]) == 10


@pytest.mark.parametrize(("batch_size", "dtype", "bound"), [(3, "fp32", 2**-9), (3, "bf16", 2**-5)])
def test_another_batch_size_changes_roundings_only(index, vae, latents, tmp_path, record_property, batch_size, dtype, bound):
    """Of the largest moment: fp16 has 11 bits, bf16 8 of which a chain of twenty layers takes some."""
    encode.encode(index.folder, tmp_path / "other", vae, SIZE, dtype, batch_size)
    wanted, found = (moments_of(folder).astype(np.float32) for folder in (latents, tmp_path / "other"))
    difference = np.abs(found - wanted).max() / np.abs(wanted).max()
    record_property("share of the largest moment", float(difference))
    assert difference < bound


@pytest.mark.slow
def test_two_ranks_write_the_same_bytes(index, vae, latents, tmp_path):
    finish(start(encode_command(index.folder, tmp_path / "latents", vae), ranks=2, script=tmp_path / "encode.py"))
    assert contents(tmp_path / "latents") == contents(latents)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(index, vae, latents, tmp_path, seed):
    out, rng, done = tmp_path / "latents", random.Random(seed), []
    for _ in range(2):
        process = start(encode_command(index.folder, out, vae), wait=0.1)
        while not (out / "settings.json").exists():
            assert process.poll() is None, process.stderr.read().decode()[-3000:]
            time.sleep(0.01)
        time.sleep(rng.uniform(0.8, 1.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        done.append({file.name: file.stat().st_mtime_ns for file in out.glob("moments*")})
        assert not (out / "manifest.json").exists()
    with pytest.raises(InputError, match=r"not finished: run the same `fastdit encode` command again"):
        read_manifest(out)
    finish(start(encode_command(index.folder, out, vae)))
    assert contents(out) == contents(latents), f"seed {seed}"
    for before in done:
        assert all(
            (out / name).stat().st_mtime_ns == time for name, time in before.items()
        )  # finished shards were not written again


def test_bad_input_is_one_sentence(index, vae, latents, tmp_path, capsys):
    complains(capsys, encode_command(tmp_path, tmp_path / "out", vae), "is not an index", "fastdit prepare")
    complains(capsys, encode_command(index.folder, tmp_path / "out", str(tmp_path)), "AutoencoderKL")
    complains(
        capsys,
        encode_command(index.folder, tmp_path / "out", "pixels"),
        "--autoencoder pixels has no latents",
        f"data.source={index.folder}",
    )
    complains(capsys, encode_command(index.folder, tmp_path / "out", vae, "--image-size", 33), "multiple of 2")
    complains(capsys, encode_command(index.folder, tmp_path / "out", vae, "--split", "val"), "no images for 'val'")
    complains(capsys, encode_command(index.folder, latents, vae, "--image-size", 64), "image_size=32", "64", "another --out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    complains(capsys, encode_command(index.folder, tmp_path / "full", vae), "is not empty")


def test_a_full_disk_keeps_whole_shards(index, vae, latents, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(encode, "SHARD", 8)
    save, saved = encode.save_array, []

    def full(path, array):
        if len(saved) == 4:
            path.with_name(f".tmp-{path.name}").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        saved.append(path)
        save(path, array)

    monkeypatch.setattr(encode, "save_array", full)
    complains(capsys, encode_command(index.folder, tmp_path / "out", vae), "No space left on device", "kept")
    assert len(list((tmp_path / "out").glob("moments*"))) == 2
    monkeypatch.setattr(encode, "save_array", save)
    assert cli.main(encode_command(index.folder, tmp_path / "out", vae)) == 0
    assert moments_of(tmp_path / "out").tobytes() == moments_of(latents).tobytes()
