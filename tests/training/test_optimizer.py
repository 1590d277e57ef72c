"""What `build` makes, and OneRankAdamW against torch's AdamW on fp32 copies. The pass itself: tests/kernels/test_adamw.py."""

import gc
import weakref

import pytest
import torch
from torch import nn

import hot_loop
from fastdit import checkpoint
from fastdit.config import InputError, TrainConfig, parse
from fastdit.training.ema import ShardedEma
from fastdit.training.engine import Fragment
from fastdit.training.optimizer import STATE_NAMES, OneRankAdamW, OneRankOptimizer, build, learning_rate, state_bytes

SHAPES = [(16, 7), (48,), (4, 2, 16), (16,)]  # multiples of the vector width: other sizes are in test_adamw.py
OPTIONS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def make(bf16, clip=0.0, accumulation=1, **options):
    """Return a few parameters with OneRankAdamW, and copies of them with torch's AdamW."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    copies = [p.detach().clone() for p in parameters]
    ours = OneRankAdamW(parameters, clip, bf16, accumulation, **(OPTIONS | options))
    if bf16:
        for p in parameters:
            p.data = p.data.bfloat16()
    return parameters, ours, copies, torch.optim.AdamW(copies, fused=True, **OPTIONS)


def backward(parameters, seed):
    """Set random gradients in the dtype of the parameters. Returns them in fp32."""
    g = torch.Generator().manual_seed(seed)
    wanted = [torch.randn(p.shape, generator=g).to(p.dtype) for p in parameters]
    sum((p * w).sum() for p, w in zip(parameters, wanted, strict=True)).backward()
    return [w.float() for w in wanted]


def overflowing(parameters, bad):
    """Set a gradient that is not finite, and others that are."""
    (parameters[1] * bad).sum().backward()
    for p in (parameters[0], *parameters[2:]):
        p.grad = torch.ones_like(p)


def test_schedules():
    rates = lambda steps, **train: [learning_rate(TrainConfig(lr=2.0, warmup_steps=4, **train), step) for step in steps]
    assert rates(range(6), total_steps=100) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0] and rates([1000], total_steps=100) == [2.0]
    assert rates((4, 52, 100, 200), total_steps=100, schedule="cosine") == pytest.approx([2, 1, 0, 0])
    # the last 16 steps: 1 - sqrt(k/16) after k of them
    decaying = dict(total_steps=100, decay_steps=16)
    assert rates((83, 84, 85, 88, 93, 99, 100, 101), **decaying) == pytest.approx([2, 2, 1.5, 1, 0.5, 2 - 15**0.5 / 2, 0, 0])
    assert rates(range(8), total_steps=8, decay_steps=4) == pytest.approx([0.5, 1, 1.5, 2, 2, 1, 2 - 2**0.5, 2 - 3**0.5])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["train.decay_steps=9", "train.total_steps=8"],
            "decay_steps=9 and train.warmup_steps=50 must fit into train.total_steps=8",
        ),
        (["train.decay_steps=9", "train.schedule=cosine"], "decay_steps=9 needs train.schedule=constant"),
        (["train.decay_steps=-1"], "decay_steps=-1 must be at least 0"),
    ],
)
def test_schedules_that_cannot_be(words, expected):
    with pytest.raises(InputError, match=expected):
        parse(None, words)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_built_has_the_state_that_is_declared(precision, sharded):
    """Checkpoints store STATE_NAMES, and memory plans count state_bytes."""
    model, config = nn.Linear(5, 3), parse(None, [f"train.precision={precision}", "train.lr=0.5"])
    groups, optimizer = build(config, model, sharded)
    assert isinstance(optimizer, OneRankOptimizer) != sharded
    parameters = list(model.parameters())
    assert [id(p) for group in groups for p in group["params"]] == [id(p) for p in parameters]
    for p in parameters:
        p.grad = torch.ones_like(p)
    if sharded:  # torch makes the state in the first step
        optimizer.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.5 if sharded else 0.5 / 50}  # the engine adds ZeRO's warm-up
    assert len(optimizer.state) == 2
    for tensor, state in optimizer.state.items():
        assert set(state) == {"step", *STATE_NAMES} and not any(map(checkpoint.holds_weights, STATE_NAMES))
        assert sum(state[name].numel() * state[name].element_size() for name in STATE_NAMES) == state_bytes(config, tensor.numel())


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_steps_are_those_of_adamw_on_fp32_sums(bf16, accumulation):
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
        assert ours.finish_step() and ours._global_grad_norm == pytest.approx(wanted_norm.item(), rel=1e-6) and not ours.overflow
        for parameter, master, copy in zip(parameters, ours.masters, copies, strict=True):
            assert torch.equal(master, copy) and torch.equal(parameter, copy.to(parameter.dtype))
            assert parameter.grad is None and master.grad is None


@pytest.mark.parametrize("bf16", [False, True])
def test_clipping_scales_the_gradient_to_the_norm(bf16):
    """The scale is rounded once more than torch's, so a step of 1e-2 may differ by a few fp32 roundings."""
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
    overflowing(parameters, bad)
    ours.step()
    assert not ours.finish_step() and ours.overflow
    assert all(torch.equal(a, b) for a, b in zip([*parameters, *ours.masters], before, strict=True))
    assert all(torch.equal(a["exp_avg"], b) for a, b in zip(ours.state.values(), moments, strict=True))
    backward(parameters, 1)
    ours.step()
    assert ours.finish_step() and not ours.overflow and all(p.isfinite().all() for p in parameters)
    assert ours.steps == 2 and {state["step"].item() for state in ours.state.values()} == {2}


@pytest.mark.parametrize("asked", [False, True])
def test_a_skipped_step_advances_neither_count_nor_schedule(asked):
    """The bits are the same if each step is finished at once, or by the next step."""
    rates, taken = [], []
    parameters, ours, _, _ = make(True, clip=1.0, lr=lambda steps: 1e-2 / (1 + steps))
    assert ours.finish_step()  # there is no step yet
    for step in range(6):
        overflowing(parameters, torch.nan) if step in (1, 4) else backward(parameters, step)
        ours.step()
        rates.append(ours.param_groups[0]["lr"])  # of the step that has just begun: the one before is finished
        if asked:
            taken += [ours.finish_step(), ours.finish_step()]
    ours.finish_step()
    assert (
        rates == [1e-2, 5e-3, 5e-3, 1e-2 / 3, 1e-2 / 4, 1e-2 / 4]
        if not asked
        else taken == [t for step in range(6) for t in [step not in (1, 4)] * 2]
    )
    assert ours.steps == 4 and ours.param_groups[0]["lr"] == 1e-2 / 5
    wanted, theirs, _, _ = make(True, clip=1.0, lr=lambda steps: 1e-2 / (1 + steps))
    for step in (0, 2, 3, 5):
        backward(wanted, step)
        theirs.step()
    assert all(torch.equal(a, b) for a, b in zip([*parameters, *ours.masters], [*wanted, *theirs.masters], strict=True))


def test_a_step_reads_nothing_on_the_host():
    parameters, ours, _, _ = make(True, clip=1.0)
    for step in range(3):
        backward(parameters, step)
        with hot_loop.HotLoopGuard() as guard:
            ours.step()
            ours.finish_step()
        assert guard.syncs == 0 and guard.counts


@pytest.mark.parametrize("bf16", [False, True])
def test_averages_are_those_of_updates_after_the_steps(bf16):
    """Two decays, updated every second step, one of which is skipped: bitwise equal to ShardedEma's own updates."""
    parameters, ours, _, _ = make(bf16)
    again, theirs, _, _ = make(bf16)
    fragments = lambda optimizer: [Fragment(str(i), 0, m.detach().view(-1)) for i, m in enumerate(optimizer.masters)]
    ema, plain = ShardedEma(fragments(ours), 0.99, 0.5, optimizer=ours), ShardedEma(fragments(theirs), 0.99, 0.5)
    for step in range(8):
        for each in (parameters, again):
            overflowing(each, torch.inf) if step == 3 else backward(each, step)
        if step % 2:
            ema.announce()
            plain.announce()
        ours.step()
        theirs.step()
        for optimizer, averages in ((ours, ema), (theirs, plain)):
            if optimizer.finish_step() and step % 2:
                averages.update()
    assert ema.updates == plain.updates == 3
    for kind in ("ema", "ema_0.5"):
        assert all(torch.equal(a, b) for a, b in zip(ema.all[kind], plain.all[kind], strict=True))
        assert not any(torch.equal(a, f.master) for a, f in zip(ema.all[kind], ema.fragments, strict=True))


def test_an_optimizer_that_is_dropped_is_freed():
    """The addresses that a step keeps do not keep the tensors alive."""
    parameters, ours, _, _ = make(True)
    backward(parameters, 0)
    ours.step()
    gone = weakref.ref(ours.masters[0])
    del ours
    gc.collect()
    assert gone() is None
