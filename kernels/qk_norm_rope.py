"""qk_norm_rope: split packed qkv, RMS-normalise each head of q and k, rotate it. B batch, T tokens, N heads, D head dim.

Forward: one pass over q and k; v stays where it is. Backward: one pass that reads the three gradients and q, k, and writes dq, dk
and dv into one packed gradient, so that no slice of qkv is zero-filled and added; and a small kernel that sums the weights'
gradients. Saved for the backward: qkv, weights and tables; the norms are computed again, from q and k that are loaded anyway.

A row is one head of one token; rows are numbered m = token·N + head, so that no number of heads costs dead lanes. The two
halves of a head are loaded apart: the rotation pairs element j with j + D/2, at the same index of the other half.
"""

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import tuning
from .dispatch import check_float, check_no_grad, check_shape, check_tokens, choose_backend, compute_dtype
from .library import cdiv, cpp, find, inner_contiguous, launch, register
from .token_sums import common_dtype, reduce_partials

BYTES = (8, 16)  # per element of [B,T,N·D] in bf16: q and k, read and written; dq, dk, dv, q, k, and the three parts of dqkv
WARPS = 4  # a tile has 1024 elements of each half, 8 per thread: 128-bit accesses of bf16


def _norm_and_rotate(x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    """x [B,T,N,D] -> [B,N,T,D], in the dtype of x."""
    dtype = compute_dtype(x)
    y = x.to(dtype)
    if weight is not None:
        y = F.rms_norm(y, (x.shape[-1],), weight.to(dtype), eps)
    if cos is not None:
        assert sin is not None  # both or neither
        cos, sin = cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)
        x1, x2 = y.chunk(2, dim=-1)
        y = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    return y.to(x.dtype).transpose(1, 2)


def qk_norm_rope_reference(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_norm_rope` in plain PyTorch: fp32 maths (fp64 for fp64 input), one rounding at the end."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    q = _norm_and_rotate(q, q_weight, cos, sin, eps)
    k = _norm_and_rotate(k, k_weight, cos, sin, eps)
    return q, k, v.transpose(1, 2)


@triton.jit
def _locate_rows(first, T, N: tl.constexpr, ROWS: tl.constexpr):
    """Return sample, token within it and head of rows first .. first + ROWS − 1, int64 [ROWS,1].

    Only the first row is divided in int64; the others are 32-bit distances from it, at a third of the instructions.
    """
    token = first // N
    distance = (first - token * N).to(tl.int32) + tl.arange(0, ROWS)[:, None]
    head = (distance % N).to(tl.int64)
    t = (token % T).to(tl.int32) + distance // N  # may run into the following samples
    return token // T + t // T, (t % T).to(tl.int64), head


@triton.jit
def _table_rows(b, t, T, PER_SAMPLE: tl.constexpr):
    """Return the rows of the rotary tables, which all samples share or which are those of [B,T,D/2]."""
    return b * T + t if PER_SAMPLE else t


@triton.jit
def _load_table(table_ptr, t, columns, mask, HALF: tl.constexpr):
    return tl.load(table_ptr + t * HALF + columns, mask=mask, other=0.0)


@triton.jit
def _forward_rows(
    x_ptr, y_ptr, weight_ptr, cos_ptr, sin_ptr, t, columns, mask,
    D: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Norm and rotation of a tile of heads: x_ptr, y_ptr point at the first element of each head, [ROWS,1]."""
    HALF: tl.constexpr = D // 2
    x1 = tl.load(x_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + HALF + columns, mask=mask, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1, keep_dims=True) / D + EPS)
        x1 *= rstd * tl.load(weight_ptr + columns, mask=columns < HALF, other=0.0).to(tl.float32)
        x2 *= rstd * tl.load(weight_ptr + HALF + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    if cos_ptr is not None:
        cos = _load_table(cos_ptr, t, columns, mask, HALF)
        sin = _load_table(sin_ptr, t, columns, mask, HALF)
        x1, x2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    tl.store(y_ptr + columns, x1.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + HALF + columns, x2.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "T"])
def qk_norm_rope_forward_kernel(
    qkv_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, qkv_stride_b, qkv_stride_t, rows, T,
    N: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, PER_SAMPLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS heads of q (grid axis 1 = 0) or of k (1), which are stored token-major."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (columns < D // 2)
    b, t, head = _locate_rows(first, T, N, ROWS)
    x_ptr = qkv_ptr + b * qkv_stride_b + t * qkv_stride_t + head * D
    angle = _table_rows(b, t, T, PER_SAMPLE)
    if tl.program_id(1) == 0:
        _forward_rows(x_ptr, q_ptr + row * D, q_weight_ptr, cos_ptr, sin_ptr, angle, columns, mask, D, EPS)
    else:
        _forward_rows(x_ptr + N * D, k_ptr + row * D, k_weight_ptr, cos_ptr, sin_ptr, angle, columns, mask, D, EPS)


@triton.jit
def _backward_rows(
    dy_ptr, dy_stride_d, x_ptr, dx_ptr, weight_ptr, cos_ptr, sin_ptr, t, columns, mask, sum1, sum2,
    D: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """dx of a tile of heads; returns sum1, sum2 [ROWS,COLUMNS] with the tile's terms of the weight's gradient added.

    The rotation back is the rotation by the opposite angle. With xh = x·rstd and g the gradient of xh·w:
    dw = sum g·xh and dx = rstd·(g·w − xh·mean(g·w·xh)).
    """
    HALF: tl.constexpr = D // 2
    g1 = tl.load(dy_ptr + columns * dy_stride_d, mask=mask, other=0.0).to(tl.float32)
    g2 = tl.load(dy_ptr + (HALF + columns) * dy_stride_d, mask=mask, other=0.0).to(tl.float32)
    if cos_ptr is not None:
        cos = _load_table(cos_ptr, t, columns, mask, HALF)
        sin = _load_table(sin_ptr, t, columns, mask, HALF)
        g1, g2 = g1 * cos + g2 * sin, g2 * cos - g1 * sin
    if weight_ptr is not None:
        x1 = tl.load(x_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + HALF + columns, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1, keep_dims=True) / D + EPS)
        x1 *= rstd
        x2 *= rstd
        sum1 += g1 * x1
        sum2 += g2 * x2
        g1 *= tl.load(weight_ptr + columns, mask=columns < HALF, other=0.0).to(tl.float32)
        g2 *= tl.load(weight_ptr + HALF + columns, mask=columns < HALF, other=0.0).to(tl.float32)
        mean = tl.sum(g1 * x1 + g2 * x2, axis=1, keep_dims=True) / D
        g1 = rstd * (g1 - x1 * mean)
        g2 = rstd * (g2 - x2 * mean)
    tl.store(dx_ptr + columns, g1.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + HALF + columns, g2.to(dx_ptr.dtype.element_ty), mask=mask)
    return sum1, sum2


@triton.jit(do_not_specialize=["rows", "T", "iterations"])
def qk_norm_rope_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dqkv_ptr, sums_ptr,
    dq_stride_b, dq_stride_n, dq_stride_t, dq_stride_d, dk_stride_b, dk_stride_n, dk_stride_t, dk_stride_d,
    dv_stride_b, dv_stride_n, dv_stride_t, dv_stride_d, qkv_stride_b, qkv_stride_t, rows, T, iterations,
    N: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, PER_SAMPLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`iterations` tiles of ROWS heads of q, k or v (grid axis 1 = 0, 1, 2), into their third of the packed gradient.

    The sums of the weights' gradients stay elementwise in registers to the end: one reduction per program, in a fixed order.
    """
    HALF: tl.constexpr = D // 2
    part = tl.program_id(1)
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)[None, :]
    sum1 = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum2 = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(iterations):
        first = (chunk * iterations + i) * ROWS
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & (columns < HALF)
        b, t, head = _locate_rows(first, T, N, ROWS)
        x_ptr = qkv_ptr + b * qkv_stride_b + t * qkv_stride_t + head * D
        dx_ptr = dqkv_ptr + (b * T + t) * (3 * N * D) + head * D
        angle = _table_rows(b, t, T, PER_SAMPLE)
        if part == 0:
            dy_ptr = dq_ptr + b * dq_stride_b + head * dq_stride_n + t * dq_stride_t
            sum1, sum2 = _backward_rows(
                dy_ptr, dq_stride_d, x_ptr, dx_ptr, q_weight_ptr, cos_ptr, sin_ptr, angle, columns, mask, sum1, sum2, D, EPS
            )
        elif part == 1:
            dy_ptr = dk_ptr + b * dk_stride_b + head * dk_stride_n + t * dk_stride_t
            sum1, sum2 = _backward_rows(
                dy_ptr,
                dk_stride_d,
                x_ptr + N * D,
                dx_ptr + N * D,
                k_weight_ptr,
                cos_ptr,
                sin_ptr,
                angle,
                columns,
                mask,
                sum1,
                sum2,
                D,
                EPS,
            )
        else:
            dy_ptr = dv_ptr + b * dv_stride_b + head * dv_stride_n + t * dv_stride_t
            v1 = tl.load(dy_ptr + columns * dv_stride_d, mask=mask)
            v2 = tl.load(dy_ptr + (HALF + columns) * dv_stride_d, mask=mask)
            tl.store(dx_ptr + 2 * N * D + columns, v1.to(dqkv_ptr.dtype.element_ty), mask=mask)
            tl.store(dx_ptr + 2 * N * D + HALF + columns, v2.to(dqkv_ptr.dtype.element_ty), mask=mask)
    if sums_ptr is not None and part < 2:
        target = sums_ptr + (chunk * 2 + part) * D + tl.arange(0, COLUMNS)
        inside = tl.arange(0, COLUMNS) < HALF
        tl.store(target, tl.sum(sum1, axis=0), mask=inside)
        tl.store(target + HALF, tl.sum(sum2, axis=0), mask=inside)


@functools.cache
def _tile(D: int) -> dict[str, int]:
    """Return the tile: 1024 elements of each half on 4 warps. D = 64 takes 32 heads, 72 takes 16 with 28 of 64 lanes masked."""
    columns = triton.next_power_of_2(D // 2)
    return {"ROWS": 1024 // columns, "COLUMNS": columns, "num_warps": WARPS}


def _chunks(tiles: int, D: int, arch: int) -> tuple[int, int]:
    """Return (programs, tiles per program) for each of q, k and v in a backward.

    At least 4 tiles per program, so that the partial sums are few; and no more programs than run at once, because a small second
    wave would double the time: their registers (machine_code.csv) allow 6 per multiprocessor, 5 on sm_100, and 4 for
    head dims with masked lanes.
    """
    blocks = 4 if D & (D - 1) else 5 if arch == 100 else 6
    programs = min(cdiv(tiles, 4), tuning.MULTIPROCESSORS[arch] * blocks // 3)
    iterations = cdiv(tiles, programs)
    return cdiv(tiles, iterations), iterations


def _table(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()  # made contiguous: no copy of those of the model


def _per_sample(cos: Tensor | None) -> bool:
    """Return whether each sample has rotary tables of its own, [B,T,D/2]."""
    return cos is not None and cos.ndim == 3


def _cpp_tables(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None
) -> list[Tensor | None]:
    """Return the weights and tables as the C++ kernels read them: tables that all samples share as [B,T,D/2] with a stride of 0."""
    rotary = (None if t is None else t.expand(len(qkv), -1, -1) for t in map(_table, (cos, sin)))
    return [_table(q_weight), _table(k_weight), *rotary]


def _forward_fake(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    B, T, packed = qkv.shape
    shape = B, T, num_heads, packed // (3 * num_heads)
    return qkv.new_empty(shape), qkv.new_empty(shape)


def _backward_fake(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """dqkv like qkv, and the gradients of both weights as one [2,D] (empty when there are none)."""
    weights = [w for w in (q_weight, k_weight) if w is not None]
    if not weights:
        return qkv.new_empty(qkv.shape), qkv.new_empty(0)
    return qkv.new_empty(qkv.shape), qkv.new_empty((2, *weights[0].shape), dtype=common_dtype(*weights))


@register(
    "qk_norm_rope_forward_triton(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, int num_heads, "
    "float eps) -> (Tensor, Tensor)",
    _forward_fake,
)
def _forward_triton(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    q, k = _forward_fake(qkv, q_weight, k_weight, cos, sin, num_heads, eps)
    _, T, N, D = q.shape
    rows = q.numel() // D
    if rows:
        tile, qkv = _tile(D), inner_contiguous(qkv)
        grid = cdiv(rows, tile["ROWS"]), 2
        tensors = qkv, q, k, _table(q_weight), _table(k_weight), _table(cos), _table(sin)
        launch(qk_norm_rope_forward_kernel, grid, qkv, *tensors, *qkv.stride()[:2], rows, T, N, D, eps, _per_sample(cos), **tile)
    return q, k


@register(
    "qk_norm_rope_backward_triton(Tensor dq, Tensor dk, Tensor dv, Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, "
    "Tensor? sin, int num_heads, float eps) -> (Tensor, Tensor)",
    _backward_fake,
)
def _backward_triton(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    dqkv, dweights = _backward_fake(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, num_heads, eps)
    _, N, T, D = dq.shape
    rows = dq.numel() // D
    if not rows:
        return dqkv, dweights.zero_()
    tile, qkv = _tile(D), inner_contiguous(qkv)
    programs, iterations = _chunks(cdiv(rows, tile["ROWS"]), D, tuning.architecture(qkv.device))
    sums = qkv.new_empty((1, programs, 2, D), dtype=torch.float32) if dweights.numel() else None
    tensors = dq, dk, dv, qkv, _table(q_weight), _table(k_weight), _table(cos), _table(sin), dqkv, sums
    strides = *dq.stride(), *dk.stride(), *dv.stride(), *qkv.stride()[:2]
    sizes = rows, T, iterations, N, D, eps, _per_sample(cos)
    launch(qk_norm_rope_backward_kernel, (programs, 3), qkv, *tensors, *strides, *sizes, **tile)
    if sums is not None:
        reduce_partials(sums, dweights)
    return dqkv, dweights


def _forward_cpp_fake(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As _forward_fake, but in head-major memory, which batched matmuls on a CPU take without a copy."""
    B, T, packed = qkv.shape
    shape = B, num_heads, T, packed // (3 * num_heads)
    return qkv.new_empty(shape).transpose(1, 2), qkv.new_empty(shape).transpose(1, 2)


@register(
    "qk_norm_rope_forward_cpp(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, int num_heads, "
    "float eps) -> (Tensor, Tensor)",
    _forward_cpp_fake,
)
def _forward_cpp(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    q, k = _forward_cpp_fake(qkv, q_weight, k_weight, cos, sin, num_heads, eps)
    if q.numel():
        cpp.qk_norm_rope_forward(inner_contiguous(qkv), *_cpp_tables(qkv, q_weight, k_weight, cos, sin), eps, q, k)
    return q, k


@register(
    "qk_norm_rope_backward_cpp(Tensor dq, Tensor dk, Tensor dv, Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, "
    "Tensor? sin, int num_heads, float eps) -> (Tensor, Tensor)",
    _backward_fake,
)
def _backward_cpp(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    dqkv, dweights = _backward_fake(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, num_heads, eps)
    if not dq.numel():
        return dqkv, dweights.zero_()
    grads, tables = [inner_contiguous(t) for t in (dq, dk, dv)], _cpp_tables(qkv, q_weight, k_weight, cos, sin)
    cpp.qk_norm_rope_backward(*grads, inner_contiguous(qkv), *tables, eps, dqkv, dweights)
    return dqkv, dweights


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        num_heads: int,
        eps: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.backend = backend
        ctx.num_heads = num_heads
        ctx.eps = eps
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
        q, k = find("qk_norm_rope_forward", backend)(qkv, q_weight, k_weight, cos, sin, num_heads, eps)
        v = qkv.unflatten(-1, (3, num_heads, -1)).select(2, 2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        op = find("qk_norm_rope_backward", ctx.backend)
        saved = ctx.saved_tensors  # read once: under recomputation a second read fails
        dqkv, dweights = op(dq, dk, dv, *saved, ctx.num_heads, ctx.eps)
        weights = saved[1:3]
        dq_weight, dk_weight = (None if w is None else dweights[i].to(w.dtype) for i, w in enumerate(weights))
        return dqkv, dq_weight, dk_weight, None, None, None, None, None


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values from one projection: RMSNorm over each head of q and k, then rotary positions.

    qkv [B,T,3·N·D], packed as (q | k | v); q_weight, k_weight [D] or None (no norm); cos, sin fp32 [T,D/2], [B,T,D/2] if the
    positions differ between samples, or None (no rotation). The rotation is half-split: with x1 | x2 the halves of a head,
    (x1·cos − x2·sin | x2·cos + x1·sin) (RoFormer, arXiv:2104.09864, with the pairs (j, j + D/2)). RMSNorm:
    x·rsqrt(mean(x²) + eps)·weight (arXiv:1910.07467, equation 4). Returns q, k, v as [B,N,T,D] in the dtype of qkv: q and k are
    views of token-major [B,T,N,D] memory (C++: of head-major [B,N,T,D], which CPU matmuls take without a copy), v is a view of
    qkv. Maths in fp32; gradients in the dtype of each input, those of q, k and v of any strides.
    Raises ValueError for other shapes, an odd head dim or one over 256, cos/sin that are not fp32 (fp64 with fp64 qkv) or that
    require grad, integer tensors, tensors on two devices, or fp64 outside the reference.
    """
    op = "qk_norm_rope"
    B, T, packed = check_tokens(op, "qkv", qkv)
    if num_heads < 1 or packed % (3 * num_heads):
        raise ValueError(f"{op}: qkv has width {packed}, which is not 3 x {num_heads} heads x a head dim")
    D = packed // (3 * num_heads)
    if D % 2 or D > 256:
        raise ValueError(f"{op}: head dim is {D}, but it must be even and at most 256")
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: one of cos and sin is None: pass both tables or neither")
    check_float(op, qkv=qkv, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_shape(op, name, weight, (D,))
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None:
            check_shape(op, name, table, (B, T, D // 2) if _per_sample(cos) else (T, D // 2))
            if table.dtype not in (torch.float32, compute_dtype(qkv)):
                raise ValueError(f"{op}: {name} has dtype {table.dtype}, but rotary tables must stay in float32")
    check_no_grad(op, cos=cos, sin=sin)
    backend = choose_backend(op, qkv, q_weight, k_weight, cos, sin)
    if backend == "reference":
        return qk_norm_rope_reference(qkv, q_weight, k_weight, cos, sin, num_heads, eps)
    return _QKNormRope.apply(qkv, q_weight, k_weight, cos, sin, num_heads, eps, backend)
