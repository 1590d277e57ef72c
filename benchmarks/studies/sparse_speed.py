"""What sparse-dense blocks save: the CPU time of a forward and backward pass of the dense model over that of the sparse one.

    python -m benchmarks.studies.sparse_speed [--case "S/2, 2+2"] [--precision bf16] [--turns 9]

Each trains in a process of its own, with glibc's allocator as `fastdit train` sets it up, and they take turns; the speed-up is the
median of the turns' ratios. The sparse model keeps a quarter of the tokens between its dense blocks ("2+2": the first two and the
last two) and chooses them anew in every step; the dense one has no Linear that joins streams. `flops`: the ratio of the FLOPs that
`fastdit plan` counts; `share`: the speed-up over it. Half an hour on one core.
"""

import sys
from collections.abc import Callable

import torch

from benchmarks import results_csv
from benchmarks.harness import DEVICE, THREADS, Worker, quantiles, speedup, take_turns, timed
from fastdit import flops, flow, progress
from fastdit.config import parse
from fastdit.device import DTYPES
from fastdit.model import DiT

CSV = "sparse_speed"
LATENTS = ["model.in_channels=4", "model.num_classes=1000"]
NARROW = ["model.preset=S/2", "model.depth=28"]
WIDE = ["model.preset=base/2", "model.depth=12"]
CASES = {  # settings; batch sizes in bf16 and fp32, for steps of 3 to 5 seconds
    "S/2, 2+2": (["model.preset=S/2", "model.dense_blocks=[2,2]"], {"bf16": 32, "fp32": 8}),
    "S/2, 1+1": (["model.preset=S/2", "model.dense_blocks=[1,1]"], {"bf16": 32, "fp32": 8}),
    "28 blocks, 384 wide, 2+2": ([*NARROW, "model.dense_blocks=[2,2]"], {"bf16": 16, "fp32": 4}),
    "12 blocks, 1088 wide, 2+2": ([*WIDE, "model.dense_blocks=[2,2]"], {"bf16": 8, "fp32": 2}),
}
PROVIDERS = {"dense": ["model.dense_blocks=null"], "sparse": ["model.keep_tokens=0.25"]}


def step_of(words: list[str], batch: int, precision: str) -> Callable[[], tuple[float, float]]:
    """In a worker: return a function that does a forward and backward pass and returns its wall and CPU seconds."""
    config = parse(None, [*LATENTS, *words])
    torch.manual_seed(0)
    model = DiT(config.model).to(DEVICE, DTYPES[precision])
    x0, labels = torch.randn(batch, 4, 32, 32, device=DEVICE), torch.randint(1000, (batch,), device=DEVICE)
    ids = flow.sample_ids(0, 0, batch, DEVICE)

    def work() -> None:
        chosen = flow.choose_tokens(config.model, 0, ids, dense=False)
        flow.losses(model, x0, labels, ids, config.flow, seed=0, null=1000, chosen=chosen).total.mean().backward()
        for p in model.parameters():
            p.grad = None

    def step() -> tuple[float, float]:
        return timed(work)[1:]

    return step


def measure(case: str, precision: str, turns: int) -> list[dict]:
    """Return the rows of both models."""
    settings, batches = CASES[case]
    batch = batches[precision]
    words = {name: [*LATENTS, *settings, *more] for name, more in PROVIDERS.items()}
    workers = {name: Worker("benchmarks.studies.sparse_speed:step_of", words[name], batch, precision) for name in PROVIDERS}
    with progress.progress_bar(turns + 2, description=f"{case}, {precision}", unit="turn") as bar:
        calls = {name: lambda _, worker=worker: worker() for name, worker in workers.items()}
        taken, errors = take_turns(calls, turns + 2, lambda _: bar.update())
    for worker in workers.values():
        worker.stop()
    if errors:
        raise RuntimeError(f"{case}, {precision}: {errors}")
    flop = {name: sum(flops.walk(parse(None, words[name]).model, 1, DTYPES[precision], "none")[:2]) for name in PROVIDERS}
    cpu = {name: [seconds[1] for seconds in times[2:]] for name, times in taken.items()}  # the first two warm up
    rows = []
    for name in PROVIDERS:
        ratio, allowed = speedup(cpu["dense"], cpu[name]), flop["dense"] / flop[name]
        rows.append(
            {
                "case": case, "provider": name, "precision": precision, "size": f"batch {batch}", "threads": THREADS,
                "cpu_s": f"{quantiles(cpu[name])[0]:.4g}", **ratio, "gflop_per_image": f"{flop[name] / 1e9:.2f}",
                "flops": f"{allowed:.3f}", "share": f"{float(ratio['speedup']) / allowed:.3f}",
            }
        )  # fmt: skip
        print(results_csv.line(rows[-1]))
    return rows


def main(words: list[str] | None = None) -> int:
    parser = results_csv.parser(__doc__, results_csv.path_of(CSV, DEVICE))
    parser.add_argument("--case", choices=CASES, help="the only case to measure (default: all)")
    parser.add_argument("--precision", choices=DTYPES, help="the only precision to measure (default: bf16, then fp32)")
    parser.add_argument("--turns", type=int, default=9, help="timed steps of each model (default: %(default)s)")
    options = results_csv.parse(parser, words)
    rows: list[dict] = []
    for case in [options.case] if options.case else CASES:
        for precision in [options.precision] if options.precision else ("bf16", "fp32"):
            rows += measure(case, precision, options.turns)
    results_csv.write(options.csv, rows, DEVICE, options.allow_dirty)
    return 0


if __name__ == "__main__":
    sys.exit(main())
