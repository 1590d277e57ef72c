"""What `fastdit sample` draws and writes: seeds, batches and ranks; grids, animations, latents, npz; resuming; the notebook."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import autoencoders
import cuda_graphs
from commands import environment
from fastdit import autoencoder, checkpoint, cli, kernels
from fastdit.config import from_dict
from fastdit.device import native_bf16
from fastdit.distributed import World
from fastdit.evaluation import image_sets
from fastdit.flow import Stream
from fastdit.model import DiT
from fastdit.sampling import command as sample_command
from fastdit.sampling import sampler
from fastdit.sampling.fast import Graphs, PackedBlock, fast_velocity
from fastdit.sampling.pictures import grid
from fastdit.sampling.sampler import Sampler, attention, latent_shape, one_generator_noise, per_sample_noise, to_images

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
ENVIRONMENT = environment(GLIBC_TUNABLES="")
COMMAND = [sys.executable, "-m", "fastdit.cli", "sample"]


def make_run(folder, **sections):
    """A run of a small random model, as an import leaves it."""
    config = from_dict({"model": {"preset": "test/4", "zero_init_gates": False, **sections.pop("model", {})}, **sections})
    torch.manual_seed(0)
    weights = {name: p.detach() * 2 for name, p in DiT(config.model).named_parameters()}
    checkpoint.save_weights(folder / "checkpoints", weights, config, 3, "a test")
    return folder


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


def test_default_noise_is_one_generators_in_order():
    draw_noise = one_generator_noise(7, (4, 8, 8))
    got = torch.cat([draw_noise(torch.arange(n), 0)[0] for n in (2, 3)])
    assert torch.equal(got, torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(7)))
    start, *later = one_generator_noise(7, (4, 8, 8))(torch.arange(2), 2)
    generator = torch.Generator().manual_seed(7)
    for x in (start, *later):  # what the base command draws before each step
        assert torch.equal(x, torch.randn(2, 4, 8, 8, generator=generator))


def test_noise_per_sample_is_named_by_seed_sample_and_step():
    draw_noise, shape = per_sample_noise(7, (1, 8, 8)), (1, 8, 8)
    whole, alone = draw_noise(torch.arange(8), 3), draw_noise(torch.tensor([5]), 3)
    assert torch.equal(whole[:, 5], alone[:, 0])
    assert torch.equal(whole[0], kernels.counter_normal(7, Stream.SAMPLE, torch.arange(8), shape))
    flat = whole.flatten(2).flatten(0, 1)
    assert (torch.corrcoef(flat).fill_diagonal_(0).abs() < 0.6).all()  # 64 numbers each: 5 standard deviations
    assert not torch.equal(whole, per_sample_noise(8, shape)(torch.arange(8), 3))


@pytest.mark.parametrize("solver", ["euler", "sde"])
def test_a_sample_of_its_own_seed_does_not_see_its_batch(run, tmp_path, solver):
    more = ["--class", "3", "--per-class", "8", "--seed-per-sample", "--seed", "4", "--solver", solver]
    whole, alone = (latents(run, tmp_path, *more, "--at-once", n) for n in (8, 1))
    assert np.abs(whole - alone).max() < 1e-4
    if solver == "euler":  # the default differs in the noise, and its images do not depend on the batch either
        more.remove("--seed-per-sample")
        first, second = (latents(run, tmp_path, *more, "--at-once", n) for n in (8, 3))
        assert np.abs(first - second).max() < 1e-4 < np.abs(first - whole).max()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_is_the_runs_where_it_is_fast(tmp_path, capsys, monkeypatch, precision):
    """bf16 differs by some roundings of 2^-9, which 3 guided steps of such random models make 0.8 to 2.2 % of the latents (ten
    seeds; most with this one)."""
    run = make_run(tmp_path / "run", train={"precision": precision})
    assert Sampler(run).dtype == "fp32"  # imported, as it was sampled
    opened = checkpoint.open_checkpoint(run)
    opened = checkpoint.Checkpoint(opened.path, opened.config, checkpoint.RunState(3))  # as if it were no import
    monkeypatch.setattr(checkpoint, "open_checkpoint", lambda _: opened)
    monkeypatch.setattr(sampler, "native_bf16", lambda _: True)
    assert Sampler(run).dtype == precision
    monkeypatch.setattr(sampler, "native_bf16", lambda _: False)
    assert Sampler(run).dtype == "fp32"
    exact, rough = (latents(run, tmp_path, "--class", "3,7", "--dtype", dtype) for dtype in ("fp32", "bf16"))
    assert 0 < np.abs(exact - rough).max() < 0.03 * np.abs(exact).max()
    assert "bf16 on" in capsys.readouterr().out


def test_a_sampler_asks_for_attention_in_its_precision_first(run, monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "check", lambda *of, training: asked.append((*of, training)))
    config = Sampler(run, dtype="bf16").config
    assert asked == [(config.model, torch.bfloat16, CPU, False)]


@pytest.mark.skipif(not kernels.library.EXTENSION, reason="the C++ extension is not built")
@pytest.mark.skipif(not native_bf16(CPU), reason="oneDNN has no bf16 for this CPU")
@torch.no_grad()
def test_packed_blocks_sample_as_the_model_does(monkeypatch):
    """Where AMX is, and without it with plain vectors in its place: no further from fp32 than the model's own bf16."""
    config = from_dict({"model": {"preset": "test/4", "zero_init_gates": False, "input_size": 16, "patch_size": 2}})

    def final(dtype, fast):
        torch.manual_seed(0)
        model = DiT(config.model).to(dtype).eval().requires_grad_(False)
        monkeypatch.setattr(kernels, "dit_block_is_fast", lambda device: fast)
        assert fast_velocity(model, CPU) is None
        assert isinstance(model.blocks[0], PackedBlock) == (fast and dtype == torch.bfloat16)
        if fast and dtype == torch.bfloat16:
            assert fast_velocity(model, CPU) is None  # again: nothing to do
            with pytest.raises(RuntimeError, match="load it again"):
                model.state_dict()
        draw, ids = per_sample_noise(3, latent_shape(model)), torch.arange(3)
        return next(sampler.latents(model, config.sample, torch.tensor([1, 5, 1]), ids, draw, config.model.num_classes))[1]

    truth, plain, packed = final(torch.float32, True), final(torch.bfloat16, False), final(torch.bfloat16, True)
    error, plain_error = ((x - truth).abs().max().item() for x in (packed, plain))
    assert 0 < error <= 2 * plain_error


def random_model(**given):
    config = from_dict({"model": {"preset": "test/4", "zero_init_gates": False, **given}})
    torch.manual_seed(0)
    return DiT(config.model).eval().requires_grad_(False), config.sample


@torch.no_grad()
def test_graphs_are_one_a_batch_size_in_one_pool(monkeypatch):
    """Six batch sizes, guided and not, each with few classes and then with many: what the model gives, few graphs kept."""
    captures = cuda_graphs.install(monkeypatch)
    model, _ = random_model()
    graphs = fast_velocity(model, torch.device("cuda"))
    assert all(block._compiled_call_impl is None for block in model.blocks)
    for batch in (1, 2, 3, 4, 5, 6):
        for rows in (batch, 2 * batch):
            before = len(captures)
            for labels in (torch.full((rows,), 3), torch.arange(rows) % 10, torch.arange(rows) // 2):
                x, t = torch.randn(rows, 1, 32, 32), torch.rand(())
                inputs = (x, t, *model.embed_classes(labels))
                torch.testing.assert_close(graphs(*inputs), model.velocity(*inputs), rtol=0, atol=1e-5)
            assert len(captures) - before <= 1
    assert {mode for _, mode in captures} == {"thread_local"} and len({id(pool) for pool, _ in captures}) == 1
    assert list(graphs.captured) == [5, 10, 6, 12]  # the last used
    again = len(captures)
    for rows in (6, 12, 6, 12):
        graphs(torch.randn(rows, 1, 32, 32), torch.rand(()), *model.embed_classes(torch.arange(rows) % 10))
    assert len(captures) == again


def test_every_way_to_samples_is_the_fast_one(monkeypatch):
    """Evaluation, validation and the grids of training: by graphs where there are any, one for all batches of a size."""
    model, config = random_model()
    codec, labels = autoencoder.Pixels(1, 32), torch.arange(7)
    source = lambda: image_sets.of_model(model, codec, config, labels, 0, (32, 32, 1), {})
    drawn = lambda: np.concatenate([images for _, images in source().batches(World(0, 1, CPU, None))])
    plain, captures = drawn(), cuda_graphs.install(monkeypatch)
    monkeypatch.setattr(sampler, "fast_velocity", lambda model, device: Graphs(model))
    monkeypatch.setattr(sampler, "BATCH", 3)
    assert np.abs(drawn().astype(int) - plain).max() <= 1
    assert len(captures) == 2  # batches of 3, 3 and 1, guided


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
    assert "classes: 207 (golden retriever), 360 (otter)\n" in capsys.readouterr().out


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
    decoded = to_images(Sampler(latent_run).codec, x)
    assert np.abs(decoded.astype(int) - images).max() <= 1  # another batch
    animation = Image.open(tmp_path / "g.gif")
    assert (animation.n_frames, animation.size) == (4, (2 * 34 + 2, 34 + 2))  # the start and three steps
    assert cli.main(words(latent_run, *more, "--gif", tmp_path / "g.webp", "--gif_fps", "5")) == 0
    animation = Image.open(tmp_path / "g.webp")
    animation.seek(3)  # WebP is lossless: the last frame is what was drawn
    last = np.asarray(animation.convert("RGB")).astype(int)
    assert np.abs(last - np.asarray(grid(images[[3, 0]], 2))).max() <= 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.gif", "g.png", "g.webp", "images", "l.npz", "s.npz"]


def test_intermediate_latents_are_decoded_for_animations_alone(latent_run, tmp_path, monkeypatch):
    decoded = []
    original = to_images
    monkeypatch.setattr(sample_command, "to_images", lambda codec, x: decoded.append(len(x)) or original(codec, x))
    assert cli.main(words(latent_run, "--class", "1", "--per-class", "3", "--out", tmp_path / "g.png")) == 0
    assert decoded == [3]


def test_npz_is_what_numpy_writes(run, tmp_path):
    sampler = Sampler(run)
    images = sampler.images("3,7", count=5, seed=2, steps=3, solver="euler")
    assert cli.main(words(run, "--class", "3,7", "--per-class", "5", "--seed", "2", "--npz", tmp_path / "s.npz")) == 0
    np.savez(tmp_path / "t.npz", arr_0=images, arr_1=np.array([3] * 5 + [7] * 5))
    ours, theirs = np.load(tmp_path / "s.npz"), np.load(tmp_path / "t.npz")
    assert ours.files == theirs.files
    assert np.array_equal(ours["arr_0"], theirs["arr_0"]) and np.array_equal(ours["arr_1"], theirs["arr_1"])
    assert ours["arr_0"].dtype == np.uint8 and ours["arr_1"].dtype == np.int64


def test_npz_goes_on_where_it_was_interrupted(run, tmp_path, capsys, monkeypatch):
    """Stochastic, so that batches that are there already have used up noise of the one generator."""
    more = ["--class", "all", "--per-class", "2", "--at-once", "3", "--solver", "euler_stochastic", "--npz"]
    assert cli.main(words(run, *more, tmp_path / "a.npz")) == 0
    original, written = sample_command.Parts.write, []

    def interrupted(self, k, images):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(k)
        original(self, k, images)

    monkeypatch.setattr(sample_command.Parts, "write", interrupted)
    assert cli.main(words(run, *more, tmp_path / "b.npz")) == 130
    assert not (tmp_path / "b.npz").exists()
    assert cli.main(words(run, *more, tmp_path / "b.npz", "--seed", "1")) == 2
    assert "was begun with seed=0, this command has 1" in capsys.readouterr().err
    monkeypatch.setattr(sample_command.Parts, "write", lambda self, k, images: written.append(k) or original(self, k, images))
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
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launcher, *command[1:]], env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "on each of 2 ranks" in done.stdout and not parts.exists()
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert np.load(tmp_path / "b.npz")["arr_0"].shape == (1000, 32, 32, 1)


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
    command = [*launcher, "-m", "fastdit.cli", *words(run, "--class", "12")]
    bad = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False)
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
