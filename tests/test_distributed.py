"""How a process joins the ranks. Runs on two ranks are in training/test_ranks.py."""

import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch

from commands import environment
from fastdit import distributed
from fastdit.config import InputError

ONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
SLURM = ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_JOB_ID")


def launch(monkeypatch, **variables):
    """Set the environment of a launcher's only rank, changed by `variables`."""
    for name, value in (ONE | variables).items():
        monkeypatch.setenv(name, value)


def test_weight_gradients_are_summed_in_fp32_on_cuda(monkeypatch):
    """What `start` sets on CUDA before DeepSpeed starts, tried without a GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(distributed, "control_group", lambda: None)
    launch(monkeypatch)
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
    launch(monkeypatch, RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
    with pytest.raises(InputError, match="rank 1 of this node has no GPU of its own: 1 are visible"):
        distributed.start("cuda")
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(InputError, match=r"LOCAL_RANK, .* is not set: ranks would share one GPU"):
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
    launch(monkeypatch)
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


@pytest.fixture
def alone(monkeypatch):
    """Leave nothing of a launcher in the environment, at the end neither; CUDA and groups are not there."""
    for name in (*ONE, "LOCAL_WORLD_SIZE", *SLURM):
        monkeypatch.setenv(name, "")  # restored at the end
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return monkeypatch


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"},  # salloc -n 8, then a command in its shell
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # the script of sbatch -n 8
        {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # salloc's interactive step, srun -n 1
        {"SLURM_NTASKS": "", "SLURM_STEP_NUM_TASKS": "", "SLURM_PROCID": ""},
        {"SLURM_STEP_NUM_TASKS": "8"},
        {"WORLD_SIZE": "1"},
    ],
)
def test_one_process_inside_of_an_allocation_is_one_process(alone, variables):
    for name, value in variables.items():
        alone.setenv(name, value)
    assert not distributed.launched()
    assert distributed.world_of_this_process("cpu") == distributed.World(0, 1, torch.device("cpu"), None)
    joined = []
    alone.setattr(distributed, "_join", lambda *arguments, **options: joined.append(arguments))
    alone.setattr(torch.distributed, "get_rank", lambda: 0)
    alone.setattr(torch.distributed, "get_world_size", lambda: 1)
    alone.setattr(distributed, "control_group", lambda: None)
    assert distributed.start("cpu").size == 1 and len(joined) == 1


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, ["srun started 8 tasks", "slurm.sbatch"]),
        ({"RANK": "0"}, ["RANK=0 is set without WORLD_SIZE, MASTER_ADDR, MASTER_PORT", "unset RANK"]),
        ({**ONE, "MASTER_ADDR": ""}, ["RANK=0 is set without MASTER_ADDR"]),
        ({**ONE, "RANK": ""}, ["RANK='' must be a number", "unset RANK"]),
        ({**ONE, "RANK": "-1"}, ["RANK='-1' must be a number"]),
        ({**ONE, "RANK": "x"}, ["RANK='x' must be a number"]),
        ({**ONE, "WORLD_SIZE": "x"}, ["WORLD_SIZE='x' must be a number"]),
        ({**ONE, "RANK": "1"}, ["RANK=1 must be below WORLD_SIZE=1"]),
        ({**ONE, "WORLD_SIZE": "0"}, ["RANK=0 must be below WORLD_SIZE=0"]),
        ({**ONE, "MASTER_PORT": "x"}, ["MASTER_PORT='x' must be a number"]),
        ({**ONE, "MASTER_PORT": "99999"}, ["MASTER_PORT=99999 must be below 65536"]),
        ({**ONE, "LOCAL_RANK": "x"}, ["LOCAL_RANK='x' must be a number"]),
        ({"LOCAL_WORLD_SIZE": "x"}, ["LOCAL_WORLD_SIZE='x' must be a number"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2 is set without RANK"]),
    ],
)
def test_variables_that_contradict_each_other_are_one_sentence(alone, variables, words):
    """For every command alike: sample, evaluate and sweep ask world_of_this_process, train and encode start."""
    for name, value in variables.items():
        alone.setenv(name, value)
    for ask in (distributed.start, distributed.world_of_this_process):
        with pytest.raises(InputError) as error:
            ask("cpu")
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), str(error.value)


def test_a_port_in_use_is_one_sentence_that_names_it():
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen(1)
        port = str(holder.getsockname()[1])
        code = "from fastdit import distributed; distributed.start('cpu')"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment(**ONE | {"MASTER_PORT": port}),
            capture_output=True,
            text=True,
            check=False,
        )
    last = done.stderr.strip().splitlines()[-1]
    assert last.endswith(f"InputError: MASTER_PORT={port} is in use on this node: set MASTER_PORT to another port, on all ranks")
