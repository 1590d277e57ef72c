"""fastdit train with a fault built in, for training/test_faults.py: fault_worker.py FAULT RANK LOSSES train WORDS…

Appends each step's loss on this rank, in hex, to LOSSES.<rank>. FAULT happens on rank RANK:
    none
    step:K             SIGKILL in the forward of step K
    stop:K             SIGSTOP in the forward of step K
    nan:K,L            a NaN loss in these steps
and in the second save of the process:
    files              SIGKILL after this rank has written its files
    manifest           SIGKILL before the manifest is written
    rename, renamed    SIGKILL before and after the folder is renamed
    pruned             SIGKILL before older checkpoints are deleted
"""

import os
import signal
import sys
from pathlib import Path

import torch

from fastdit import checkpoint, cli, flow
from fastdit.training import saver
from fastdit.training.loop import Trainer

FAULTS = {"none", "step", "stop", "nan", "files", "manifest", "rename", "renamed", "pruned"}
fault, victim, losses_file = sys.argv[1], int(sys.argv[2]), sys.argv[3]
rank = int(os.environ.get("RANK", 0))
kind, _, numbers = fault.partition(":")
steps = [int(k) for k in numbers.split(",")] if numbers else []
saves = 0
assert kind in FAULTS, f"unknown fault {kind}"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


losses = flow.losses


def faulty_losses(model, x0, labels, ids, config, **named):
    step = int(ids[0] >> 32)
    if rank == victim and step in steps:
        if kind == "step":
            die()
        if kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
    result = losses(model, x0, labels, ids, config, **named)
    faulty = kind == "nan" and rank == victim and step in steps
    return result._replace(total=result.total * torch.nan) if faulty else result


flow.losses = faulty_losses
trainer_step = Trainer.step


def step_and_write(self, step):
    trainer_step(self, step)
    with open(f"{losses_file}.{rank}", "a") as file:
        file.write(f"{step} {self.step_sums[0].item().hex()}\n")


Trainer.step = step_and_write


def patch(owner, attribute: str, before: str | None = None, after: str | None = None) -> None:
    """Replace a function by one that has the fault `before` or `after` it in the second save of this process."""
    function = getattr(owner, attribute)

    def faulty(*arguments, **options):
        armed = rank == victim and saves == 2
        if armed and kind == before:
            die()
        result = function(*arguments, **options)
        if armed and kind == after:
            die()
        return result

    setattr(owner, attribute, faulty)


write = saver._write


def counted_write(*arguments):
    global saves
    saves += 1
    write(*arguments)


saver._write = counted_write
patch(saver, "_write_rank", after="files")
patch(checkpoint, "write_atomically", before="manifest")
patch(type(Path()), "rename", before="rename", after="renamed")
patch(saver, "prune", before="pruned")
sys.exit(cli.main(sys.argv[4:]))
