"""Flow: every random number is named by seed, step and place in the global batch; formulas against fp64."""

import torch

from fastdit import flow, kernels
from fastdit.config import FlowConfig


def ids(step, first, count):
    return flow.sample_ids(step, first, count, torch.device("cpu"))


def test_ids_do_not_meet():
    a = torch.cat([ids(step, first, 4) for step in (0, 1, 70_000) for first in (0, 4, 1 << 20)])
    assert len(a.unique()) == len(a)


def test_timesteps_are_logit_normal():
    t = flow.sample_timesteps(FlowConfig(logit_mean=-0.5, logit_std=0.8), 3, ids(0, 0, 20_000))
    assert t.dtype == torch.float32
    assert t.min() > 0 and t.max() < 1
    normal = (torch.logit(t.double()) + 0.5) / 0.8
    # 20,000 draws: standard errors 0.007 and 0.005; five of them
    assert abs(normal.mean()) < 0.036
    assert abs(normal.std() - 1) < 0.025


def test_label_dropout_rate_and_independence_of_the_split():
    labels = torch.arange(20_000) % 10
    dropped = flow.drop_labels(FlowConfig(label_dropout=0.1), 0, ids(5, 0, 20_000), labels, null=10)
    assert torch.equal(dropped[dropped != 10], labels[dropped != 10])
    assert abs((dropped == 10).double().mean() - 0.1) < 5 * (0.09 / 20_000) ** 0.5
    halves = [flow.drop_labels(FlowConfig(), 0, ids(5, k, 10_000), labels[k : k + 10_000], 10) for k in (0, 10_000)]
    assert torch.equal(torch.cat(halves), dropped)
    assert not flow.drop_labels(FlowConfig(label_dropout=0.0), 0, ids(5, 0, 20_000), labels, 10).eq(10).any()


def test_losses_are_the_formula():
    x0 = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6)
    names = ids(9, 0, 6)
    seen = {}

    def model(x, t, given):
        seen.update(x=x, t=t, labels=given)
        return torch.sin(x)

    got = flow.losses(model, FlowConfig(), 10, x0, labels, 1, names)
    noise = kernels.counter_normal(1, flow.Stream.NOISE, names, (3, 4, 4)).double()
    t = flow.sample_timesteps(FlowConfig(), 1, names).double().view(-1, 1, 1, 1)
    x_t = (1 - t) * x0.double() + t * noise
    torch.testing.assert_close(seen["x"].double(), x_t, atol=1e-6, rtol=0)
    expected = ((torch.sin(x_t) - (noise - x0.double())) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)
    assert got.shape == (6,)


def test_losses_do_not_depend_on_the_split_over_ranks():
    x0 = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8)

    def model(x, t, given):
        return x * t.view(-1, 1, 1, 1) + given.view(-1, 1, 1, 1)

    whole = flow.losses(model, FlowConfig(), 10, x0, labels, 1, ids(2, 0, 8))
    parts = [flow.losses(model, FlowConfig(), 10, x0[k : k + 2], labels[k : k + 2], 1, ids(2, k, 2)) for k in (0, 2, 4, 6)]
    assert torch.equal(torch.cat(parts), whole)
