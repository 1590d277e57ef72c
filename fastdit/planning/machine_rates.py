"""Rates of a machine, measured: matmuls, attention, copies, links. Needs only torch.

B batch, T tokens, H width, N heads, D head dim, W ranks.
"""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.profiler import profile

from fastdit import attention
from fastdit.config import ModelConfig
from fastdit.device import synchronize

COPY = 1 << 28  # bytes per copy: eight times the last-level cache of the machines it ran on, five times an H100's
LINK = {"cuda": 1 << 30, "cpu": 1 << 26}  # bytes per all-reduce


def seconds(call: Callable[[], object], device: torch.device, calls: int) -> float:
    """Return the mean seconds of `calls` calls, after one that is not counted."""
    call()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def matmul_rate(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    """Return the FLOP/s of [M,K] @ [K,N]. shape: M, K, N."""
    M, K, N = shape
    a, b = (torch.randn(s, dtype=dtype, device=device) for s in ((M, K), (K, N)))
    flop = 2 * M * K * N
    calls = max(3, min(200, int(2e10 / flop))) if device.type == "cpu" else 50
    return flop / seconds(lambda: a @ b, device, calls)


def copy_rate(device: torch.device) -> float:
    """Return the bytes/s of a large copy within the device's memory, reads and writes counted."""
    source, target = (torch.ones(COPY // 4, device=device) for _ in range(2))
    return 2 * COPY / seconds(lambda: target.copy_(source), device, 3 if device.type == "cpu" else 50)


def link_rate(ranks: int, device: torch.device) -> float | None:
    """Return the bytes/s that a rank sends in an all-reduce, counted as a ring sends them, 2·(W-1)/W of the tensor.

    None on one rank. All ranks must call it.
    """
    if ranks == 1:
        return None
    size = LINK[device.type]
    tensor = torch.ones(size // 4, device=device)
    return 2 * (ranks - 1) / ranks * size / seconds(lambda: dist.all_reduce(tensor), device, 3)


def attention_rate(model: ModelConfig, B: int, dtype: torch.dtype, device: torch.device) -> tuple[str, float]:
    """Return what attention runs, as the profiler names it, and its FLOP/s forward and backward, counted as 12·B·T²·H."""
    T, N = (model.input_size // model.patch_size) ** 2, model.heads
    packed = torch.randn(B, T, 3, N, model.width // N, dtype=dtype, device=device)
    # as qk_norm_rope returns them: token-major, v a view of packed memory
    q, k, v = packed[:, :, 0].contiguous(), packed[:, :, 1].contiguous(), packed[:, :, 2]
    q, k, v = (tensor.transpose(1, 2).requires_grad_() for tensor in (q, k, v))
    ones = torch.ones(B, T, model.width, dtype=dtype, device=device)  # sum() would give a gradient of stride 0, which cuDNN copies

    def forward_and_backward() -> None:
        torch.autograd.grad(attention.attention(q, k, v, model.attention), (q, k, v), ones)

    per_call = seconds(forward_and_backward, device, 5)
    with profile() as profiler:
        forward_and_backward()
    names = [event.key for event in profiler.key_averages()]
    fused = next((name for name in names if name.startswith(("aten::_scaled_dot_product", "flash_attn::"))), "matmul")
    return fused.removeprefix("aten::_"), 12 * B * T * T * model.width / per_call


def hidden_share(device: torch.device, matmul: tuple[int, int, int], dtype: torch.dtype) -> float | None:
    """Return how much of a copy from pinned host memory, on its own stream, is hidden behind matmuls that take as long.

    1 is all of it, 0 none; None on a CPU, which has no streams.
    """
    if device.type != "cuda":
        return None
    M, K, N = matmul
    a, b = torch.randn(M, K, dtype=dtype, device=device), torch.randn(K, N, dtype=dtype, device=device)
    source, target = torch.ones(COPY // 4).pin_memory(), torch.empty(COPY // 4, device=device)
    side = torch.cuda.Stream()

    def copy() -> None:
        with torch.cuda.stream(side):
            target.copy_(source, non_blocking=True)

    copy_seconds = seconds(copy, device, 5)
    count = max(1, round(copy_seconds / seconds(lambda: a @ b, device, 20)))

    def multiply() -> None:
        for _ in range(count):
            torch.matmul(a, b)

    def both() -> None:
        copy()
        multiply()

    matmul_seconds = seconds(multiply, device, 5)
    return (copy_seconds + matmul_seconds - seconds(both, device, 5)) / min(copy_seconds, matmul_seconds)
