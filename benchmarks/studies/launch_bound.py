"""Host against GPU time on this GPU: a train step's time, the share of it that the GPU works, and its kernels, per train.compile.

    python -m benchmarks.studies.launch_bound [--cases "S/2 blocks 32" "XL/2 graphs 64"]

A case is a preset, a provider of train_steps.py and a batch size; each runs in a process of its own. step_ms: the mean of 20 steps
after 6, without a wait between them; busy_ms and kernels: from a profile of 3 more steps, if CUPTI records them. If busy_ms is far
below step_ms, the host limits the step. The five longest kernels are printed.
"""

import functools
import sys

import torch

from benchmarks import results_csv
from benchmarks.harness import DEVICE, PRECISION, Worker, busy_seconds, gpu_events, peak_memory, reason, timed
from benchmarks.train_steps import PROVIDERS, config_of, step_of
from fastdit import flops
from fastdit.config import InputError
from fastdit.presets import PRESETS

CSV = "launch_bound"
CASES = (
    "S/2 eager reference compiled 32", "S/2 blocks 32", "S/2 graphs 32", "S/2 none 256", "S/2 blocks 256", "S/2 graphs 256",
    "B/2 blocks 64", "B/2 graphs 64", "XL/2 blocks 32", "XL/2 blocks 64", "XL/2 graphs 64",
)  # fmt: skip
WARM = 6  # steps before the timed ones
STEPS = 20  # timed
PROFILED = 3
SHOWN = 5  # kernels printed


def parsed(case: str) -> tuple[str, str, int]:
    """Return (preset, provider, batch size) of a case such as "S/2 blocks 32". Raises InputError."""
    preset, _, rest = case.partition(" ")
    provider, _, batch = rest.rpartition(" ")
    if preset not in PRESETS or provider not in PROVIDERS or not batch.isdecimal() or int(batch) < 1:
        raise InputError(
            f"--cases {case!r} is not a preset, a provider and a batch size: write for example 'S/2 blocks 32', with a provider of "
            f"{', '.join(PROVIDERS)}"
        )
    return preset, provider, int(batch)


def measure(preset: str, provider: str, batch: int) -> tuple[dict[str, str], list[str]]:
    """Return a row's values, and lines of the longest kernels; runs in a worker."""
    step = step_of(preset, provider, batch)
    run = lambda steps: [step() for _ in range(steps)]
    warm = timed(lambda: run(WARM)).wall
    wall = timed(lambda: run(STEPS)).wall / STEPS
    events = gpu_events(lambda: run(PROFILED))
    busy, kernels = busy_seconds(events) / PROFILED, sum(e.count for e in events) / PROFILED
    counted = flops.walk(config_of(preset, "none", batch, ".").model, 1, torch.bfloat16, "none")
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
    """Return a function that measures a case; what a worker makes."""
    return functools.partial(measure, preset, provider, batch)


def main(words: list[str] | None = None) -> int:
    parser = results_csv.parser(__doc__, results_csv.path_of(CSV, DEVICE))
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="CASE", help="cases, each one quoted (default: eleven)")
    options = results_csv.parse(parser, words)
    try:
        cases = [parsed(case) for case in options.cases]
    except InputError as error:
        parser.error(str(error))
    if DEVICE.type != "cuda":
        parser.error("torch finds no CUDA GPU here")
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
            print(results_csv.line(row), *longest, sep="\n", flush=True)
        except Exception as error:  # whatever a provider dies of is its row
            row["error"] = reason(error)
            failed = True
            print(results_csv.line(row), flush=True)
        others = [r for r in results_csv.read(options.csv) if key(r) != key(row)]
        results_csv.write(options.csv, [*others, row], DEVICE, options.allow_dirty)
    print(f"rows: {options.csv}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
