"""The checks that the benchmark suites make on their own rows, and two suites as a user runs them."""

import importlib.util
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import (
    bench_blocks,
    bench_end_to_end,
    bench_kernels,
    bench_sampling,
    bench_train_step,
    eager_reference,
    results_csv,
    roofline,
)
from benchmarks.eager_reference import EagerDiT, comparable, fastdit_model
from fastdit import autoencoder
from fastdit.data.order import center_crops

ROOT = Path(__file__).parent.parent


def turns(losses, seconds):
    return [(losses[i : i + 1], seconds[i]) for i in range(len(losses))]


def test_end_to_end_rows_need_the_reference_losses():
    limits = [(1e11, 1e10)] * 3
    found = {
        "eager": turns([1.0, 0.9, 0.8], [9.0, 4.0, 4.0]), "from latents": turns([1.0, 0.9, 0.8], [9.0, 0.5, 0.5]),
        "from images": turns([1.0, 0.9, 0.7], [9.0, 2.0, 2.0]), "limits": limits,
    }  # fmt: skip
    names, peaks = ("eager", "from images", "from latents"), dict.fromkeys(found, 1)
    del peaks["limits"]
    rows = bench_end_to_end.rows(2, 3, names, found, peaks, {})
    assert rows["from latents"].values["speedup"] == "8.000" and rows["from latents"].samples == [0.5, 0.5]
    assert rows["from images"].error.startswith("parity") and rows["from images"].samples == []
    found["from images"] = turns([1.0, math.nan, 0.8], [9.0, 2.0, 2.0])
    assert bench_end_to_end.rows(2, 3, names, found, peaks, {})["from images"].error.startswith("parity")
    gone = bench_end_to_end.rows(2, 3, names, found | {"eager": []}, dict.fromkeys(names[1:], 1), {"eager": "out of memory"})
    assert gone["eager"].error == "out of memory" and gone["from latents"].error.startswith("parity")


def test_a_speedup_of_several_processes_is_the_median_of_theirs():
    """The second process, whose tensors lie badly, is one value in three; in one process each turn is a value."""
    eager, held = [[2.0, 2.2, 1.8]] * 2, {"eager forward": 8_000_000, "fused forward": 4_000_000}
    processes = [
        bench_kernels.Turns({"eager forward": eager, "fused forward": [[ours], [ours]]}, held, {}, 1e9, parity)
        for ours, parity in ((1.0, 1e-7), (4.0, 3e-7), (0.8, 2e-7))
    ]
    members = ("eager forward", "fused forward")
    found = bench_kernels.together(processes, members, {"case": "op", "size": "1"})
    row = found["fused forward"].row()
    assert [row[k] for k in ("speedup", "turns", "parity", "peak_mb", "samples")] == ["2.000", "3", "3.0e-07", "4.00", 6]
    assert found["eager forward"].values["speedup"] == "1.000" and "parity" not in found["eager forward"].values
    assert (float(row["speedup_p20"]), float(row["speedup_p80"])) == pytest.approx((1.1, 2.3))
    one = bench_kernels.together(processes[:1], members, {})["fused forward"].values
    assert (one["speedup"], one["turns"]) == ("2.000", "2")
    wrong = processes[1]._replace(samples={"eager forward": eager}, errors={"fused forward": "parity: wrong"})
    gone = bench_kernels.together([processes[0], wrong], members, {})
    assert gone["fused forward"].error == "parity: wrong" and not gone["fused forward"].samples
    no_reference = [p._replace(samples=p.samples | {"eager forward": []}, errors={"eager forward": "died"}) for p in processes]
    ours = bench_kernels.together(no_reference, members, {})["fused forward"]
    assert ours.samples and "speedup" not in ours.values


def test_a_gpus_rows_say_what_the_host_needs_for_a_call():
    eager, held = [[2.0]], {"eager forward": 1}
    processes = [
        bench_kernels.Turns({"eager forward": eager}, held, {}, 1e9, 0.0, {"eager forward": host}) for host in (2e-5, 4e-5)
    ]
    found = bench_kernels.together(processes, ("eager forward",), {})["eager forward"]
    assert found.values["host_us"] == "30.0"
    [cpu] = bench_kernels.together([processes[0]._replace(host=None)], ("eager forward",), {}).values()
    assert "host_us" not in cpu.values


def test_a_gpus_tensors_are_twice_its_cache(monkeypatch):
    card = types.SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    batch = bench_kernels.batch_above_cache(256 * 384)
    assert 100 << 20 <= batch * 256 * 384 * bench_kernels.DTYPE.itemsize < 101 << 20


def test_blocks_convert_the_model_before_it_goes_to_the_device(monkeypatch):
    """The conversion mixes its weights with tensors of the CPU."""

    class Converted(Exception):
        pass

    def convert(model):
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        raise Converted

    monkeypatch.setattr(bench_blocks, "DEVICE", torch.device("meta"))
    monkeypatch.setattr(bench_blocks, "fastdit_model", convert)
    with pytest.raises(Converted):
        bench_blocks.measure("S/2", 1, (), 1)


class FakeWorker:
    """Says what it was asked; a step's loss is its number."""

    alive, most = set(), 0

    def __init__(self, make, name, *_, **__):
        if name == "broken":
            raise RuntimeError("cannot be made")
        self.limits, self.name = make == "benchmarks.roofline:Limits", str(name)
        if not self.limits:
            FakeWorker.alive.add(self.name)
            FakeWorker.most = max(FakeWorker.most, len(FakeWorker.alive))

    def __call__(self, first=0, count=0, busy=False):
        if self.limits:
            return 1e12, 1e11
        return 0.25 if busy else ([1.0 + first + i for i in range(count)], 0.5, 0.25)

    def peak_memory(self):
        return 1_000_000

    def stop(self):
        FakeWorker.alive.discard(self.name)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_train_steps_on_a_gpu_are_measured_one_provider_after_the_other(monkeypatch, kind):
    """On a CPU all in turns. One that cannot be made leaves the others their rows."""
    monkeypatch.setattr(bench_train_step, "Worker", FakeWorker)
    monkeypatch.setattr(bench_train_step, "DEVICE", torch.device(kind))
    FakeWorker.most = 0
    names = ("eager", "broken", "engine")
    rows = bench_train_step.measure("S/2", (64, 1, 1, 128, None), 2, (64, 64, 64), names, 4, lambda _: None)
    assert FakeWorker.most == (1 if kind == "cuda" else 2) and not FakeWorker.alive
    assert rows["broken"].error == "RuntimeError: cannot be made" and not rows["broken"].samples
    assert rows["engine"].samples == [0.5] * 4 and rows["engine"].values["parity"] == "0.0e+00"
    assert rows["engine"].values.get("gpu_busy") == ("0.500" if kind == "cuda" else None)


def test_the_providers_of_a_train_step(monkeypatch):
    assert bench_train_step.of_cpu(True) == tuple(n for n in bench_train_step.PROVIDERS if n not in ("+compile", "graphs"))
    assert "eager compiled" not in bench_train_step.of_cpu(False)
    monkeypatch.setattr(bench_train_step, "DEVICE", torch.device("cuda"))
    groups = bench_train_step.groups(True)
    assert list(groups) == ["S/2", "B/2", "L/2", "XL/2"] and groups["XL/2"].members == bench_train_step.MAIN
    assert set(groups["S/2"].members) == set(bench_train_step.PROVIDERS)
    assert [group.measure.args[2] for group in groups.values()] == [256, 256, 64, 64]


def test_without_diffusers_bf16_latents_are_judged_by_themselves(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    eager = torch.randn(2, 4, 8, 8)
    values, errors = bench_sampling.check({"eager": eager, "fastdit bf16": eager + 0.01}, decoded=False)
    assert not errors and 5e-3 < float(values["fastdit bf16"]["latents_rms"]) < 2e-2
    for wrong in (eager + 0.1, eager * torch.nan):
        _, errors = bench_sampling.check({"eager": eager, "fastdit bf16": wrong}, decoded=False)
        assert errors["fastdit bf16"].startswith("parity: latents differ")


def test_sampling_rows_need_the_reference_latents():
    eager = torch.randn(2, 4, 8, 8)
    values, errors = bench_sampling.check({"eager": eager, "fastdit fp32": eager + 1e-6}, decoded=True)
    assert not errors and float(values["fastdit fp32"]["parity"]) < 1e-5
    _, errors = bench_sampling.check({"eager": eager, "fastdit fp32": eager + 0.1}, decoded=True)
    assert errors["fastdit fp32"].startswith("parity")
    _, errors = bench_sampling.check({"eager": eager, "fastdit fp32": eager * torch.nan, "fastdit bf16": eager * torch.nan}, True)
    assert set(errors) == {"fastdit fp32", "fastdit bf16"}
    values, errors = bench_sampling.check({"eager": eager, "fastdit bf16": eager + 0.1}, decoded=True)
    assert values["fastdit bf16"]["psnr_db"] == "26.0" and "26.0 dB" in errors["fastdit bf16"]


def test_both_samplers_of_the_suite_give_the_same_latents(monkeypatch):
    monkeypatch.setattr(bench_sampling, "SHAPE", (64, 2, 1, 128, None))
    monkeypatch.setattr(bench_sampling, "STEPS", 3)
    torch.manual_seed(0)
    eager = bench_sampling.eager_sampler(False)(2)
    torch.manual_seed(0)
    ours = bench_sampling.fastdit_sampler("fp32", False)(2)
    assert (ours - eager).abs().max() < 1e-4 * eager.abs().max()


@pytest.mark.parametrize("class_width", [48, None])
def test_flops_are_those_of_every_linear_and_of_attention(class_width):
    """Backward twice the forward, without the gradients at the latent and at the timestep's frequencies."""
    model = fastdit_model(EagerDiT(comparable(64, 2, 2, 128, class_width)))
    tokens, width, depth = 256, 64, 2
    once = [*model.modulation, model.final_modulation, *model.time_embedding.modules(), *model.class_embedding.modules()]
    flops = {m: 2 * m.weight.numel() * (1 if m in once else tokens) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    attention = depth * 4 * tokens**2 * width
    frequencies = next(m for m in model.time_embedding.modules() if m in flops)
    forward = sum(flops.values()) + attention
    assert roofline.train_flops(model.config) == 3 * forward - flops[model.patch_embedding] - flops[frequencies]
    assert roofline.velocity_flops(model.config) == forward - sum(flops[m] for m in once if m in flops)


def test_the_reference_reads_and_encodes_images_as_fastdit_does():
    """A photograph cut by the base script's integers is within 2 levels of what `center_crops` cuts; posteriors are the same."""
    from benchmarks.photographs import crops, encoded

    photo = next(iter(crops(1)))
    ours = eager_reference.pixels(encoded(photo, format="PNG", quality=None), 64, 64)
    start, end = center_crops(np.array([photo.height]), np.array([photo.width]), 64)
    box = (*start[0][::-1], *end[0][::-1])
    wanted = torch.from_numpy(np.asarray(photo.resize((64, 64), 3, box), np.float32).transpose(2, 0, 1) / 127.5 - 1)
    assert (ours - wanted).abs().mean() < 2 / 127.5

    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, scaling_factor=0.3).eval()
    images, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 4, 8, 8)
    codec = autoencoder.KL("tiny", 8, torch.device("cpu"), vae)
    ours = codec.posterior_sample(codec.encode(images), noise)
    assert torch.allclose(eager_reference.encode(vae, images, noise), ours, atol=1e-6)


@pytest.mark.slow
def test_suites_write_their_rows(tmp_path):
    """Checkpoints and latents, measured for real."""
    path = tmp_path / "rows.csv"
    options = ["-q", "-p", "no:cacheprovider", "--allow-dirty", f"--csv={path}", "-k", "checkpoint or latents or index"]
    suites = [ROOT / "benchmarks" / f"bench_{name}.py" for name in ("checkpoint", "data")]
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # where this process is a rank by now
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    command = [sys.executable, "-m", "pytest", *options, *map(str, suites)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    rows = results_csv.read(path)
    assert {row["suite"] for row in rows} == {"checkpoint", "data"} and len(rows) == 6 + 3
    assert all(not row["error"] and float(row["median_s"]) > 0 and row["commit"] for row in rows)
    waits, save = (next(r for r in rows if (r["provider"], r["direction"]) == ("fastdit", d)) for d in ("waits", "save"))
    assert float(waits["median_s"]) < float(save["median_s"])
