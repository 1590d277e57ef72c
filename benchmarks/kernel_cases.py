"""One realistic call of every op, by size: what codegen.py compiles and tune_kernels.py times. B batch, T tokens, H width."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdit import kernels

TOKENS = 256
WIDTHS = (384, 768, 1088, 1152)


class Case(NamedTuple):
    """`make(size, batch, dtype, device)` returns the public function and its inputs, those that are differentiated marked so."""

    sizes: tuple[int, ...]  # widths, or whatever the op is sized by
    make: Callable[[int, int, torch.dtype, torch.device], tuple[Callable, tuple]]
    forward_launches: int = 1
    backward_launches: int = 2


def random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device).requires_grad_()


def _modulation(batch: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Six [B,H] views of one [B,6H] tensor, as the model's modulation Linear gives them."""
    packed = torch.randn(batch, 6 * width, dtype=dtype, device=device)
    return tuple(t.requires_grad_() for t in packed.view(batch, 6, width).unbind(1))


def _modulate(width: int, batch: int, dtype: torch.dtype, device: torch.device):
    shift, scale = _modulation(batch, width, dtype, device)[:2]
    return kernels.modulate, (random(batch, TOKENS, width, dtype=dtype, device=device), shift, scale)


def _gated_residual(width: int, batch: int, dtype: torch.dtype, device: torch.device):
    x, branch = (random(batch, TOKENS, width, dtype=dtype, device=device) for _ in range(2))
    return kernels.gated_residual, (x, branch, _modulation(batch, width, dtype, device)[0])


def _gated_residual_modulate(width: int, batch: int, dtype: torch.dtype, device: torch.device):
    x, branch = (random(batch, TOKENS, width, dtype=dtype, device=device) for _ in range(2))
    return kernels.gated_residual_modulate, (x, branch, *_modulation(batch, width, dtype, device)[:3])


CASES = {
    "modulate": Case(WIDTHS, _modulate),
    "gated_residual": Case(WIDTHS, _gated_residual),
    "gated_residual_modulate": Case(WIDTHS, _gated_residual_modulate),
}
