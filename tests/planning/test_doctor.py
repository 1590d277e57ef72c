"""`fastdit doctor`: its figures of a tiny run, and that it names the part that was made slow."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import profile

from commands import complains, environment
from fastdit import cli, data
from fastdit.config import parse
from fastdit.planning import doctor, plan

TINY = ["model.preset=test/4", "train.precision=fp32", "train.batch_size=4"]
CPU = torch.device("cpu")


def test_the_command(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor", "--json", *TINY, "train.accumulation=2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())  # nothing is left behind
    assert report["images_per_step"] == 8 and report["precision"] == "fp32" and report["matmul"]["shape"] == [4 * 64, 64, 256]
    assert report["images_per_s"]["measured"] == pytest.approx(8 / report["step_s"])
    assert min(report["matmul"]["flops"], report["attention"]["flops"], report["copy_bytes_per_s"], report["data_images_per_s"]) > 0
    assert report["attention"]["kind"] == "scaled_dot_product_flash_attention_for_cpu"
    assert report["link_bytes_per_s"] is None and report["overlap_hidden"] is None
    parts = report["parts_s"]
    assert parts["communication"] == {"expected": 0.0, "measured": 0.0}
    assert all(parts[name]["measured"] > 0 for name in ("data", "matmuls", "optimizer")) and parts["ops"]["measured"] >= 0
    text = doctor.describe(report)
    assert "not measured: one rank" in text and f"largest gap: {report['largest_gap']}, " in text


def test_slow_data_are_the_largest_gap(monkeypatch):
    """The loader takes 0.1 s per batch, and a step a few milliseconds."""
    load = data.load

    def slow(config, path, world):
        loader = load(config, path, world)
        batch = loader.batch
        monkeypatch.setattr(loader, "batch", lambda *step: time.sleep(0.1) or batch(*step))
        return loader

    monkeypatch.setattr(data, "load", slow)
    report = doctor.examine(parse(None, TINY))
    assert report["largest_gap"] == "data" and report["parts_s"]["data"]["measured"] >= 0.1
    assert report["data_images_per_s"] <= 4 / 0.1
    assert "largest gap: data, " in doctor.describe(report)


def test_a_profile_tells_matmuls_from_other_ops():
    x = torch.randn(64, 64, requires_grad=True)
    linear = torch.nn.Linear(64, 64)
    with profile() as profiler:
        linear(x).exp().sum().backward()
    events = profiler.key_averages()
    matmuls, collectives = doctor.profiled(events, CPU)
    assert {"aten::addmm", "aten::mm"} <= {event.key for event in events if doctor.MATMULS.match(event.key)}
    assert 0 < matmuls < sum(event.self_cpu_time_total for event in events) / 1e6 and collectives == 0


def test_attention_on_a_gpu_counts_as_matmuls():
    """Its kernels are those of an inner op; the outer one, which a CPU's profile has, takes no time there."""
    names = ("_flash_attention_forward", "_efficient_attention_backward", "_cudnn_attention_forward", "mm", "exp")
    events = [SimpleNamespace(key=f"aten::{name}", self_device_time_total=1e6) for name in names]
    assert doctor.profiled(events, torch.device("cuda")) == (4.0, 0)


def test_gloos_spans_count_whole():
    """They run in a thread of their own, and the profiler gives them no time of their own."""
    span = SimpleNamespace(key="gloo:all_reduce", self_cpu_time_total=0.0, cpu_time_total=3e5)
    call = SimpleNamespace(key="c10d::allreduce_", self_cpu_time_total=100.0, cpu_time_total=3e5)  # waits for the span
    assert doctor.profiled([span, call], CPU) == (0.0, 0.3)


@pytest.mark.slow
def test_two_ranks():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "fastdit.cli"]
    done = subprocess.run([*launcher, "doctor", "--json", *TINY], env=environment(), capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["ranks"] == 2 and report["images_per_step"] == 8 and report["link_bytes_per_s"] > 0
    assert all(report["parts_s"]["communication"].values())


def test_collectives_belong_to_the_phase_that_sends():
    """30 ms of them, two thirds gradients: on a CPU all count, on CUDA those of the weights."""
    expected = plan.Rates(0.1, 0.02, 0.05, 0.01, gradients_sent=0.002, weights_sent=0.001, fast=1, slow=1)
    step = {"data_wait": 0.0, "forward_backward": 0.2, "optimizer": 0.03, "ema": 0.01, "matmuls": 0.12, "collectives": 0.03}
    cpu, cuda = doctor.compare(expected, True, step, False), doctor.compare(expected, False, step, True)
    measured = lambda parts: [round(parts[name]["measured"], 6) for name in ("matmuls", "ops", "optimizer", "communication")]
    assert measured(cpu) == [0.12, 0.06, 0.03, 0.03] and measured(cuda) == [0.12, 0.08, 0.03, 0.01]
    assert cpu["communication"]["expected"] == pytest.approx(0.003) and cuda["communication"]["expected"] == 0.001
    assert (cpu["ops"]["expected"], cuda["ops"]["expected"]) == (0.02, 0.05)


def test_bad_input(capsys):
    complains(capsys, ["doctor", "data.source=nowhere"], "data.source=nowhere is neither")
