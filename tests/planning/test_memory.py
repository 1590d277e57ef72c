"""Memory and traffic that plan predicts, against the tensors of real steps and sums done by hand."""

import pytest
import torch

from fastdit import distributed, flops, flow, kernels
from fastdit.config import parse
from fastdit.model import DiT
from fastdit.planning import cards, memory, plan
from fastdit.training import engine
from fastdit.training.ema import ShardedEma
from fastdit.training.optimizer import muon_share


@pytest.mark.parametrize(
    "words",
    [
        ["model.width=256", "train.batch_size=8"],  # mostly activations
        ["model.width=256", "train.batch_size=8", "train.recompute=full"],
        ["model.width=512", "train.batch_size=1", "train.accumulation=2"],  # mostly weights
        ["model.width=256", "train.batch_size=1", "train.optimizer=muon"],
        ["model.width=256", "train.batch_size=8", "model.mlp=gelu", "model.linear_bias=true", "model.positions=sincos"],
    ],
)
def test_memory_is_what_the_tensors_of_a_real_step_take(words, record_property):
    """The tensors of three steps under the engine, on a CPU with one rank, by the counter that plan uses on the meta device."""
    shape = ["model.preset=S/2", "model.depth=4", "model.heads=4", "model.input_size=16"]
    config = plan.settings(None, [*shape, "train.precision=fp32", *words])
    world, train = distributed.start("cpu"), config.train
    with flops.LiveBytes([]) as live:
        model = DiT(config.model)
        running = engine.initialize(model, config, world)
        ema = ShardedEma(engine.fragments(running, world), train.ema_decay)
        for step in range(3):
            for micro in range(train.accumulation):
                ids = flow.sample_ids(step, micro * train.batch_size, train.batch_size, world.device)
                x0, labels = torch.randn(train.batch_size, 4, 16, 16), torch.zeros(train.batch_size, dtype=torch.int64)
                running.backward(
                    flow.losses(running, x0, labels, ids, config.flow, seed=0, null=config.model.num_classes).total.mean()
                )
                running.step()
            ema.update()
    predicted = memory.memory(config, 1).peak
    record_property("peak_mb", live.peak / 1e6)
    record_property("predicted_mb", predicted / 1e6)
    fused = kernels.backend_in_use(world.device) != "reference"  # references keep more for the backward
    assert live.peak == pytest.approx(predicted, rel=0.1 if fused else 0.2)


def test_one_gpu_holds_gradients_through_the_forward_only_to_add_them_up():
    """AdamW uses them up in each step: only sums of several micro-steps stay between steps, 4 bytes per parameter."""
    words = ["model.preset=S/2", "train.precision=fp32", "train.batch_size=64"]
    one, two = (memory.memory(plan.settings(None, [*words, f"train.accumulation={n}"]), 1, cards.CARDS["h100"]) for n in (1, 2))
    parameters = flops.walk(plan.settings(None, words).model, 1, torch.float32, "none").parameters
    assert two.peak - one.peak == 4 * parameters


def test_the_bytes_of_gelu_and_biases_by_hand():
    """Per token and block, of PyTorch's ops with or without the fused ones: GELU moves 2 + 4 hidden widths, of which the last
    sums its input's gradient for the bias, and again 2 if it is recomputed; the sums of the biases' gradients of the attention
    read 4 widths."""
    words = ["model.preset=test/4", "model.depth=1", "model.hidden=1000"]
    swiglu, gelu, biased = (
        parse(None, [*words, *more]).model for more in ([], ["model.mlp=gelu"], ["model.mlp=gelu", "model.linear_bias=true"])
    )
    for fused, of_swiglu in ((True, 3 + 5), (False, 5 + 13)):
        count = [memory.op_bytes(model, fused) for model in (swiglu, gelu, biased)]
        assert count[0] - count[1] == 64 * 1000 * (of_swiglu - (2 + 4)) and count[2] - count[1] == 64 * 64 * 4
        assert memory.op_bytes(gelu, fused, "light") - memory.op_bytes(gelu, fused) == 64 * 1000 * 2


@pytest.mark.parametrize(
    ("words", "gpus", "per_parameter"),
    [
        # gradient for the norm and for AdamW (2 + 2), master and moments (24), bf16 weights (2), average (8)
        ([], 1, 2 + 2 + 24 + 2 + 8),
        # fp32 weights are the masters
        (["train.precision=fp32"], 1, 4 + 4 + 24 + 8),
        # each of 3 micro-steps adds its gradient (2) to a sum (8), which is what the norm and AdamW read
        (["train.accumulation=3"], 1, 3 * (2 + 8) + 4 + 4 + 24 + 2 + 8),
        # buckets of all gradients (4 passes of 2); for a quarter: sum (2 + 8), norm, copy, clip, AdamW, weights (4 + 2), average
        ([], 4, 8 + (10 + 4 + 8 + 8 + 28 + 6 + 12) / 4),
        # two averages, every second step
        (["train.ema_more=[0.9]", "train.ema_every=2"], 4, 8 + (10 + 4 + 8 + 8 + 28 + 6 + 12) / 4),
    ],
)
def test_the_optimizers_bytes_by_hand(words, gpus, per_parameter):
    config = parse(None, ["train.precision=bf16", *words])
    assert memory.optimizer_bytes(config, 1000, gpus) == pytest.approx(1000 * per_parameter)


def test_muons_bytes_by_hand():
    """Of test/4's two blocks: one momentum, not two moments; updates in bf16 during a step, sent twice on four GPUs."""
    config, adamw = (
        parse(None, ["model.preset=test/4", "train.precision=bf16", f"train.optimizer={o}"]) for o in ("muon", "adamw")
    )
    hidden, most = 2 * (4 * 64 * 64 + 3 * 64 * 128), 2 * 2 * 64 * 128  # value and gate
    assert muon_share(config)[:2] == (hidden, 2 * 5 * (4 * 6 * 64**3 + 3 * (4 * 64 * 64 * 128 + 2 * 64**3)))
    for gpus, copies in ((1, 1), (4, 3)):
        ours, theirs = (memory.memory(each, gpus) for each in (config, adamw))
        assert theirs.masters - ours.masters == 4 * hidden / gpus
        assert ours.gradients - theirs.gradients == 2 * (copies * hidden + 4 * most) / gpus
        ours, theirs = (memory.optimizer_bytes(each, 150_000, gpus) for each in (config, adamw))
        assert theirs - ours == pytest.approx(hidden / gpus * (8 - 2 * 2))
        (_, ours), (_, theirs) = (memory.communication(each, 150_000, gpus) for each in (config, adamw))
        assert ours - theirs == pytest.approx(2 * 2 * hidden / gpus * (gpus - 1) / gpus)


@pytest.mark.parametrize(
    ("stage", "gpus", "gradients", "weights"),
    [
        (2, 1, 0, 0),
        (1, 4, 8, 2),  # all-reduces fp32 sums once, gathers bf16 weights
        (2, 4, 2 * 3, 2),  # reduce-scatters bf16 gradients of each of 3 micro-steps
        (3, 4, 2 * 3, 2 * 3),  # and gathers the weights for each
    ],
)
def test_bytes_sent_by_hand(stage, gpus, gradients, weights):
    config = parse(None, ["train.precision=bf16", "train.accumulation=3", f"zero.stage={stage}"])
    share = 1000 * (gpus - 1) / gpus
    assert memory.communication(config, 1000, gpus) == (gradients * share, weights * share)


@pytest.mark.parametrize(
    ("stage", "accumulates", "forward", "end"),
    [
        (0, False, 0, 2000),
        (0, True, 4000, 4000),
        (1, False, 4000, 4000 + 1000),
        (2, False, 0, (4 + 4 + 2) * 250),
        (2, True, 1000, (4 + 4 + 2) * 250),
        (3, False, 500, (2 + 4) * 250),
    ],
)
def test_bytes_of_bf16_gradients_by_hand(stage, accumulates, forward, end):
    share = 1000 / (4 if stage else 1)
    assert memory.gradients_of(stage, 1000, share, 2, accumulates) == (forward, end)
