"""Compares every fused op, and a step of AdamW, with its reference on this device: outputs and gradients, at the presets' shapes.

    python -m benchmarks.parity [--batch 32] [--smallest]

Exit code 1: an op differs by more than BOUND of the largest value.
"""

import argparse
import sys

import torch

from benchmarks.bench_kernels import BOUND, difference, fill
from benchmarks.harness import DEVICE, DTYPE
from benchmarks.kernel_cases import CASES
from fastdit import kernels


def adamw_difference() -> float:
    """Return the largest difference of masters, moments, average and copies after a step from the reference's, as a share of the
    largest value, for sizes that leave a last block unfilled."""
    sizes = ((3,), (384, 384), (8193,))
    generator = torch.Generator().manual_seed(0)
    make = lambda scale, dtype=torch.float32: [(scale * torch.randn(size, generator=generator)).to(DEVICE, dtype) for size in sizes]
    # masters, first moments, second moments (not below 0), average, copies
    start = [make(1), make(1e-2), [t.abs() for t in make(1e-4)], make(1), make(1, DTYPE)]
    gradients, one, zero = make(1e-2, DTYPE), torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE)
    results = []
    for backend in ("auto", "reference"):
        *state, average, copies = [[t.clone() for t in tensors] for tensors in start]
        with kernels.backend(backend):
            kernels.adamw_step(
                kernels.AdamWTensors(*state, copies, [average]), gradients, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
                step=3, grad_scale=2 * one, found_inf=zero, weights=(0.1,),
            )  # fmt: skip
        results.append([t.double() for tensors in (*state, average, copies) for t in tensors])
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True))


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="batch size (default: %(default)s)")
    parser.add_argument("--smallest", action="store_true", help="only the smallest size of each op, for compute-sanitizer")
    options = parser.parse_args(words)
    wrong = []
    for op, case in CASES.items():
        for size in case.sizes[:1] if options.smallest else case.sizes:
            function, inputs = case.make(size, options.batch, DTYPE, DEVICE)
            fill(inputs)
            away = difference(function, inputs, case.backward_launches > 0)
            print(f"{op:24} {size:5} {away:.1e}", flush=True)
            if not away <= BOUND:  # or not a number
                wrong.append(f"{op} {size}")
    away = adamw_difference()
    print(f"{'adamw_step':30} {away:.1e}", flush=True)
    if not away <= BOUND:
        wrong.append("adamw_step")
    print(f"more than {BOUND:.1e}: {', '.join(wrong)}" if wrong else f"all within {BOUND:.1e} on {DEVICE}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
