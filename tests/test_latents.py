"""fastdit encode and training on what it wrote."""

import dataclasses
import errno
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import autoencoders
from benchmarks import photographs
from commands import complains, environment
from fastdit import autoencoder, checkpoint, cli, data, files, kernels
from fastdit.config import InputError, from_dict
from fastdit.data import builtin, encode, prefetch, prepare
from fastdit.data.index import open_index
from fastdit.data.latents import LatentLoader, read_manifest
from fastdit.data.loader import ImageLoader
from fastdit.distributed import World

SIZE = 32
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return str(autoencoders.tiny(tmp_path_factory.mktemp("vae")))


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagenet")
    return prepare.prepare([photographs.imagenet(folder)[0]], folder / "index")


def words(index, out, vae, *more):
    small = ["--image-size", SIZE, "--batch-size", 4, "--dtype", "fp32", *more]
    return [str(word) for word in ["encode", index, "--out", out, "--autoencoder", vae, *small]]


# shards of 8 images: 35 images make 5
PATIENT = """
import sys, time
from fastdit import autoencoder, cli
from fastdit.data import encode
encode.SHARD = 8
moments = autoencoder.KL.moments
autoencoder.KL.moments = lambda self, images: (time.sleep(float(sys.argv[1])), moments(self, images))[1]
print("begun", flush=True)
sys.exit(cli.main(sys.argv[2:]))
"""


def patient(command, wait=0.0, ranks=1, **options):
    python = [sys.executable, "-W", "ignore"]
    if ranks > 1:
        python += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        script = options.pop("script")
        script.write_text(PATIENT)
        python += [str(script)]
    else:
        python += ["-c", PATIENT]
    return subprocess.Popen(
        [*python, str(wait), *command], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


@pytest.fixture(scope="module")
def latents(index, vae, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded") / "latents"
    process = patient(words(index, out, vae))
    said, problems = process.communicate()
    assert process.returncode == 0, problems.decode()[-3000:]
    assert f"latents: {out} (35 images" in said.decode()
    return out


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def config(source, vae, **sections):
    sections.setdefault("train", {"batch_size": 4})
    given = {"source": str(source), "image_size": SIZE, "autoencoder": vae, **sections.pop("data", {})}
    return from_dict({"model": {"preset": "test/4", "in_channels": 4, "input_size": 16}, "data": given, **sections})


def moments_of(folder):
    return np.concatenate([np.load(file) for file in sorted(folder.glob("moments_*.npy"))])


def test_moments_are_the_autoencoders(index, vae, latents):
    codec = autoencoder.KL(vae, SIZE, CPU)
    rows, found = open_index(index).rows("train"), moments_of(latents)
    assert found.dtype == np.float16 and found.shape == (35, 2, 2, 4, 16, 16)
    labels = np.concatenate([np.load(file) for file in sorted(latents.glob("labels_*.npy"))])
    assert labels.tolist() == rows["label"].tolist()
    plain = ImageLoader(open_index(index), config(index, vae, train={"batch_size": 5}), World(0, 1, CPU, None))
    for step in range(7):
        images, _ = plain.batch(step, 0)
        chosen = plain.order.images(step, 0)[0]
        for mirrored, view in enumerate((images, images.flip(3))):
            expected = codec.moments(view).numpy()
            # half a unit in the last place of fp16, and as much again for another batch size in fp32
            np.testing.assert_allclose(found[chosen, mirrored], expected, rtol=2**-10, atol=2**-14)


def test_manifest_says_what_it_was_made_of(index, vae, latents):
    manifest = read_manifest(latents)
    assert manifest["autoencoder_sha256"] == autoencoder.KL(vae, SIZE, CPU).sha256() and manifest["scaling_factor"] == 0.5
    assert manifest["images"] == 35 and manifest["classes"] == open_index(index).classes and manifest["dtype"] == "fp32"
    assert manifest["files"]["moments_00004.npy"]["sha256"] == files.sha256(latents / "moments_00004.npy")
    assert len(manifest["files"]) == 10


@pytest.mark.parametrize(("batch_size", "dtype", "bound"), [(3, "fp32", 2**-9), (3, "bf16", 2**-5)])
def test_another_batch_size_changes_roundings_only(index, vae, latents, tmp_path, monkeypatch, batch_size, dtype, bound):
    """Of the largest moment: fp16 has 11 bits, bf16 8 of which a chain of twenty layers takes some."""
    encode.encode(index, tmp_path / "other", vae, SIZE, dtype, batch_size)
    wanted, found = (moments_of(folder).astype(np.float32) for folder in (latents, tmp_path / "other"))
    difference = np.abs(found - wanted).max() / np.abs(wanted).max()
    print(f"{dtype}, batches of {batch_size}: {difference:.2e} of the largest moment")
    assert difference < bound


@pytest.mark.slow
def test_two_ranks_write_the_same_bytes(index, vae, latents, tmp_path):
    process = patient(words(index, tmp_path / "latents", vae), ranks=2, script=tmp_path / "encode.py")
    _, problems = process.communicate()
    assert process.returncode == 0, problems.decode()[-3000:]
    assert contents(tmp_path / "latents") == contents(latents)


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(index, vae, latents, tmp_path):
    out, seed = tmp_path / "latents", random.randrange(1000)
    print("seed", seed)
    rng, done = random.Random(seed), []
    for _ in range(2):
        process = patient(words(index, out, vae), wait=0.1)
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
    process = patient(words(index, out, vae))
    _, problems = process.communicate()
    assert process.returncode == 0, problems.decode()[-3000:]
    assert contents(out) == contents(latents)
    for before in done:
        assert all((out / name).stat().st_mtime_ns == time for name, time in before.items())  # what was there was kept


def test_bad_input_is_one_sentence(index, vae, latents, tmp_path, capsys):
    complains(capsys, words(tmp_path, tmp_path / "out", vae), "is not an index", "fastdit prepare")
    complains(capsys, words(index, tmp_path / "out", str(tmp_path)), "AutoencoderKL")
    complains(capsys, words(index, tmp_path / "out", vae, "--image-size", 33), "multiple of 2")
    complains(capsys, words(index, tmp_path / "out", vae, "--split", "val"), "no images for 'val'")
    complains(capsys, words(index, latents, vae, "--image-size", 64), "image_size=32", "64", "another --out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    complains(capsys, words(index, tmp_path / "full", vae), "is not empty")


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
    complains(capsys, words(index, tmp_path / "out", vae), "No space left on device", "kept")
    assert len(list((tmp_path / "out").glob("moments*"))) == 2
    monkeypatch.setattr(encode, "save_array", save)
    assert cli.main(words(index, tmp_path / "out", vae)) == 0
    assert moments_of(tmp_path / "out").tobytes() == moments_of(latents).tobytes()


@pytest.mark.parametrize("resident", ["true", "false"])
def test_batches_are_the_orders_moments(index, vae, latents, resident):
    """And the same at 2 ranks, with accumulation and from the middle on."""
    wanted, rows = moments_of(latents), open_index(index).rows("train")
    for ranks, accumulation in ((1, 1), (2, 2)):
        settings = config(
            latents, vae, data={"resident": resident, "flip": True}, train={"batch_size": 2, "accumulation": accumulation}
        )
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
    codec = autoencoder.CachedKL(vae, loader.manifest, CPU)
    moments, _ = loader.batch(0, 0)
    noise = [kernels.counter_normal(0, 3, torch.arange(4) + (step << 32), (4, 16, 16)) for step in (0, 1)]
    one, other = (codec.encode(moments, n) for n in noise)
    mean, logvar = moments.float().unbind(1)
    torch.testing.assert_close(one, (mean + (0.5 * logvar).exp() * noise[0]) * 0.5)
    assert (one != other).all()


class LateCopier:
    """Copies that read their source late, as a device's do: 20 ms after they were asked for."""

    def __init__(self):
        self.late = []

    def __call__(self, slot):
        copy = torch.full_like(slot, torch.nan)
        timer = threading.Timer(0.02, lambda: copy.copy_(slot))
        timer.start()
        self.late.append(timer)
        return copy, timer.join


@pytest.mark.parametrize("waits", [True, False])
def test_a_buffer_is_not_written_while_its_copy_runs(waits):
    """With a copier that is late; the same test fails when the ring does not wait."""
    ring = prefetch.Ring(lambda position, slot: slot.fill_(position), (1000,), torch.float32, CPU)
    late = LateCopier()
    ring.copy = late if waits else lambda slot: (late(slot)[0], lambda: None)
    batches = [ring.next(position) for position in [*range(10), *range(5, 8)]]
    for timer in late.late:
        timer.join()
    right = [bool((batch == position).all()) for batch, position in zip(batches, [*range(10), *range(5, 8)], strict=True)]
    assert all(right) == waits


def train(out, *overrides):
    base = ["model.preset=test/4", "model.in_channels=4", "model.input_size=16", f"data.image_size={SIZE}", "train.batch_size=4"]
    base += [f"train.out={out}", "train.log_steps=1", "train.warmup_steps=2", "train.schedule=constant", "train.sample_steps=0"]
    assert cli.main(["train", *base, "train.name=r", *overrides]) == 0
    lines = (out / "r" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_training_on_latents_online_and_resumed(index, vae, latents, tmp_path):
    """The same losses with latents in memory or not, and after a resume; online the same to the moments' fp16 rounding."""
    given = [f"data.autoencoder={vae}", "data.flip=true", "train.total_steps=10", "train.precision=fp32"]
    resident = train(tmp_path / "a", f"data.source={latents}", *given)
    assert len(resident) == 10
    assert train(tmp_path / "b", f"data.source={latents}", "data.resident=false", *given) == resident
    online = train(tmp_path / "c", f"data.source={index}", *given)
    np.testing.assert_allclose(online, resident, rtol=2**-9)
    for source, folder, wanted in ((latents, "d", resident), (index, "e", online)):
        train(tmp_path / folder, f"data.source={source}", *given, "train.total_steps=7")  # in mid-epoch, of 8 steps
        assert train(tmp_path / folder, f"data.source={source}", *given) == wanted


def test_class_names_are_in_the_checkpoint(latents, vae, tmp_path, capsys):
    train(tmp_path, f"data.source={latents}", f"data.autoencoder={vae}", "train.total_steps=1")
    state = checkpoint.open_checkpoint(tmp_path / "r").state
    names = read_manifest(latents)["classes"]
    assert state.class_names == names
    picture = tmp_path / "named.png"
    assert cli.main(["sample", "--checkpoint", str(tmp_path / "r"), "--class", f"{names[2]},0", "--out", str(picture)]) == 0
    assert f"classes: 2 ({names[2]}), 0 ({names[0]})" in capsys.readouterr().out
    assert cli.main(["sample", "--checkpoint", str(tmp_path / "r"), "--class", "9", "--out", str(picture)]) == 0  # without a name


def test_wrong_latents_are_one_sentence(latents, vae, tmp_path, capsys):
    other = autoencoders.tiny(tmp_path / "other", seed=1)
    base = ["train", "model.preset=test/4", "model.in_channels=4", "model.input_size=16", "train.batch_size=4"]
    base += [f"data.source={latents}", f"train.out={tmp_path / 'out'}"]
    size = f"data.image_size={SIZE}"
    complains(capsys, [*base, size, f"data.autoencoder={other}"], str(other), "not the one that the latents were made with", vae)
    complains(capsys, [*base, size], "holds latents", f"set data.autoencoder={vae}")
    complains(capsys, [*base, "data.image_size=64", f"data.autoencoder={vae}"], "data.image_size=64", "set data.image_size=32")
    copy = tmp_path / "copy"
    shutil.copytree(latents, copy)
    with (copy / "moments_00001.npy").open("r+b") as file:
        file.truncate(1000)
    complains(capsys, [*base, f"data.source={copy}", size, f"data.autoencoder={vae}"], "moments_00001.npy is not there whole")
    assert not (tmp_path / "out").exists()


def test_digits_as_jpegs_go_through_prepare_and_dali(tmp_path):
    """Class folders of JPEGs, named as training data without an index: it is made; the model learns from them."""
    from PIL import Image

    images, labels = builtin.mnist5k("train")
    for digit in range(10):
        (tmp_path / "digits" / str(digit)).mkdir(parents=True)
        for i in np.flatnonzero(labels == digit)[:40]:
            Image.fromarray(images[i, :, :, 0]).save(tmp_path / "digits" / str(digit) / f"{i}.jpg", quality=95)
    channels = ["model.in_channels=3", "model.input_size=32", "train.batch_size=16", "train.total_steps=40", "train.lr=3e-3"]
    losses = train(tmp_path / "runs", f"data.source={tmp_path / 'digits'}", *channels)
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:3])
    place = data.locate(from_dict({"data": {"source": str(tmp_path / "digits")}}))
    assert place == tmp_path / "digits.index" and open_index(place).classes == [str(i) for i in range(10)]
    settings = from_dict({"model": {"preset": "test/4"}, "train": {"batch_size": 16}})
    served, digits = data.load(settings, place, World(0, 1, CPU, None)).batch(0, 0)
    rows = open_index(place).rows("train")
    originals = {(int(row["label"]), i): int(row["name"].decode()[:-4]) for i, row in enumerate(rows)}
    order = data.load(settings, place, World(0, 1, CPU, None)).order.images(0, 0)[0]
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
