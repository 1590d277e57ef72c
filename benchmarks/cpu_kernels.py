"""The C++ kernels against the chains that the eager trainer runs, forward + backward in bf16 on a CPU. Prints a table, writes CSV.

    python benchmarks/cpu_kernels.py [--rounds 9] [--threads 2] [--out benchmarks/results/cpu_kernels.csv]

Every round times each op both ways, the order reversed every other round; figures are medians. Bytes are those that the algorithm
must move (kernels/README.md); the copy bandwidth is that of tensor.copy_ between two buffers of 256 MB, in the same rounds: what
fits into the caches can exceed it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import record
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eager_reference import rotate_interleaved
from fastdit import kernels, telemetry
from fastdit.config import ModelConfig
from fastdit.model import QK_EPS, rope_tables

SIZES = {"8x256x384": (8, 256, 384, 6, 1536), "4x256x1088": (4, 256, 1088, 17, 4352)}  # B, T, H, heads, hidden
COPY = 1 << 28  # bytes: eight times the last-level cache


def bf16(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16).requires_grad_(grad)


def eager_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale[:, None]) + shift[:, None]


def eager_gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return x + branch * gate[:, None]


def eager_both(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    r = eager_gated_residual(x, branch, gate)
    return r, eager_modulate(r, shift, scale)


def eager_qk_norm_rope(heads: int, tables: tuple[Tensor, Tensor], D: int) -> Callable:
    """On the outputs of three projections, with the fp32 norm weights and interleaved tables of the eager model."""
    q_norm, k_norm = nn.RMSNorm(D), nn.RMSNorm(D)
    cos, sin = (t.repeat_interleave(2, dim=1) for t in tables)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (t.unflatten(-1, (heads, D)).transpose(1, 2) for t in (q, k, v))
        return rotate_interleaved(q_norm(q), cos, sin), rotate_interleaved(k_norm(k), cos, sin), v

    return run


def eager_swiglu(packed: Tensor) -> Tensor:
    value, gate = packed.chunk(2, dim=-1)
    return value * F.silu(gate)


def eager_interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    t = t[:, None, None, None]
    return (1 - t) * x0 + t * noise


def cases(B: int, T: int, H: int, heads: int, hidden: int) -> dict[str, tuple]:
    """op: (eager function, its inputs, our function, its inputs, bytes of forward + backward)."""
    D, tokens = H // heads, B * T * H
    x, branch = bf16(B, T, H), bf16(B, T, H)
    modulation = [t.detach().requires_grad_() for t in bf16(B, 6 * H).chunk(6, dim=1)]
    shift, scale, gate = modulation[:3]
    tables = rope_tables(ModelConfig(width=H, heads=heads, input_size=32, patch_size=2, positions="rope_1d"))
    weights = [torch.ones(D, dtype=torch.bfloat16).requires_grad_() for _ in range(2)]
    qkv, packed = bf16(B, T, 3 * H), bf16(B, T, 2 * hidden)
    packed_qkv = lambda qkv, q_weight, k_weight: kernels.qk_norm_rope(qkv, q_weight, k_weight, *tables, heads, QK_EPS)
    separate = [t.detach().contiguous().requires_grad_() for t in qkv.chunk(3, dim=-1)]
    x0, noise, v, t = *(torch.randn(B, 4, 32, 32) for _ in range(2)), bf16(B, 4, 32, 32), torch.rand(B)
    x0_grad, noise_grad = x0.clone().requires_grad_(), noise.clone().requires_grad_()
    return {
        "modulate": (eager_modulate, (x, shift, scale), kernels.modulate, (x, shift, scale), 10 * tokens),
        "gated_residual": (eager_gated_residual, (x, branch, gate), kernels.gated_residual, (x, branch, gate), 12 * tokens),
        "gated_residual_modulate": (
            eager_both, (x, branch, gate, shift, scale), kernels.gated_residual_modulate, (x, branch, gate, shift, scale),
            20 * tokens,
        ),
        "qk_norm_rope": (eager_qk_norm_rope(heads, tables, D), separate, packed_qkv, (qkv, *weights), 24 * tokens),
        "swiglu": (eager_swiglu, (packed,), kernels.swiglu, (packed,), 16 * B * T * hidden),
        "flow_interpolate": (
            eager_interpolate, (x0_grad, noise_grad, t), kernels.flow_interpolate, (x0_grad, noise_grad, t),
            24 * x0.numel(),
        ),
        "flow_matching_loss": (
            lambda v: ((v - (noise - x0)) ** 2).flatten(1).mean(1), (v,),
            lambda v: kernels.flow_matching_loss(v, x0, noise), (v,), 16 * x0.numel(),
        ),
    }  # fmt: skip


def forward_backward(function: Callable, inputs: tuple) -> Callable[[], None]:
    """A call that runs the function and its gradients, given gradients of ones of its outputs' own dtypes."""
    wanted = [t for t in inputs if t.requires_grad]
    outputs = lambda out: out if isinstance(out, tuple) else (out,)
    ones = [torch.ones_like(out) for out in outputs(function(*inputs))]
    return lambda: torch.autograd.grad(outputs(function(*inputs)), wanted, ones)


def seconds(call: Callable[[], None], calls: int) -> float:
    call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_kernels.csv"))
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    source, target = torch.ones(COPY // 4), torch.empty(COPY // 4)
    providers = {"copy": lambda: target.copy_(source)}
    moved = {}
    for size, numbers in SIZES.items():
        for op, (eager, eager_inputs, ours, our_inputs, count) in cases(*numbers).items():
            providers[f"{size} {op} eager"] = forward_backward(eager, eager_inputs)
            providers[f"{size} {op} cpp"] = forward_backward(ours, our_inputs)
            moved[f"{size} {op}"] = count
    times: dict[str, list[float]] = {name: [] for name in providers}
    with kernels.backend("cpp"), telemetry.progress_bar(options.rounds, description="rounds") as bar:
        for i in range(options.rounds):
            for name in list(providers)[:: -1 if i % 2 else 1]:
                times[name].append(seconds(providers[name], 5))
            bar.update()
    median = {name: statistics.median(t) for name, t in times.items()}
    bandwidth = 2 * COPY / median["copy"]
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s, {options.threads} threads, {telemetry.device_name(torch.device('cpu'))}")
    rows = []
    for name, count in moved.items():
        eager, ours = (median[f"{name} {provider}"] for provider in ("eager", "cpp"))
        ratios = sorted(e / c for e, c in zip(times[f"{name} eager"], times[f"{name} cpp"], strict=True))
        size, op = name.split()
        rows.append({
            "op": op, "size": size, "eager_ms": f"{eager * 1e3:.3f}", "cpp_ms": f"{ours * 1e3:.3f}",
            "speedup": f"{statistics.median(ratios):.2f}", "lowest": f"{ratios[0]:.2f}", "highest": f"{ratios[-1]:.2f}",
            "gb_per_s": f"{count / ours / 1e9:.1f}", "share_of_copy": f"{count / ours / bandwidth:.2f}",
        })  # fmt: skip
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    record.write(options.out, rows)


if __name__ == "__main__":
    main()
