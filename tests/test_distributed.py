"""How a process joins the ranks. Runs on two ranks are in training/test_ranks.py."""

from datetime import timedelta

import pytest
import torch

from fastdit import distributed
from fastdit.config import InputError


def test_weight_gradients_are_summed_in_fp32_on_cuda(monkeypatch):
    """What `start` sets on CUDA before DeepSpeed starts, tried without a GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(distributed, "control_group", lambda: None)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    try:
        matmul.allow_bf16_reduced_precision_reduction = True
        assert distributed.start("cuda").device == torch.device("cuda", 0)
        assert not matmul.allow_bf16_reduced_precision_reduction
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def test_a_rank_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="rank 1 of this node has no GPU of its own: 1 are visible"):
        distributed.start("cuda")


@pytest.mark.parametrize(("timeout_s", "minutes"), [(0, 10), (600, 10), (3600, 60)])
def test_a_longer_step_is_a_longer_collective(monkeypatch, timeout_s, minutes):
    timeouts = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda _, timeout, **options: timeouts.append(timeout))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(distributed.atexit, "register", lambda _: None)
    monkeypatch.setattr(distributed, "control_group", lambda: None)
    monkeypatch.setenv("RANK", "0")
    distributed.start("cpu", timeout_s)
    assert timeouts == [timedelta(minutes=minutes)]


def test_one_process_works_without_a_group():
    world = distributed.World(0, 1, torch.device("cpu"), None)
    assert world.together(lambda: 3) == world.together(lambda: 3, everywhere=False) == 3


@pytest.mark.parametrize("everywhere", [True, False])
def test_an_error_of_one_rank_is_raised_on_all(monkeypatch, everywhere):
    """This process is rank 1 of 2; its partner's outcome is played back."""
    ran = []

    def gather(outcomes, mine, group):
        outcomes[:] = [(None, InputError("rank 0 has no space")), mine]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(InputError, match="rank 0 has no space"):
        distributed.World(1, 2, torch.device("cpu"), None).together(lambda: ran.append(1), everywhere)
    assert ran == [1] * everywhere
