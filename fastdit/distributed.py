"""The ranks of a run: which of them this process is, and work that all of them do or refuse together."""

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist

from fastdit.config import InputError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # for a collective of tensors, unless `start` is given more
CONTROL_TIMEOUT = timedelta(minutes=60)  # for flags and objects: rank 0 may hash and write for long while the others wait


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


def start(device: str = "auto", timeout_s: int = 0) -> World:
    """Join the processes that a launcher started (deepspeed, torchrun), or start a group of one process.

    device: "auto" (CUDA if there is a GPU) | "cpu" | "cuda". timeout_s: seconds that a collective of tensors may take, if above
    TIMEOUT. Raises InputError if there is no such device for this rank.
    """
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
            raise InputError("srun started several tasks, but none has a rank: start them with torchrun or the deepspeed launcher")
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # 0: any free port
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    options = {}
    if cuda:
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
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
        dist.init_process_group("nccl" if cuda else "gloo", timeout=max(TIMEOUT, timedelta(seconds=timeout_s)), **options)
        atexit.register(dist.destroy_process_group)
    return World(dist.get_rank(), dist.get_world_size(), rank_device, control_group())


def control_group() -> dist.ProcessGroup:
    """Return a new gloo group of all ranks. All ranks must call it."""
    group = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    return cast(dist.ProcessGroup, group)  # it would be an int on a rank that is not a member


def world_of_this_process() -> World:
    """Return the World of a launcher's ranks, or of a single process, which needs no process group."""
    if "RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        return start()
    return World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"), None)
