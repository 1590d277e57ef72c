"""swiglu: the gated activation of the MLP on a packed projection. F hidden width, M rows (all leading dimensions).

One pass forward (reads 2F, writes F: 6 bytes an output element in bf16) and one backward (reads 3F, writes 2F: 10 bytes). Saved
for the backward: packed alone; the sigmoid is computed again.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import check_float, choose_backend, compute_dtype
from .library import cpp, find, inner_contiguous, launch, register

ROWS = 2  # rows a program: the backward then has 45 registers on sm_90, so 40 warps and 120 KB of loads an SM at once


def swiglu_reference(packed: Tensor) -> Tensor:
    """`swiglu` in plain PyTorch: fp32 maths (fp64 for fp64 input), one rounding at the end."""
    value, gate = packed.to(compute_dtype(packed)).chunk(2, dim=-1)
    return (value * F.silu(gate)).to(packed.dtype)


@triton.jit(do_not_specialize=["rows"])
def swiglu_forward_kernel(packed_ptr, out_ptr, packed_row, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """ROWS x COLUMNS of the output; rows on grid axis 0, because axis 1 ends at 65535."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < WIDTH)
    source = packed_ptr + row * packed_row + column
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(source + WIDTH, mask=mask, other=0.0).to(tl.float32)
    out = value * (gate * tl.sigmoid(gate))
    tl.store(out_ptr + row * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def swiglu_backward_kernel(
    grad_ptr,
    packed_ptr,
    grad_packed_ptr,
    grad_row,
    packed_row,
    rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """With s = sigmoid(gate): dvalue = dy·gate·s, dgate = dy·value·s·(1 + gate·(1 − s)), both halves of one packed gradient."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < WIDTH)
    source = packed_ptr + row * packed_row + column
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(source + WIDTH, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * grad_row + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_value = grad * gate * sigmoid
    grad_gate = grad * value * sigmoid * (1 + gate * (1 - sigmoid))
    target = grad_packed_ptr + row * (2 * WIDTH) + column
    tl.store(target, grad_value.to(grad_packed_ptr.dtype.element_ty), mask=mask)
    tl.store(target + WIDTH, grad_gate.to(grad_packed_ptr.dtype.element_ty), mask=mask)


def _tile(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and launch options. 8 columns a thread are 128 bits of bf16; 512-column tiles leave fewer dead lanes where 1024
    does not divide the width (2688: 12 %, 4352: 6 %)."""
    columns = 1024 if width % 1024 == 0 else min(512, triton.next_power_of_2(width))
    grid = triton.cdiv(rows, ROWS), triton.cdiv(width, columns)
    return grid, {"ROWS": ROWS, "COLUMNS": columns, "num_warps": max(1, columns // 256)}


def _rows(t: Tensor) -> Tensor:
    """[..,W] -> [M,W] with contiguous rows: a view, unless the leading dimensions cannot be merged or a row has a stride."""
    return inner_contiguous(t.reshape(-1, t.shape[-1]))


def _forward_fake(packed: Tensor) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2))


def _backward_fake(grad: Tensor, packed: Tensor) -> Tensor:
    return packed.new_empty(packed.shape)


@register("swiglu_forward_triton(Tensor packed) -> Tensor", _forward_fake)
def _forward_triton(packed: Tensor) -> Tensor:
    out = _forward_fake(packed)
    if out.numel():
        flat = _rows(packed)
        grid, options = _tile(len(flat), out.shape[-1])
        launch(swiglu_forward_kernel, grid, packed, flat, out, flat.stride(0), len(flat), out.shape[-1], **options)
    return out


@register("swiglu_backward_triton(Tensor grad, Tensor packed) -> Tensor", _backward_fake)
def _backward_triton(grad: Tensor, packed: Tensor) -> Tensor:
    out = _backward_fake(grad, packed)
    if out.numel():
        flat, grad = _rows(packed), _rows(grad)
        grid, options = _tile(*grad.shape)
        strides = grad.stride(0), flat.stride(0)
        launch(swiglu_backward_kernel, grid, packed, grad, flat, out, *strides, len(flat), grad.shape[-1], **options)
    return out


@register("swiglu_forward_cpp(Tensor packed) -> Tensor", _forward_fake)
def _forward_cpp(packed: Tensor) -> Tensor:
    out = _forward_fake(packed)
    if out.numel():
        cpp.swiglu_forward(_rows(packed), out)
    return out


@register("swiglu_backward_cpp(Tensor grad, Tensor packed) -> Tensor", _backward_fake)
def _backward_cpp(grad: Tensor, packed: Tensor) -> Tensor:
    out = _backward_fake(grad, packed)
    if out.numel():
        cpp.swiglu_backward(_rows(grad), _rows(packed), out)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed: Tensor, backend: str) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(packed)
        return find("swiglu_forward", backend)(packed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return find("swiglu_backward", ctx.backend)(grad, *ctx.saved_tensors), None


def swiglu(packed: Tensor) -> Tensor:
    """value·silu(gate) of a packed projection (value | gate) (GLU variants, arXiv:2002.05202, equation 6).

    packed [..,2F]. Returns [..,F] in the dtype of packed; maths in fp32, one rounding; the gradient has the dtype of packed.
    Triton takes contiguous rows whose leading dimensions merge into one (any other layout is copied) and no fp64.
    Raises ValueError for an odd last dimension, an integer tensor, or fp64 outside the reference.
    """
    check_float("swiglu", packed=packed)
    if packed.ndim == 0 or packed.shape[-1] % 2:
        raise ValueError(f"swiglu: packed has shape {list(packed.shape)}, but its last dimension must be value | gate, so even")
    chosen = choose_backend("swiglu", packed)
    return swiglu_reference(packed) if chosen == "reference" else _SwiGLU.apply(packed, chosen)
