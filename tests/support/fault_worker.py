"""fastdit train with a fault built in, for tests/test_faults.py: fault_worker.py FAULT RANK LOSSES train WORDS…

Writes each taken step's loss of each rank, in hex, to LOSSES.<rank>. FAULT, at rank RANK:
    none | step:K (SIGKILL in the forward of step K) | nan:K,L (a NaN loss in those steps) | stop:K (SIGSTOP in step K)
    own (SIGKILL after this rank's file) | manifest, rename, renamed, pruned (before the manifest, before and after the rename,
    before older checkpoints go), each in the second save
"""

import os
import signal
import sys

import torch

from fastdit import checkpoint, cli, files, flow
from fastdit.training import saver
from fastdit.training.loop import Trainer

fault, victim, losses_file = sys.argv[1], int(sys.argv[2]), sys.argv[3]
rank = int(os.environ.get("RANK", 0))
kind, _, where = fault.partition(":")
steps = [int(k) for k in where.split(",")] if where else []
saves = 0


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
    found = losses(model, x0, labels, ids, config, **named)
    faulty = kind == "nan" and rank == victim and step in steps
    return found._replace(total=found.total * torch.nan) if faulty else found


flow.losses = faulty_losses
take = Trainer.step


def step_and_write(self, step):
    taken = take(self, step)
    with open(f"{losses_file}.{rank}", "a") as file:
        file.write(f"{step} {self.step_sums[0].item().hex()}\n")
    return taken


Trainer.step = step_and_write


def at(name: str, function, before: bool):
    """The function, with the fault before or after it in the second save of this process."""

    def run(*arguments, **options):
        if before and kind == name and rank == victim and saves == 2:
            die()
        result = function(*arguments, **options)
        if not before and kind == name and rank == victim and saves == 2:
            die()
        return result

    return run


write = saver._write


def counted_write(*arguments):
    global saves
    saves += 1
    write(*arguments)


saver._write = counted_write
saver._write_own = at("own", saver._write_own, before=False)
files.write_atomically = at("manifest", files.write_atomically, before=True)
checkpoint.is_whole = at("pruned", checkpoint.is_whole, before=True)
rename = type(checkpoint.Path()).rename
type(checkpoint.Path()).rename = at("renamed", at("rename", rename, before=True), before=False)
sys.exit(cli.main(sys.argv[4:]))
