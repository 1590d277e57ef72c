"""One of several ranks of `fastdit evaluate`, which ends by SIGKILL before, inside of or after a write of finished outputs.

Arguments: the number of this process's write that it ends at (0: none), "before", "inside" or "after", and those of fastdit.
"""

import os
import signal
import sys

import numpy as np

from fastdit import cli
from fastdit.evaluation.kept import Kept

wanted, moment = int(sys.argv[1]), sys.argv[2]
write, savez = Kept._write, np.savez
writes = 0


def die_at(now: str) -> None:
    if writes == wanted and now == moment:
        os.kill(os.getpid(), signal.SIGKILL)


def counted_write(*arguments):
    global writes
    writes += 1
    die_at("before")
    write(*arguments)
    die_at("after")


def half_written(file, **arrays):
    savez(file, **dict(list(arrays.items())[:1]))
    file.flush()
    die_at("inside")
    file.seek(0)
    savez(file, **arrays)


Kept._write = counted_write
np.savez = half_written
sys.exit(cli.main(sys.argv[3:]))
