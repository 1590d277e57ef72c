"""What a callable asks of CUDA, and the host time it takes, on the stub libraries (source DIR/env.sh first).

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
    """Names and live values. launches: of torch's kernels and cuBLAS products; driver_launches: of Triton's; captured: work that
    went into a graph instead; graph_launches: replays, of graph_nodes kernels, copies and fills in all; syncs: of device, stream or
    event."""
    library = ctypes.CDLL(os.path.join(os.environ["GPUSTUB_LIB"], "libgpustub.so"))
    names = ctypes.string_at(library.gpustub_names).decode().split()
    return names, (ctypes.c_long * len(names)).in_dll(library, "gpustub_counters")


def read() -> dict[str, int]:
    """All counters since the process began."""
    return dict(zip(*counters(), strict=True))


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """A dictionary that is filled with what was counted inside of the block."""
    before, seen = read(), {}
    yield seen
    seen.update({name: value - before[name] for name, value in read().items()})


class Measured(NamedTuple):
    """Microseconds of a call on the host's clock and of its processor time (of all threads; what else runs on the machine does not
    count), and what a call asked for by the counters' names."""

    best: float
    median: float
    cpu: float
    counts: dict[str, float]

    def __str__(self) -> str:
        counts = ", ".join(f"{value:g} {name}" for name, value in self.counts.items() if value)
        return f"{self.best:.1f} us at best, {self.median:.1f} in the median; {counts or 'nothing counted'}"


def measure(call: Callable[[], object], repeats: int = 200, warm: int = 5) -> Measured:
    """Host time and counts of one call. The time lacks the driver's own: a real launch takes 2 to 5 us more."""
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
