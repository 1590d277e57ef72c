"""gated_residual_modulate: a residual add and the next adaLN in one op. B batch, T tokens, H width."""

from torch import Tensor

from .dispatch import backend_in_use, check_float, check_shape
from .gated_residual import check_gated_residual, gated_residual_reference
from .modulate import modulate_reference


def gated_residual_modulate_reference(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`gated_residual_modulate` in plain PyTorch; r is rounded to its dtype before the norm, so that y fits the stored r."""
    r = gated_residual_reference(x, branch, gate)
    return r, modulate_reference(r, shift, scale, eps)


def gated_residual_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """r = x + gate·branch and y = LN(r)·(1 + scale) + shift: the end of one half of a block and the start of the next.

    x, branch [B,T,H]; gate, shift, scale [B,H], any strides. Returns (r, y), both [B,T,H] in the dtype of x. Maths and
    statistics in fp32; gradients in the dtype of each input.
    Raises ValueError for other shapes, integer tensors or tensors on two devices.
    """
    op = "gated_residual_modulate"
    check_gated_residual(op, x, branch, gate)
    check_float(op, x=x, shift=shift, scale=scale)
    check_shape(op, "shift", shift, tuple(gate.shape))
    check_shape(op, "scale", scale, tuple(gate.shape))
    backend_in_use(x.device)
    return gated_residual_modulate_reference(x, branch, gate, shift, scale, eps)
