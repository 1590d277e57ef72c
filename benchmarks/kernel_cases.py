"""One realistic call of every op per size, for machine_code.py, tune_kernels.py and the suites. B batch, T tokens, H width."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastdit import kernels

TOKENS = 256
WIDTHS = (384, 768, 1088, 1152)
HIDDEN = (1024, 2048, 2688, 3072, 4352)


class Case(NamedTuple):
    """An op's sizes (widths, or the latent's side), its call, and how many kernels each direction launches.

    make(size, batch, dtype, device): returns the public function and its inputs; those to differentiate require grad.
    """

    sizes: tuple[int, ...]
    make: Callable[[int, int, torch.dtype, torch.device], tuple[Callable, tuple]]
    forward_launches: int = 1
    backward_launches: int = 2


def random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return normal numbers on a GPU, whose clocks depend on values; uninitialised memory on a CPU."""
    make = torch.randn if device.type == "cuda" else torch.empty
    return make(*shape, dtype=dtype, device=device).requires_grad_()


def _modulation(batch: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Return six [B,H] views of one [B,6H] tensor, as the model's modulation Linear does."""
    packed = random(batch, 6 * width, dtype=dtype, device=device).detach()
    return tuple(t.requires_grad_() for t in packed.view(batch, 6, width).unbind(1))


def _modulate(width: int, batch: int, dtype: torch.dtype, device: torch.device):
    shift, scale = _modulation(batch, width, dtype, device)[:2]
    return kernels.modulate, (random(batch, TOKENS, width, dtype=dtype, device=device), shift, scale)


def _gated_residual(width: int, batch: int, dtype: torch.dtype, device: torch.device):
    x, branch = (random(batch, TOKENS, width, dtype=dtype, device=device) for _ in range(2))
    return kernels.gated_residual, (x, branch, _modulation(batch, width, dtype, device)[0])


def _gated_residual_modulate(width: int, batch: int, dtype: torch.dtype, device: torch.device, bias: bool = False):
    x, branch = (random(batch, TOKENS, width, dtype=dtype, device=device) for _ in range(2))
    more = (1e-5, random(width, dtype=dtype, device=device)) if bias else ()
    return kernels.gated_residual_modulate, (x, branch, *_modulation(batch, width, dtype, device)[:3], *more)


def _swiglu(hidden: int, batch: int, dtype: torch.dtype, device: torch.device, bias: bool = False):
    more = (random(2 * hidden, dtype=dtype, device=device),) if bias else ()
    return kernels.swiglu, (random(batch, TOKENS, 2 * hidden, dtype=dtype, device=device), *more)


def _swiglu_linear(hidden: int, batch: int, dtype: torch.dtype, device: torch.device):
    """Recomputed, with a narrow matmul: only its backward differs from swiglu's."""
    packed, bias = _swiglu(hidden, batch, dtype, device, bias=True)[1]
    return kernels.swiglu_linear, (packed, random(8, hidden, dtype=dtype, device=device), bias, True)


def _qk_norm_rope(width: int, batch: int, dtype: torch.dtype, device: torch.device, head_dim: int = 64):
    heads, angles = width // head_dim, torch.rand(TOKENS, head_dim // 2, device=device)
    weights = (random(head_dim, dtype=dtype, device=device) for _ in range(2))
    qkv = random(batch, TOKENS, 3 * width, dtype=dtype, device=device)
    return kernels.qk_norm_rope, (qkv, *weights, angles.cos(), angles.sin(), heads, 1e-6)


def _latents(side: int, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(random(batch, 4, side, side, dtype=dtype, device=device).detach() for _ in range(3))


def _flow_interpolate(side: int, batch: int, dtype: torch.dtype, device: torch.device):
    x0, noise, _ = _latents(side, batch, dtype, device)
    return kernels.flow_interpolate, (x0.requires_grad_(), noise, torch.rand(batch, device=device))


def _flow_matching_loss(side: int, batch: int, dtype: torch.dtype, device: torch.device):
    v, x0, noise = _latents(side, batch, dtype, device)
    return kernels.flow_matching_loss, (v.requires_grad_(), x0, noise, torch.rand(batch, device=device))


def _counter_normal(side: int, batch: int, dtype: torch.dtype, device: torch.device):
    return kernels.counter_normal, (2**40 + 1, 3, torch.arange(batch, device=device), (4, side, side))


def _counter_uniform(side: int, batch: int, dtype: torch.dtype, device: torch.device):
    return kernels.counter_uniform, (2**40 + 1, 3, torch.arange(batch, device=device), ())  # one timestep per sample


CASES = {
    "modulate": Case(WIDTHS, _modulate),
    "gated_residual": Case(WIDTHS, _gated_residual),
    "gated_residual_modulate": Case(WIDTHS, _gated_residual_modulate),
    "gated_residual_modulate_bias": Case(WIDTHS, partial(_gated_residual_modulate, bias=True), backward_launches=3),
    "swiglu": Case(HIDDEN, _swiglu, backward_launches=1),
    "swiglu_bias": Case(HIDDEN, partial(_swiglu, bias=True)),
    "swiglu_linear": Case(HIDDEN, _swiglu_linear),
    "qk_norm_rope": Case(WIDTHS, _qk_norm_rope),
    "qk_norm_rope_72": Case((1152,), partial(_qk_norm_rope, head_dim=72)),  # the head dim of the DiT paper's XL/2
    "flow_interpolate": Case((32, 64), _flow_interpolate, backward_launches=1),
    "flow_matching_loss": Case((32, 64), _flow_matching_loss, backward_launches=1),
    "counter_normal": Case((32, 64), _counter_normal, backward_launches=0),
    "counter_uniform": Case((32,), _counter_uniform, backward_launches=0),
}
