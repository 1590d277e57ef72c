"""Loss sums by timestep, the clock of a step's phases, and the lines of metrics.jsonl."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from commands import settings
from fastdit import flow
from fastdit.config import FlowConfig, parse
from fastdit.device import versions
from fastdit.distributed import World
from fastdit.flow import Losses
from fastdit.training import telemetry
from fastdit.training.loop import train


def test_versions_name_the_build_of_torch(monkeypatch):
    """The metadata of PyPI's CUDA builds say 2.14.1, torch.__version__ says 2.14.1+cu130."""
    monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
    assert versions()["torch"] == "2.14.1+cu130"


def test_loss_sums_by_bins_of_t():
    g = torch.Generator().manual_seed(0)
    losses, t = torch.rand(37, generator=g), torch.rand(37, generator=g)
    t[:3] = torch.tensor([0.125, 1.0, 1e-9])  # edges of bins, and both ends
    sums = telemetry.loss_sums(Losses(losses, t, {"flow": losses}))
    bins = [min(int(x * telemetry.TIME_BINS), telemetry.TIME_BINS - 1) for x in t.tolist()]
    assert bins[:3] == [1, 7, 0]
    wanted = [sum(loss for loss, b in zip(losses.tolist(), bins, strict=True) if b == k) for k in range(telemetry.TIME_BINS)]
    torch.testing.assert_close(sums, torch.tensor([losses.sum(), *wanted, *[bins.count(k) for k in range(telemetry.TIME_BINS)]]))


def test_a_cpus_phases_are_timed_by_the_host():
    clock = telemetry.StepClock(torch.device("cpu"))
    for _ in range(2):
        with clock.phase("ema"):
            time.sleep(0.02)
    seconds = clock.read()
    assert set(seconds) == set(telemetry.PHASES)
    assert 0.04 <= seconds["ema"] < 1 and seconds["optimizer"] == 0
    assert clock.read()["ema"] == 0


def test_a_gpus_phases_are_timed_by_events_and_the_data_wait_by_the_host(monkeypatch):
    """The events are 100 ms apart. Reading one before `read` would make the host wait."""
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = len(recorded) * 100.0
            recorded.append(self)

        def elapsed_time(self, end):
            asked.append(self)
            return end.time - self.time

    recorded = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = telemetry.StepClock(torch.device("cuda"))
    for _ in range(3):
        with clock.phase("data_wait", on_host=True):
            pass
        with clock.phase("forward_backward"):
            pass
    assert not asked and len(recorded) == 6
    seconds = clock.read()
    assert seconds["forward_backward"] == pytest.approx(0.3) and seconds["data_wait"] < 0.1 and seconds["ema"] == 0


@pytest.mark.parametrize(("name", "mfu"), [("NVIDIA H100 80GB HBM3", True), ("NVIDIA H100 PCIe", False), ("AMD EPYC", False)])
def test_a_log_line_has_each_devices_flops_and_mfu_where_the_peak_is_known(monkeypatch, tmp_path, capsys, name, mfu):
    """Two ranks, 8 images per step. XL/2 needs 0.71 TFLOP per image, forward and backward, as published."""
    monkeypatch.setattr(telemetry, "device_name", lambda device: name)
    words = ["model.preset=XL/2", "model.in_channels=4", "model.num_classes=1000", "train.precision=bf16", "train.batch_size=4"]
    log = telemetry.Log(tmp_path, parse(None, words), World(0, 2, torch.device("cpu"), None), 0, None)
    log.line_time -= 0.01  # 10 steps in 10 ms: high enough that rounding the MFU does not matter
    log.write(10, loss=1.0, loss_by_t=[])
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["tflops"] == pytest.approx(line["images_per_s"] / 2 * 0.71, rel=0.01)
    assert ("mfu" in line) == mfu == ("MFU is relative to 989.4 TFLOP/s: H100 SXM, bf16" in capsys.readouterr().err)
    if mfu:
        assert line["mfu"] == pytest.approx(line["tflops"] / 989.4, rel=0.01)


def test_log_lines_after_the_checkpoint_are_cut(tmp_path):
    config = parse(None, settings(tmp_path, "train.total_steps=3"))
    train(config)
    log = tmp_path / "r/metrics.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 4, "loss": 9}) + "\n" + '{"step": 5, "lo')
    train(parse(None, settings(tmp_path, "train.total_steps=4")))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4] and lines[-1]["loss"] != 9


def test_the_mean_of_the_bins_is_the_loss(tmp_path):
    """Eight images per line: the counter RNG's timesteps give the count of each bin, so the mean of the bins must be the loss."""
    run = train(parse(None, settings(tmp_path, "train.total_steps=4", "train.sample_steps=0")))
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        ids = torch.cat([flow.sample_ids(step, 0, 4, torch.device("cpu")) for step in (line["step"] - 2, line["step"] - 1)])
        counts = torch.bincount(
            (flow.sample_timesteps(FlowConfig(), 0, ids) * telemetry.TIME_BINS).long(), minlength=telemetry.TIME_BINS
        )
        assert [mean is None for mean in line["loss_by_t"]] == [count == 0 for count in counts.tolist()]
        total = sum(mean * n for mean, n in zip(line["loss_by_t"], counts.tolist(), strict=True) if n)
        assert total / 8 == pytest.approx(line["loss"], abs=1e-5)


def test_a_validation_line_reaches_the_log_and_wandb(tmp_path):
    log = telemetry.Log(tmp_path, parse(None, ["train.precision=fp32"]), World(0, 1, torch.device("cpu"), None), 0, None)
    sent = []
    log.wandb = SimpleNamespace(log=lambda values, step: sent.append((step, values)), finish=lambda: None)
    line = {"val_loss": 2.0, "val_losses": [1.0, 3.0], "fid": 5.0}
    log.write_validation(4, (0.25, 0.75), line)
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 4, **line}
    losses = {"validation/val_loss_t0.25": 1.0, "validation/val_loss_t0.75": 3.0}
    assert sent == [(4, {"validation/val_loss": 2.0, "validation/fid": 5.0} | losses)]
