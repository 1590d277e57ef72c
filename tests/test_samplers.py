"""Solvers against a closed-form flow: for Gaussian data the velocity and the end point of every path are known exactly."""

import itertools

import pytest
import torch

from fastdit import samplers

MEAN, STD = 0.7, 0.4


def gaussian_velocity(x, t):
    """E[noise − x0 | x_t = x] for x0 ~ N(MEAN, STD²): jointly Gaussian, so conditional means are linear in x."""
    t = t.double().view(-1, 1, 1, 1)
    centred = x - (1 - t) * MEAN
    variance = (1 - t) ** 2 * STD**2 + t**2
    noise = t / variance * centred
    x0 = MEAN + (1 - t) * STD**2 / variance * centred
    return noise - x0


def error(solver, steps):
    z = torch.randn(64, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    *_, x = samplers.SOLVERS[solver](gaussian_velocity, z, steps)
    return (x - (MEAN + STD * z)).abs().max().item()  # the flow keeps quantiles: z goes to MEAN + STD·z


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver, order):
    errors = [error(solver, steps) for steps in (40, 80, 160)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.12), errors


def test_number_of_model_calls_and_yields():
    for solver, calls in (("euler", 1), ("heun", 2)):
        seen = []

        def velocity(x, t, seen=seen):
            seen.append(t[0].item())
            return x

        points = list(samplers.SOLVERS[solver](velocity, torch.ones(2, 1, 2, 2), 5))
        assert len(points) == 5
        assert len(seen) == 5 * calls
        assert seen[0] == 1


def test_timesteps_are_linspace_to_the_last_bit():
    assert torch.equal(samplers.timesteps(7), torch.linspace(1, 1 / 7, 7))


def test_guidance_is_on_all_channels_and_in_one_batch():
    calls = []

    def model(x, t, labels):
        calls.append(labels.tolist())
        return labels.float().view(-1, 1, 1, 1).expand_as(x) + t.view(-1, 1, 1, 1)

    v = samplers.guided(model, torch.tensor([1, 2]), 5, 3.0)(torch.zeros(2, 4, 2, 2), torch.tensor([0.25, 0.5]))
    assert calls == [[1, 2, 5, 5]]
    expected = torch.tensor([(1 + 3) * (1 + 0.25) - 3 * (5 + 0.25), (1 + 3) * (2 + 0.5) - 3 * (5 + 0.5)])
    torch.testing.assert_close(v, expected.view(2, 1, 1, 1).expand(2, 4, 2, 2))


def test_no_guidance_computes_no_null_half():
    v = samplers.guided(lambda x, t, labels: labels, torch.tensor([1, 2]), 5, 0.0)(torch.zeros(2, 1, 2, 2), torch.ones(2))
    assert v.tolist() == [1, 2]
