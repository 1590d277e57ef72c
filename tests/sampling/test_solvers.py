"""Solvers against a closed-form flow: for Gaussian data the velocity and the end point of every path are known exactly."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit import config
from fastdit.config import ModelConfig
from fastdit.model import DiT
from fastdit.presets import PRESETS
from fastdit.sampling import solvers
from fastdit.sampling.sampler import Sampler, per_sample_noise

MEAN, STD = 0.7, 0.4
FIXED_STEPS = [name for name, solver in solvers.SOLVERS.items() if not solver.adaptive]
ORDERS = {"euler": (1, 80), "heun": (2, 80), "dpm++": (2, 320)}  # order, and steps at which it is visible
STOCHASTIC = ("sde", "euler_stochastic")  # each has a test of its own


def gaussian_velocity(x, t, at):
    """E[noise − x0 | x_t = x] for x0 ~ N(MEAN, STD²): jointly Gaussian, so conditional means are linear in x."""
    centred = x - (1 - at) * MEAN
    variance = (1 - at) ** 2 * STD**2 + at**2
    noise = at / variance * centred
    x0 = MEAN + (1 - at) * STD**2 / variance * centred
    return noise - x0


def error(solver, steps, **options):
    z = torch.randn(64, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    *_, x = solvers.SOLVERS[solver].solve(gaussian_velocity, z, steps, **options)
    return (x - (MEAN + STD * z)).abs().max().item()  # the flow keeps quantiles: z goes to MEAN + STD·z


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("solver", ORDERS)
def test_order_of_convergence(solver, shift):
    """dpm++ is of second order up to log n: the ratio 4 is reached slowly."""
    order, steps = ORDERS[solver]
    errors = [error(solver, n, shift=shift) for n in (steps, 2 * steps, 4 * steps)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.18 if solver == "dpm++" else 0.12), errors


def test_every_solver_has_a_test_of_its_order():
    """A solver that is registered but missing here needs a row in ORDERS, or, if it adds noise, a test of its moments."""
    assert {name for name in FIXED_STEPS if not solvers.SOLVERS[name].stochastic} == ORDERS.keys()
    assert {name for name in FIXED_STEPS if solvers.SOLVERS[name].stochastic} == set(STOCHASTIC)


def test_multistep_at_10_is_closer_than_euler_at_20():
    z = torch.randn(64, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    *_, answer = solvers.heun(gaussian_velocity, z, 1000)
    distance = lambda points: (list(points)[-1] - answer).abs().max()
    ten, twenty = distance(solvers.dpm_solver(gaussian_velocity, z, 10)), distance(solvers.euler(gaussian_velocity, z, 20))
    assert ten < twenty / 2


def test_adaptive_steps_follow_the_tolerance():
    errors = [error("dopri5", 3, rtol=tolerance, atol=tolerance) for tolerance in (1e-3, 1e-5, 1e-7)]
    assert errors[0] < 0.02 and errors[1] < errors[0] / 10 and errors[2] < errors[1] / 10, errors


@pytest.mark.parametrize("steps", [1, 10, 60])
@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_a_model_of_the_data_ends_at_its_estimate(solver, steps):
    """As flow.velocity makes it, there is no velocity at t = 0: no solver asks for it. The number of points stays, and the end is
    off by no more than one Euler step to 0: |x''|·dt²/2, where x'' = z/STD."""
    asked = []

    def velocity(x, t, at):
        asked.append(at)
        return gaussian_velocity(x, t, at)

    start = torch.randn(64, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.zeros(steps, *start.shape, dtype=torch.float64) if solvers.SOLVERS[solver].stochastic else None
    points = list(solvers.SOLVERS[solver].solve(velocity, start, steps, noise=noise, at_zero=False))
    assert len(points) == steps and min(asked) > 0
    if noise is None:
        off = lambda x: (x - (MEAN + STD * start)).abs().max()
        *_, end = solvers.SOLVERS[solver].solve(gaussian_velocity, start, steps)
        dt = 0.05 if solvers.SOLVERS[solver].adaptive else 1 / steps
        assert off(points[-1]) < off(end) + 1.2 * start.abs().max() / STD * dt**2 / 2


def moments(solver, steps):
    """Mean and variance of what a stochastic solver makes of N(0,1), exactly: each step is affine in x and its noise, so the end is
    the mean plus a sum of the start and each step's noise, times what a unit of it alone adds."""
    units = torch.eye(1 + steps, dtype=torch.float64)
    inputs = torch.cat((torch.zeros(1, 1 + steps, dtype=torch.float64), units)).view(-1, 1 + steps, 1, 1)
    start, noise = inputs[:, :1], inputs[:, 1:].transpose(0, 1).unsqueeze(2)
    *_, x = solvers.SOLVERS[solver].solve(gaussian_velocity, start, steps, noise=noise)
    mean, rest = x.flatten()[0], x.flatten()[1:] - x.flatten()[0]
    return mean.item(), rest.square().sum().item()


def test_sde_keeps_the_marginals_to_weak_order_1():
    found = [moments("sde", steps) for steps in (100, 200, 400)]
    assert all(mean == pytest.approx(MEAN, abs=1e-12) for mean, _ in found)
    for (_, coarse), (_, fine) in itertools.pairwise(found):
        assert (coarse - STD**2) / (fine - STD**2) == pytest.approx(2, rel=0.12), found


def test_euler_stochastic_converges_at_order_1_to_a_wider_spread():
    found = [moments("euler_stochastic", steps) for steps in (100, 200, 400, 800)]
    assert all(mean == pytest.approx(MEAN, abs=1e-12) for mean, _ in found)
    changes = [a - b for (_, a), (_, b) in itertools.pairwise(found)]
    assert all(a / b == pytest.approx(2, rel=0.25) for a, b in itertools.pairwise(changes)), found
    assert found[-1][1] > 1.05 * STD**2


def test_multistep_is_diffusers_dpm_solver(monkeypatch):
    """The same x after each step from the same times, which diffusers begins at 0.999."""
    from diffusers import DPMSolverMultistepScheduler

    steps = 8
    theirs = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    theirs.set_timesteps(steps)
    times = theirs.sigmas.tolist()
    x = y = torch.randn(16, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    ours, theirs_at = [], []
    original = solvers.timesteps
    try:
        solvers.timesteps = lambda *_: [solvers.Step(torch.tensor(s), torch.tensor(e), s, e) for s, e in itertools.pairwise(times)]
        ours = list(solvers.dpm_solver(gaussian_velocity, x, steps))
    finally:
        solvers.timesteps = original
    for i, t in enumerate(theirs.timesteps):
        y = theirs.step(gaussian_velocity(y, None, times[i]), t, y).prev_sample
        theirs_at.append(y)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs_at), rtol=0, atol=2e-6)


@pytest.mark.parametrize("solver", FIXED_STEPS)
def test_number_of_model_calls_and_yields(solver):
    seen = []

    def velocity(x, t, at):
        seen.append((t.item(), at))
        return x

    noise = torch.zeros(5, 2, 1, 2, 2)
    points = list(solvers.SOLVERS[solver].solve(velocity, torch.ones(2, 1, 2, 2), 5, noise=noise))
    assert len(points) == 5
    assert len(seen) == 5 * solvers.SOLVERS[solver].calls
    assert seen[0] == (1, 1)
    assert all(t == pytest.approx(at, abs=1e-7) for t, at in seen)


def test_last_noise_of_the_sde_does_not_stay():
    def end(last):
        noise = torch.zeros(4, 1, 1, 1, 1)
        noise[-1] = last
        return list(solvers.sde(gaussian_velocity, torch.ones(1, 1, 1, 1), 4, noise=noise))[-1]

    assert torch.equal(end(0.0), end(5.0))


def test_timesteps_are_linspace_to_the_last_bit():
    steps = solvers.timesteps(7)
    times = torch.linspace(1, 1 / 7, 7)
    assert torch.equal(torch.stack([s.t for s in steps]), times)
    assert torch.equal(torch.stack([s.t_next for s in steps]), times - 1 / 7)
    assert [s.dt for s in steps] == pytest.approx([1 / 7] * 7, abs=1e-15) and steps[-1].to == 0


def test_shift_spends_steps_near_noise():
    steps = solvers.timesteps(4, 3.0)
    assert [s.at for s in steps] == pytest.approx([1, 0.9, 0.75, 0.5])
    assert [s.t.item() for s in steps] == pytest.approx([s.at for s in steps])
    assert all(a.to == b.at for a, b in itertools.pairwise(steps)) and steps[-1].to == 0


class Stub:
    """v = label + t, and the labels of each call."""

    def __init__(self):
        self.calls = []

    def embed_classes(self, labels):
        return (labels,)

    def velocity(self, x, t, labels):
        self.calls.append(labels.tolist())
        return labels.float().view(-1, 1, 1, 1).expand_as(x) + t


def test_guidance_is_on_all_channels_and_in_one_batch():
    model = Stub()
    v = solvers.guided(model, torch.tensor([1, 2]), 5, 3.0)(torch.zeros(2, 4, 2, 2), torch.tensor(0.25), 0.25)
    assert model.calls == [[1, 2, 5, 5]]
    expected = torch.tensor([(1 + 3) * (1 + 0.25) - 3 * (5 + 0.25), (1 + 3) * (2 + 0.25) - 3 * (5 + 0.25)])
    torch.testing.assert_close(v, expected.view(2, 1, 1, 1).expand(2, 4, 2, 2))


def test_guidance_holds_where_dopri5_steps_past_the_end():
    """It interpolates back to t = 0: without guidance there the velocity would jump, and the step size shrink to nothing."""
    model = Stub()
    velocity = solvers.guided(model, torch.tensor([1, 2]), 5, 1.0, (0.0, 0.5))
    for at in (0.1, 0.0, -0.05):
        velocity(torch.zeros(2, 1, 2, 2), torch.tensor(at), at)
    assert model.calls == [[1, 2, 5, 5]] * 3


@pytest.mark.parametrize(("steps", "low"), [(5, 0.2), (10, 0.1), (20, 0.35)])
def test_a_step_at_the_intervals_end_is_guided(steps, low):
    assert low in [step.at for step in solvers.timesteps(steps)]


def test_no_null_half_without_guidance_or_outside_of_its_interval():
    model = Stub()
    x = torch.zeros(2, 1, 2, 2)
    solvers.guided(model, torch.tensor([1, 2]), 5, 0.0)(x, torch.tensor(1.0), 1.0)
    velocity = solvers.guided(model, torch.tensor([1, 2]), 5, 1.0, (0.25, 0.5))
    for at in (0.75, 0.5, 0.25, 0.125):
        velocity(x, torch.tensor(at), at)
    assert model.calls == [[1, 2], [1, 2], [1, 2, 5, 5], [1, 2, 5, 5], [1, 2]]


def small_model(**given):
    torch.manual_seed(0)
    given = {"preset": "test/4", **PRESETS["test/4"], "zero_init_gates": False, **given}
    return DiT(ModelConfig(**given)).eval()


@pytest.mark.parametrize("embedding", ["sinusoidal", "base"])
@torch.no_grad()
def test_shared_modulation_is_that_of_each_sample(embedding):
    model = small_model(time_embedding=embedding)
    x, labels, t = torch.randn(5, 1, 32, 32), torch.tensor([3, 10, 3, 0, 10]), torch.tensor(0.3)
    classes, rows = model.embed_classes(labels)
    assert len(classes) == 3
    expected = model(x, t.expand(5), labels)
    torch.testing.assert_close(model.velocity(x, t, classes, rows), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


class DispatchLog(TorchDispatchMode):
    """Every operation with the shapes, dtypes and devices of its tensors."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.Tensor)]
        self.lines.append((str(func), [(tuple(a.shape), a.dtype, a.device.type) for a in tensors]))
        return out


HOST_SCALARS = ("aten.scalar_tensor", "aten._local_scalar_dense", "aten.lift_fresh", "aten.full", "aten.nonzero", "aten.unique")


@pytest.mark.parametrize("embedding", ["sinusoidal", "base"])
@torch.no_grad()
def test_velocity_calls_are_alike_and_make_no_host_scalars(embedding):
    """What a CUDA graph of one call needs: steps 2 and 7 issue the same operations on the same kinds of tensors."""
    model, logs = small_model(time_embedding=embedding), []
    velocity = solvers.guided(model, torch.tensor([3, 7]), 10, 2.0)
    x = torch.randn(2, 1, 32, 32)

    def logged(x, t, at):
        assert t.dtype == torch.float32 and t.shape == ()
        with DispatchLog() as log:
            v = velocity(x, t, at)
        logs.append(log.lines)
        return v

    list(solvers.euler(logged, x, 8))
    assert logs[1] == logs[6] and len(logs[1]) > 20
    names = [name for name, _ in logs[6]]
    assert not [name for name in names if name.startswith(HOST_SCALARS)]


@pytest.mark.parametrize("solver", FIXED_STEPS)
@torch.no_grad()
def test_every_step_issues_the_same_operations(solver):
    noise, marks = torch.randn(8, 2, 1, 4, 4), []
    with DispatchLog() as log:
        for _ in solvers.SOLVERS[solver].solve(lambda x, t, at: x * t, torch.randn(2, 1, 4, 4), 8, noise=noise):
            marks.append(len(log.lines))
    assert log.lines[marks[0] : marks[1]] == log.lines[marks[5] : marks[6]] == log.lines[marks[6] : marks[7]]
    assert not [name for name, _ in log.lines[marks[0] :] if name.startswith(HOST_SCALARS)]


def test_a_registered_solver_is_known_to_the_config_and_to_the_sampler(monkeypatch):
    """Nothing else needs to be edited; two solvers of one name are refused."""
    monkeypatch.setattr(solvers, "SOLVERS", dict(solvers.SOLVERS))
    monkeypatch.setattr(config, "SOLVERS", solvers.SOLVERS)
    with pytest.raises(config.InputError, match=r"sample\.solver=still"):
        config.SampleConfig(solver="still")

    @solvers.solver("still", calls=0, stochastic=True, help="moves nothing")
    def still(velocity, x, steps, shift=1.0, noise=None):
        assert len(noise) == steps
        for _ in range(steps):
            yield x

    settings = config.SampleConfig(solver="still", steps=3)
    model = small_model()
    sampler = Sampler.of_model(model, config.Config(model=model.config), None)
    ((ids, x),) = sampler.latents([1, 2], 4, settings)
    assert ids == range(2) and torch.equal(x, per_sample_noise(4, (1, 32, 32))(torch.arange(2), 0)[0])
    with pytest.raises(ValueError, match="already"):
        solvers.solver("euler", calls=1, help="")(still)


def test_the_registry_says_what_solvers_do():
    assert [name for name, solver in solvers.SOLVERS.items() if solver.adaptive] == ["dopri5"]
    assert all(solver.help and "\n" not in solver.help for solver in solvers.SOLVERS.values())
