"""Rates of a machine, measured: matmuls, attention, copies, links. Needs torch alone.

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

COPY = 1 << 28  # bytes: eight times the last-level cache of the machines it ran on, five times an H100's
LINK = {"cuda": 1 << 30, "cpu": 1 << 26}  # bytes of an all-reduce


def seconds(call: Callable[[], object], device: torch.device, calls: int) -> float:
    """Of one call, the mean of some after one that is not counted."""
    call()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def matmul_rate(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of [M,K] @ [K,N]. shape: M, K, N."""
    M, K, N = shape
    a, b = (torch.randn(s, dtype=dtype, device=device) for s in ((M, K), (K, N)))
    flop = 2 * M * K * N
    return flop / seconds(lambda: a @ b, device, max(3, min(200, int(2e10 / flop))) if device.type == "cpu" else 50)


def copy_rate(device: torch.device) -> float:
    """Bytes/s of a large copy within the device's memory, reads and writes counted."""
    source, target = (torch.ones(COPY // 4, device=device) for _ in range(2))
    return 2 * COPY / seconds(lambda: target.copy_(source), device, 3 if device.type == "cpu" else 50)


def link_rate(ranks: int, device: torch.device) -> float | None:
    """Bytes/s that a rank sends in an all-reduce, as by a ring: 2·(W-1)/W of the tensor. None: one rank. All ranks must call it."""
    if ranks == 1:
        return None
    size = LINK[device.type]
    tensor = torch.ones(size // 4, device=device)
    return 2 * (ranks - 1) / ranks * size / seconds(lambda: dist.all_reduce(tensor), device, 3)


def attention_rate(model: ModelConfig, B: int, dtype: torch.dtype, device: torch.device) -> tuple[str, float]:
    """(What attention runs, as the profiler names it; its FLOP/s, forward and backward: 12·B·T²·H)."""
    T, N = (model.input_size // model.patch_size) ** 2, model.heads
    packed = torch.randn(B, T, 3, N, model.width // N, dtype=dtype, device=device)
    # as qk_norm_rope leaves them: token-major, v a view of packed memory
    q, k, v = packed[:, :, 0].contiguous(), packed[:, :, 1].contiguous(), packed[:, :, 2]
    q, k, v = (tensor.transpose(1, 2).requires_grad_() for tensor in (q, k, v))
    ones = torch.ones(B, T, model.width, dtype=dtype, device=device)  # sum() would give a gradient of stride 0, which cuDNN copies
    call = lambda: torch.autograd.grad(attention.attention(q, k, v, model.attention), (q, k, v), ones)
    taken = seconds(call, device, 5)
    with profile() as found:
        call()
    names = [event.key for event in found.key_averages()]
    fused = next((name for name in names if name.startswith(("aten::_scaled_dot_product", "flash_attn::"))), "matmul")
    return fused.removeprefix("aten::_"), 12 * B * T * T * model.width / taken


def hidden_share(device: torch.device, matmul: tuple[int, int, int], dtype: torch.dtype) -> float | None:
    """How much of a copy from pinned host memory, on a stream of its own, is hidden behind matmuls of the same length: 1 all of
    it, 0 none. None on a CPU, which has no streams."""
    if device.type != "cuda":
        return None
    M, K, N = matmul
    a, b = torch.randn(M, K, dtype=dtype, device=device), torch.randn(K, N, dtype=dtype, device=device)
    source, target = torch.ones(COPY // 4).pin_memory(), torch.empty(COPY // 4, device=device)
    side = torch.cuda.Stream()

    def copy() -> None:
        with torch.cuda.stream(side):
            target.copy_(source, non_blocking=True)

    alone = seconds(copy, device, 5)
    count = max(1, round(alone / seconds(lambda: a @ b, device, 20)))
    multiply = lambda: [a @ b for _ in range(count)]
    work = seconds(multiply, device, 5)
    both = seconds(lambda: (copy(), multiply()), device, 5)
    return (alone + work - both) / min(alone, work)
