"""Sums of the losses by timestep, the clock of a step's phases, and what a log line says of the speed."""

import json
import time

import pytest
import torch

from fastdit.config import parse
from fastdit.device import versions
from fastdit.distributed import World
from fastdit.flow import Losses
from fastdit.training import telemetry


def test_versions_name_the_build_of_torch(monkeypatch):
    """PyPI's CUDA builds are 2.14.1 in their metadata and 2.14.1+cu130 in torch.__version__."""
    monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
    assert versions()["torch"] == "2.14.1+cu130"


def test_loss_sums_by_bins_of_t():
    g = torch.Generator().manual_seed(0)
    losses, t = torch.rand(37, generator=g), torch.rand(37, generator=g)
    t[:3] = torch.tensor([0.125, 1.0, 1e-9])  # the edges of bins, and the ends
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
    """Events of a stream that runs 100 ms behind each record; asking them before read() would make the host wait."""
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
    """Two ranks, 8 images a step; what XL/2 takes an image is published: 0.71 TFLOP forward and backward."""
    monkeypatch.setattr(telemetry, "device_name", lambda device: name)
    words = ["model.preset=XL/2", "model.in_channels=4", "model.num_classes=1000", "train.precision=bf16", "train.batch_size=4"]
    log = telemetry.Log(tmp_path, parse(None, words), World(0, 2, torch.device("cpu"), None), 0, None)
    log.time -= 0.01  # 10 steps in no time: a rate whose MFU is not rounded away
    log.write(10, loss=1.0, loss_by_t=[])
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["tflops"] == pytest.approx(line["images_per_s"] / 2 * 0.71, rel=0.01)
    assert ("mfu" in line) == mfu == ("MFU is of 989.4 TFLOP/s: H100 SXM, bf16" in capsys.readouterr().err)
    if mfu:
        assert line["mfu"] == pytest.approx(line["tflops"] / 989.4, rel=0.01)
