"""The limits of this machine: the rate of a large matmul, the copy bandwidth, and what a train step needs of both.

B batch, T tokens, H width, F SwiGLU hidden.
"""

import torch

from benchmarks.harness import DEVICE, DTYPE
from fastdit import flops, kernels
from fastdit.config import ModelConfig
from fastdit.model import DiT
from fastdit.planning.machine_rates import copy_rate, matmul_rate

# Elements that each op must read or write, (forward, backward): kernels.BYTES are those of bf16, counter_normal's of fp32.
MOVED = {
    op: tuple(n // (4 if op == "counter_normal" else 2) for n in kernels.BYTES[op]) for op in kernels.OPS if op != "counter_uniform"
}


class Limits:
    """Measures both rates when called; made in a worker. shape: M, K, N of the matmul."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape

    def __call__(self) -> tuple[float, float]:
        """Return FLOP/s of a matmul in the measured precision, and bytes/s of a copy, reads and writes counted."""
        return matmul_rate(self.shape, DTYPE, DEVICE), copy_rate(DEVICE)


def train_flops(config: ModelConfig) -> int:
    """Return the FLOPs of forward and backward per image: matmuls and attention, as `fastdit plan` counts them."""
    walk = flops.walk(config, 1, torch.bfloat16, "none")
    return walk.forward + walk.backward


def velocity_flops(config: ModelConfig) -> int:
    """Return the FLOPs of one velocity per image without the embeddings of time and class and the modulation, whose rows samples
    share: the blocks, the patch embedding and the output."""
    tokens = (config.input_size // config.patch_size) ** 2
    patch = config.in_channels * config.patch_size**2
    return flops.walk(config, 1, torch.bfloat16, "none").blocks_forward + 2 * 2 * tokens * patch * config.width


def bytes_per_step(model: DiT, batch: int) -> float:
    """Return the bytes that a train step must move besides its matmuls: the fused ops' streams, and AdamW's fp32 weights and
    moments (read and written), gradients and, in bf16, the rounded weights."""
    config, size = model.config, DTYPE.itemsize
    both = {op: sum(moved) for op, moved in MOVED.items()}
    block = (2 * both["gated_residual_modulate"] + both["qk_norm_rope"]) * config.width + both["swiglu"] * config.hidden
    optimizer = 24 + size + (size if size < 4 else 0)
    streams = config.block_tokens * block + config.tokens * both["modulate"] * config.width
    return batch * size * streams + optimizer * model.num_parameters


def shares(model: DiT, batch: int, step: float, rates: tuple[float, float]) -> tuple[float, float]:
    """Return (MFU, share of the bound) of a step of `step` seconds.

    MFU: the step's FLOPs over the rate of a large matmul. Bound: that time plus the time of `bytes_per_step` at copy bandwidth.
    rates: FLOP/s and bytes/s of Limits.
    """
    compute = batch * train_flops(model.config) / rates[0]
    return compute / step, (compute + bytes_per_step(model, batch) / rates[1]) / step
