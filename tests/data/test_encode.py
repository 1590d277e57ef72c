"""fastdit encode: the moments are the autoencoder's, on any number of ranks and after kills and full disks; whose set it is."""

import errno
import fcntl
import json
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

import autoencoders
from commands import complains, snapshot
from fastdit import autoencoder, cli, files
from fastdit.config import InputError
from fastdit.data import encode, prepare
from fastdit.data.index import open_index
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
def test_two_ranks_without_internet_stop_together(index, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    command = encode_command(index.folder, tmp_path / "latents", "owner/name")
    process = start(command, ranks=2, script=tmp_path / "encode.py")
    _, problems = process.communicate(timeout=300)
    assert process.returncode != 0 and b"`hf download owner/name" in problems and b"InputError" not in problems, (
        problems
    )  # no traceback
    assert not (tmp_path / "latents").exists()


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


@pytest.fixture
def pictures(tmp_path):
    """A folder of two class folders of three pictures each."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            save_picture(tmp_path / "data" / name / f"{i}.png", rng)
    return tmp_path / "data"


def save_picture(path, rng):
    Image.fromarray(rng.integers(0, 256, (36, 40, 3), np.uint8)).save(path)


def test_changed_pictures_or_classes_are_not_the_old_latents(pictures, vae, tmp_path, capsys):
    """Finished and unfinished sets are kept and named; the same pictures elsewhere and another spelling are the same set."""
    first, out = tmp_path / "index", tmp_path / "latents"
    prepare.prepare([pictures], first)
    assert cli.main(encode_command(first, out, vae)) == 0
    assert read_manifest(out)["index_sha256"] == open_index(first).digest("train")
    before = snapshot(out)
    shutil.copytree(pictures, tmp_path / "copy")
    prepare.prepare([tmp_path / "copy"], tmp_path / "index_of_copy")
    shutil.copytree(vae, tmp_path / "vae_of_copy")
    assert cli.main(encode_command(tmp_path / "index_of_copy", out, str(tmp_path / "vae_of_copy"))) == 0
    assert snapshot(out) == before
    save_picture(pictures / "cat" / "1.png", np.random.default_rng(1))
    for index in ("replaced", "renamed"):
        prepare.prepare([pictures], tmp_path / index)
        complains(capsys, encode_command(tmp_path / index, out, vae), str(out), "other images or classes", "another --out")
        shutil.rmtree(pictures)
        shutil.copytree(tmp_path / "copy", pictures)
        (pictures / "cat").rename(pictures / "lynx")
    assert snapshot(out) == before
    (out / "manifest.json").unlink()
    prepare.prepare([pictures], tmp_path / "again")
    complains(capsys, encode_command(tmp_path / "again", out, vae), "other images or classes")
    other = autoencoders.tiny(tmp_path / "other", seed=1)
    complains(capsys, encode_command(tmp_path / "index_of_copy", out, str(other)), "was begun with autoencoder", "another --out")


def test_a_set_without_the_indexs_digest_still_counts(pictures, vae, tmp_path, capsys):
    """As fastdit wrote it before: the same command does nothing, and what can be seen to differ is refused."""
    index, out = tmp_path / "index", tmp_path / "latents"
    prepare.prepare([pictures], index)
    assert cli.main(encode_command(index, out, vae)) == 0
    for name in ("settings.json", "manifest.json"):
        values = json.loads((out / name).read_text())
        del values["index_sha256"]
        (out / name).write_text(json.dumps(values))
    before = snapshot(out)
    assert cli.main(encode_command(index, out, vae)) == 0 and snapshot(out) == before
    (pictures / "cat").rename(pictures / "lynx")
    shutil.rmtree(index)
    prepare.prepare([pictures], index)
    complains(capsys, encode_command(index, out, vae), "other names of classes")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"\xff\xfe"])
def test_settings_of_another_shape_are_one_sentence(index, vae, latents, tmp_path, capsys, text):
    for name in ("settings.json", "manifest.json"):
        shutil.copytree(latents, tmp_path / name)
        (tmp_path / name / name).write_bytes(text)
        complains(capsys, encode_command(index.folder, tmp_path / name, vae), f"{tmp_path / name} is damaged", name, "delete it")


def test_two_encoders_in_one_folder(index, vae, latents, tmp_path, capsys):
    """The second one stops; it may have the folder once the first has gone. A finished set needs no lock."""
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        complains(capsys, encode_command(index.folder, out, vae), f"another process encodes into {out}", "another --out")
    assert [path.name for path in out.iterdir()] == [".lock"]
    assert cli.main(encode_command(index.folder, out, vae)) == 0
    with (out / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert cli.main(encode_command(index.folder, out, vae)) == 0


def test_ctrl_c_keeps_whole_shards(index, vae, latents, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "SHARD", 8)
    save, saved = encode.save_array, []

    def interrupt(path, array):
        if len(saved) == 4:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, array)

    monkeypatch.setattr(encode, "save_array", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        encode.encode(index.folder, tmp_path / "out", vae, SIZE, "fp32", 4)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.npy")) == sorted(path.name for path in saved)
    monkeypatch.setattr(encode, "save_array", save)
    assert cli.main(encode_command(index.folder, tmp_path / "out", vae)) == 0, caught  # the lock is free though the error lives
    assert contents(tmp_path / "out") == contents(latents)
