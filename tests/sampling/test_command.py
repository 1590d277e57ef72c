"""What `fastdit sample` draws and writes: seeds, batches and ranks; grids, animations, latents; the notebook."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import autoencoders
import forked_ranks
from commands import environment
from fastdit import cli
from fastdit.sampling.pictures import grid
from fastdit.sampling.sampler import Sampler
from runs import make_run

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = environment(GLIBC_TUNABLES="")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory):
    vae = autoencoders.tiny(tmp_path_factory.mktemp("vae"))
    model = {"in_channels": 4, "input_size": 16}
    return make_run(tmp_path_factory.mktemp("run"), model=model, data={"autoencoder": str(vae), "image_size": 32})


def words(run, *more):
    return ["sample", "--checkpoint", str(run), "--steps", "3", "--solver", "euler", *map(str, more)]


def latents(run, tmp_path, *more):
    out = tmp_path / "latents.npz"
    assert cli.main(words(run, "--latents", out, *more)) == 0
    return np.load(out)["latents"]


@pytest.mark.parametrize("solver", ["euler", "sde"])
def test_a_sample_of_its_own_seed_does_not_see_its_batch(run, tmp_path, solver):
    more = ["--class", "3", "--per-class", "8", "--seed-per-sample", "--seed", "4", "--solver", solver]
    whole, alone = (latents(run, tmp_path, *more, "--at-once", n) for n in (8, 1))
    assert np.abs(whole - alone).max() < 1e-4
    if solver == "euler":  # the default differs in the noise, and its images do not depend on the batch either
        more.remove("--seed-per-sample")
        first, second = (latents(run, tmp_path, *more, "--at-once", n) for n in (8, 3))
        assert np.abs(first - second).max() < 1e-4 < np.abs(first - whole).max()


def test_classes_and_seeds_that_are_drawn(run, tmp_path, capsys):
    def classes(*more):
        assert cli.main(words(run, "--npz", tmp_path / "s.npz", *more)) == 0
        return np.load(tmp_path / "s.npz")["arr_1"].tolist(), capsys.readouterr().out

    one, text = classes("--class", "-1", "--batch_size", "3", "--seed", "5")
    assert len(one) == 3 and len(set(one)) == 1 and f"classes: {one[0]}\n" in text and "seed 5;" in text
    assert classes("--class", "-1", "--batch_size", "3", "--seed", "5")[0] == one
    many = [classes("--class=-1,-1,2", "--seed", seed)[0] for seed in range(6)]
    assert all(m[2] == 2 for m in many) and len({m[0] for m in many}) > 2 and any(m[0] != m[1] for m in many)
    seeds = [classes("--class", "1", "--seed", "-1")[1].partition("seed ")[2].partition(";")[0] for _ in range(2)]
    assert seeds[0] != seeds[1]
    again = [latents(run, tmp_path, "--class", "1", "--seed", seeds[0]) for _ in range(2)]
    assert np.array_equal(*again)


def test_a_random_class_where_there_are_a_thousand(tmp_path, capsys):
    run = make_run(tmp_path / "run", model={"num_classes": 1000})
    assert latents(run, tmp_path).shape == (1, 1, 32, 32)
    assert latents(run, tmp_path, "--class-name", "golden retriever,otter").shape == (2, 1, 32, 32)
    assert " id  class\n207  golden retriever\n360  otter\n" in capsys.readouterr().out


def test_every_kind_of_file(latent_run, tmp_path, capsys):
    more = ["--class", "3,7", "--per-class", "2", "--at-once", "3", "--gif-of", "3,0,3"]
    files = {"out": "g.png", "gif": "g.gif", "npz": "s.npz", "latents": "l.npz", "folder": "images"}
    named = [word for flag, name in files.items() for word in (f"--{flag}", tmp_path / name)]
    assert cli.main(words(latent_run, *more, *named)) == 0
    printed = capsys.readouterr().out
    assert all(f"{flag}: {tmp_path / name}" in printed for flag, name in files.items()) and "images/s" in printed
    images = np.load(tmp_path / "s.npz")["arr_0"]
    assert images.shape == (4, 32, 32, 3)
    pngs = sorted((tmp_path / "images").iterdir())
    assert [p.name for p in pngs] == [f"{i:06d}_class_{c}.png" for i, c in enumerate((3, 3, 7, 7))]
    assert all(np.array_equal(np.asarray(Image.open(p)), image) for p, image in zip(pngs, images, strict=True))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "g.png")), np.asarray(grid(images, 2)))
    x = torch.from_numpy(np.load(tmp_path / "l.npz")["latents"])
    decoded = Sampler(latent_run).decode(x)
    assert np.abs(decoded.astype(int) - images).max() <= 1  # another batch
    animation = Image.open(tmp_path / "g.gif")
    assert (animation.n_frames, animation.size) == (4, (2 * 34 + 2, 34 + 2))  # the start and three steps
    assert cli.main(words(latent_run, *more, "--gif", tmp_path / "g.webp", "--gif_fps", "5")) == 0
    animation = Image.open(tmp_path / "g.webp")
    animation.seek(3)  # WebP is lossless: the last frame is what was drawn
    last = np.asarray(animation.convert("RGB")).astype(int)
    assert np.abs(last - np.asarray(grid(images[[3, 0]], 2))).max() <= 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.gif", "g.png", "g.webp", "images", "l.npz", "s.npz"]


def test_intermediate_latents_are_decoded_for_animations_only(latent_run, tmp_path, monkeypatch):
    decoded = []
    original = Sampler.decode
    monkeypatch.setattr(Sampler, "decode", lambda self, x: decoded.append(len(x)) or original(self, x))
    assert cli.main(words(latent_run, "--class", "1", "--per-class", "3", "--out", tmp_path / "g.png")) == 0
    assert decoded == [3]


@pytest.mark.slow
def test_two_ranks_draw_the_same_and_gather_it(run, tmp_path):
    more = ["--class", "1,2", "--per-class", "4", "--at-once", "3", "--seed-per-sample", "--solver", "sde"]
    alone = latents(run, tmp_path, *more)
    files = ["--latents", tmp_path / "l.npz", "--out", tmp_path / "g.png", "--gif", tmp_path / "g.gif", "--gif-of", "0,7"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "fastdit.cli", *words(run, *more, *files)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.abs(np.load(tmp_path / "l.npz")["latents"] - alone).max() < 1e-4
    assert Image.open(tmp_path / "g.gif").n_frames == 4 and Image.open(tmp_path / "g.png").size == (4 * 34 + 2, 2 * 34 + 2)
    bad = forked_ranks.run(2, ["-m", "fastdit.cli", *words(run, "--class", "12")])
    assert bad.returncode != 0 and bad.stderr.count("--class 12 is out of range") == 1


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    make_run(tmp_path / "run", model={"num_classes": 1000})
    notebook = nbformat.read(ROOT / "launch/sample_loop.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert 'checkpoint = "runs/base"' in first.source
    first.source = first.source.replace("runs/base", str(tmp_path / "run"))
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    assert len(pictures) >= 2 and any("golden retriever" in output.get("text", "") for output in shown)
