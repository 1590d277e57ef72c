"""FLOPs and activations on the meta device, against what torch counts and against what a real pass saves."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastdit import flops, flow, kernels
from fastdit.config import parse
from fastdit.model import DiT


@pytest.mark.parametrize(
    "words",
    [
        ["model.preset=test/4"],
        ["model.preset=nano/4", "model.positions=rope_2d", "model.class_width=32"],
        ["model.preset=sit-S/2", "model.depth=2", "model.input_size=8"],
        ["model.preset=test/4", "model.depth=6", "model.positions=rope_2d", "model.keep_tokens=0.3", "model.dense_blocks=[2,1]"],
    ],
)
def test_flops_are_those_that_torch_counts(words):
    """With attention by matmuls, which torch counts on a CPU; its fused kernel there it does not."""
    config = parse(None, [*words, "train.precision=fp32", "model.attention=matmul"]).model
    counted, batch = flops.walk(config, 2, torch.float32, "none"), 2
    model = DiT(config)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size)
    chosen = flow.choose_tokens(config, 0, torch.arange(batch), dense=False)
    with FlopCounterMode(display=False) as forward:
        loss = model(x, torch.rand(batch), torch.zeros(batch, dtype=torch.int64), *chosen).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert counted.forward == forward.get_total_flops()
    assert counted.backward == backward.get_total_flops()
    assert counted.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("preset", ["XL/2", "sit-XL/2"])
def test_published_flops_and_parameters(preset):
    """DiT-XL/2: 675 M parameters (arXiv:2212.09748, table 1), 0.710 TFLOP an image forward and backward; SiT-XL/2 has the same."""
    counted = flops.walk(
        parse(None, [f"model.preset={preset}", "model.num_classes=1000", "model.in_channels=4"]).model, 1, torch.bfloat16, "none"
    )
    assert (counted.forward + counted.backward) / 1e12 == pytest.approx(0.710, rel=0.02)
    assert counted.parameters / 1e6 == pytest.approx(675, rel=0.01)


@pytest.mark.skipif(kernels.backend_in_use(torch.device("cpu")) == "reference", reason="references save more")
@pytest.mark.parametrize("words", [[], ["model.mlp=gelu", "model.linear_bias=true", "model.positions=sincos"]])
def test_saved_bytes_are_those_of_a_real_forward(words):
    """Tensors that autograd saves, and the velocity; with attention by matmuls, which is the same on a CPU."""
    config = dataclasses.replace(parse(None, ["model.preset=test/4", *words]).model, attention="matmul")
    counted = flops.walk(config, 3, torch.float32, "none")
    model = DiT(config).train()
    with flops.LiveBytes([*model.parameters(), *model.buffers()]) as live:
        v = model(torch.randn(3, 1, 32, 32), torch.rand(3), torch.zeros(3, dtype=torch.int64))
    assert counted.saved == pytest.approx(live.now, rel=0.05) and v.shape == (3, 1, 32, 32)
    assert counted.saved_per_block * config.depth < counted.saved < counted.peak


@pytest.mark.parametrize("preset", ["S/2", "sit-S/2"])
def test_recomputing_saves_less_and_counts_the_same_flops(preset):
    config = parse(None, [f"model.preset={preset}"]).model
    none, light, full = (flops.walk(config, 2, torch.bfloat16, mode) for mode in ("none", "light", "full"))
    assert none.saved_per_block > light.saved_per_block > full.saved_per_block and none.peak > light.peak > full.peak
    assert none.forward == light.forward == full.forward and none.backward == light.backward == full.backward
