"""How fast this machine could go: the rate of a large matmul, the copy bandwidth, and what a train step needs of both.

B batch, T tokens, H width, F SwiGLU hidden.
"""

from torch import nn

from fastdit import kernels
from fastdit.model import DiT
from fastdit.rates import copy_rate, matmul_rate
from measure import DEVICE, DTYPE

# (forward, backward) elements that each op must read or write: kernels.BYTES are those of bf16, counter_normal's of fp32.
MOVED = {
    op: tuple(n // (4 if op == "counter_normal" else 2) for n in kernels.BYTES[op]) for op in kernels.OPS if op != "counter_uniform"
}


class Limits:
    """Made in a worker; called, it measures both rates. shape: M, K, N of the matmul."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape

    def __call__(self) -> tuple[float, float]:
        """FLOP/s of a matmul in the precision that is measured, and bytes/s of a copy, reads and writes counted."""
        return matmul_rate(self.shape, DTYPE, DEVICE), copy_rate(DEVICE)


def flops_per_image(model: DiT) -> int:
    """Of forward and backward: 2·M·N·K of every Linear, by its weight and how often it is applied, and 4·T²·H of attention, three
    times. What the backward pass leaves out, the gradients of the latent and of the timestep's features, is subtracted."""
    config = model.config
    tokens = (config.input_size // config.patch_size) ** 2
    once = [*model.modulation, model.final_modulation, *model.time_embedding.modules(), *model.class_embedding.modules()]
    of = lambda linear: 2 * linear.weight.numel() * (1 if linear in once else tokens)
    forward = sum(of(module) for module in model.modules() if isinstance(module, nn.Linear))
    forward += config.depth * 4 * tokens**2 * config.width
    time_map = next(module for module in model.time_embedding.modules() if isinstance(module, nn.Linear))
    return 3 * forward - of(model.patch_embedding) - of(time_map)


def bytes_per_step(model: DiT, batch: int) -> float:
    """That a train step must move besides its matmuls: the fused ops' streams, and AdamW's fp32 weights and moments (read and
    written), gradients and, in bf16, the weights that it rounds."""
    config, size = model.config, DTYPE.itemsize
    stream = batch * (config.input_size // config.patch_size) ** 2 * size
    both = {op: sum(moved) for op, moved in MOVED.items()}
    block = (2 * both["gated_residual_modulate"] + both["qk_norm_rope"]) * config.width + both["swiglu"] * config.hidden
    optimizer = 24 + size + (size if size < 4 else 0)
    return stream * (config.depth * block + both["modulate"] * config.width) + optimizer * model.num_parameters


def shares(model: DiT, batch: int, step: float, rates: tuple[float, float]) -> tuple[float, float]:
    """(MFU, share of the bound) of a step of so many seconds. MFU: its FLOPs over the rate of a large matmul. Bound: that time
    and the bytes' at copy bandwidth, one after the other."""
    compute = batch * flops_per_image(model) / rates[0]
    return compute / step, (compute + bytes_per_step(model, batch) / rates[1]) / step
