"""gated_residual: add a branch to the residual stream through the adaLN gate. B batch, T tokens, H width."""

import torch
from torch import Tensor

from .dispatch import backend_in_use, check_float, check_shape, check_tokens, compute_dtype


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


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """r = x + gate·branch (adaLN-Zero, DiT, arXiv:2212.09748, section 3.2).

    x, branch [B,T,H]; gate [B,H], any strides. Returns r [B,T,H] in the dtype of x. Maths in fp32; gradients in the dtype of
    each input. Raises ValueError for other shapes, integer tensors or tensors on two devices.
    """
    check_gated_residual("gated_residual", x, branch, gate)
    backend_in_use(x.device)
    return gated_residual_reference(x, branch, gate)
