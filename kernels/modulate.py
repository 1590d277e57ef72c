"""modulate: LayerNorm without affine, then the adaLN scale and shift of the sample. B batch, T tokens, H width."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import backend_in_use, check_float, check_shape, check_tokens, compute_dtype


def modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """`modulate` in plain PyTorch: fp32 maths (fp64 for fp64 input), one rounding at the end."""
    dtype = compute_dtype(x)
    normed = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    return torch.addcmul(shift.to(dtype)[:, None], normed, 1 + scale.to(dtype)[:, None]).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """y = LN(x)·(1 + scale) + shift, with LN over the width and without affine (DiT, arXiv:2212.09748, section 3.2).

    x [B,T,H]; shift, scale [B,H], any strides (views of one [B,6H] tensor are taken as they are). Returns y [B,T,H] in the
    dtype of x. Maths and statistics in fp32; gradients in the dtype of each input.
    Raises ValueError for other shapes, integer tensors or tensors on two devices.
    """
    B, _, H = check_tokens("modulate", "x", x)
    check_float("modulate", x=x, shift=shift, scale=scale)
    check_shape("modulate", "shift", shift, (B, H))
    check_shape("modulate", "scale", scale, (B, H))
    backend_in_use(x.device)
    return modulate_reference(x, shift, scale, eps)
