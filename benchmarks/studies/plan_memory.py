"""The memory that `fastdit plan` predicts for a train step on one CPU rank, against the resident memory of the real step.

    python -m benchmarks.studies.plan_memory

Each case is a process of its own that trains as `fastdit train` does (engine, AdamW, EMA; no loader, logs or checkpoints), after a
tiny model whose steps load the libraries. Measured: the maximum of resident memory in STEPS steps minus the resident memory before
the model (VmHWM, reset). The plan counts live tensors; freed tensors stay resident or not depending on the allocator, hence two
providers: "returned", in which glibc returns freed blocks of 64 KiB and more, and "kept", as `fastdit train` sets it up for speed.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import results_csv
from benchmarks.harness import DEVICE, THREADS, Result, Worker, resident
from fastdit import distributed, flow, progress
from fastdit.config import Config, parse
from fastdit.model import DiT
from fastdit.planning import memory, plan
from fastdit.training import engine
from fastdit.training.ema import ShardedEma

CSV = "plan_memory"
STEPS = 4  # the second is the first with AdamW's moments and the EMA
WARM = ["model.preset=test/4", "train.batch_size=2"]
CASES = {
    "S/2": ["model.preset=S/2", "train.batch_size=8"],
    "S/2, full": ["model.preset=S/2", "train.batch_size=16", "train.recompute=full"],
    "XL/2 x 2": ["model.preset=XL/2", "model.depth=2", "train.batch_size=4"],  # mostly weights
}
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def settings(words: list[str]) -> Config:
    """Return a config in fp32: many CPUs emulate bf16 through copies in fp32 that no GPU makes."""
    return parse(None, [*plan.IMAGENET_LATENTS, "train.precision=fp32", *words])


def run_steps(config: Config, world: distributed.World) -> None:
    """Build all that a run keeps in memory and take STEPS steps on noise."""
    model, size = DiT(config.model), config.model.input_size
    running = engine.initialize(model, config, world)
    ema = ShardedEma(engine.fragments(running, world), config.train.ema_decay)
    x0 = torch.randn(config.train.batch_size, config.model.in_channels, size, size)
    labels = torch.zeros(len(x0), dtype=torch.int64)
    for step in range(STEPS):
        ids = flow.sample_ids(step, 0, len(x0), world.device)
        running.backward(flow.losses(running, x0, labels, ids, config.flow, seed=0, null=config.model.num_classes).total.mean())
        running.step()
        ema.update()


def measured() -> Callable[[list[str]], int]:
    """In a worker: return a function of a case's settings to bytes."""
    world = distributed.start("cpu")
    run_steps(settings(WARM), world)

    def measure(words: list[str]) -> int:
        ctypes.CDLL(None).malloc_trim(0)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        run_steps(settings(words), world)
        return resident("VmHWM") - before

    return measure


def main(words: list[str] | None = None) -> int:
    parser = results_csv.parser(__doc__, results_csv.path_of(CSV))
    options = results_csv.parse(parser, words)
    if DEVICE.type == "cuda":
        parser.error("this compares resident memory of a CPU run: hide the GPU with CUDA_VISIBLE_DEVICES=")
    rows = []
    with progress.progress_bar(2 * len(CASES), description="runs", unit="run") as bar:
        for case, overrides in CASES.items():
            config = settings(overrides)
            predicted = memory.memory(config, 1).peak
            for allocator, variables in (("returned", RETURNED), ("kept", {})):
                os.environ.update(variables)
                worker = Worker("benchmarks.studies.plan_memory:measured", allocator=allocator == "kept")
                for name in variables:
                    del os.environ[name]
                peak = worker(overrides)
                worker.stop()
                values = {
                    "peak_mb": f"{peak / 1e6:.0f}", "predicted_mb": f"{predicted / 1e6:.0f}",
                    "measured_over_predicted": f"{peak / predicted:.3f}",
                }  # fmt: skip
                key = {"suite": "plan_memory", "case": case, "provider": allocator, "size": f"batch {config.train.batch_size}"}
                rows.append(Result(key, [], values).row() | {"precision": "fp32", "threads": THREADS})
                bar.update()
    print(results_csv.table(rows, ("case", "size", "provider", "predicted_mb", "peak_mb", "measured_over_predicted")))
    results_csv.write(options.csv, rows, allow_dirty=options.allow_dirty)
    return 0


if __name__ == "__main__":
    sys.exit(main())
