"""FLOPs counted on the meta device, against torch's counter and published models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastdit import flops
from fastdit.config import parse
from fastdit.model import DiT


@pytest.mark.parametrize(
    "words", [["model.preset=test/4"], ["model.preset=nano/4", "model.positions=rope_2d", "model.class_width=32"]]
)
def test_flops_are_those_that_torch_counts(words):
    """With attention by matmuls, which torch counts on a CPU; its fused kernel there it does not."""
    config = parse(None, [*words, "model.attention=matmul"]).model
    counted, batch = flops.walk(config, 2, torch.float32, "none"), 2
    model = DiT(config)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size)
    with FlopCounterMode(display=False) as forward:
        loss = model(x, torch.rand(batch), torch.zeros(batch, dtype=torch.int64)).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert counted.forward == forward.get_total_flops()
    assert counted.backward == backward.get_total_flops()
    assert counted.parameters == sum(p.numel() for p in model.parameters())


def test_published_flops_and_parameters():
    """DiT-XL/2: 675 M parameters (arXiv:2212.09748, table 1), 0.710 TFLOP per image forward and backward."""
    counted = flops.walk(
        parse(None, ["model.preset=XL/2", "model.in_channels=4", "model.num_classes=1000"]).model, 1, torch.bfloat16, "none"
    )
    assert (counted.forward + counted.backward) / 1e12 == pytest.approx(0.710, rel=0.02)
    assert counted.parameters / 1e6 == pytest.approx(675, rel=0.01)
