"""Sums of the losses by timestep, and the clock of a step's phases."""

import time

import pytest
import torch

from fastdit import telemetry


def test_loss_sums_by_bins_of_t():
    g = torch.Generator().manual_seed(0)
    losses, t = torch.rand(37, generator=g), torch.rand(37, generator=g)
    t[:3] = torch.tensor([0.125, 1.0, 1e-9])  # the edges of bins, and the ends
    sums = telemetry.loss_sums(losses, t)
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
