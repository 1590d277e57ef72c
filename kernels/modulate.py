"""modulate: LayerNorm without affine, then the adaLN scale and shift of the sample. B batch, T tokens, H width, S parts.

With x̂ = (x − mean)·rstd and g = dy·(1 + scale), the backward is dx = rstd·(g − mean(g) − x̂·mean(g·x̂)),
dscale = Σ_t dy·x̂, dshift = Σ_t dy. Saved for the backward: x, and 8 bytes of fp32 statistics per row. x̂ is recomputed from x and
never from y, which cannot be inverted if scale = −1.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import check_float, check_shape, check_tokens, choose_backend, compute_dtype
from .library import cdiv, cpp, find, inner_contiguous, launch, load_columns, register
from .token_sums import common_dtype, reduce_partials
from .tuning import check_width, chunks, launch_for

BYTES = (4, 6)  # per element of x [B,T,H] in bf16: x, y; dy, x, dx


def modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """`modulate` in plain PyTorch: fp32 maths (fp64 for fp64 input), one rounding at the end."""
    dtype = compute_dtype(x)
    normed = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    return torch.addcmul(shift.to(dtype)[:, None], normed, 1 + scale.to(dtype)[:, None]).to(x.dtype)


@triton.jit(do_not_specialize=["T", "parts", "count"])
def modulate_forward_kernel(
    x_ptr, shift_ptr, scale_ptr, y_ptr, stats_ptr, x_stride_b, x_stride_t, shift_stride_b, scale_stride_b, T, parts, count,
    H: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS tokens of one sample, so that shift and scale are read once for all of them."""
    pid = tl.program_id(0).to(tl.int64)
    b, start = pid // parts, pid % parts * ROWS
    tile = tl.arange(0, TILE)
    shift_row, scale_row = shift_ptr + b * shift_stride_b, scale_ptr + b * scale_stride_b
    tile_shift, tile_scale = load_columns(shift_row, tile, H), 1.0 + load_columns(scale_row, tile, H)
    if TAIL > 0:
        tail = TILE + tl.arange(0, TAIL)
        tail_shift, tail_scale = load_columns(shift_row, tail, H), 1.0 + load_columns(scale_row, tail, H)
    for t in tl.range(start, tl.minimum(start + ROWS, T), num_stages=STAGES):
        x_row, row = x_ptr + (b * x_stride_b + t * x_stride_t), b * T + t
        tile_x = load_columns(x_row, tile, H)
        total = tl.sum(tile_x, axis=0)
        if TAIL > 0:
            tail_x = load_columns(x_row, tail, H)
            total += tl.sum(tail_x, axis=0)
        mean = total / H
        # Two steps, and zero again in the dead lanes: E[x²] − mean² would cancel, and 0 − mean would be counted.
        tile_x = tl.where(tile < H, tile_x - mean, 0.0)
        total = tl.sum(tile_x * tile_x, axis=0)
        if TAIL > 0:
            tail_x = tl.where(tail < H, tail_x - mean, 0.0)
            total += tl.sum(tail_x * tail_x, axis=0)
        rstd = tl.rsqrt(total / H + EPS)
        tl.store(y_ptr + row * H + tile, tile_x * rstd * tile_scale + tile_shift, mask=tile < H)
        if TAIL > 0:
            tl.store(y_ptr + row * H + tail, tail_x * rstd * tail_scale + tail_shift, mask=tail < H)
        tl.store(stats_ptr + row, mean)
        tl.store(stats_ptr + (count + row), rstd)


@triton.jit(do_not_specialize=["T", "parts", "rows", "count"])
def modulate_backward_kernel(
    dy_ptr, x_ptr, stats_ptr, scale_ptr, dx_ptr, sums_ptr, dy_stride_b, dy_stride_t, x_stride_b, x_stride_t, scale_stride_b,
    T, parts, rows, count,
    H: tl.constexpr, TILE: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program takes `rows` tokens of one sample and stores one row of sums [B,parts,2,H]: dshift, dscale."""
    pid = tl.program_id(0).to(tl.int64)
    b, start = pid // parts, pid % parts * rows
    tile = tl.arange(0, TILE)
    tile_scale = 1.0 + load_columns(scale_ptr + b * scale_stride_b, tile, H)
    tile_dshift, tile_dscale = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    if TAIL > 0:
        tail = TILE + tl.arange(0, TAIL)
        tail_scale = 1.0 + load_columns(scale_ptr + b * scale_stride_b, tail, H)
        tail_dshift, tail_dscale = tl.zeros((TAIL,), tl.float32), tl.zeros((TAIL,), tl.float32)
    for t in tl.range(start, tl.minimum(start + rows, T), num_stages=STAGES):
        x_row, dy_row, row = x_ptr + (b * x_stride_b + t * x_stride_t), dy_ptr + (b * dy_stride_b + t * dy_stride_t), b * T + t
        mean, rstd = tl.load(stats_ptr + row), tl.load(stats_ptr + (count + row))
        # dy is 0 in the dead lanes, and with it every product below: x̂ needs no mask there.
        tile_dy, tile_xhat = load_columns(dy_row, tile, H), (load_columns(x_row, tile, H) - mean) * rstd
        tile_g = tile_dy * tile_scale
        sum_g, sum_gx = tl.sum(tile_g, axis=0), tl.sum(tile_g * tile_xhat, axis=0)
        tile_dshift += tile_dy
        tile_dscale += tile_dy * tile_xhat
        if TAIL > 0:
            tail_dy, tail_xhat = load_columns(dy_row, tail, H), (load_columns(x_row, tail, H) - mean) * rstd
            tail_g = tail_dy * tail_scale
            sum_g += tl.sum(tail_g, axis=0)
            sum_gx += tl.sum(tail_g * tail_xhat, axis=0)
            tail_dshift += tail_dy
            tail_dscale += tail_dy * tail_xhat
        tl.store(dx_ptr + row * H + tile, rstd * (tile_g - sum_g / H - tile_xhat * (sum_gx / H)), mask=tile < H)
        if TAIL > 0:
            tl.store(dx_ptr + row * H + tail, rstd * (tail_g - sum_g / H - tail_xhat * (sum_gx / H)), mask=tail < H)
    out = sums_ptr + pid * (2 * H)
    tl.store(out + tile, tile_dshift, mask=tile < H)
    tl.store(out + H + tile, tile_dscale, mask=tile < H)
    if TAIL > 0:
        tl.store(out + tail, tail_dshift, mask=tail < H)
        tl.store(out + H + tail, tail_dscale, mask=tail < H)


def _forward_fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((2, *x.shape[:2]), dtype=torch.float32)


@register("modulate_forward_triton(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor y, Tensor stats)", _forward_fake)
def _forward_triton(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y [B,T,H] and stats fp32 [2,B,T] (mean, 1/σ). Copies x only if its rows are not contiguous."""
    y, stats = _forward_fake(x, shift, scale, eps)
    if x.numel() == 0:
        return y, stats
    B, T, H = x.shape
    x, shift, scale = inner_contiguous(x), inner_contiguous(shift), inner_contiguous(scale)
    config = launch_for("modulate_forward", H, x.device)
    parts = cdiv(T, config.rows)
    launch(
        modulate_forward_kernel, (B * parts,), x, x, shift, scale, y, stats,
        x.stride(0), x.stride(1), shift.stride(0), scale.stride(0), T, parts, B * T,
        H, eps, config.rows, config.tile, config.tail, config.stages, num_warps=config.warps, maxnreg=config.registers,
    )  # fmt: skip
    return y, stats


def _backward_fake(dy: Tensor, x: Tensor, stats: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    B, _, H = x.shape
    return x.new_empty(x.shape), x.new_empty((B, 2, H), dtype=common_dtype(shift, scale))


@register(
    "modulate_backward_triton(Tensor dy, Tensor x, Tensor stats, Tensor shift, Tensor scale) -> (Tensor dx, Tensor dmodulation)",
    _backward_fake,
)
def _backward_triton(dy: Tensor, x: Tensor, stats: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """dx [B,T,H] and (dshift, dscale) as one [B,2,H]. Copies dy (such as the expanded gradient of a sum) or x only if their
    rows are not contiguous. Two launches, or one if samples are not cut."""
    dx, dmodulation = _backward_fake(dy, x, stats, shift, scale)
    if x.numel() == 0:
        return dx, dmodulation.zero_()
    B, T, H = x.shape
    dy, x, scale = inner_contiguous(dy), inner_contiguous(x), inner_contiguous(scale)
    config = launch_for("modulate_backward", H, x.device)
    parts, rows = chunks(B, T, config.blocks, x.device)
    sums = dmodulation if parts == 1 else x.new_empty((B, parts, 2, H), dtype=torch.float32)
    launch(
        modulate_backward_kernel, (B * parts,), x, dy, x, stats, scale, dx, sums,
        dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), scale.stride(0),
        T, parts, rows, B * T, H, config.tile, config.tail, config.stages, num_warps=config.warps, maxnreg=config.registers,
    )  # fmt: skip
    if parts > 1:
        reduce_partials(sums, dmodulation)
    return dx, dmodulation


@register("modulate_forward_cpp(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor y, Tensor stats)", _forward_fake)
def _forward_cpp(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, stats = _forward_fake(x, shift, scale, eps)
    cpp.modulate_forward(inner_contiguous(x), inner_contiguous(shift), inner_contiguous(scale), eps, y, stats)
    return y, stats


@register(
    "modulate_backward_cpp(Tensor dy, Tensor x, Tensor stats, Tensor shift, Tensor scale) -> (Tensor dx, Tensor dmodulation)",
    _backward_fake,
)
def _backward_cpp(dy: Tensor, x: Tensor, stats: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    dx, dmodulation = _backward_fake(dy, x, stats, shift, scale)
    cpp.modulate_backward(inner_contiguous(dy), inner_contiguous(x), stats, inner_contiguous(scale), dx, dmodulation)
    return dx, dmodulation


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shift: Tensor, scale: Tensor, eps: float, backend: str) -> Tensor:
        y, stats = find("modulate_forward", backend)(x, shift, scale, eps)
        ctx.save_for_backward(x, stats, shift, scale)
        ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, stats, shift, scale = ctx.saved_tensors
        dx, dmodulation = find("modulate_backward", ctx.backend)(dy, x, stats, shift, scale)
        dshift, dscale = dmodulation.unbind(1)
        return dx, dshift.to(shift.dtype), dscale.to(scale.dtype), None, None


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """Return LN(x)·(1 + scale) + shift, with LN over the width and without affine (DiT, arXiv:2212.09748, section 3.2).

    x [B,T,H]; shift, scale [B,H], any strides (views of one [B,6H] tensor are taken as they are). Returns y [B,T,H] in the
    dtype of x. Maths and statistics in fp32; gradients in the dtype of each input.
    Raises ValueError for other shapes, integer tensors and tensors on two devices, and outside the reference for fp64 and a width
    over 8192.
    """
    B, _, H = check_tokens("modulate", "x", x)
    check_float("modulate", x=x, shift=shift, scale=scale)
    check_shape("modulate", "shift", shift, (B, H))
    check_shape("modulate", "scale", scale, (B, H))
    backend = choose_backend("modulate", x, shift, scale)
    if backend == "reference":
        return modulate_reference(x, shift, scale, eps)
    check_width("modulate", H)
    return _Modulate.apply(x, shift, scale, eps, backend)
