"""Host time and launches of a train step on a GPU machine, measured without a GPU (see benchmarks/without_gpu/README.md).

    . DIR/env.sh && python -m benchmarks.without_gpu.cuda_host [--presets S/2 B/2 L/2 XL/2]

One row per preset and provider of train_steps.py, each measured in a process of its own. host_ms, host_min_ms: median and minimum
of 7 steps after 3; cpu_ms: the median of their CPU time, which other processes disturb less. Times are those of the row's CPU,
without the driver's 2 to 5 us per launch. Per step: launches (of torch and cuBLAS), triton_launches, graph_launches, syncs, copies,
fills. The last line is the table HOST of fastdit/planning/host.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks import results_csv
from benchmarks.harness import reason
from benchmarks.train_steps import PROVIDERS, step_of
from fastdit.config import InputError
from fastdit.presets import PRESETS

ROOT = Path(__file__).parents[2]
CSV = "cuda_host"
STEPS, WARM, BATCH = 7, 3, 32
LIMIT = 600  # time limit of a process in seconds
COUNTS = {
    "launches": "launches", "driver_launches": "triton_launches", "graph_launches": "graph_launches", "syncs": "syncs",
    "memcpys": "copies", "memsets": "fills",
}  # fmt: skip
COMMAND = "source DIR/env.sh of benchmarks/without_gpu/stubs/build.sh first: these are measurements on its stub libraries"


def measure_step(preset: str, provider: str, batch: int) -> dict[str, str]:
    """Measure a row in this process and return its values; {"error": …} for a provider that fails."""
    from benchmarks.without_gpu.count import measure

    try:
        step = step_of(preset, provider, batch)
        measured = measure(step, STEPS, WARM)
    except Exception as error:  # whatever a provider dies of is its row
        sentence = str(error) if isinstance(error, InputError) else reason(error)
        return {"error": sentence}
    times = {
        "steps": str(STEPS),
        "host_ms": f"{measured.median / 1e3:.3f}",
        "host_min_ms": f"{measured.best / 1e3:.3f}",
        "cpu_ms": f"{measured.cpu / 1e3:.3f}",
    }
    peak = {"peak_mb": f"{torch.cuda.max_memory_allocated() / 1e6:.0f}"}
    return times | {name: f"{measured.counts[counter]:.1f}" for counter, name in COUNTS.items()} | peak


def measured_in_a_process(preset: str, provider: str, batch: int) -> dict[str, str]:
    """Return `measure_step` of a process of its own, which may die or hang."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.without_gpu.cuda_host",
        "--one",
        preset,
        provider,
        "--batch",
        str(batch),
        "--allow-dirty",
    ]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {LIMIT} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"exit code {done.returncode}: {last[:160]}"}
    return json.loads(lines[-1])


def fit(rows: list[dict[str, str]], provider: str, column: str) -> tuple[float, float] | None:
    """Return (slope per block, value outside of the blocks) of the least-squares line through a column's values over depth.

    None for fewer than two depths. A negative slope or rest is noise and set to 0: the slope if one graph holds all blocks.
    """
    points = [(PRESETS[r["preset"]]["depth"], float(r[column])) for r in rows if r["provider"] == provider and not r.get("error")]
    if len({depth for depth, _ in points}) < 2:
        return None
    slope, outside = np.polyfit(*zip(*points, strict=True), 1).tolist()
    if slope <= 0:
        return 0.0, statistics.mean(value for _, value in points)
    return (slope, outside) if outside >= 0 else (sum(d * v for d, v in points) / sum(d * d for d, _ in points), 0.0)


def plan_table(rows: list[dict[str, str]]) -> dict[str, tuple[float, ...]]:
    """Return fastdit.planning.host.HOST from the rows: provider -> ms and launches per block, then outside of the blocks."""
    table = {}
    launches = ("launches", "triton_launches", "graph_launches")
    rows = [r if r.get("error") else {**r, "all": str(sum(float(r[name]) for name in launches))} for r in rows]
    for provider, compiled in PROVIDERS.items():
        fits = [fit(rows, provider, column) for column in ("cpu_ms", "all")]
        if compiled and all(fits):
            (ms, ms_outside), (count, count_outside) = fits
            table[provider] = (round(ms, 2), round(count, 1), round(ms_outside, 1), float(round(count_outside)))
    return table


def main(words: list[str] | None = None) -> int:
    parser = results_csv.parser(__doc__, results_csv.path_of(CSV))
    parser.add_argument(
        "--presets", nargs="+", default=["S/2", "B/2", "L/2", "XL/2"], choices=list(PRESETS), metavar="PRESET",
        help="model presets (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--providers", nargs="+", default=[name for name in PROVIDERS if name != "model"], choices=list(PROVIDERS),
        metavar="PROVIDER", help="providers (default: all except model, which Inductor compiles for over ten minutes at 12 blocks)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=BATCH, help="images per step (default: %(default)s)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a row's process
    options = results_csv.parse(parser, words)
    if "GPUSTUB_LIB" not in os.environ:
        parser.error(COMMAND)
    if options.one:
        print("\n" + json.dumps(measure_step(*options.one, options.batch)), flush=True)
        os._exit(0)  # the stub of NCCL never says that it has ended
    rows = []
    device = f"{results_csv.hardware(results_csv.CPU)}, host of a stub {torch.cuda.get_device_name()}"
    for preset in options.presets:
        for provider in options.providers:
            key = {"preset": preset, "provider": provider, "batch": str(options.batch)}
            rows.append(key | measured_in_a_process(preset, provider, options.batch) | {"device": device})
            print(results_csv.line({k: v for k, v in rows[-1].items() if k != "device"}), flush=True)
    columns = list(dict.fromkeys(k for row in rows for k in row))
    results_csv.write(options.csv, [{k: row.get(k, "") for k in columns} for row in rows], allow_dirty=options.allow_dirty)
    print(f"rows: {options.csv}")
    print("HOST = {" + ", ".join(f'"{k}": Host{v}' for k, v in plan_table(rows).items()) + "}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
