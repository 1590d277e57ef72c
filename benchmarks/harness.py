"""How every suite measures: providers take turns, each in a process of its own; a failure becomes a row with its reason.

A bench_*.py module has SUITE, its name, and `groups(full)`, its cases. The `measure` of a Group returns one Result per member.
conftest.py runs the suites under pytest, run_on_gpu.py without it. Needs only torch, as the suites of kernels, blocks and train
steps do.
"""

import atexit
import importlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from fastdit import device
from fastdit.cli import ALLOCATOR
from fastdit.device import precision
from fastdit.planning import machine_rates

T = TypeVar("T")
CSV = "suites"  # all suites share one CSV per machine
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
THREADS = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
PRECISION = precision("auto", DEVICE)  # bf16 if the device computes in it; else fp32, for the eager reference too
DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}[PRECISION]
SWEEPS = {False: 3, True: 5}  # quick and full: rounds of turns in which a process measures ops and blocks
PROCESSES = {False: 1, True: 1 if DEVICE.type == "cuda" else 12}  # `bench_kernels.together` says why there are several
EXCUSED = ("out of memory", "ModuleNotFoundError")  # prefixes of errors that only say what this machine lacks


class Result(NamedTuple):
    """One provider's measurement.

    key: case, provider, direction and size, as in the table; samples: seconds of each call; values: further columns; error: the
    reason if there are no samples.
    """

    key: dict[str, str]
    samples: list[float]
    values: dict[str, object]
    error: str = ""

    def row(self) -> dict[str, object]:
        """Return the columns of this result's row in the CSV."""
        timed = dict(zip(("median_s", "p20_s", "p80_s"), (f"{s:.6g}" for s in quantiles(self.samples)), strict=False))
        return {**self.key, "precision": PRECISION, **timed, "samples": len(self.samples), **self.values, "error": self.error}


class Group(NamedTuple):
    """Measurements that take turns: `measure(say)` returns one Result per name in `members` and reports progress through `say`."""

    members: tuple[str, ...]
    measure: Callable[[Callable[[str], None]], dict[str, Result]]


def quantiles(samples: list[float]) -> tuple[float, ...]:
    """Return median, 20th and 80th percentile, linear between samples; an empty tuple for no samples."""
    if len(samples) < 2:
        return tuple(samples * 3)
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return statistics.median(samples), cuts[1], cuts[7]


def speedup(theirs: list[float], ours: list[float]) -> dict[str, str]:
    """Return the speed-up columns of `ours` over `theirs`, seconds that were measured in turns; no columns if either is empty."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)]) if theirs and ours else {}


def spread(speedups: list[float]) -> dict[str, str]:
    """Return a row's columns of some speed-ups: median, 20th and 80th percentile, and their number."""
    median, low, high = quantiles(speedups)
    return {"speedup": f"{median:.3f}", "speedup_p20": f"{low:.4f}", "speedup_p80": f"{high:.4f}", "turns": f"{len(speedups)}"}


def reason(error: BaseException) -> str:
    """Return an error as one line for the CSV's `error` column."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory"
    if isinstance(error, BrokenProcessPool):
        return "the process died: out of memory, or a crash"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def synchronize() -> None:
    """Wait until the device has finished its queue."""
    device.synchronize(DEVICE)


class Timed(NamedTuple):
    """The result of a call, its wall-clock seconds, and the CPU seconds of all threads of the process."""

    result: object
    wall: float
    cpu: float


def timed(work: Callable[[], object], wait: bool = True) -> Timed:
    """Call `work` once and time it. wait: wait for the device before each reading of the clocks."""
    if wait:
        synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    if wait:
        synchronize()
    return Timed(result, time.perf_counter() - wall, time.process_time() - cpu)


def seconds(call: Callable[[], object], calls: int) -> float:
    """Return the mean seconds of `calls` calls after one untimed call."""
    return machine_rates.seconds(call, DEVICE, calls)


def gpu_events(call: Callable[[], object]) -> list:
    """Return what ran on the GPU during a call, copies and fills included, longest first: torch.profiler's averages, with `key`,
    `count` and `self_device_time_total` in microseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        synchronize()
    events = [event for event in profile.key_averages() if event.self_device_time_total]
    return sorted(events, key=lambda event: -event.self_device_time_total)


def busy_seconds(events: list) -> float:
    """Return the seconds that the GPU worked on `gpu_events`."""
    return sum(event.self_device_time_total for event in events) / 1e6


def resident(key: str) -> int:
    """Return this process's resident memory in bytes: "VmRSS" now, "VmHWM" the maximum since it was reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def peak_memory() -> int:
    """Return the most bytes that torch allocated on the GPU, or that this process held in memory.

    Not `getrusage`, as in telemetry: its maximum of a spawned worker includes the parent's memory (614 MB for a worker of 14).
    """
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else resident("VmHWM")


_made: object = None  # in a worker's process: what its `make` returned


def _make(log: str, path: str, arguments: tuple) -> None:
    global _made
    sys.stdout.flush()
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 1)  # what libraries print
    os.dup2(1, 2)
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    module, _, name = path.partition(":")
    _made = getattr(importlib.import_module(module), name)(*arguments)


def _call(arguments: tuple) -> object:
    return _made(*arguments)


class Worker:
    """A process of its own that holds a callable and calls it on request.

    make: "module:function" that returns the callable, called in the process with `arguments`; allocator: whether glibc is set up
    for tensors, as `fastdit train` asks for and a plain script does not.
    """

    def __init__(self, make: str, *arguments, allocator: bool = True) -> None:
        """Start the process. Raises what `make` raises."""
        self.log = tempfile.NamedTemporaryFile(suffix=".log")  # noqa: SIM115 (lives as long as the process)
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        before = os.environ.pop("GLIBC_TUNABLES", None)
        if allocator:
            os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        try:
            started = self.pool.submit(_make, self.log.name, make, arguments)  # starts the process, with this environment
        finally:
            os.environ.pop("GLIBC_TUNABLES", None)
            if before is not None:
                os.environ["GLIBC_TUNABLES"] = before
        try:
            started.result()
        except BaseException:
            self.stop()
            raise
        atexit.register(self.stop)  # suites keep some workers until the interpreter exits

    def __call__(self, *arguments):
        """Call the process's callable; arguments and result are pickled."""
        return self.pool.submit(_call, arguments).result()

    def peak_memory(self) -> int:
        """Return `peak_memory` of the process."""
        return self.pool.submit(peak_memory).result()

    def stop(self) -> None:
        """End the process."""
        self.pool.shutdown()
        self.log.close()


def start(makers: dict[str, Callable[[], T]], say: Callable[[str], None]) -> tuple[dict[str, T], dict[str, str]]:
    """Call each maker. Returns what they made, and the reasons of those that failed."""
    made, errors = {}, {}
    for name, make in makers.items():
        say(f"start {name}")
        try:
            made[name] = make()
        except Exception as error:  # whatever a provider dies of is its row
            errors[name] = reason(error)
    return made, errors


def take_turns(
    calls: dict[str, Callable[[int], T]], turns: int, say: Callable[[str], None]
) -> tuple[dict[str, list[T]], dict[str, str]]:
    """Make each call once per turn, in reverse order every other turn.

    Returns what each call returned in each turn, and the reasons of those that failed, which take no further turns.
    """
    returned: dict[str, list[T]] = {name: [] for name in calls}
    errors: dict[str, str] = {}
    for turn in range(turns):
        say(f"turn {turn + 1} of {turns}")
        for name in [name for name in list(calls)[:: -1 if turn % 2 else 1] if name not in errors]:
            try:
                returned[name].append(calls[name](turn))
            except Exception as error:  # whatever a provider dies of is its row
                errors[name] = reason(error)
                returned[name] = []
    return returned, errors
