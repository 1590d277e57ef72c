"""swiglu: the gated activation of the MLP on a packed projection. F hidden width, M rows (all leading dimensions), S parts.

One pass forward and one backward. Saved for the backward: packed only; the sigmoid is computed again. The bias of the projection is
added here, so that its gradient, the column sums of packed's gradient, is summed while those numbers are in registers.

`swiglu_linear` includes the Linear after it in an MLP. It is one autograd.Function, because only then can the backward recompute
SwiGLU's output, from tensors that it reads anyway, instead of keeping it from the forward.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .dispatch import check_float, check_shape, choose_backend, compute_dtype
from .library import cdiv, cpp, find, inner_contiguous, launch, load_columns, register
from .token_sums import reduce_partials
from .tuning import chunks

BYTES = (6, 10)  # per element of the result [..,F] in bf16: both halves of packed, out; dout, packed, dpacked. `again`: 2 more
ROWS = 2  # rows that a program takes at a time


def swiglu_reference(packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """`swiglu` in plain PyTorch: fp32 maths (fp64 for fp64 input), one rounding at the end."""
    dtype = compute_dtype(packed)
    biased = packed.to(dtype) if bias is None else packed.to(dtype) + bias.to(dtype)
    value, gate = biased.chunk(2, dim=-1)
    return (value * F.silu(gate)).to(packed.dtype)


@triton.jit(do_not_specialize=["rows"])
def swiglu_forward_kernel(
    packed_ptr, bias_ptr, out_ptr, packed_stride_m, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """ROWS x COLUMNS of the output; rows on grid axis 0, because axis 1 ends at 65535."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (columns < WIDTH)
    source = packed_ptr + row * packed_stride_m + columns
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(source + WIDTH, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        value += load_columns(bias_ptr, columns, WIDTH)
        gate += load_columns(bias_ptr + WIDTH, columns, WIDTH)
    out = value * (gate * tl.sigmoid(gate))
    tl.store(out_ptr + row * WIDTH + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def swiglu_backward_kernel(
    dout_ptr, packed_ptr, bias_ptr, dpacked_ptr, out_ptr, sums_ptr, dout_stride_m, packed_stride_m, rows, rows_per_program,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """With s = sigmoid(gate): dvalue = dout·gate·s, dgate = dout·value·s·(1 + gate·(1 − s)), halves of one packed gradient.

    A program takes `rows_per_program` rows, ROWS at a time, and COLUMNS of each half. With a bias it stores the sums of its rows,
    fp32 [S,2·WIDTH]. out_ptr, if given: the output of the forward once more, by the same expression and so of the same bits.
    """
    start = tl.program_id(0).to(tl.int64) * rows_per_program
    end = tl.minimum(start + rows_per_program, rows)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    if bias_ptr is not None:
        value_bias = load_columns(bias_ptr, columns, WIDTH)[None, :]
        gate_bias = load_columns(bias_ptr + WIDTH, columns, WIDTH)[None, :]
        value_sum, gate_sum = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for first in range(start, end, ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        mask = (row < end) & (columns < WIDTH)[None, :]
        source = packed_ptr + row * packed_stride_m + columns[None, :]
        value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(source + WIDTH, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + row * dout_stride_m + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            value += value_bias
            gate += gate_bias
        sigmoid = tl.sigmoid(gate)
        dvalue = dout * gate * sigmoid
        dgate = dout * value * sigmoid * (1 + gate * (1 - sigmoid))
        target = dpacked_ptr + row * (2 * WIDTH) + columns[None, :]
        tl.store(target, dvalue.to(dpacked_ptr.dtype.element_ty), mask=mask)
        tl.store(target + WIDTH, dgate.to(dpacked_ptr.dtype.element_ty), mask=mask)
        if out_ptr is not None:
            out = value * (gate * sigmoid)
            tl.store(out_ptr + row * WIDTH + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
        if bias_ptr is not None:  # rows past the end have a gradient of 0
            value_sum += tl.sum(dvalue, axis=0)
            gate_sum += tl.sum(dgate, axis=0)
    if bias_ptr is not None:
        sums = sums_ptr + tl.program_id(0).to(tl.int64) * (2 * WIDTH) + columns
        tl.store(sums, value_sum, mask=columns < WIDTH)
        tl.store(sums + WIDTH, gate_sum, mask=columns < WIDTH)


def _columns(width: int) -> int:
    """Return the columns of a tile. 8 columns per thread are 128 bits of bf16; tiles of 512 leave fewer dead lanes if 1024 does not
    divide the width (2688: 12 %, 4352: 6 %)."""
    return 1024 if width % 1024 == 0 else min(512, triton.next_power_of_2(width))


def blocks(width: int) -> int:
    """Return the programs per multiprocessor of a backward with a bias, whose programs each sum their rows: as many as the
    registers allow if the output is written too. 49 KB of loads are then in flight per SM, of which an H100 needs about 36, and the
    partial sums are few."""
    return min(32, 4 * 1024 // _columns(width))


def _rows(t: Tensor) -> Tensor:
    """Return [..,W] as [M,W] with contiguous rows: a view, or a copy if leading dimensions cannot be merged or a row is strided."""
    return inner_contiguous(t.reshape(-1, t.shape[-1]))


def _forward_fake(packed: Tensor, bias: Tensor | None = None) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2))


def _backward_fake(dout: Tensor, packed: Tensor, bias: Tensor | None = None, again: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return dpacked, the bias's gradient [2F] and the forward's output, which are empty without a bias and unless `again`.

    The argument keeps its name: TorchInductor's caches on users' disks hold calls that give it by keyword.
    """
    dbias = packed.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return packed.new_empty(packed.shape), dbias, packed.new_empty(dout.shape if again else 0)


@register("swiglu_forward_triton(Tensor packed, Tensor? bias=None) -> Tensor", _forward_fake)
def _forward_triton(packed: Tensor, bias: Tensor | None = None) -> Tensor:
    out = _forward_fake(packed)
    if out.numel():
        flat, width = _rows(packed), out.shape[-1]
        bias = bias if bias is None else inner_contiguous(bias)
        columns = _columns(width)
        grid = cdiv(len(flat), ROWS), cdiv(width, columns)
        launch(
            swiglu_forward_kernel, grid, packed, flat, bias, out, flat.stride(0), len(flat), width, ROWS, columns,
            num_warps=max(1, columns // 256),
        )  # fmt: skip
    return out


@register(
    "swiglu_backward_triton(Tensor dout, Tensor packed, Tensor? bias=None, bool again=False) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
)
def _backward_triton(
    dout: Tensor, packed: Tensor, bias: Tensor | None = None, again: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch; with a bias a second one adds its partial sums."""
    dpacked, dbias, out = _backward_fake(dout, packed, bias, again)
    if not dout.numel():
        return dpacked, dbias.zero_(), out
    flat, dout = _rows(packed), _rows(dout)
    M, width = dout.shape
    columns = _columns(width)
    across = cdiv(width, columns)
    parts, rows_per_program, sums = cdiv(M, ROWS), ROWS, None
    if bias is not None:
        bias = inner_contiguous(bias)
        parts, rows_per_program = chunks(across, M, blocks(width), flat.device)
        sums = packed.new_empty((1, parts, 1, 2 * width), dtype=torch.float32)
    launch(
        swiglu_backward_kernel, (parts, across), flat, dout, flat, bias, dpacked, out if again else None, sums,
        dout.stride(0), flat.stride(0), M, rows_per_program, width, ROWS, columns, num_warps=max(1, columns // 256),
    )  # fmt: skip
    if sums is not None:
        reduce_partials(sums, dbias)
    return dpacked, dbias, out


@register("swiglu_forward_cpp(Tensor packed, Tensor? bias=None) -> Tensor", _forward_fake)
def _forward_cpp(packed: Tensor, bias: Tensor | None = None) -> Tensor:
    out = _forward_fake(packed)
    if out.numel():
        cpp.swiglu_forward(_rows(packed), bias if bias is None else inner_contiguous(bias), out)
    return out


@register(
    "swiglu_backward_cpp(Tensor dout, Tensor packed, Tensor? bias=None, bool again=False) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
)
def _backward_cpp(dout: Tensor, packed: Tensor, bias: Tensor | None = None, again: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    dpacked, dbias, out = _backward_fake(dout, packed, bias, again)
    if not dout.numel():
        return dpacked, dbias.zero_(), out
    bias = bias if bias is None else inner_contiguous(bias)
    cpp.swiglu_backward(_rows(dout), _rows(packed), bias, dpacked, None if bias is None else dbias, out if again else None)
    return dpacked, dbias, out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(packed, bias)
        return find("swiglu_forward", backend)(packed, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        packed, bias = ctx.saved_tensors
        dpacked, dbias, _ = find("swiglu_backward", ctx.backend)(dout, packed, bias)
        return dpacked, None if bias is None else dbias, None


def _check(op: str, packed: Tensor, bias: Tensor | None) -> None:
    check_float(op, packed=packed, bias=bias)
    if packed.ndim == 0 or packed.shape[-1] % 2:
        raise ValueError(f"{op}: packed has shape {list(packed.shape)}, but its last dimension must be value | gate, so even")
    if bias is not None:
        check_shape(op, "bias", bias, (packed.shape[-1],))


def swiglu(packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return value·silu(gate) of a packed projection (value | gate) plus its bias (GLU variants, arXiv:2002.05202, equation 6).

    packed [..,2F]; bias [2F] or None. Returns [..,F] in the dtype of packed; maths in fp32, one rounding; gradients in the dtype of
    each input. Triton takes contiguous rows whose leading dimensions merge into one (any other layout is copied) and no fp64.
    Raises ValueError for an odd last dimension, another shape of bias, an integer tensor, or fp64 outside the reference.
    """
    _check("swiglu", packed, bias)
    backend = choose_backend("swiglu", packed, bias)
    return swiglu_reference(packed, bias) if backend == "reference" else _SwiGLU.apply(packed, bias, backend)


def swiglu_linear_reference(packed: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`swiglu_linear` in plain PyTorch."""
    return F.linear(swiglu_reference(packed, bias), weight)


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed: Tensor, weight: Tensor, bias: Tensor | None, recompute: bool, backend: str) -> Tensor:
        hidden = find("swiglu_forward", backend)(packed, bias)
        ctx.backend = backend
        ctx.save_for_backward(packed, weight, bias, None if recompute else hidden)
        return F.linear(hidden, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        packed, weight, bias, hidden = ctx.saved_tensors
        backward = find("swiglu_backward", ctx.backend)
        # Not a second call of the forward: AOTAutograd would see the same call twice in its joint graph, and keep the first result.
        dpacked, dbias, recomputed = backward(dout @ weight, packed, bias, hidden is None)
        hidden = recomputed if hidden is None else hidden
        dweight = dout.flatten(0, -2).T @ hidden.flatten(0, -2)
        return dpacked, dweight, None if bias is None else dbias, None, None


def swiglu_linear(packed: Tensor, weight: Tensor, bias: Tensor | None = None, recompute: bool = False) -> Tensor:
    """Return swiglu(packed, bias) @ weightᵀ: the second half of an MLP, without the bias of its Linear.

    packed [..,2F]; weight [H,F] of the same dtype; bias [2F] of packed, or None. Returns [..,H]. recompute: whether the backward
    computes SwiGLU's output again (F more elements written per row) instead of keeping it; all gradients are bitwise equal. Raises
    ValueError for other shapes, integer tensors, two dtypes of packed and weight, or fp64 outside the reference.
    """
    op = "swiglu_linear"
    _check(op, packed, bias)
    check_float(op, packed=packed, weight=weight)
    if packed.ndim < 2:
        raise ValueError(f"{op}: packed has shape {list(packed.shape)}, but [.., 2F] with rows is needed")
    if weight.ndim != 2 or weight.shape[1] != packed.shape[-1] // 2:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}, but [any, {packed.shape[-1] // 2}] is needed here")
    if weight.dtype != packed.dtype:
        raise ValueError(f"{op}: weight has dtype {weight.dtype}, but packed has {packed.dtype}: cast one of them")
    backend = choose_backend(op, packed, weight, bias)
    if backend != "reference":
        return _SwiGLULinear.apply(packed, weight, bias, recompute, backend)
    if recompute:
        return checkpoint(swiglu_linear_reference, packed, weight, bias, use_reentrant=False, preserve_rng_state=False)
    return swiglu_linear_reference(packed, weight, bias)
