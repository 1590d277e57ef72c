"""Flow: every random number is named by seed, step and place in the global batch; formulas against fp64."""

import json

import pytest
import torch

from fastdit import flow, kernels
from fastdit.config import FlowConfig, from_dict, parse
from fastdit.training.loop import train


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


def test_chosen_tokens_are_random_subsets_that_do_not_depend_on_the_split():
    config = from_dict({"model": {"preset": "test/4", "depth": 5, "keep_tokens": 0.25, "path_drop": 0.1}}).model
    tokens, dropped = flow.choose_tokens(config, 7, ids(5, 0, 4000), dense=False)
    assert tokens.shape == (4000, 16) and (tokens.diff(dim=1) > 0).all() and tokens.min() == 0 and tokens.max() == 63
    for k in (0, 1000, 3000):
        again = flow.choose_tokens(config, 7, ids(5, k, 1000), dense=False)
        assert torch.equal(again[0], tokens[k : k + 1000]) and torch.equal(again[1], dropped[k : k + 1000])
    # each token in a quarter of the samples, pairs of tokens in 16·15 of 64·63: five standard errors
    shares = torch.nn.functional.one_hot(tokens, 64).sum(1).double()
    assert (shares.mean(0) - 0.25).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5
    pairs = (shares.T @ shares / 4000)[~torch.eye(64, dtype=torch.bool)]
    expected = 16 * 15 / (64 * 63)
    assert (pairs - expected).abs().max() < 5 * (expected * (1 - expected) / 4000) ** 0.5
    assert abs(dropped.double().mean() - 0.1) < 5 * (0.09 / 4000) ** 0.5
    for seed, step in ((8, 5), (7, 6)):
        assert not torch.equal(flow.choose_tokens(config, seed, ids(step, 0, 4000), dense=False)[0], tokens)
    assert torch.equal(flow.choose_tokens(config, 7, ids(5, 0, 2), dense=True)[0], torch.arange(64).expand(2, -1))
    assert flow.choose_tokens(from_dict({}).model, 7, ids(5, 0, 2), dense=False) == ()


def test_losses_are_the_formula():
    x0 = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6)
    names = ids(9, 0, 6)
    seen = {}

    def model(x, t, given):
        seen.update(x=x, t=t, labels=given)
        return torch.sin(x)

    got = flow.losses(model, x0, labels, names, FlowConfig(), seed=1, null=10)
    noise = kernels.counter_normal(1, flow.Stream.NOISE, names, (3, 4, 4)).double()
    t = flow.sample_timesteps(FlowConfig(), 1, names).double().view(-1, 1, 1, 1)
    x_t = (1 - t) * x0.double() + t * noise
    torch.testing.assert_close(seen["x"].double(), x_t, atol=1e-6, rtol=0)
    expected = ((torch.sin(x_t) - (noise - x0.double())) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(got.total.double(), expected, atol=1e-5, rtol=0)
    assert got.total.shape == (6,) and torch.equal(got.t.double(), t.flatten())
    assert tuple(got.parts) == flow.PARTS and torch.equal(got.parts["flow"], got.total)


def test_the_loss_of_predicted_data_is_that_of_its_velocity():
    """arXiv:2511.13720: |x̂ − x0|²/max(t, 0.05)², with its gradient, against fp64; the exact data have no loss."""
    x0, noise = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([0.001, 0.04, 0.05, 0.3, 1.0]), torch.zeros(5, dtype=torch.long)
    estimate = (x0 + 0.1 * noise.sin()).requires_grad_()
    got = flow.losses_at(lambda x_t, t, labels: estimate, x0, noise, t, labels, "x")
    got.total.sum().backward()
    exact = estimate.detach().double().requires_grad_()
    wanted = ((exact - x0.double()).square() / t.double().clamp(min=0.05).view(-1, 1, 1, 1) ** 2).mean((1, 2, 3))
    wanted.sum().backward()
    # at t = 0.001 the velocity loses three digits of x_t − x̂ to rounding
    torch.testing.assert_close(got.total.double(), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(estimate.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)
    assert flow.losses_at(lambda *_: x0, x0, noise, t, labels, "x").total.max() < 1e-6
    v = flow.losses_at(lambda x_t, t, labels: (x_t - estimate) / t.view(-1, 1, 1, 1), x0, noise, t, labels, "v")
    torch.testing.assert_close(v.total[2:], got.total[2:])


def test_losses_do_not_depend_on_the_split_over_ranks():
    x0 = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8)

    def model(x, t, given):
        return x * t.view(-1, 1, 1, 1) + given.view(-1, 1, 1, 1)

    together = flow.losses(model, x0, labels, ids(2, 0, 8), FlowConfig(), seed=1, null=10)
    shares = [
        flow.losses(model, x0[k : k + 2], labels[k : k + 2], ids(2, k, 2), FlowConfig(), seed=1, null=10) for k in (0, 2, 4, 6)
    ]
    assert torch.equal(torch.cat([share.total for share in shares]), together.total)
    assert torch.equal(torch.cat([share.t for share in shares]), together.t)


def test_a_second_term_is_logged_and_validated_by_its_name(tmp_path, monkeypatch):
    """Terms that are equal, so that each is half of the total; they survive a stop between two log lines."""
    losses_at = flow.losses_at

    def doubled(*arguments):
        only = losses_at(*arguments)
        return only._replace(total=2 * only.total, parts={"flow": only.total, "other": only.total})

    monkeypatch.setattr(flow, "PARTS", ("flow", "other"))
    monkeypatch.setattr(flow, "losses_at", doubled)
    settings = [
        "model.preset=test/4", "train.batch_size=8", "train.warmup_steps=1", "train.schedule=constant", "train.log_steps=4",
        "train.sample_steps=0", "validate.steps=4", "validate.images=8", f"train.out={tmp_path}",
    ]  # fmt: skip
    for total in (2, 4):
        run = train(parse(None, [*settings, f"train.total_steps={total}"]))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4]
    for prefix in ("", "val_"):
        for line in (line for line in lines if f"{prefix}loss" in line):
            assert line[f"{prefix}loss_flow"] == line[f"{prefix}loss_other"] == pytest.approx(line[f"{prefix}loss"] / 2)
