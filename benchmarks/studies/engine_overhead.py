"""The cost of DeepSpeed's engine on one rank: CPU time of a train step under it over a plain loop of the same model, at S/2.

    python -m benchmarks.studies.engine_overhead [--pairs 15] [--case S/2]

The plain loop has torch's fused AdamW, in bf16 with fp32 masters, and computes no gradient norm; the engine is the one of
`fastdit train`. Both are processes of their own (bench_train_step.py) and take turns, in reverse order every other pair. The row
has the median of the pairs' ratios and its 95 % confidence interval (order statistics).
"""

import functools
import statistics
import sys

from benchmarks import results_csv
from benchmarks.bench_train_step import CASES
from benchmarks.harness import DEVICE, PRECISION, THREADS, Worker, take_turns
from fastdit import progress

CSV = "engine_overhead"


def interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the median: ranks n/2 ∓ 0.98·√n, by the normal approximation of a binomial."""
    ordered, reach = sorted(values), 0.98 * len(values) ** 0.5
    low, high = int(len(values) / 2 - reach), int(len(values) / 2 + reach)
    return ordered[max(0, low)], ordered[min(len(values) - 1, high)]


def main(words: list[str] | None = None) -> int:
    parser = results_csv.parser(__doc__, results_csv.path_of(CSV, DEVICE))
    parser.add_argument("--pairs", type=int, default=15, help="number of pairs of timed steps (default: %(default)s)")
    parser.add_argument("--case", choices=CASES, default="S/2", help="model of bench_train_step (default: %(default)s)")
    options = results_csv.parse(parser, words)
    shape, size, _ = CASES[options.case]
    workers = {name: Worker("benchmarks.bench_train_step:provider", name, shape, size) for name in ("+adamw", "engine")}
    for worker in workers.values():
        worker(0, 3)
    with progress.progress_bar(options.pairs, description="pairs", unit="pair") as bar:

        def turn(name: str, pair: int) -> tuple[float, float]:
            step = 3 + 2 * pair
            workers[name](step, 1)  # not timed: the caches hold the other provider's data
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
    print(results_csv.line(row))
    results_csv.write(options.csv, [row], DEVICE, options.allow_dirty)
    return 0


if __name__ == "__main__":
    sys.exit(main())
