"""What an optimizer step costs on one rank besides the gradients: OneRankAdamW's one pass, and the same of torch's operations.

    python benchmarks/optimizer_step.py [--preset S/2] [--rounds 15] [--out benchmarks/results/optimizer_step.csv]

Both clip the gradient's norm, step AdamW on fp32 masters, update one moving average and, with bf16 gradients, round the masters to
bf16 weights. "torch": the norm is read on the host, then casts of bf16 gradients, fused AdamW, torch._foreach_copy_ and
torch._foreach_lerp_, in parts of 16 M parameters. They take turns; given are medians, and the bytes that one pass must move.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import record
from fastdit import progress
from fastdit.config import parse
from fastdit.model import DiT
from fastdit.training.ema import ShardedEma
from fastdit.training.engine import Fragment
from fastdit.training.optimizer import OneRankAdamW
from measure import DEVICE, THREADS, quantiles, synchronize

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
        if optimizer.finish_step():
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
        if bf16 and size >= PART:  # so that not all gradients are there in fp32
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="S/2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/optimizer_step.csv"))
    options = parser.parse_args()
    model = DiT(parse(None, [f"model.preset={options.preset}"]).model).to(DEVICE)
    initial, rows = [p.detach() for p in model.parameters()], []
    size = sum(p.numel() for p in initial)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        make = lambda: [nn.Parameter(p.clone()) for p in initial]
        steps = {"torch": of_torch(make(), dtype == torch.bfloat16), "one pass": one_pass(make(), dtype == torch.bfloat16)}
        gradients = [torch.randn_like(p).mul_(1e-3).to(dtype) for p in initial]
        given = {name: [g.clone() for g in gradients] for name in steps}  # torch's AdamW scales them in place
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        with progress.progress_bar(options.rounds + 2, description=precision, unit="round") as bar:
            for turn in range(options.rounds + 2):  # two that are not counted
                for name, step in steps.items() if turn % 2 else reversed(steps.items()):
                    synchronize()
                    wall, cpu = time.perf_counter(), time.process_time()
                    step(given[name])
                    synchronize()
                    if turn >= 2:
                        samples[name].append((time.perf_counter() - wall, time.process_time() - cpu))
                bar.update()
        moved = size * (2 * 4 * 4 + 4)  # masters, moments and average both ways; gradient and weight of 2 bytes, or a gradient of 4
        for name, times in samples.items():
            (median, low, high), cpu = quantiles([t[0] for t in times]), quantiles([t[1] for t in times])[0]
            rows.append(
                {"preset": options.preset, "precision": precision, "provider": name, "parameters": size, "threads": THREADS}
            )
            rows[-1] |= {"wall_ms": f"{median * 1e3:.2f}", "p20_ms": f"{low * 1e3:.2f}", "p80_ms": f"{high * 1e3:.2f}"}
            rows[-1] |= {"cpu_ms": f"{cpu * 1e3:.2f}", "rounds": options.rounds, "gb_s": f"{moved / median / 1e9:.1f}"}
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    record.write(options.out, rows, DEVICE)


if __name__ == "__main__":
    main()
