"""swiglu: the gated activation of the MLP on a packed projection. F hidden width."""

import torch.nn.functional as F
from torch import Tensor

from .dispatch import backend_in_use, check_float, compute_dtype


def swiglu_reference(packed: Tensor) -> Tensor:
    """`swiglu` in plain PyTorch: fp32 maths (fp64 for fp64 input), one rounding at the end."""
    value, gate = packed.to(compute_dtype(packed)).chunk(2, dim=-1)
    return (value * F.silu(gate)).to(packed.dtype)


def swiglu(packed: Tensor) -> Tensor:
    """value·silu(gate) of a packed projection (value | gate) (GLU variants, arXiv:2002.05202, equation 6).

    packed [..,2F]. Returns [..,F] in the dtype of packed; maths in fp32.
    Raises ValueError for an odd last dimension or an integer tensor.
    """
    check_float("swiglu", packed=packed)
    if packed.ndim == 0 or packed.shape[-1] % 2:
        raise ValueError(f"swiglu: packed has shape {list(packed.shape)}, but its last dimension must be value | gate, so even")
    backend_in_use(packed.device)
    return swiglu_reference(packed)
