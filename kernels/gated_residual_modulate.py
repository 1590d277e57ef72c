"""gated_residual_modulate: a residual add and the next adaLN in one op. B batch, T tokens, H width, S parts.

r is rounded to its dtype before the norm, so that forward and backward normalise the same numbers. With g = dy·(1 + scale) and
r̂ = (r − mean)·rstd, d = dr + rstd·(g − mean(g) − r̂·mean(g·r̂)) is the gradient at r: the residual gradient dr is added
here, not in a separate pass. dx = d, dbranch = gate·d, dgate = Σ_t d·branch, dscale = Σ_t dy·r̂, dshift = Σ_t dy.
With a bias that is added to branch: dgate = Σ_t d·branch + bias·Σ_t d and dbias = Σ_b gate·Σ_t d, a fourth sum over tokens.
Saved for the backward: r, branch, and 8 bytes of fp32 statistics per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import check_float, check_shape, choose_backend, compute_dtype
from .gated_residual import check_gated_residual, gated_residual_reference
from .library import cdiv, cpp, find, inner_contiguous, launch, load_columns, register
from .modulate import modulate_reference
from .token_sums import common_dtype, reduce_partials
from .tuning import check_width, chunks, launch_for

BYTES = (8, 12)  # per element of x [B,T,H] in bf16: x, branch, r, y; dy, dr, r, branch, dx, dbranch


def gated_residual_modulate_reference(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`gated_residual_modulate` in plain PyTorch; r is rounded to its dtype before the norm, so that y fits the stored r."""
    if bias is not None:
        dtype = compute_dtype(x)
        branch = branch.to(dtype) + bias.to(dtype)
    r = gated_residual_reference(x, branch, gate)
    return r, modulate_reference(r, shift, scale, eps)


@triton.jit(do_not_specialize=["T", "parts", "count"])
def gated_residual_modulate_forward_kernel(
    x_ptr, branch_ptr, bias_ptr, gate_ptr, shift_ptr, scale_ptr, r_ptr, y_ptr, stats_ptr,
    x_stride_b, x_stride_t, branch_stride_b, branch_stride_t, gate_stride_b, shift_stride_b, scale_stride_b, T, parts, count,
    H: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS tokens of one sample, so that gate, shift and scale are read once for all of them."""
    pid = tl.program_id(0).to(tl.int64)
    b, start = pid // parts, pid % parts * ROWS
    gate_row, shift_row, scale_row = gate_ptr + b * gate_stride_b, shift_ptr + b * shift_stride_b, scale_ptr + b * scale_stride_b
    tile = tl.arange(0, TILE)
    tile_gate = load_columns(gate_row, tile, H)
    tile_shift, tile_scale = load_columns(shift_row, tile, H), 1.0 + load_columns(scale_row, tile, H)
    if TAIL > 0:
        tail = TILE + tl.arange(0, TAIL)
        tail_gate = load_columns(gate_row, tail, H)
        tail_shift, tail_scale = load_columns(shift_row, tail, H), 1.0 + load_columns(scale_row, tail, H)
    if bias_ptr is not None:
        tile_bias = load_columns(bias_ptr, tile, H)
        if TAIL > 0:
            tail_bias = load_columns(bias_ptr, tail, H)
    for t in tl.range(start, tl.minimum(start + ROWS, T), num_stages=STAGES):
        x_row, branch_row = x_ptr + (b * x_stride_b + t * x_stride_t), branch_ptr + (b * branch_stride_b + t * branch_stride_t)
        row = b * T + t
        tile_branch = load_columns(branch_row, tile, H)
        if bias_ptr is not None:
            tile_branch += tile_bias
        tile_r = (load_columns(x_row, tile, H) + tile_gate * tile_branch).to(r_ptr.dtype.element_ty)
        tl.store(r_ptr + row * H + tile, tile_r, mask=tile < H)
        tile_r = tile_r.to(tl.float32)
        total = tl.sum(tile_r, axis=0)
        if TAIL > 0:
            tail_branch = load_columns(branch_row, tail, H)
            if bias_ptr is not None:
                tail_branch += tail_bias
            tail_r = (load_columns(x_row, tail, H) + tail_gate * tail_branch).to(r_ptr.dtype.element_ty)
            tl.store(r_ptr + row * H + tail, tail_r, mask=tail < H)
            tail_r = tail_r.to(tl.float32)
            total += tl.sum(tail_r, axis=0)
        mean = total / H
        # Two steps, and zero again in the dead lanes: E[r²] − mean² would cancel, and 0 − mean would be counted.
        tile_r = tl.where(tile < H, tile_r - mean, 0.0)
        total = tl.sum(tile_r * tile_r, axis=0)
        if TAIL > 0:
            tail_r = tl.where(tail < H, tail_r - mean, 0.0)
            total += tl.sum(tail_r * tail_r, axis=0)
        rstd = tl.rsqrt(total / H + EPS)
        tl.store(y_ptr + row * H + tile, tile_r * rstd * tile_scale + tile_shift, mask=tile < H)
        if TAIL > 0:
            tl.store(y_ptr + row * H + tail, tail_r * rstd * tail_scale + tail_shift, mask=tail < H)
        tl.store(stats_ptr + row, mean)
        tl.store(stats_ptr + (count + row), rstd)


@triton.jit(do_not_specialize=["T", "parts", "rows", "count"])
def gated_residual_modulate_backward_kernel(
    dr_ptr, dy_ptr, r_ptr, branch_ptr, bias_ptr, stats_ptr, gate_ptr, scale_ptr, dx_ptr, dbranch_ptr, sums_ptr,
    dr_stride_b, dr_stride_t, dy_stride_b, dy_stride_t, branch_stride_b, branch_stride_t, gate_stride_b, scale_stride_b,
    T, parts, rows, count,
    H: tl.constexpr, HAS_DR: tl.constexpr, TILE: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program takes `rows` tokens of one sample and stores one row of sums [B,parts,3,H]: dgate, dshift, dscale; with a bias
    [B,parts,4,H]: its gradient too.

    Rows of two tiles read gate and scale again for each row, from the L1 cache: the registers that would hold them are needed.
    """
    pid = tl.program_id(0).to(tl.int64)
    b, start = pid // parts, pid % parts * rows
    gate_row, scale_row = gate_ptr + b * gate_stride_b, scale_ptr + b * scale_stride_b
    tile = tl.arange(0, TILE)
    if TAIL == 0:
        tile_gate, tile_scale = load_columns(gate_row, tile, H), 1.0 + load_columns(scale_row, tile, H)
    tile_dgate = tl.zeros((TILE,), tl.float32)
    tile_dshift, tile_dscale = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    tile_total = tl.zeros((TILE,), tl.float32)  # of d, for the bias
    if TAIL > 0:
        tail = TILE + tl.arange(0, TAIL)
        tail_gate, tail_scale = load_columns(gate_row, tail, H), 1.0 + load_columns(scale_row, tail, H)
        tail_dgate = tl.zeros((TAIL,), tl.float32)
        tail_dshift, tail_dscale = tl.zeros((TAIL,), tl.float32), tl.zeros((TAIL,), tl.float32)
        tail_total = tl.zeros((TAIL,), tl.float32)
    for t in tl.range(start, tl.minimum(start + rows, T), num_stages=STAGES):
        row = b * T + t
        dr_row, dy_row = dr_ptr + (b * dr_stride_b + t * dr_stride_t), dy_ptr + (b * dy_stride_b + t * dy_stride_t)
        branch_row = branch_ptr + (b * branch_stride_b + t * branch_stride_t)
        mean, rstd = tl.load(stats_ptr + row), tl.load(stats_ptr + (count + row))
        # dy is 0 in the dead lanes, and with it every product that is summed: r̂ needs no mask there.
        tile_dy, tile_rhat = load_columns(dy_row, tile, H), (load_columns(r_ptr + row * H, tile, H) - mean) * rstd
        tile_g = tile_dy * (tile_scale if TAIL == 0 else 1.0 + load_columns(scale_row, tile, H))
        sum_g, sum_gr = tl.sum(tile_g, axis=0), tl.sum(tile_g * tile_rhat, axis=0)
        tile_dshift += tile_dy
        tile_dscale += tile_dy * tile_rhat
        if TAIL > 0:
            tail_dy, tail_rhat = load_columns(dy_row, tail, H), (load_columns(r_ptr + row * H, tail, H) - mean) * rstd
            tail_g = tail_dy * tail_scale
            sum_g += tl.sum(tail_g, axis=0)
            sum_gr += tl.sum(tail_g * tail_rhat, axis=0)
            tail_dshift += tail_dy
            tail_dscale += tail_dy * tail_rhat
        tile_d = rstd * (tile_g - sum_g / H - tile_rhat * (sum_gr / H))
        if HAS_DR:
            tile_d += load_columns(dr_row, tile, H)
        tile_dgate += tile_d * load_columns(branch_row, tile, H)
        if bias_ptr is not None:
            tile_total += tile_d
        tl.store(dx_ptr + row * H + tile, tile_d, mask=tile < H)
        tl.store(
            dbranch_ptr + row * H + tile, tile_d * (tile_gate if TAIL == 0 else load_columns(gate_row, tile, H)), mask=tile < H
        )
        if TAIL > 0:
            tail_d = rstd * (tail_g - sum_g / H - tail_rhat * (sum_gr / H))
            if HAS_DR:
                tail_d += load_columns(dr_row, tail, H)
            tail_dgate += tail_d * load_columns(branch_row, tail, H)
            if bias_ptr is not None:
                tail_total += tail_d
            tl.store(dx_ptr + row * H + tail, tail_d, mask=tail < H)
            tl.store(dbranch_ptr + row * H + tail, tail_gate * tail_d, mask=tail < H)
    if bias_ptr is None:
        out = sums_ptr + pid * (3 * H)
    else:
        out = sums_ptr + pid * (4 * H)
        tile_dgate += load_columns(bias_ptr, tile, H) * tile_total
        tl.store(out + 3 * H + tile, load_columns(gate_row, tile, H) * tile_total, mask=tile < H)
        if TAIL > 0:
            tail_dgate += load_columns(bias_ptr, tail, H) * tail_total
            tl.store(out + 3 * H + tail, tail_gate * tail_total, mask=tail < H)
    tl.store(out + tile, tile_dgate, mask=tile < H)
    tl.store(out + H + tile, tile_dshift, mask=tile < H)
    tl.store(out + 2 * H + tile, tile_dscale, mask=tile < H)
    if TAIL > 0:
        tl.store(out + tail, tail_dgate, mask=tail < H)
        tl.store(out + H + tail, tail_dshift, mask=tail < H)
        tl.store(out + 2 * H + tail, tail_dscale, mask=tail < H)


def _forward_fake(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty((2, *x.shape[:2]), dtype=torch.float32)


@register(
    "gated_residual_modulate_forward_triton(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, float eps,"
    " Tensor? bias=None) -> (Tensor r, Tensor y, Tensor stats)",
    _forward_fake,
)
def _forward_triton(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """r, y [B,T,H] and stats fp32 [2,B,T] (mean, 1/σ of r). Copies an input only if its rows are not contiguous."""
    r, y, stats = _forward_fake(x, branch, gate, shift, scale, eps)
    if x.numel() == 0:
        return r, y, stats
    B, T, H = x.shape
    x, branch, bias = inner_contiguous(x), inner_contiguous(branch), bias if bias is None else inner_contiguous(bias)
    gate, shift, scale = inner_contiguous(gate), inner_contiguous(shift), inner_contiguous(scale)
    config = launch_for("gated_residual_modulate_forward", H, x.device)
    parts = cdiv(T, config.rows)
    launch(
        gated_residual_modulate_forward_kernel, (B * parts,), x, x, branch, bias, gate, shift, scale, r, y, stats,
        x.stride(0), x.stride(1), branch.stride(0), branch.stride(1), gate.stride(0), shift.stride(0), scale.stride(0),
        T, parts, B * T, H, eps, config.rows, config.tile, config.tail, config.stages,
        num_warps=config.warps, maxnreg=config.registers,
    )  # fmt: skip
    return r, y, stats


def _backward_fake(
    dr: Tensor | None,
    dy: Tensor,
    r: Tensor,
    branch: Tensor,
    stats: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, _, H = r.shape
    dmodulation = r.new_empty((B, 3, H), dtype=common_dtype(gate, shift, scale))
    return r.new_empty(r.shape), branch.new_empty(r.shape), dmodulation, r.new_empty(0) if bias is None else bias.new_empty(H)


@register(
    "gated_residual_modulate_backward_triton(Tensor? dr, Tensor dy, Tensor r, Tensor branch, Tensor stats, Tensor gate,"
    " Tensor shift, Tensor scale, Tensor? bias=None) -> (Tensor dx, Tensor dbranch, Tensor dmodulation, Tensor dbias)",
    _backward_fake,
)
def _backward_triton(
    dr: Tensor | None,
    dy: Tensor,
    r: Tensor,
    branch: Tensor,
    stats: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dbranch [B,T,H], (dgate, dshift, dscale) as one [B,3,H], and dbias [H] (empty without a bias); dr None counts as zero.
    Copies dr, dy or branch only if their rows are not contiguous. Two launches, or one if samples are not cut; three with a
    bias."""
    dx, dbranch, dmodulation, dbias = _backward_fake(dr, dy, r, branch, stats, gate, shift, scale, bias)
    if r.numel() == 0:
        return dx, dbranch, dmodulation.zero_(), dbias.zero_()
    B, T, H = r.shape
    given = dy if dr is None else inner_contiguous(dr)  # without dr any valid pointer: HAS_DR keeps the kernel from reading it
    dy, branch, gate, scale = inner_contiguous(dy), inner_contiguous(branch), inner_contiguous(gate), inner_contiguous(scale)
    bias = bias if bias is None else inner_contiguous(bias)
    config = launch_for("gated_residual_modulate_backward", H, r.device)
    parts, rows = chunks(B, T, config.blocks, r.device)
    in_place = parts == 1 and bias is None
    sums = dmodulation if in_place else r.new_empty((B, parts, 3 if bias is None else 4, H), dtype=torch.float32)
    launch(
        gated_residual_modulate_backward_kernel, (B * parts,), r,
        given, dy, r, branch, bias, stats, gate, scale, dx, dbranch, sums,
        given.stride(0), given.stride(1), dy.stride(0), dy.stride(1), branch.stride(0), branch.stride(1),
        gate.stride(0), scale.stride(0), T, parts, rows, B * T, H, dr is not None, config.tile, config.tail, config.stages,
        num_warps=config.warps, maxnreg=config.registers,
    )  # fmt: skip
    if not in_place:
        reduce_partials(sums[:, :, :3], dmodulation)
    if bias is not None:
        reduce_partials(sums.flatten(0, 1)[None, :, 3:], dbias)  # of all samples
    return dx, dbranch, dmodulation, dbias


@register(
    "gated_residual_modulate_forward_cpp(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, float eps,"
    " Tensor? bias=None) -> (Tensor r, Tensor y, Tensor stats)",
    _forward_fake,
)
def _forward_cpp(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r, y, stats = _forward_fake(x, branch, gate, shift, scale, eps)
    given = [inner_contiguous(t) for t in (x, branch, gate, shift, scale)]
    bias = bias if bias is None else inner_contiguous(bias)
    cpp.gated_residual_modulate_forward(*given, bias, eps, r, y, stats)
    return r, y, stats


@register(
    "gated_residual_modulate_backward_cpp(Tensor? dr, Tensor dy, Tensor r, Tensor branch, Tensor stats, Tensor gate,"
    " Tensor shift, Tensor scale, Tensor? bias=None) -> (Tensor dx, Tensor dbranch, Tensor dmodulation, Tensor dbias)",
    _backward_fake,
)
def _backward_cpp(
    dr: Tensor | None,
    dy: Tensor,
    r: Tensor,
    branch: Tensor,
    stats: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dbranch, dmodulation, dbias = _backward_fake(dr, dy, r, branch, stats, gate, shift, scale, bias)
    dr, bias = (t if t is None else inner_contiguous(t) for t in (dr, bias))
    dy, branch, gate, scale = (inner_contiguous(t) for t in (dy, branch, gate, scale))
    cpp.gated_residual_modulate_backward(dr, dy, r, branch, stats, gate, scale, bias, dx, dbranch, dmodulation, dbias)
    return dx, dbranch, dmodulation, dbias


class _GatedResidualModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, bias: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        r, y, stats = find("gated_residual_modulate_forward", backend)(x, branch, gate, shift, scale, eps, bias)
        ctx.save_for_backward(r, branch, stats, gate, shift, scale, bias)
        ctx.backend = backend
        ctx.set_materialize_grads(False)  # if nothing reads r of a last block, no tensor of zeros is made for it
        return r, y

    @staticmethod
    @once_differentiable
    def backward(ctx, dr: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        r, branch, stats, gate, shift, scale, bias = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(r)
        backward = find("gated_residual_modulate_backward", ctx.backend)
        dx, dbranch, dmodulation, dbias = backward(dr, dy, r, branch, stats, gate, shift, scale, bias)
        dgate, dshift, dscale = dmodulation.unbind(1)
        dbias = None if bias is None else dbias
        return dx, dbranch, dgate.to(gate.dtype), dshift.to(shift.dtype), dscale.to(scale.dtype), None, dbias, None


def gated_residual_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return r = x + gate·(branch + bias) and y = LN(r)·(1 + scale) + shift: a residual add and the modulated norm after it.

    x, branch [B,T,H]; gate, shift, scale [B,H], any strides; bias [H] or None: the bias of the Linear that made branch; its
    gradient is summed from branch's gradient while that is in registers. Returns (r, y), both [B,T,H] in the dtype of x. Maths and
    statistics in fp32; gradients in the dtype of each input. If x and branch differ in dtype, the C++ backend runs the reference.
    Raises ValueError for other shapes, integer tensors and tensors on two devices, and outside the reference for fp64 and a width
    over 8192.
    """
    op = "gated_residual_modulate"
    check_gated_residual(op, x, branch, gate)
    check_float(op, x=x, shift=shift, scale=scale, bias=bias)
    check_shape(op, "shift", shift, tuple(gate.shape))
    check_shape(op, "scale", scale, tuple(gate.shape))
    if bias is not None:
        check_shape(op, "bias", bias, (x.shape[2],))
    backend = choose_backend(op, x, branch, gate, shift, scale, bias)
    if backend == "reference" or (backend == "cpp" and x.dtype != branch.dtype):
        return gated_residual_modulate_reference(x, branch, gate, shift, scale, eps, bias)
    check_width(op, x.shape[2])
    return _GatedResidualModulate.apply(x, branch, gate, shift, scale, eps, bias, backend)
