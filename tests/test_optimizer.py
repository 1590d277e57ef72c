"""OneRankAdamW against torch's AdamW on fp32 copies."""

import pytest
import torch
from torch import nn

from fastdit import optimizer
from fastdit.optimizer import OneRankAdamW

SHAPES = [(5, 7), (3,), (4, 2, 3), (1,)]
OPTIONS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def make(bf16, clip=0.0, accumulation=1):
    """OneRankAdamW of a few parameters, and the same values with torch's own optimizer."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    copies = [p.detach().clone() for p in parameters]
    ours = OneRankAdamW(parameters, clip, bf16, accumulation, **OPTIONS)
    if bf16:
        for p in parameters:
            p.data = p.data.bfloat16()
    return parameters, ours, copies, torch.optim.AdamW(copies, fused=True, **OPTIONS)


def backward(parameters, seed):
    """Gradients that are not exact in bf16 until they are rounded to the parameters' dtype; returned in fp32."""
    g = torch.Generator().manual_seed(seed)
    wanted = [torch.randn(p.shape, generator=g).to(p.dtype) for p in parameters]
    sum((p * w).sum() for p, w in zip(parameters, wanted, strict=True)).backward()
    return [w.float() for w in wanted]


@pytest.mark.parametrize("part", [1, optimizer.PART])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_steps_are_those_of_adamw_on_fp32_sums(monkeypatch, bf16, accumulation, part):
    monkeypatch.setattr(optimizer, "PART", part)
    parameters, ours, copies, theirs = make(bf16, accumulation=accumulation)
    for step in range(5):
        sums = [torch.zeros(p.shape) for p in parameters]
        for micro in range(accumulation):
            for total, gradient in zip(sums, backward(parameters, 10 * step + micro), strict=True):
                total += gradient
        ours.step()
        for copy, total in zip(copies, sums, strict=True):
            copy.grad = total
        theirs.step()
        wanted_norm = torch.cat([total.flatten() for total in sums]).double().norm()
        assert ours._global_grad_norm == pytest.approx(wanted_norm.item(), rel=1e-6) and not ours.overflow
        for parameter, master, copy in zip(parameters, ours.masters, copies, strict=True):
            assert torch.equal(master, copy) and torch.equal(parameter, copy.to(parameter.dtype))
            assert parameter.grad is None and master.grad is None


@pytest.mark.parametrize("bf16", [False, True])
def test_clipping_scales_the_whole_gradient_to_the_norm(bf16):
    """The scale is rounded once more than torch's: a few fp32 roundings of a step of 1e-2."""
    parameters, ours, copies, theirs = make(bf16, clip=0.5)
    for step in range(4):
        gradients = backward(parameters, step)
        ours.step()
        for copy, gradient in zip(copies, gradients, strict=True):
            copy.grad = gradient
        assert torch.nn.utils.clip_grad_norm_(copies, 0.5) > 0.5
        theirs.step()
        for master, copy in zip(ours.masters, copies, strict=True):
            torch.testing.assert_close(master, copy, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing(bf16, bad):
    parameters, ours, _, _ = make(bf16, clip=1.0)
    backward(parameters, 0)
    ours.step()
    before = [p.detach().clone() for p in [*parameters, *ours.masters]]
    moments = [state["exp_avg"].clone() for state in ours.state.values()]
    (parameters[1] * bad).sum().backward()
    for p in (parameters[0], *parameters[2:]):
        p.grad = torch.ones_like(p)
    ours.step()
    assert ours.overflow
    assert all(torch.equal(a, b) for a, b in zip([*parameters, *ours.masters], before, strict=True))
    assert all(torch.equal(a["exp_avg"], b) for a, b in zip(ours.state.values(), moments, strict=True))
    backward(parameters, 1)
    ours.step()
    assert not ours.overflow and all(p.isfinite().all() for p in parameters)
    assert {state["step"].item() for state in ours.state.values()} == {2}
