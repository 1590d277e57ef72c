"""What DeepSpeed's engine costs on one rank: CPU time of a train step under it over a plain loop of the same model, at S/2.

    python benchmarks/engine_overhead.py [--pairs 15] [--threads 2] [--case S/2] [--out benchmarks/results/engine_overhead.csv]

The plain loop has torch's fused AdamW, on fp32 masters of bf16 weights, or on fp32 weights where bf16 is emulated, and computes no
gradient norm; the engine is as `fastdit train` sets it up. Both are processes of their own (train_step.py) and take turns, the
order reversed every other pair. Printed: the median of the pairs' ratios, and the interval that holds it with 95 % confidence
(order statistics).
"""

import argparse
import statistics
from pathlib import Path

import record
import torch
from train_step import CASES, Worker

from fastdit import engine, telemetry


def interval(values: list[float]) -> tuple[float, float]:
    """Of the median, 95 %: ranks n/2 ∓ 0.98·√n of a binomial's normal approximation."""
    ordered, reach = sorted(values), 0.98 * len(values) ** 0.5
    low, high = int(len(values) / 2 - reach), int(len(values) / 2 + reach)
    return ordered[max(0, low)], ordered[min(len(values) - 1, high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", choices=CASES, default="S/2")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engine_overhead.csv"))
    options = parser.parse_args()
    workers = {name: Worker(name, options.case, options.threads) for name in ("plain", "engine")}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    step = 3
    for worker in workers.values():
        worker.turn(0)
    with telemetry.progress_bar(options.pairs, description="pairs", unit="pair") as bar:
        for pair in range(options.pairs):
            for name in list(workers)[:: -1 if pair % 2 else 1]:
                workers[name].step(step)  # finds the caches full of the other's data
                times[name].append(workers[name].step(step + 1)[1:])
            step += 2
            bar.update()
    for worker in workers.values():
        worker.stop()
    precision = engine.precision("auto", torch.device("cpu"))
    row = {"case": options.case, "precision": precision, "pairs": options.pairs, "threads": options.threads}
    for k, clock in enumerate(("wall", "cpu")):
        ratios = [e[k] / p[k] for e, p in zip(times["engine"], times["plain"], strict=True)]
        low, high = interval(ratios)
        row |= {f"plain_{clock}_ms": f"{statistics.median(p[k] for p in times['plain']) * 1e3:.0f}"}
        row |= {f"{clock}_ratio": f"{statistics.median(ratios):.3f}", f"{clock}_low": f"{low:.3f}", f"{clock}_high": f"{high:.3f}"}
    print("  ".join(f"{key} {value}" for key, value in row.items()))
    record.write(options.out, [row])


if __name__ == "__main__":
    main()
