"""Solvers of the flow ODE dx/dt = v(x, t) from noise (t = 1) to data (t = 0), and classifier-free guidance. No I/O.

B batch, C/h/w the latent. A velocity is any function (x [B,C,h,w], t fp32 [B]) -> v [B,C,h,w].
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

Velocity = Callable[[Tensor, Tensor], Tensor]


def guided(model: nn.Module, labels: Tensor, null: int, guidance: float) -> Velocity:
    """v = (1+w)·v(class) − w·v(null) with w = guidance (arXiv:2207.12598, equation 6), both halves in one batch.

    labels int64 [B]; null: the id of the null class. With w = 0 the null half is not computed.
    """
    if guidance == 0:
        return lambda x, t: model(x, t, labels)
    both = torch.cat((labels, torch.full_like(labels, null)))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        v_class, v_null = model(torch.cat((x, x)), torch.cat((t, t)), both).float().chunk(2)
        return (1 + guidance) * v_class - guidance * v_null

    return velocity


def timesteps(steps: int, device: torch.device | None = None) -> Tensor:
    """fp32 [steps]: 1, 1−1/n, .., 1/n, as torch.linspace rounds them on the CPU (the base model's embedding feels the last bit)."""
    return torch.linspace(1, 1 / steps, steps).to(device)


def euler(velocity: Velocity, x: Tensor, steps: int) -> Iterator[Tensor]:
    """Yield x after each of `steps` Euler steps of 1/steps: x ← x − v·dt. First order, one model call a step."""
    for t in timesteps(steps, x.device):
        x = x - velocity(x, t.expand(len(x))) / steps
        yield x


def heun(velocity: Velocity, x: Tensor, steps: int) -> Iterator[Tensor]:
    """Yield x after each of `steps` Heun steps: the trapezoid of v here and v at the Euler step. Second order, two calls a step.

    The last step evaluates v at t = 0 (to rounding).
    """
    for t in timesteps(steps, x.device):
        t = t.expand(len(x))
        v = velocity(x, t)
        v_next = velocity(x - v / steps, t - 1 / steps)
        x = x - (v + v_next) / (2 * steps)
        yield x


SOLVERS = {"euler": euler, "heun": heun}
