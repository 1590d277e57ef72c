"""Who waits for whom on this GPU: a train step's time, the share of it that the GPU works, its kernels, for each train.compile.

    python benchmarks/launch_bound.py [--csv runs/launch_bound.csv] [--cases "S/2 blocks 32" "XL/2 graphs 64"]

A case is a preset, a provider of train_steps.py and a batch; each is a process of its own. step_ms: the mean of 20 steps after 6,
one after the other without a wait; busy_ms and kernels: of a profile of 3 more, where CUPTI sees them. Where busy_ms is far below
step_ms the host is the limit. The five kernels that take longest are printed.
"""

import argparse
import functools
import sys
import time
from pathlib import Path

import torch

from benchmarks import results_csv
from benchmarks.harness import DEVICE, PRECISION, Worker, busy_seconds, gpu_events, peak_memory, reason, synchronize
from benchmarks.train_steps import PROVIDERS, config_of, step_of
from fastdit import plan
from fastdit.config import PRESETS, InputError

CASES = (
    "S/2 eager reference compiled 32", "S/2 blocks 32", "S/2 graphs 32", "S/2 none 256", "S/2 blocks 256", "S/2 graphs 256",
    "B/2 blocks 64", "B/2 graphs 64", "XL/2 blocks 32", "XL/2 blocks 64", "XL/2 graphs 64",
)  # fmt: skip
WARM, STEPS, PROFILED, SHOWN = 6, 20, 3, 5


def parsed(case: str) -> tuple[str, str, int]:
    """(preset, provider, batch) of "S/2 blocks 32". Raises InputError."""
    preset, _, rest = case.partition(" ")
    provider, _, batch = rest.rpartition(" ")
    if preset not in PRESETS or provider not in PROVIDERS or not batch.isdecimal() or int(batch) < 1:
        raise InputError(
            f"--cases {case!r} is no preset, provider and batch: write for example 'S/2 blocks 32', with a provider of "
            f"{', '.join(PROVIDERS)}"
        )
    return preset, provider, int(batch)


def measure(preset: str, provider: str, batch: int) -> tuple[dict[str, str], list[str]]:
    """A row's values, and lines of the kernels that take longest; runs in a worker."""
    step, start = step_of(preset, provider, batch), time.perf_counter()
    for _ in range(WARM):
        step()
    synchronize()
    warm, start = time.perf_counter() - start, time.perf_counter()
    for _ in range(STEPS):
        step()
    synchronize()
    wall = (time.perf_counter() - start) / STEPS
    events = gpu_events(lambda: [step() for _ in range(PROFILED)])
    busy, kernels = busy_seconds(events) / PROFILED, sum(e.count for e in events) / PROFILED
    counted = plan.walk(config_of(preset, "none", batch, "").model, 1, torch.bfloat16, "none")
    rate = batch * (counted.forward + counted.backward) / wall
    values = {
        "step_ms": f"{wall * 1e3:.3f}", "busy_ms": f"{busy * 1e3:.3f}", "gpu_busy": f"{busy / wall:.3f}",
        "kernels": f"{kernels:.0f}",
        "images_per_s": f"{batch / wall:.4g}", "tflop_per_s": f"{rate / 1e12:.1f}", "peak_mb": f"{peak_memory() / 1e6:.0f}",
        "warm_s": f"{warm:.1f}",
    }  # fmt: skip
    longest = [
        f"  {e.self_device_time_total / PROFILED / 1e3:9.3f} ms {e.count / PROFILED:6.0f} x  {e.key[:90]}" for e in events[:SHOWN]
    ]
    return values, longest


def served(preset: str, provider: str, batch: int):
    """What a worker makes: the case is measured when it is called."""
    return functools.partial(measure, preset, provider, batch)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=Path("runs/launch_bound.csv"), help="where the rows go (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="(default: eleven)")
    options = parser.parse_args(words)
    try:
        cases = [parsed(case) for case in options.cases]
    except InputError as error:
        parser.error(str(error))
    if DEVICE.type != "cuda":
        parser.error("there is no CUDA GPU for torch here")
    failed = False
    key = lambda row: (row["preset"], row["provider"], str(row["batch"]))
    for preset, provider, batch in cases:
        row = {"preset": preset, "provider": provider, "batch": str(batch), "precision": PRECISION}
        try:
            worker = Worker("benchmarks.studies.launch_bound:served", preset, provider, batch)
            try:
                values, longest = worker()
            finally:
                worker.stop()
            row |= values
            print("  ".join(f"{k} {v}" for k, v in row.items()), *longest, sep="\n", flush=True)
        except Exception as error:  # whatever a provider dies of is its row
            row["error"] = reason(error)
            failed = True
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        results_csv.write(options.csv, [r for r in results_csv.read(options.csv) if key(r) != key(row)] + [row], DEVICE)
    print(f"rows: {options.csv}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
