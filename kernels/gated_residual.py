"""gated_residual: add a branch to the residual stream through the adaLN gate. B batch, T tokens, H width, S parts.

Backward: dx = dr (the same tensor, no kernel), dbranch = gate·dr, dgate = Σ_t dr·branch. Saved for the
backward: branch. No row is reduced, so a program takes a tile of rows by columns, and the columns divide the width: 384 = 3·128,
768 = 3·256, 1088 = 17·64, 1152 = 9·128, without dead lanes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import check_float, check_shape, check_tokens, choose_backend, compute_dtype
from .library import cdiv, cpp, find, inner_contiguous, launch, register
from .token_sums import reduce_partials
from .tuning import chunks, launch_for

BYTES = (6, 6)  # per element of x [B,T,H] in bf16: x, branch, r; dr, branch, dbranch


def check_gated_residual(op: str, x: Tensor, branch: Tensor, gate: Tensor) -> None:
    """Raise ValueError unless x, branch are [B,T,H] and gate is [B,H], floating point, on one device."""
    B, _, H = check_tokens(op, "x", x)
    check_float(op, x=x, branch=branch, gate=gate)
    check_shape(op, "branch", branch, tuple(x.shape))
    check_shape(op, "gate", gate, (B, H))


def gated_residual_reference(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """`gated_residual` in plain PyTorch: fp32 maths (fp64 for fp64 input), one rounding at the end."""
    dtype = compute_dtype(x)
    return torch.addcmul(x.to(dtype), branch.to(dtype), gate.to(dtype)[:, None]).to(x.dtype)


@triton.jit(do_not_specialize=["T", "parts"])
def gated_residual_forward_kernel(
    x_ptr, branch_ptr, gate_ptr, r_ptr, x_stride_b, x_stride_t, branch_stride_b, branch_stride_t, gate_stride_b, T, parts,
    H: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS tokens of one sample and TILE columns."""
    pid = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (H + TILE - 1) // TILE
    b, start = pid // (parts * blocks), pid // blocks % parts * ROWS
    columns = (pid % blocks * TILE + tl.arange(0, TILE))[None, :]
    t = (start + tl.arange(0, ROWS))[:, None]
    mask = (t < T) & (columns < H)
    scale = tl.load(gate_ptr + b * gate_stride_b + columns, mask=columns < H, other=0.0).to(tl.float32)
    stream = tl.load(x_ptr + (b * x_stride_b + t * x_stride_t + columns), mask=mask, other=0.0).to(tl.float32)
    added = tl.load(branch_ptr + (b * branch_stride_b + t * branch_stride_t + columns), mask=mask, other=0.0).to(tl.float32)
    tl.store(r_ptr + ((b * T + t) * H + columns), stream + scale * added, mask=mask)


@triton.jit(do_not_specialize=["T", "parts", "rows"])
def gated_residual_backward_kernel(
    dr_ptr, branch_ptr, gate_ptr, dbranch_ptr, sums_ptr, dr_stride_b, dr_stride_t, branch_stride_b, branch_stride_t, gate_stride_b,
    T, parts, rows,
    H: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program takes `rows` tokens of one sample, ROWS at a time, and TILE columns; sums [B,parts,1,H] is dgate."""
    pid = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (H + TILE - 1) // TILE
    part = pid // blocks  # of all samples: b·parts + s
    b, start = part // parts, part % parts * rows
    end = tl.minimum(start + rows, T)
    columns = (pid % blocks * TILE + tl.arange(0, TILE))[None, :]
    scale = tl.load(gate_ptr + b * gate_stride_b + columns, mask=columns < H, other=0.0).to(tl.float32)
    dgate = tl.zeros((ROWS, TILE), tl.float32)
    for first in range(start, end, ROWS):
        t = (first + tl.arange(0, ROWS))[:, None]
        mask = (t < end) & (columns < H)
        d = tl.load(dr_ptr + (b * dr_stride_b + t * dr_stride_t + columns), mask=mask, other=0.0).to(tl.float32)
        added = tl.load(branch_ptr + (b * branch_stride_b + t * branch_stride_t + columns), mask=mask, other=0.0).to(tl.float32)
        dgate += d * added
        tl.store(dbranch_ptr + ((b * T + t) * H + columns), scale * d, mask=mask)
    tl.store(sums_ptr + part * H + columns, tl.sum(dgate, axis=0)[None, :], mask=columns < H)


def _forward_fake(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@register("gated_residual_forward_triton(Tensor x, Tensor branch, Tensor gate) -> Tensor", _forward_fake)
def _forward_triton(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """r [B,T,H]. Copies an input only if its rows are not contiguous."""
    r = _forward_fake(x, branch, gate)
    if x.numel() == 0:
        return r
    B, T, H = x.shape
    x, branch, gate = inner_contiguous(x), inner_contiguous(branch), inner_contiguous(gate)
    config = launch_for("gated_residual_forward", H, x.device)
    parts = cdiv(T, config.rows)
    launch(
        gated_residual_forward_kernel, (B * parts * cdiv(H, config.tile),), x, x, branch, gate, r,
        x.stride(0), x.stride(1), branch.stride(0), branch.stride(1), gate.stride(0), T, parts, H, config.rows, config.tile,
        num_warps=config.warps,
    )  # fmt: skip
    return r


def _backward_fake(dr: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return branch.new_empty(branch.shape), gate.new_empty(gate.shape)


@register("gated_residual_backward_triton(Tensor dr, Tensor branch, Tensor gate) -> (Tensor dbranch, Tensor dgate)", _backward_fake)
def _backward_triton(dr: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """dbranch [B,T,H] and dgate [B,H]. Copies dr or branch only if its rows are not contiguous. One or two launches."""
    dbranch, dgate = _backward_fake(dr, branch, gate)
    if branch.numel() == 0:
        return dbranch, dgate.zero_()
    B, T, H = branch.shape
    dr, branch, gate = inner_contiguous(dr), inner_contiguous(branch), inner_contiguous(gate)
    config = launch_for("gated_residual_backward", H, branch.device)
    blocks = cdiv(H, config.tile)
    parts, rows = chunks(B * blocks, T, config.blocks, branch.device, config.rows)
    sums = dgate if parts == 1 else dr.new_empty((B, parts, 1, H), dtype=torch.float32)
    launch(
        gated_residual_backward_kernel, (B * parts * blocks,), branch, dr, branch, gate, dbranch, sums,
        dr.stride(0), dr.stride(1), branch.stride(0), branch.stride(1), gate.stride(0), T, parts, rows, H, config.rows, config.tile,
        num_warps=config.warps,
    )  # fmt: skip
    if parts > 1:
        reduce_partials(sums, dgate)
    return dbranch, dgate


@register("gated_residual_forward_cpp(Tensor x, Tensor branch, Tensor gate) -> Tensor", _forward_fake)
def _forward_cpp(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    r = _forward_fake(x, branch, gate)
    cpp.gated_residual_forward(inner_contiguous(x), inner_contiguous(branch), inner_contiguous(gate), r)
    return r


@register("gated_residual_backward_cpp(Tensor dr, Tensor branch, Tensor gate) -> (Tensor dbranch, Tensor dgate)", _backward_fake)
def _backward_cpp(dr: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    dbranch, dgate = _backward_fake(dr, branch, gate)
    cpp.gated_residual_backward(inner_contiguous(dr), inner_contiguous(branch), inner_contiguous(gate), dbranch, dgate)
    return dbranch, dgate


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, branch: Tensor, gate: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(branch, gate)
        ctx.backend = backend
        return find("gated_residual_forward", backend)(x, branch, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx, dr: Tensor) -> tuple[Tensor | None, ...]:
        dbranch, dgate = find("gated_residual_backward", ctx.backend)(dr, *ctx.saved_tensors)
        return dr, dbranch, dgate, None


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Return x + gate·branch (adaLN-Zero, DiT, arXiv:2212.09748, section 3.2).

    x, branch [B,T,H]; gate [B,H], any strides. Returns r [B,T,H] in the dtype of x. Maths in fp32; gradients in the dtype of
    each input. If x and branch differ in dtype, the C++ backend runs the reference.
    Raises ValueError for other shapes, integer tensors, tensors on two devices, and fp64 outside the reference.
    """
    check_gated_residual("gated_residual", x, branch, gate)
    backend = choose_backend("gated_residual", x, branch, gate)
    if backend == "reference" or (backend == "cpp" and x.dtype != branch.dtype):
        return gated_residual_reference(x, branch, gate)
    return _GatedResidual.apply(x, branch, gate, backend)
