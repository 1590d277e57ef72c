"""What DeepSpeed's engine costs on one rank: CPU time of a train step under it over a plain loop of the same model, at S/2.

    python benchmarks/engine_overhead.py [--pairs 15] [--case S/2] [--out benchmarks/results/engine_overhead.csv]

The plain loop has torch's fused AdamW, in bf16 on fp32 masters, and computes no gradient norm; the engine is as `fastdit train`
sets it up. Both are processes of their own (bench_train_step.py) and take turns, the order reversed every other pair. Printed: the
median of the pairs' ratios, and the interval that holds it with 95 % confidence (order statistics).
"""

import argparse
import functools
import statistics
from pathlib import Path

from benchmarks import results_csv
from benchmarks.bench_train_step import CASES
from benchmarks.harness import PRECISION, THREADS, Worker, take_turns
from fastdit import telemetry


def interval(values: list[float]) -> tuple[float, float]:
    """Of the median, 95 %: ranks n/2 ∓ 0.98·√n of a binomial's normal approximation."""
    ordered, reach = sorted(values), 0.98 * len(values) ** 0.5
    low, high = int(len(values) / 2 - reach), int(len(values) / 2 + reach)
    return ordered[max(0, low)], ordered[min(len(values) - 1, high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--case", choices=CASES, default="S/2")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engine_overhead.csv"))
    options = parser.parse_args()
    shape, size, _ = CASES[options.case]
    workers = {name: Worker("benchmarks.bench_train_step:provider", name, shape, size) for name in ("+adamw", "engine")}
    for worker in workers.values():
        worker(0, 3)
    with telemetry.progress_bar(options.pairs, description="pairs", unit="pair") as bar:

        def turn(name: str, pair: int) -> tuple[float, float]:
            step = 3 + 2 * pair
            workers[name](step, 1)  # finds the caches full of the other's data
            bar.update(name == "engine")
            return workers[name](step + 1, 1)[1:]

        times, _ = take_turns({n: functools.partial(turn, n) for n in workers}, options.pairs, lambda _: None)
    for worker in workers.values():
        worker.stop()
    row = {"case": options.case, "pairs": options.pairs, "precision": PRECISION, "threads": THREADS}
    for k, clock in enumerate(("wall", "cpu")):
        ratios = [e[k] / p[k] for e, p in zip(times["engine"], times["+adamw"], strict=True)]
        low, high = interval(ratios)
        row |= {f"plain_{clock}_ms": f"{statistics.median(p[k] for p in times['+adamw']) * 1e3:.0f}"}
        row |= {f"{clock}_ratio": f"{statistics.median(ratios):.3f}", f"{clock}_low": f"{low:.3f}", f"{clock}_high": f"{high:.3f}"}
    print("  ".join(f"{key} {value}" for key, value in row.items()))
    results_csv.write(options.out, [row])


if __name__ == "__main__":
    main()
