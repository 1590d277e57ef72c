"""Counts what a callable asks of CUDA, and times the host, on the stub libraries (source DIR/env.sh first).

from benchmarks.without_gpu.count import measure
print(measure(lambda: torch.add(x, y)))   # 9.8 us at best, …; 1 launches
"""

import ctypes
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple


@functools.cache
def counters() -> tuple[list[str], ctypes.Array]:
    """Return the counters' names and live values.

    launches: launches of torch's kernels and cuBLAS products; driver_launches: those of Triton's; captured: work recorded into a
    graph instead; graph_launches: replays, with graph_nodes kernels, copies and fills; syncs: of device, stream or event.
    """
    library = ctypes.CDLL(os.path.join(os.environ["GPUSTUB_LIB"], "libgpustub.so"))
    names = ctypes.string_at(library.gpustub_names).decode().split()
    return names, (ctypes.c_long * len(names)).in_dll(library, "gpustub_counters")


def read() -> dict[str, int]:
    """Return all counters since the process began."""
    return dict(zip(*counters(), strict=True))


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Yield a dictionary that receives the counts of the block when it ends."""
    before, seen = read(), {}
    yield seen
    seen.update({name: value - before[name] for name, value in read().items()})


class Measured(NamedTuple):
    """One call: best and median microseconds on the host's clock, median CPU microseconds of all threads, and counts by name."""

    best: float
    median: float
    cpu: float
    counts: dict[str, float]

    def __str__(self) -> str:
        counts = ", ".join(f"{value:g} {name}" for name, value in self.counts.items() if value)
        return f"{self.best:.1f} us at best, {self.median:.1f} in the median; {counts or 'nothing counted'}"


def measure(call: Callable[[], object], repeats: int = 200, warm: int = 5) -> Measured:
    """Return host time and counts of one call. The time lacks the driver's: a real launch takes 2 to 5 us more."""
    for _ in range(warm):
        call()
    wall, cpu = [], []
    with counted() as seen:
        for _ in range(repeats):
            began, cpu_began = time.perf_counter_ns(), time.process_time_ns()
            call()
            wall.append((time.perf_counter_ns() - began) / 1e3)
            cpu.append((time.process_time_ns() - cpu_began) / 1e3)
    counts = {name: value / repeats for name, value in seen.items()}
    return Measured(min(wall), statistics.median(wall), statistics.median(cpu), counts)
