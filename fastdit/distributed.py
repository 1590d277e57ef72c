"""The ranks of a run: which of them this process is, and work that all of them do or refuse together."""

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist

from fastdit.config import InputError
from fastdit.device import choose_device

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # for a collective of tensors, unless `start` is given more
CONTROL_TIMEOUT = timedelta(minutes=60)  # for flags and objects: rank 0 may hash and write for long while the others wait
LAUNCHER = "start with torchrun or the deepspeed launcher"  # in error sentences


class World(NamedTuple):
    """The position of this process among all ranks. The default process group only carries tensors on `device`."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None  # gloo group for flags, objects and barriers around I/O; None: no process group is needed

    def together(self, work: Callable[[], T], everywhere: bool = True) -> T:
        """Run `work` on every rank and return its result. All ranks must call it.

        everywhere=False runs it only on rank 0 and returns that result on all ranks. An InputError or a FloatingPointError on any
        rank is raised on all, so that none waits for a rank that has left.
        """
        if self.size == 1:
            return work()
        result = error = None
        if everywhere or self.rank == 0:
            try:
                result = work()
            except (InputError, FloatingPointError) as caught:
                error = caught
        outcomes: list = [None] * self.size
        dist.all_gather_object(outcomes, (None if everywhere else result, error), group=self.control)
        for _, error_of_rank in outcomes:
            if error_of_rank:
                raise error_of_rank
        return cast(T, result) if everywhere else outcomes[0][0]  # None only if `work` returned it


def _number(name: str) -> int | None:
    """Return an environment variable as a number, None if it is not set. Raises InputError if it holds anything else."""
    value = os.environ.get(name)
    if value is not None and not (value.isascii() and value.isdecimal() and len(value) < 10):
        raise InputError(f"the environment variable {name}={value!r} must be a number: {LAUNCHER}, or unset {name}")
    return None if value is None else int(value)


def launched() -> bool:
    """Return whether a launcher started this process as one of its ranks. If not, it is the only process.

    Slurm's variables decide nothing: one process inside of an allocation of many tasks (SLURM_NTASKS) is one process. Raises
    InputError if the launcher's variables contradict each other, or for tasks of one srun without ranks: each would train alone.
    """
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        _number(name)
    if rank is None:
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")  # of this srun; SLURM_NTASKS is of the allocation
        if tasks.isdecimal() and int(tasks) > 1 and "SLURM_PROCID" in os.environ:
            raise InputError(
                f"srun started {tasks} tasks (SLURM_STEP_NUM_TASKS), but none has a RANK: start them as launch/slurm.sbatch does, "
                "or a single task"
            )
        if size is not None and size > 1:
            raise InputError(f"WORLD_SIZE={size} is set without RANK: {LAUNCHER}, or unset WORLD_SIZE")
        return False
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise InputError(f"RANK={rank} is set without {', '.join(missing)}: {LAUNCHER}, or unset RANK")
    if rank >= cast(int, size):
        raise InputError(f"RANK={rank} must be below WORLD_SIZE={size}")
    if cast(int, _number("MASTER_PORT")) >= 2**16:
        raise InputError(f"MASTER_PORT={os.environ['MASTER_PORT']} must be below 65536")
    return True


def _join(backend: str, timeout: timedelta, **options) -> None:
    """Join the process group of the launcher's ranks. Raises InputError if they cannot meet."""
    try:
        dist.init_process_group(backend, timeout=timeout, **options)
    except dist.DistNetworkError as error:
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        if "EADDRINUSE" in str(error):
            raise InputError(f"MASTER_PORT={port} is in use on this node: set MASTER_PORT to another port, on all ranks") from error
        raise InputError(
            f"rank 0 cannot be reached at MASTER_ADDR={address} MASTER_PORT={port}: {' '.join(str(error).split())}"
        ) from error
    atexit.register(dist.destroy_process_group)


def start(device: str = "auto", timeout_s: int = 0) -> World:
    """Join the processes that a launcher started (deepspeed, torchrun), or start a group of one process.

    device: "auto" (CUDA if there is a GPU) | "cpu" | "cuda". timeout_s: seconds that a collective of tensors may take, if above
    TIMEOUT. Raises InputError if there is no such device for this rank, or if the launcher's variables are wrong.
    """
    if not launched():
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # 0: any free port
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    options = {}
    if cuda:
        local_rank, gpus = _number("LOCAL_RANK"), torch.cuda.device_count()
        if local_rank is None and int(os.environ["WORLD_SIZE"]) > 1:
            raise InputError("LOCAL_RANK, the number of this rank on its node, is not set: ranks would share one GPU")
        local_rank = local_rank or 0
        if local_rank >= gpus:
            raise InputError(
                f"rank {local_rank} of this node has no GPU of its own: {gpus} are visible; start fewer ranks, or train.device=cpu"
            )
        rank_device = torch.device("cuda", local_rank)
        torch.cuda.set_device(rank_device)
        # cuBLAS may split the long sums of a weight's gradient: the partial sums must not be rounded to bf16
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        if int(os.environ["WORLD_SIZE"]) > 1:
            options["device_id"] = rank_device
    else:
        rank_device = torch.device("cpu")
    if not dist.is_initialized():
        _join("nccl" if cuda else "gloo", max(TIMEOUT, timedelta(seconds=timeout_s)), **options)
    return World(dist.get_rank(), dist.get_world_size(), rank_device, control_group())


def control_group() -> dist.ProcessGroup:
    """Return a new gloo group of all ranks. All ranks must call it."""
    group = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    return cast(dist.ProcessGroup, group)  # it would be an int on a rank that is not a member


def world_of_this_process(device: str = "auto") -> World:
    """Return the World of a launcher's ranks, or of a single process, which needs no process group.

    device: "auto" | "cpu" | "cuda" | "gpu", as of `device.choose_device`. Raises InputError.
    """
    if launched():
        return start("cuda" if device == "gpu" else device)
    return World(0, 1, choose_device(device), None)
