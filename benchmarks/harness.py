"""How every suite measures: providers take turns, each in a process of its own; what fails becomes a row with its reason.

A bench_*.py has SUITE, its name, and `groups(full)`, its cases. A Group's `measure` gives one Result a member. conftest.py runs
them under pytest, gpu.py without it. Needs torch alone; so do the suites of kernels, blocks and train steps.
"""

import atexit
import importlib
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from fastdit import rates
from fastdit.cli import ALLOCATOR
from fastdit.engine import precision

T = TypeVar("T")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
THREADS = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
PRECISION = precision("auto", DEVICE)  # bf16 where the device computes in it; else fp32, the eager reference's too
DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}[PRECISION]
SWEEPS = {False: 3, True: 5}  # quick and full: how often ops and blocks are measured in a process, all providers in turns
PROCESSES = {False: 1, True: 1 if DEVICE.type == "cuda" else 12}  # why there are several: `bench_kernels.together`
EXCUSED = ("out of memory", "ModuleNotFoundError")  # what an error begins with that says no more than what is missing here


class Result(NamedTuple):
    """What was measured of one provider: its place in the table, seconds of each call, further values; or why there are none."""

    key: dict[str, str]  # of case, provider, direction, size
    samples: list[float]
    values: dict[str, object]
    error: str = ""

    def row(self) -> dict[str, object]:
        timed = dict(zip(("median_s", "p20_s", "p80_s"), (f"{s:.6g}" for s in quantiles(self.samples)), strict=False))
        return {**self.key, "precision": PRECISION, **timed, "samples": len(self.samples), **self.values, "error": self.error}


class Group(NamedTuple):
    """Measurements that take turns: `measure(say)` returns a Result for each of `members`, and says how far it is."""

    members: tuple[str, ...]
    measure: Callable[[Callable[[str], None]], dict[str, Result]]


def quantiles(samples: list[float]) -> tuple[float, ...]:
    """Median, 20th and 80th percentile, linear between samples; nothing of nothing."""
    if len(samples) < 2:
        return tuple(samples * 3)
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return statistics.median(samples), cuts[1], cuts[7]


def speedup(theirs: list[float], ours: list[float]) -> dict[str, str]:
    """How many times as fast as theirs, of times that were taken in turns; nothing of nothing."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)]) if theirs and ours else {}


def spread(speedups: list[float]) -> dict[str, str]:
    """A row's columns of them: median, 20th and 80th percentile, and how many."""
    median, low, high = quantiles(speedups)
    return {"speedup": f"{median:.3f}", "speedup_p20": f"{low:.4f}", "speedup_p80": f"{high:.4f}", "turns": f"{len(speedups)}"}


def reason(error: BaseException) -> str:
    """In one line, as the CSV's `error` holds it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory"
    if isinstance(error, BrokenProcessPool):
        return "the process died: out of memory, or a crash"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def synchronize() -> None:
    rates.synchronize(DEVICE)


def gpu_events(call: Callable[[], object]) -> list:
    """What ran on the GPU in a call, copies and fills included, the longest first: averages of torch.profiler, with `key`, `count`
    and `self_device_time_total` in microseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        call()
        synchronize()
    events = [event for event in found.key_averages() if event.self_device_time_total]
    return sorted(events, key=lambda event: -event.self_device_time_total)


def busy_seconds(events: list) -> float:
    """Seconds in which the GPU worked on `gpu_events`."""
    return sum(event.self_device_time_total for event in events) / 1e6


def peak_memory() -> int:
    """Bytes: the most that torch held on the GPU, or that this process held in memory."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024


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
    """`make`, "module:function" with its arguments, in a process of its own; what it returns is called there from here.

    allocator: with glibc set up for tensors, as `fastdit train` asks for; a plain script does not.
    """

    def __init__(self, make: str, *arguments, allocator: bool = True) -> None:
        """Raises what `make` raises."""
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
        atexit.register(self.stop)  # a suite keeps some until the end, when nothing is left to end them with

    def __call__(self, *arguments):
        return self.pool.submit(_call, arguments).result()

    def peak_memory(self) -> int:
        return self.pool.submit(peak_memory).result()

    def stop(self) -> None:
        self.pool.shutdown()
        self.log.close()


def start(makers: dict[str, Callable[[], T]], say: Callable[[str], None]) -> tuple[dict[str, T], dict[str, str]]:
    """What each maker makes, and the reasons of those that failed."""
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
    """What each call gave in each turn, the order reversed every other turn; and the reasons of those that failed, which leave."""
    found: dict[str, list[T]] = {name: [] for name in calls}
    errors: dict[str, str] = {}
    for turn in range(turns):
        say(f"turn {turn + 1} of {turns}")
        for name in [name for name in list(calls)[:: -1 if turn % 2 else 1] if name not in errors]:
            try:
                found[name].append(calls[name](turn))
            except Exception as error:  # whatever a provider dies of is its row
                errors[name] = reason(error)
                found[name] = []
    return found, errors


def seconds(call: Callable[[], object], calls: int) -> float:
    """Of one call, the mean of some after one that is not counted."""
    return rates.seconds(call, DEVICE, calls)
