"""The door from weights to samples: noise, sharing among ranks, precision, and that every user of it takes the fast path."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import cuda_graphs
import fast_paths
import forked_ranks
from fastdit import attention, autoencoder, checkpoint, cli, files, kernels
from fastdit.config import InputError
from fastdit.distributed import World
from fastdit.flow import Stream
from fastdit.sampling import sampler
from fastdit.sampling.sampler import BATCH, Sampler, batch_size, one_generator_noise, per_sample_noise, shares
from runs import make_run, not_finite_run, random_model, with_state

CPU = torch.device("cpu")
SUPPORT = Path(__file__).parent.parent / "support"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


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


def test_every_rank_has_equal_work_and_one_rank_full_batches():
    for count in (1, 2, 80, 100, 250, 500, 1000, 50_000):
        assert batch_size(count, World(0, 1, CPU, None)) == BATCH
        for size in (2, 3, 8):
            at_once = batch_size(count, World(0, size, CPU, None))
            work = [[*shares(count, World(rank, size, CPU, None), at_once)] for rank in range(size)]
            assert sorted(i for batches in work for ids in batches for i in ids) == list(range(count))
            assert 1 <= at_once <= BATCH
            images = [sum(map(len, batches)) for batches in work]
            assert max(images) <= count / size + at_once and max(images) - min(images) <= 2 * at_once, (count, size, images)
            assert max(map(len, work)) <= -(-count // (size * BATCH))


@pytest.mark.parametrize(("count", "at_once"), [(23, 0), (23, 5), (1, 0)])
def test_two_ranks_share_samples_as_one_rank_draws_them(run, tmp_path, count, at_once):
    """Each id once; the images to rounding, and with the same batches to the bit."""
    (tmp_path / "run").symlink_to(run)
    done = forked_ranks.run(2, [SUPPORT / "sampler_worker.py", tmp_path, count, at_once])
    assert done.returncode == 0, done.stderr[-3000:]
    parts = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]
    assert sorted(np.concatenate([part["ids"] for part in parts]).tolist()) == list(range(count))
    single = Sampler(run, device="cpu")
    settings, labels = single.settings(steps=2, solver="sde"), torch.arange(count) % 10
    wanted = single.draw(labels, 5, settings, at_once=at_once or None)
    shared = np.load(tmp_path / "all.npy")
    for part in parts:
        assert not len(part["ids"]) or np.array_equal(shared[part["ids"].astype(int)], part["images"])
    assert shared.shape == wanted.shape and np.abs(shared.astype(int) - wanted).max() <= (0 if at_once else 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_is_the_runs_where_it_is_fast(tmp_path, monkeypatch, precision):
    """bf16 differs by some roundings of 2^-9, which 3 guided steps of such random models make 0.8 to 2.2 % of the latents (ten
    seeds; most with this one)."""
    run = make_run(tmp_path, train={"precision": precision})
    assert Sampler(run).dtype == "fp32"  # imported, as it was sampled
    opened = checkpoint.open_checkpoint(run)
    opened = checkpoint.Checkpoint(opened.path, opened.config, checkpoint.RunState(3))  # as if it were no import
    monkeypatch.setattr(checkpoint, "open_checkpoint", lambda _: opened)
    monkeypatch.setattr(sampler, "native_bf16", lambda _: True)
    assert Sampler(run).dtype == precision
    monkeypatch.setattr(sampler, "native_bf16", lambda _: False)
    assert Sampler(run).dtype == "fp32"
    samplers = [Sampler(run, dtype=dtype) for dtype in ("fp32", "bf16")]
    settings = samplers[0].settings(steps=3, solver="euler")
    exact, rough = (next(each.latents([3, 7], settings=settings, per_sample=False))[1].numpy() for each in samplers)
    assert 0 < np.abs(exact - rough).max() < 0.03 * np.abs(exact).max()


def test_a_sampler_asks_for_attention_in_its_precision_first(run, monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "check", lambda *of, training: asked.append((*of, training)))
    config = Sampler(run, dtype="bf16").config
    assert asked == [(config.model, torch.bfloat16, CPU, False)]


def test_a_model_in_memory_gives_the_samples_of_its_checkpoint(run):
    from_file = Sampler(run, device="cpu")
    model = checkpoint.open_checkpoint(run).load_model("ema", CPU)
    in_memory = Sampler.of_model(model, from_file.config, autoencoder.Pixels(1, 32))
    assert (in_memory.dtype, in_memory.null, in_memory.path, in_memory.sha256) == ("fp32", 10, None, None)
    settings = from_file.settings(steps=2)
    assert np.array_equal(in_memory.draw([1, 2], 3, settings), from_file.draw([1, 2], 3, settings))


def test_no_images_are_refused(run):
    with pytest.raises(InputError, match="count 0 must be at least 1"):
        Sampler(run, device="cpu").images("3", count=0)


def test_what_a_sampler_says_of_its_weights(run, tmp_path):
    exported = tmp_path / "model.safetensors"
    assert cli.main(["export", str(run), "--out", str(exported)]) == 0
    folder = next((run / "checkpoints").iterdir())
    imported, file = Sampler(run, device="cpu"), Sampler(exported, device="cpu")
    assert (imported.path, imported.sha256) == (folder, files.sha256(folder / "manifest.json"))
    assert (file.path, file.sha256) == (exported, files.sha256(exported))
    assert imported.weights == "ema" and imported.ema_decay is None and imported.step == 3  # nothing is known of its average
    with pytest.raises(InputError, match="holds no raw weights"):
        Sampler(run, "raw", "cpu")


def test_graphs_are_made_once_for_all_streams(monkeypatch):
    """One for all batches of a size, and again none in the next stream; the images of the plain path to one level of 255."""
    model, config = random_model()
    codec, labels = autoencoder.Pixels(1, 32), torch.arange(7)
    plain = Sampler.of_model(model, config, codec).draw(labels, at_once=3)
    calls = fast_paths.install(monkeypatch)
    captures = cuda_graphs.install(monkeypatch)
    fast = Sampler.of_model(model, config, codec)
    assert np.abs(fast.draw(labels, at_once=3).astype(int) - plain).max() <= 1
    assert len(captures) == 2 and calls.prepared == 1  # batches of 3, 3 and 1, guided
    fast.draw(labels, 1, at_once=3)
    assert len(captures) == 2 and calls.velocity == 2 * 3 * 2 * config.sample.steps  # Heun


def test_samples_that_are_not_finite_are_an_error(tmp_path):
    """It names the sample of the whole job, not of its batch; weights that are not finite are named as the cause."""
    sampler = Sampler(not_finite_run(tmp_path / "run"), device="cpu")
    settings = sampler.settings(steps=2, solver="euler")
    expected = (
        r"^sample 0 of class 3 is not finite after 2 steps of euler with guidance 2 in fp32: use less guidance or other weights$"
    )
    for draw in (sampler.draw, lambda *of: list(sampler.stream(*of)), lambda *of: list(sampler.latents(*of))):
        with pytest.raises(FloatingPointError, match=expected):
            draw([3, 7], 0, settings)
    model, config = random_model()
    sampler = Sampler.of_model(model, config, autoencoder.Pixels(1, 32))
    latents = sampler.latents([3, 7, 1], 0, sampler.settings(steps=1), at_once=2)
    next(latents)
    original = sampler._fast_velocity or model.velocity
    sampler.model.velocity = lambda *of: original(*of) * torch.tensor([float("nan")])
    with pytest.raises(FloatingPointError, match="sample 2 of class 1 "):
        list(sampler.latents([3, 7, 1], 0, sampler.settings(steps=1, guidance=0), at_once=2, skip=lambda ids: ids.start == 0))
    model.output.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="the weights of the model are not: use an earlier checkpoint"):
        sampler.draw([3], 0, settings)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm++"])
def test_a_model_of_the_data_is_sampled_as_one(solver):
    """One step from noise ends at what the model predicts there."""
    model, config = random_model()
    sampler = Sampler.of_model(model, replace(config, flow=replace(config.flow, prediction="x")), None)
    ((_, x),) = sampler.latents([3, 7], 0, sampler.settings(steps=1, solver=solver, guidance=0))
    start = per_sample_noise(0, (1, 32, 32))(torch.arange(2), 0)[0]
    torch.testing.assert_close(x, model(start, torch.ones(2), torch.tensor([3, 7])), rtol=0, atol=1e-5)


def test_pixels_that_are_not_finite_are_an_error(run, monkeypatch):
    sampler = Sampler(run, device="cpu")
    latents = torch.zeros(3, 1, 32, 32)
    latents[1, 0, 5, 5] = float("nan")
    with pytest.raises(FloatingPointError, match="autoencoder pixels decodes image 1 of a batch of 3"):
        sampler.decode(latents)


def test_the_check_reads_the_device_once_per_batch(run, monkeypatch):
    """One reduction of the final latents, none within the steps."""
    checks, original = [], torch.Tensor.isfinite
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda self: checks.append(len(self)) or original(self))
    sampler = Sampler(run, device="cpu")
    list(sampler.latents([1] * 7, 0, sampler.settings(steps=5), at_once=3))
    assert checks == [3, 3, 1]


def test_path_drop_guidance_skips_the_blocks_between_for_the_null_class(monkeypatch):
    """The formula, from two forward passes; the same by CUDA graphs; refused for models that were not trained for it."""
    model, config = random_model(depth=4, dense_blocks=(1, 1), path_drop=0.1)
    labels, seen = torch.arange(3), []
    settings = replace(config.sample, steps=1, solver="euler", guidance=1.5, path_drop_guidance=True)
    sampler = Sampler.of_model(model, config, None)
    handles = [block.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0]))) for block in model.blocks]
    _, x = next(sampler.latents(labels, 0, settings))
    noise = kernels.counter_normal(0, Stream.SAMPLE, labels, (1, 32, 32))
    assert seen == [6, 3, 3, 6]
    for handle in handles:
        handle.remove()
    everything, t = torch.arange(64).expand(3, -1), torch.ones(3)
    v_null = model(noise, t, torch.full((3,), 10), everything, torch.ones(3, dtype=torch.bool))
    expected = noise - (2.5 * model(noise, t, labels) - 1.5 * v_null)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    fast_paths.install(monkeypatch)
    _, fast = next(Sampler.of_model(model, config, None).latents(labels, 0, settings))
    torch.testing.assert_close(fast, x, rtol=0, atol=1e-6 * x.abs().max().item())
    with pytest.raises(InputError, match=r"path_drop_guidance=true needs a model trained with model\.path_drop"):
        Sampler.of_model(*random_model(), None).settings(path_drop_guidance=True)


def test_a_model_without_a_null_class_is_not_guided(tmp_path):
    """Also one that was saved with the default guidance, as runs of before were."""
    run = make_run(tmp_path / "run", flow={"label_dropout": 0})
    (folder,) = (run / "checkpoints").iterdir()
    text = (folder / "config.json").read_text().replace('"guidance": 0.0', '"guidance": 2.0')
    (folder / "config.json").write_text(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["config.json"] = {"bytes": len(text), "sha256": files.sha256(folder / "config.json")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    sampler = Sampler(run, device="cpu")
    assert sampler.settings().guidance == 0 and sampler.settings(guidance=0.0).guidance == 0
    for wrong in ({"guidance": 1.0}, {"guidance_low": 0.2}, {"guidance_high": 0.5}):
        with pytest.raises(InputError, match=f"sample.{next(iter(wrong))}=.* needs the null class.*label_dropout=0"):
            sampler.settings(**wrong)
    assert cli.main(["export", str(run), "--out", str(tmp_path / "m.safetensors")]) == 0
    with pytest.raises(InputError, match="null class"):
        Sampler(tmp_path / "m.safetensors", device="cpu").images("3", guidance=1.0)


def test_python_draws_classes_with_images_and_says_which_it_leaves_out(tmp_path, capsys):
    run = with_state(make_run(tmp_path, model={"num_classes": 4}), class_names=["x", "y"], class_counts=[2, 0])
    assert len(Sampler(run, device="cpu").images("all", steps=1)) == 1
    assert "classes without images in training are left out: 1, 2, 3" in capsys.readouterr().err
