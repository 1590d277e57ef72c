"""The sums over tokens of the backward kernels: fp32 parts in a fixed order, then one small kernel. B batch, S parts, H width.

Every program of a backward takes consecutive tokens of one sample, keeps its k column sums in registers and stores them once, as
[B,S,k,H]. No atomics: the same launch gives the same bits. With one part the backward writes the result itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .library import cdiv, launch


@triton.jit(do_not_specialize=["S"])
def reduce_partials_kernel(
    partials_ptr, out_ptr, partials_stride_b, partials_stride_s, S, width, COLUMNS: tl.constexpr, PARTS: tl.constexpr
):
    """out[b,c] = sum over s of partials[b,s,c], for one sample and COLUMNS of the width = k·H columns."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(width, COLUMNS)
    b, block = pid // blocks, pid % blocks
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    s = tl.arange(0, PARTS).to(tl.int64)
    total = tl.zeros((PARTS, COLUMNS), tl.float32)
    for start in range(0, S, PARTS):
        part_ptr = partials_ptr + (b * partials_stride_b + (start + s)[:, None] * partials_stride_s + columns[None, :])
        total += tl.load(part_ptr, mask=((start + s) < S)[:, None] & (columns < width)[None, :], other=0.0)
    tl.store(out_ptr + b * width + columns, tl.sum(total, axis=0), mask=columns < width)


def reduce_partials(partials: Tensor, out: Tensor) -> None:
    """Sum partials fp32 [B,S,k,H] over S into out [B,k,H]; one launch. The last two dimensions of partials and all of out must be
    contiguous.

    A sum over all samples, B = 1, has hundreds of parts and few columns: narrow programs, so that there are several of them, and
    many parts at a time, because a program waits for each of its loads.
    """
    B, S, k, H = partials.shape
    columns, parts, warps = (32, 64, 8) if B == 1 else (128, 16, 4)
    grid = (B * cdiv(k * H, columns),)
    strides = partials.stride()[:2]
    launch(reduce_partials_kernel, grid, partials, partials, out, *strides, S, k * H, columns, parts, num_warps=warps)


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which a backward returns the gradients of `tensors` as one tensor: theirs if they agree, else fp32."""
    first = tensors[0].dtype
    return first if all(t.dtype == first for t in tensors) else torch.float32
