"""qk_norm_rope: split packed qkv, RMS-normalise q and k a head, rotate them. B batch, T tokens, N heads, D head dim."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import backend_in_use, check_float, check_shape, check_tokens, compute_dtype


def _norm_and_rotate(x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    """x [B,T,N,D] -> [B,N,T,D], in the dtype of x."""
    dtype = compute_dtype(x)
    y = x.to(dtype)
    if weight is not None:
        y = F.rms_norm(y, (x.shape[-1],), weight.to(dtype), eps)
    if cos is not None:
        cos, sin = cos.to(dtype)[:, None], sin.to(dtype)[:, None]
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


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values from one projection: RMSNorm over each head of q and k, then rotary positions.

    qkv [B,T,3·N·D], packed as (q | k | v); q_weight, k_weight [D] or None (no norm); cos, sin fp32 [T,D/2] or None (no
    rotation). The rotation is half-split: with x1 | x2 the halves of a head, (x1·cos − x2·sin | x2·cos + x1·sin)
    (RoFormer, arXiv:2104.09864, with the pairs (j, j + D/2)). Returns q, k, v as [B,N,T,D] views of any strides, in the dtype
    of qkv; v is a view of qkv. Maths in fp32; gradients in the dtype of each input.
    Raises ValueError for other shapes, an odd head dim or one over 256, cos/sin that are not fp32 (fp64 with fp64 qkv), integer
    tensors or tensors on two devices.
    """
    op = "qk_norm_rope"
    _, T, packed = check_tokens(op, "qkv", qkv)
    if packed % (3 * num_heads):
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
            check_shape(op, name, table, (T, D // 2))
            if table.dtype not in (torch.float32, compute_dtype(qkv)):
                raise ValueError(f"{op}: {name} has dtype {table.dtype}, but rotary tables must stay in float32")
    backend_in_use(qkv.device)
    return qk_norm_rope_reference(qkv, q_weight, k_weight, cos, sin, num_heads, eps)
