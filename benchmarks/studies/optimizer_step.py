"""The cost of an optimizer step on one rank without the gradients: OneRankAdamW's one pass against torch's operations.

    python -m benchmarks.studies.optimizer_step [--preset S/2] [--rounds 15]

Both clip the gradient's norm, step AdamW on fp32 masters, update one moving average and, with bf16 gradients, round the masters to
bf16 weights. "torch": the norm is read on the host, then casts of bf16 gradients, fused AdamW, torch._foreach_copy_ and
torch._foreach_lerp_, in parts of 16 M parameters. They take turns; rows have medians, and the rate of the bytes that one pass must
move.
"""

import functools
import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import results_csv
from benchmarks.harness import DEVICE, THREADS, quantiles, timed
from fastdit import progress
from fastdit.config import InputError, parse
from fastdit.model import DiT
from fastdit.training.ema import ShardedEma
from fastdit.training.engine import Fragment
from fastdit.training.optimizer import OneRankAdamW

CSV = "optimizer_step"
OPTIONS = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
CLIP, DECAY, PART = 1.0, 0.9999, 16_000_000


def one_pass(parameters: list[nn.Parameter], bf16: bool) -> Callable[[list[Tensor]], None]:
    optimizer = OneRankAdamW(parameters, CLIP, bf16, 1, **OPTIONS)
    if bf16:
        for p in parameters:
            p.data = p.data.bfloat16()
    masters = [Fragment(str(i), 0, m.detach().view(-1)) for i, m in enumerate(optimizer.masters)]
    ema = ShardedEma(masters, DECAY, optimizer=optimizer)

    def step(gradients: list[Tensor]) -> None:
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        if optimizer.settle():
            ema.update()
        ema.announce()
        optimizer.step()

    return step


def of_torch(parameters: list[nn.Parameter], bf16: bool) -> Callable[[list[Tensor]], None]:
    masters = [p.detach().clone() for p in parameters]
    weights = [p.detach().bfloat16() for p in parameters] if bf16 else None
    averages = [m.clone() for m in masters]
    optimizer, parts, size = torch.optim.AdamW(masters, fused=True, **OPTIONS), [[]], 0
    for i, m in enumerate(masters):
        if bf16 and size >= PART:  # so that only a part of the gradients exists in fp32
            parts.append([])
            size = 0
        parts[-1].append(i)
        size += m.numel()

    @torch.no_grad()
    def step(gradients: list[Tensor]) -> None:
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(norms)).item()
        if not math.isfinite(norm):
            return
        optimizer.grad_scale = torch.full((), norm / CLIP, device=DEVICE) if norm > CLIP else None
        for part in parts:
            for i in part:
                masters[i].grad = gradients[i].float()
            optimizer.step()
            for i in part:
                masters[i].grad = None
            if weights:
                torch._foreach_copy_([weights[i] for i in part], [masters[i] for i in part])
        torch._foreach_lerp_(averages, masters, 1 - DECAY)

    return step


def measure(initial: list[Tensor], dtype: torch.dtype, rounds: int, label: str) -> dict[str, list[tuple[float, float]]]:
    """Return each provider's (wall, CPU) seconds of `rounds` steps with gradients of a dtype, after two that are not counted."""
    bf16 = dtype == torch.bfloat16
    make = lambda: [nn.Parameter(p.clone()) for p in initial]
    steps = {"torch": of_torch(make(), bf16), "one pass": one_pass(make(), bf16)}
    gradients = [torch.randn_like(p).mul_(1e-3).to(dtype) for p in initial]
    given = {name: [g.clone() for g in gradients] for name in steps}  # torch's AdamW scales them in place
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    with progress.progress_bar(rounds + 2, description=label, unit="round") as bar:
        for turn in range(rounds + 2):
            for name, step in steps.items() if turn % 2 else reversed(steps.items()):
                _, wall, cpu = timed(functools.partial(step, given[name]))
                if turn >= 2:
                    samples[name].append((wall, cpu))
            bar.update()
    return samples


def main(words: list[str] | None = None) -> int:
    parser = results_csv.parser(__doc__, results_csv.path_of(CSV, DEVICE))
    parser.add_argument("--preset", default="S/2", help="model preset (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each provider (default: %(default)s)")
    options = results_csv.parse(parser, words)
    try:
        model = DiT(parse(None, [f"model.preset={options.preset}"]).model).to(DEVICE)
    except InputError as error:
        parser.error(str(error))
    initial, rows = [p.detach() for p in model.parameters()], []
    size = sum(p.numel() for p in initial)
    # masters, moments and average both ways; gradient and weight of 2 bytes, or a gradient of 4
    moved = size * (2 * 4 * 4 + 4)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for name, times in measure(initial, dtype, options.rounds, precision).items():
            (median, low, high), cpu = quantiles([t[0] for t in times]), quantiles([t[1] for t in times])[0]
            rows.append(
                {
                    "preset": options.preset, "precision": precision, "provider": name, "parameters": size, "threads": THREADS,
                    "wall_ms": f"{median * 1e3:.2f}", "p20_ms": f"{low * 1e3:.2f}", "p80_ms": f"{high * 1e3:.2f}",
                    "cpu_ms": f"{cpu * 1e3:.2f}", "rounds": options.rounds, "gb_s": f"{moved / median / 1e9:.1f}",
                }
            )  # fmt: skip
            print(results_csv.line(rows[-1]))
    results_csv.write(options.csv, rows, DEVICE, options.allow_dirty)
    return 0


if __name__ == "__main__":
    sys.exit(main())
