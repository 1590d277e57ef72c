"""Solvers of the flow from noise (t = 1) to data (t = 0), and classifier-free guidance. No I/O.

B batch, C/h/w the latent. A velocity is any function (x [B,C,h,w], t fp32 [], at) -> v [B,C,h,w]; t lies on the device of x and
`at` is the same number on the host. What a solver issues on the device is the same at every step (gpu_rules: CUDA graphs), and
nothing is read back; dopri5 alone chooses its steps by what it reads.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, float], Tensor]


def guided(
    model, labels: Tensor, null: int, guidance: float, interval: tuple[float, float] = (0.0, 1.0), run: Callable | None = None
) -> Velocity:
    """v = (1+w)·v(class) − w·v(null) with w = guidance (arXiv:2207.12598, equation 6), on all channels, both halves in one batch.

    model: a DiT, or what has its `embed_classes` and `velocity`; labels int64 [B]; null: the id of the null class. Where w = 0 or
    t is outside `interval` (arXiv:2404.07724), v(class) alone is computed. run: called in place of model.velocity.
    """
    run = run or model.velocity
    alone = model.embed_classes(labels)
    both = model.embed_classes(torch.cat((labels, torch.full_like(labels, null)))) if guidance else None
    low, high = interval

    def velocity(x: Tensor, t: Tensor, at: float) -> Tensor:
        at = min(max(at, 0.0), 1.0)  # dopri5 steps past the end, and interpolates
        if both is None or not low <= at <= high:
            return run(x, t, *alone).float()
        v_class, v_null = run(torch.cat((x, x)), t, *both).float().chunk(2)
        return (1 + guidance) * v_class - guidance * v_null

    return velocity


class Step(NamedTuple):
    """From time `at` to `to`, fp64 on the host; t and t_next are the same, fp32 [] on the device."""

    t: Tensor
    t_next: Tensor
    at: float
    to: float

    @property
    def dt(self) -> float:
        return self.at - self.to


def shifted(t, shift: float):
    """s·t/(1+(s−1)·t), s = shift: above 1, more of the steps are spent near noise (SD3, arXiv:2403.03206, equation 23)."""
    return shift * t / (1 + (shift - 1) * t)


def timesteps(steps: int, shift: float = 1.0, device: torch.device | None = None) -> list[Step]:
    """Steps of equal length before the shift. Without it t is 1, 1−1/n, .., 1/n as torch.linspace rounds them on the CPU and
    t_next is t − 1/n, because the base model's embedding feels the last bit."""
    times = torch.linspace(1, 1 / steps, steps)
    pairs = shifted(torch.stack((times, times - 1 / steps)), shift).to(device)
    at = [shifted((steps - i) / steps, shift) for i in range(steps + 1)]
    return [Step(*pair.unbind(), at[i], at[i + 1]) for i, pair in enumerate(pairs.unbind(1))]


def euler(velocity: Velocity, x: Tensor, steps: int, shift: float = 1.0, noise: Tensor | None = None) -> Iterator[Tensor]:
    """Yield x after each Euler step: x ← x − v·dt. First order, one model call a step."""
    for step in timesteps(steps, shift, x.device):
        x = x - velocity(x, step.t, step.at) * step.dt
        yield x


def heun(velocity: Velocity, x: Tensor, steps: int, shift: float = 1.0, noise: Tensor | None = None) -> Iterator[Tensor]:
    """Yield x after each Heun step: the trapezoid of v here and v at the Euler step. Second order, two calls a step.

    The last step evaluates v at t = 0 (to rounding).
    """
    for step in timesteps(steps, shift, x.device):
        v = velocity(x, step.t, step.at)
        v_next = velocity(x - v * step.dt, step.t_next, step.to)
        x = x - (v + v_next) * (step.dt / 2)
        yield x


def dpm_solver(velocity: Velocity, x: Tensor, steps: int, shift: float = 1.0, noise: Tensor | None = None) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2) for flows: α = 1−t, σ = t, λ = log(α/σ). One call a step.

    It extrapolates the estimate x0 = x − t·v from this step and the one before, linearly in λ; the first two steps and the last,
    where λ is infinite, are of first order. Second order up to log n.
    """
    log_snr = lambda t: math.log((1 - t) / t) if 0 < t < 1 else math.copysign(math.inf, 0.5 - t)
    before, h_before = torch.zeros_like(x), math.inf
    for step in timesteps(steps, shift, x.device):
        h = log_snr(step.to) - log_snr(step.at)
        k = h / (2 * h_before) if math.isfinite(h) and math.isfinite(h_before) else 0.0
        weight = 1 - step.to / step.at
        x0 = x - step.at * velocity(x, step.t, step.at)
        x = (step.to / step.at) * x + weight * (1 + k) * x0 - weight * k * before
        before, h_before = x0, h
        yield x


def euler_stochastic(
    velocity: Velocity, x: Tensor, steps: int, shift: float = 1.0, noise: Tensor | None = None
) -> Iterator[Tensor]:
    """The base model's: x ← x − v·dt + s·noise·√dt with s = t(1−t)/(1−t+0.008). noise fp32 [steps,B,C,h,w].

    It adds noise without the drift that would keep the marginals, so it ends beside the data's distribution however many steps
    it takes; `sde` does not.
    """
    for step, z in zip(timesteps(steps, shift, x.device), noise, strict=True):
        s = step.at * (1 - step.at) / (1 - step.at + 0.008)
        x = x - velocity(x, step.t, step.at) * step.dt + z * (s * step.dt**0.5)
        yield x


def sde(velocity: Velocity, x: Tensor, steps: int, shift: float = 1.0, noise: Tensor | None = None) -> Iterator[Tensor]:
    """Euler-Maruyama on the reverse SDE with the flow's marginals and diffusion w = t (SiT, arXiv:2401.08740, section 2.4):
    x ← x − v·dt + w/2·score·dt + √(w·dt)·noise, score = −(x + (1−t)·v)/t. noise fp32 [steps,B,C,h,w].

    Weak order 1. The last step is Euler's without noise, which would stay in the image.
    """
    for step, z in zip(timesteps(steps, shift, x.device), noise, strict=True):
        w = step.at if step.to > 0 else 0.0
        v = velocity(x, step.t, step.at)
        drift = v + (w / step.at / 2) * (x + (1 - step.at) * v)
        x = x - drift * step.dt + z * (w * step.dt) ** 0.5
        yield x


def dopri5(
    velocity: Velocity, x: Tensor, steps: int, shift: float = 1.0, noise: Tensor | None = None,
    rtol: float = 1e-4, atol: float = 1e-5,
) -> Iterator[Tensor]:  # fmt: skip
    """Dormand-Prince 5(4) with its own step size, by torchdiffeq; the x yielded are interpolated at the times of `steps` steps.

    One step size for the whole batch, so that an image depends on its batch to the tolerance (per element atol + rtol·|x|). The
    base model's velocity is not smooth in t, and costs it hundreds of calls.
    """
    from torchdiffeq import odeint

    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    points = shifted(times, shift).to(x)
    yield from odeint(lambda t, x: velocity(x, t.float(), t.item()), x, points, rtol=rtol, atol=atol, method="dopri5")[1:]


SOLVERS = {
    "euler": euler,
    "heun": heun,
    "dpm++": dpm_solver,
    "dopri5": dopri5,
    "euler_stochastic": euler_stochastic,
    "sde": sde,
}
STOCHASTIC = ("euler_stochastic", "sde")  # they take noise
