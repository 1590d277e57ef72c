"""modulate: LayerNorm without affine, then the adaLN scale and shift of the sample. B batch, T tokens, H width, S parts.

With x̂ = (x − mean)·rstd and g = dy·(1 + scale), the backward is dx = rstd·(g − mean(g) − x̂·mean(g·x̂)),
dscale = Σ_t dy·x̂, dshift = Σ_t dy. Bytes per element in bf16: forward 4 (x, y), backward 6 (dy, x, dx); saved: x and 8 bytes
a row of fp32 statistics. x̂ is recomputed from x and never from y, which cannot be inverted where scale = −1.
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


def modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """`modulate` in plain PyTorch: fp32 maths (fp64 for fp64 input), one rounding at the end."""
    dtype = compute_dtype(x)
    normed = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    return torch.addcmul(shift.to(dtype)[:, None], normed, 1 + scale.to(dtype)[:, None]).to(x.dtype)


@triton.jit(do_not_specialize=["T", "parts", "count"])
def _modulate_forward_kernel(
    x, shift, scale, y, stats, x_batch, x_token, shift_batch, scale_batch, T, parts, count,
    H: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS tokens of one sample, so that shift and scale are read once for all of them."""
    pid = tl.program_id(0).to(tl.int64)
    b, start = pid // parts, pid % parts * ROWS
    c = tl.arange(0, TILE)
    shift_row, scale_row = shift + b * shift_batch, scale + b * scale_batch
    c_shift, c_scale = load_columns(shift_row, c, H), 1.0 + load_columns(scale_row, c, H)
    if TAIL > 0:
        d = TILE + tl.arange(0, TAIL)
        d_shift, d_scale = load_columns(shift_row, d, H), 1.0 + load_columns(scale_row, d, H)
    for t in tl.range(start, tl.minimum(start + ROWS, T), num_stages=STAGES):
        x_row, row = x + (b * x_batch + t * x_token), b * T + t
        c_x = load_columns(x_row, c, H)
        total = tl.sum(c_x, axis=0)
        if TAIL > 0:
            d_x = load_columns(x_row, d, H)
            total += tl.sum(d_x, axis=0)
        mean = total / H
        # Two steps, and zero again in the dead lanes: E[x²] − mean² would cancel, and 0 − mean would be counted.
        c_x = tl.where(c < H, c_x - mean, 0.0)
        total = tl.sum(c_x * c_x, axis=0)
        if TAIL > 0:
            d_x = tl.where(d < H, d_x - mean, 0.0)
            total += tl.sum(d_x * d_x, axis=0)
        rstd = tl.rsqrt(total / H + EPS)
        tl.store(y + row * H + c, c_x * rstd * c_scale + c_shift, mask=c < H)
        if TAIL > 0:
            tl.store(y + row * H + d, d_x * rstd * d_scale + d_shift, mask=d < H)
        tl.store(stats + row, mean)
        tl.store(stats + (count + row), rstd)


@triton.jit(do_not_specialize=["T", "parts", "rows", "count"])
def _modulate_backward_kernel(
    dy, x, stats, scale, dx, sums, dy_batch, dy_token, x_batch, x_token, scale_batch, T, parts, rows, count,
    H: tl.constexpr, TILE: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program takes `rows` tokens of one sample and stores one row of sums [B,parts,2,H]: dshift, dscale."""
    pid = tl.program_id(0).to(tl.int64)
    b, start = pid // parts, pid % parts * rows
    c = tl.arange(0, TILE)
    c_scale = 1.0 + load_columns(scale + b * scale_batch, c, H)
    c_dshift, c_dscale = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    if TAIL > 0:
        d = TILE + tl.arange(0, TAIL)
        d_scale = 1.0 + load_columns(scale + b * scale_batch, d, H)
        d_dshift, d_dscale = tl.zeros((TAIL,), tl.float32), tl.zeros((TAIL,), tl.float32)
    for t in tl.range(start, tl.minimum(start + rows, T), num_stages=STAGES):
        x_row, dy_row, row = x + (b * x_batch + t * x_token), dy + (b * dy_batch + t * dy_token), b * T + t
        mean, rstd = tl.load(stats + row), tl.load(stats + (count + row))
        # dy is 0 in the dead lanes, and with it every product below: x̂ needs no mask there.
        c_dy, c_xhat = load_columns(dy_row, c, H), (load_columns(x_row, c, H) - mean) * rstd
        c_g = c_dy * c_scale
        sum_g, sum_gx = tl.sum(c_g, axis=0), tl.sum(c_g * c_xhat, axis=0)
        c_dshift += c_dy
        c_dscale += c_dy * c_xhat
        if TAIL > 0:
            d_dy, d_xhat = load_columns(dy_row, d, H), (load_columns(x_row, d, H) - mean) * rstd
            d_g = d_dy * d_scale
            sum_g += tl.sum(d_g, axis=0)
            sum_gx += tl.sum(d_g * d_xhat, axis=0)
            d_dshift += d_dy
            d_dscale += d_dy * d_xhat
        tl.store(dx + row * H + c, rstd * (c_g - sum_g / H - c_xhat * (sum_gx / H)), mask=c < H)
        if TAIL > 0:
            tl.store(dx + row * H + d, rstd * (d_g - sum_g / H - d_xhat * (sum_gx / H)), mask=d < H)
    out = sums + pid * (2 * H)
    tl.store(out + c, c_dshift, mask=c < H)
    tl.store(out + H + c, c_dscale, mask=c < H)
    if TAIL > 0:
        tl.store(out + d, d_dshift, mask=d < H)
        tl.store(out + H + d, d_dscale, mask=d < H)


def _forward_fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((2, *x.shape[:2]), dtype=torch.float32)


@register("modulate_forward_triton(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor y, Tensor stats)", _forward_fake)
def _forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y [B,T,H] and stats fp32 [2,B,T] (mean, 1/σ). Copies x only if its rows are not contiguous."""
    y, stats = _forward_fake(x, shift, scale, eps)
    if x.numel() == 0:
        return y, stats
    B, T, H = x.shape
    x, shift, scale = inner_contiguous(x), inner_contiguous(shift), inner_contiguous(scale)
    how = launch_for("modulate_forward", H, x.device)
    parts = cdiv(T, how.rows)
    launch(
        _modulate_forward_kernel, (B * parts,), x, x, shift, scale, y, stats,
        x.stride(0), x.stride(1), shift.stride(0), scale.stride(0), T, parts, B * T,
        H, eps, how.rows, how.tile, how.tail, how.stages, num_warps=how.warps, maxnreg=how.registers,
    )  # fmt: skip
    return y, stats


def _backward_fake(dy: Tensor, x: Tensor, stats: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    B, _, H = x.shape
    return x.new_empty(x.shape), x.new_empty((B, 2, H), dtype=common_dtype(shift, scale))


@register(
    "modulate_backward_triton(Tensor dy, Tensor x, Tensor stats, Tensor shift, Tensor scale) -> (Tensor dx, Tensor dmodulation)",
    _backward_fake,
)
def _backward(dy: Tensor, x: Tensor, stats: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """dx [B,T,H] and (dshift, dscale) as one [B,2,H]. Copies dy (such as the expanded gradient of a sum) or x only if their
    rows are not contiguous. Two launches, or one where a sample is not cut."""
    dx, dmodulation = _backward_fake(dy, x, stats, shift, scale)
    if x.numel() == 0:
        return dx, dmodulation.zero_()
    B, T, H = x.shape
    dy, x, scale = inner_contiguous(dy), inner_contiguous(x), inner_contiguous(scale)
    how = launch_for("modulate_backward", H, x.device)
    parts, rows = chunks(B, T, how.blocks, x.device)
    sums = dmodulation if parts == 1 else x.new_empty((B, parts, 2, H), dtype=torch.float32)
    launch(
        _modulate_backward_kernel, (B * parts,), x, dy, x, stats, scale, dx, sums,
        dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), scale.stride(0),
        T, parts, rows, B * T, H, how.tile, how.tail, how.stages, num_warps=how.warps, maxnreg=how.registers,
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
    """y = LN(x)·(1 + scale) + shift, with LN over the width and without affine (DiT, arXiv:2212.09748, section 3.2).

    x [B,T,H]; shift, scale [B,H], any strides (views of one [B,6H] tensor are taken as they are). Returns y [B,T,H] in the
    dtype of x. Maths and statistics in fp32; gradients in the dtype of each input.
    Raises ValueError for other shapes, integer tensors, tensors on two devices, and where the kernels run for fp64 or a width
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
