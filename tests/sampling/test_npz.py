"""Samples as an npz for evaluators: what numpy writes, and resumed after an interruption to the last byte."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import autoencoders
import forked_ranks
from commands import environment
from fastdit import cli
from fastdit.sampling.npz import Parts
from fastdit.sampling.sampler import Sampler
from runs import make_run

ENVIRONMENT = environment(GLIBC_TUNABLES="")
COMMAND = [sys.executable, "-m", "fastdit.cli", "sample"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def words(run, *more):
    return ["sample", "--checkpoint", str(run), "--steps", "3", "--solver", "euler", *map(str, more)]


def test_npz_is_what_numpy_writes(run, tmp_path):
    sampler = Sampler(run)
    images = sampler.images("3,7", count=5, seed=2, steps=3, solver="euler")
    assert cli.main(words(run, "--class", "3,7", "--per-class", "5", "--seed", "2", "--npz", tmp_path / "s.npz")) == 0
    np.savez(tmp_path / "t.npz", arr_0=images, arr_1=np.array([3] * 5 + [7] * 5))
    ours, theirs = np.load(tmp_path / "s.npz"), np.load(tmp_path / "t.npz")
    assert ours.files == theirs.files
    assert np.array_equal(ours["arr_0"], theirs["arr_0"]) and np.array_equal(ours["arr_1"], theirs["arr_1"])
    assert ours["arr_0"].dtype == np.uint8 and ours["arr_1"].dtype == np.int64


def test_an_interrupted_npz_is_resumed(run, tmp_path, capsys, monkeypatch):
    """Stochastic, so that batches that are there already have used up noise of the one generator."""
    more = ["--class", "all", "--per-class", "2", "--at-once", "3", "--solver", "euler_stochastic", "--npz"]
    assert cli.main(words(run, *more, tmp_path / "a.npz")) == 0
    original, written = Parts.write, []

    def interrupted(self, k, images):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(k)
        original(self, k, images)

    monkeypatch.setattr(Parts, "write", interrupted)
    assert cli.main(words(run, *more, tmp_path / "b.npz")) == 130
    assert not (tmp_path / "b.npz").exists()
    assert cli.main(words(run, *more, tmp_path / "b.npz", "--seed", "1")) == 2
    assert "was begun with seed=0, this command has 1" in capsys.readouterr().err
    monkeypatch.setattr(Parts, "write", lambda self, k, images: written.append(k) or original(self, k, images))
    assert cli.main(words(run, *more, tmp_path / "b.npz")) == 0
    assert written == list(range(7))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz"]


@pytest.mark.slow
def test_a_thousand_samples_killed_and_resumed_on_one_and_two_ranks(run, tmp_path):
    """To the last byte: SIGKILL after three batches, then on two ranks."""
    more = ["--per-class", "100", "--at-once", "50", "--seed-per-sample", "--npz"]
    assert cli.main(words(run, *more, tmp_path / "a.npz")) == 0
    command = [*COMMAND, *words(run, *more, tmp_path / "b.npz")[1:]]
    killed = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts, deadline = tmp_path / ".b.npz.parts", time.monotonic() + 100
    while len(list(parts.glob("*.npy"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    found = len(list(parts.glob("*.npy")))
    assert 3 <= found < 20 and not (tmp_path / "b.npz").exists()
    done = forked_ranks.run(2, command[1:])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "on each of 2 ranks" in done.stdout and not parts.exists()
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert np.load(tmp_path / "b.npz")["arr_0"].shape == (1000, 32, 32, 1)


def begun(words, monkeypatch):
    """Run a command that stops after its second batch."""
    original, written = Parts.write, []

    def interrupted(self, k, images):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(k)
        original(self, k, images)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "write", interrupted)
        assert cli.main(words) == 130


def test_an_npz_of_one_model_is_not_finished_by_another(run, tmp_path, capsys, monkeypatch):
    """At the same path, with the same step; but the same model may have been moved."""
    file = tmp_path / "m.safetensors"
    assert cli.main(["export", str(run), "--out", str(file)]) == 0
    command = words(file, "--at-once", "2", "--npz", tmp_path / "a.npz")
    begun(command, monkeypatch)
    tensors = load_file(file)
    save_file({name: t * 1.01 for name, t in tensors.items()}, file)
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert "was begun with checkpoint=" in error and f"delete {tmp_path}/.a.npz.parts" in error
    save_file(tensors, file)
    moved = tmp_path / "moved.safetensors"
    file.rename(moved)
    file.with_suffix(".json").rename(moved.with_suffix(".json"))
    assert cli.main(words(moved, "--at-once", "2", "--npz", tmp_path / "a.npz")) == 0


def test_an_npz_of_one_autoencoder_is_not_finished_by_another(tmp_path, capsys, monkeypatch):
    vae = autoencoders.tiny(tmp_path / "vae")
    run = make_run(tmp_path / "run", model={"in_channels": 4, "input_size": 16}, data={"autoencoder": str(vae), "image_size": 32})
    command = words(run, "--at-once", "2", "--npz", tmp_path / "a.npz")
    begun(command, monkeypatch)
    weights = next(vae.glob("*.safetensors"))
    save_file({name: t * 1.01 for name, t in load_file(weights).items()}, weights)
    assert cli.main(command) == 2
    assert "autoencoder" in capsys.readouterr().err


def test_a_damaged_batch_is_named(run, tmp_path, capsys, monkeypatch):
    command = words(run, "--at-once", "2", "--npz", tmp_path / "a.npz")
    begun(command, monkeypatch)
    part = tmp_path / ".a.npz.parts" / "000001.npy"
    for damage in (b"", np.lib.format.magic(1, 0), part.read_bytes()[:-5]):
        part.write_bytes(damage)
        assert cli.main(command) == 2
        assert f"{part} is damaged" in capsys.readouterr().err and not (tmp_path / "a.npz").exists()
    part.unlink()
    assert cli.main(command) == 0
