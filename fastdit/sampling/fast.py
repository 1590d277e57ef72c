"""Fast paths of models that are used only for inference: CUDA graphs on a GPU, packed blocks on a CPU with AMX.

B batch size, T tokens, H width, C/h/w channels, rows and columns of a latent.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from fastdit import kernels
from fastdit.device import native_bf16
from fastdit.graphs import Recorded, graph_pool, warm_up
from fastdit.model import QK_EPS, Block, DiT

GRAPHS = 4  # CUDA graphs that are kept: with and without guidance, for a full batch and for the last one


class Graphs:
    """DiT.velocity as CUDA graphs, one per batch size and number of deep samples: a replay costs one launch instead of hundreds.

    All graphs allocate from one memory pool. That is safe because replays follow each other on one stream and each output is
    copied before the next replay.
    """

    def __init__(self, model: DiT) -> None:
        self.model = model
        self.pool = graph_pool(torch.device("cuda"))
        self.captured: dict[tuple[int, int | None], tuple] = {}  # by batch size and `deep`, least recently used first

    def __call__(self, x: Tensor, t: Tensor, classes: Tensor, rows: Tensor, deep: int | None = None) -> Tensor:
        """Return the velocity [B,C,h,w] of x fp32 [B,C,h,w], t fp32 [], classes [U,H] with U <= B and rows int64 [B]; deep as in
        DiT.velocity."""
        batch, key = len(x), (len(x), deep)
        if key not in self.captured:
            if len(self.captured) == GRAPHS:
                del self.captured[next(iter(self.captured))]
            # U differs from batch to batch if classes are random: the buffer has room for B, and rows never points past U
            static = x.clone(), t.clone(), classes.new_zeros(batch, classes.shape[1]), rows.clone()
            self.captured[key] = self._capture(static, deep)
        recorded, static = self.captured[key] = self.captured.pop(key)
        for buffer, tensor in zip(static, (x, t, classes, rows), strict=True):
            (buffer[: len(tensor)] if tensor.ndim else buffer).copy_(tensor)
        recorded.replay()
        return recorded.results[0].clone()

    def _capture(self, static: tuple[Tensor, Tensor, Tensor, Tensor], deep: int | None) -> tuple[Recorded, tuple[Tensor, ...]]:
        work = lambda: [self.model.velocity(*static, deep)]
        warm_up(work)
        return Recorded(work, self.pool), static


class PackedBlock(nn.Module):
    """A Block for inference, by `kernels.dit_block` with weights packed for it."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        attention, mlp = block.attention, block.mlp
        self.heads = attention.heads
        self.eps = block.eps
        self.weights = kernels.pack_dit_block(
            kernels.BlockWeights(
                attention.qkv.weight, attention.q_weight, attention.k_weight, attention.out.weight,
                mlp.up.weight, mlp.up.bias, mlp.down.weight, mlp.down.bias,
            )
        )  # fmt: skip

    def forward(
        self, x: Tensor, y: Tensor, modulation: tuple[Tensor, ...], cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return what Block.forward does: the residual stream and the next block's input, both [B,T,H]."""
        return kernels.dit_block(x, y, modulation, self.weights, cos, sin, self.heads, QK_EPS, self.eps)


class PackedLinear(nn.Module):
    """A Linear for inference on a CPU: weights in the order of oneDNN, which is faster if they are large and rows are few."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight, 8)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def _refuse_state(*_) -> None:
    raise RuntimeError("a model that fast_velocity has packed holds no weights to save: load it again")


@torch.no_grad()
def fast_velocity(model: DiT, device: torch.device) -> Callable | None:
    """Prepare a model for inference only. Returns a faster replacement of `model.velocity`, or None if there is none or the model
    itself was made faster in place.

    On CUDA the replacement is CUDA graphs. Blocks are not compiled: Inductor finds nothing to fuse in their forward pass, which is
    matmuls, attention and library ops, and each batch size would be compiled anew. On a CPU with AMX, in bf16, blocks are packed in
    place; the model can then not be saved, copied, cast or trained.
    """
    if device.type == "cuda":
        return Graphs(model)
    config, bf16 = model.config, model.output.weight.dtype == torch.bfloat16
    fits = kernels.dit_block_fits((config.input_size // config.patch_size) ** 2, config.width, config.heads, config.hidden)
    plain = config.qk_norm != "full_width" and config.attention == "auto" and not isinstance(model.blocks[0], PackedBlock)
    plain &= config.mlp == "swiglu" and not config.linear_bias  # the packed block has neither GELU nor biases in the attention
    if bf16 and fits and plain and native_bf16(device) and kernels.dit_block_is_fast(device):
        model.register_state_dict_pre_hook(_refuse_state)
        for i, block in enumerate(model.blocks):
            model.blocks[i] = PackedBlock(cast(Block, block))
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    setattr(parent, name, PackedLinear(child))
    return None
