"""Solvers of the flow from noise (t = 1) to data (t = 0), and classifier-free guidance. No I/O.

B batch size, C/h/w channels, rows and columns of a latent. A velocity is any function (x [B,C,h,w], t fp32 [], at) -> v [B,C,h,w];
t lies on the device of x and `at` is the same number on the host. What a solver issues on the device is the same at every step, so
that a CUDA graph can repeat it, and nothing is read back; only dopri5 chooses its steps by what it reads.

The settings and the help texts of commands read SOLVERS: torch is imported when it is needed, and nothing of fastdit is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Velocity = Callable[[Tensor, Tensor, float], Tensor]


class Solver(NamedTuple):
    """A solver with what commands need to know of it.

    solve: function (velocity, x [B,C,h,w] at t = 1, steps, shift=1.0, noise=None, at_zero=True) that yields x after each of the
        steps; shift as in `shifted`, noise fp32 [steps,B,C,h,w] if the solver is stochastic; at_zero: whether there is a velocity
        at t = 0, which a model that predicts the data does not have.
    calls: model calls per step; None if the solver is adaptive, chooses its own steps and yields only after the last of them.
    stochastic: whether it adds noise at each step.
    help: description in one line.
    """

    solve: Callable[..., Iterator[Tensor]]
    calls: int | None
    stochastic: bool
    help: str

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its own steps."""
        return self.calls is None


SOLVERS: dict[str, Solver] = {}  # by the names that sample.solver takes, in the order of help texts


def solver(name: str, calls: int | None, help: str, stochastic: bool = False) -> Callable[[Callable], Callable]:
    """Register the decorated function as the `solve` of a Solver. Raises ValueError if the name is taken."""

    def register(solve: Callable[..., Iterator[Tensor]]) -> Callable[..., Iterator[Tensor]]:
        if name in SOLVERS:
            raise ValueError(f"there is a solver {name!r} already: choose another name")
        SOLVERS[name] = Solver(solve, calls, stochastic, help)
        return solve

    return register


def guided(
    model, labels: Tensor, null: int, guidance: float, interval: tuple[float, float] = (0.0, 1.0), run: Callable | None = None,
    path_drop: bool = False,
) -> Velocity:  # fmt: skip
    """Return the velocity (1+w)·v(class) − w·v(null) with w = guidance (arXiv:2207.12598, equation 6).

    All channels are guided, and both halves are computed in one batch. If w = 0 or t is outside `interval` (arXiv:2404.07724), only
    v(class) is computed.

    Args:
        model: a DiT, or what has its `embed_classes` and `velocity`.
        labels: class ids, int64 [B].
        null: id of the null class.
        run: function that is called in place of model.velocity, such as that of `fast.fast_velocity`.
        path_drop: v(null) leaves out the blocks between the dense ones (path-drop guidance, arXiv:2510.21986).
    """
    import torch

    run = run or model.velocity
    conditional = model.embed_classes(labels)
    both = model.embed_classes(torch.cat((labels, torch.full_like(labels, null)))) if guidance else None
    low, high = interval

    def velocity(x: Tensor, t: Tensor, at: float) -> Tensor:
        at = min(max(at, 0.0), 1.0)  # dopri5 steps past the end, and interpolates
        if both is None or not low <= at <= high:
            return run(x, t, *conditional).float()
        deep = (len(x),) if path_drop else ()
        v_class, v_null = run(torch.cat((x, x)), t, *both, *deep).float().chunk(2)
        return (1 + guidance) * v_class - guidance * v_null

    return velocity


class Step(NamedTuple):
    """A step from time `at` to `to`, in fp64 on the host; t and t_next are the same, fp32 [] on the device."""

    t: Tensor
    t_next: Tensor
    at: float
    to: float

    @property
    def dt(self) -> float:
        """Length of the step, positive."""
        return self.at - self.to


def shifted(t, shift: float):
    """Return s·t/(1+(s−1)·t), s = shift: above 1, more of the steps are spent near noise (SD3, arXiv:2403.03206, equation 23)."""
    return shift * t / (1 + (shift - 1) * t)


def timesteps(steps: int, shift: float = 1.0, device: torch.device | None = None) -> list[Step]:
    """Return steps of equal length before the shift.

    Without it t is 1, 1−1/n, .., 1/n as torch.linspace rounds them on the CPU and t_next is t − 1/n, because the base model's
    embedding feels the last bit.
    """
    import torch

    times = torch.linspace(1, 1 / steps, steps)
    pairs = shifted(torch.stack((times, times - 1 / steps)), shift).to(device)
    at = [shifted((steps - i) / steps, shift) for i in range(steps + 1)]
    return [Step(t, t_next, at[i], at[i + 1]) for i, (t, t_next) in enumerate(pairs.unbind(1))]


@solver("euler", calls=1, help="Euler, first order")
def euler(
    velocity: Velocity, x: Tensor, steps: int, shift: float = 1.0, noise: Tensor | None = None, at_zero: bool = True
) -> Iterator[Tensor]:
    """Yield x after each Euler step, x ← x − v·dt. First order."""
    for step in timesteps(steps, shift, x.device):
        x = x - velocity(x, step.t, step.at) * step.dt
        yield x


@solver("heun", calls=2, help="Heun, second order, two model calls per step")
def heun(
    velocity: Velocity, x: Tensor, steps: int, shift: float = 1.0, noise: Tensor | None = None, at_zero: bool = True
) -> Iterator[Tensor]:
    """Yield x after each Heun step: the mean of v here and v at the end of the Euler step. Second order.

    The last step evaluates v at t = 0 (to rounding), or is Euler's if there is none.
    """
    for step in timesteps(steps, shift, x.device):
        v = velocity(x, step.t, step.at)
        v_next = velocity(x - v * step.dt, step.t_next, step.to) if at_zero or step.to > 0 else v
        x = x - (v + v_next) * (step.dt / 2)
        yield x


@solver("dpm++", calls=1, help="DPM-Solver++ 2M, second order, one model call per step")
def dpm_solver(
    velocity: Velocity, x: Tensor, steps: int, shift: float = 1.0, noise: Tensor | None = None, at_zero: bool = True
) -> Iterator[Tensor]:
    """Yield x after each step of DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2) for flows: α = 1−t, σ = t, λ = log(α/σ).

    It extrapolates the estimate x0 = x − t·v from this step and the one before, linearly in λ; the first two steps and the last,
    where λ is infinite, are of first order. Second order up to log n.
    """
    import torch

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


@solver("dopri5", calls=None, help="Dormand-Prince 5(4) with its own steps, of which the number of steps only sets the frames")
def dopri5(
    velocity: Velocity, x: Tensor, steps: int, shift: float = 1.0, noise: Tensor | None = None, at_zero: bool = True,
    rtol: float = 1e-4, atol: float = 1e-5,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield x at the times of `steps` steps, interpolated by torchdiffeq's Dormand-Prince 5(4), which chooses its own step size.

    There is one step size for the whole batch, so that an image depends on its batch to the tolerance (per element
    atol + rtol·|x|). The base model's velocity is not smooth in t, and costs it hundreds of calls. Without a velocity at t = 0 it
    integrates to t = 0.05, and one Euler step leads to the end: nearer to 0 the network's error divided by t makes its steps short.
    """
    import torch
    from torchdiffeq import odeint

    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    points = shifted(times, shift).to(x)
    end = 0.0 if at_zero else 0.05
    beyond = points[points <= end]
    within = torch.cat((points[points > end], points.new_tensor([end])))
    options = {} if at_zero else {"step_t": within[-1:]}  # it would step past the end, and interpolate
    slope = lambda t, x: velocity(x, t.float(), t.item())
    solution = odeint(slope, x, within, rtol=rtol, atol=atol, method="dopri5", options=options)
    *path, x = cast("Tensor", solution)[1:]  # a tuple only if x is one, or with events
    yield from path
    v = None if at_zero else velocity(x, within[-1].float(), end)
    yield from (x if v is None else x - v * (end - point) for point in beyond)


@solver("euler_stochastic", calls=1, stochastic=True, help="the base model's: Euler with added noise")
def euler_stochastic(
    velocity: Velocity, x: Tensor, steps: int, shift: float = 1.0, noise: Tensor | None = None, at_zero: bool = True
) -> Iterator[Tensor]:
    """Yield x after each step of the base model's solver, x ← x − v·dt + s·noise·√dt with s = t(1−t)/(1−t+0.008).

    It adds noise without the drift that would keep the marginals, so it ends beside the data's distribution however many steps it
    takes; `sde` does not. noise fp32 [steps,B,C,h,w].
    """
    assert noise is not None  # as Solver.solve says of a stochastic one
    for step, z in zip(timesteps(steps, shift, x.device), noise, strict=True):
        s = step.at * (1 - step.at) / (1 - step.at + 0.008)
        x = x - velocity(x, step.t, step.at) * step.dt + z * (s * step.dt**0.5)
        yield x


@solver("sde", calls=1, stochastic=True, help="Euler-Maruyama on the reverse SDE")
def sde(
    velocity: Velocity, x: Tensor, steps: int, shift: float = 1.0, noise: Tensor | None = None, at_zero: bool = True
) -> Iterator[Tensor]:
    """Yield x after each Euler-Maruyama step on the reverse SDE with the flow's marginals and diffusion w = t (SiT,
    arXiv:2401.08740, section 2.4): x ← x − v·dt + w/2·score·dt + √(w·dt)·noise, score = −(x + (1−t)·v)/t.

    Weak order 1. The last step is Euler's without noise, which would stay in the image. noise fp32 [steps,B,C,h,w].
    """
    assert noise is not None  # as Solver.solve says of a stochastic one
    for step, z in zip(timesteps(steps, shift, x.device), noise, strict=True):
        w = step.at if step.to > 0 else 0.0
        v = velocity(x, step.t, step.at)
        drift = v + (w / step.at / 2) * (x + (1 - step.at) * v)
        x = x - drift * step.dt + z * (w * step.dt) ** 0.5
        yield x
