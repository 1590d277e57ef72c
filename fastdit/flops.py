"""FLOPs and activations of a model, counted on the meta device, which computes shapes only. B images, T tokens, H width."""

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit import kernels
from fastdit.config import ModelConfig
from fastdit.model import Attention, DiT, Mlp


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors, from their creation to the end of their storage."""

    def __init__(self, ignored: list[Tensor]) -> None:
        """ignored: tensors that exist already and do not count."""
        super().__init__()
        self.now = 0
        self.peak = 0
        self.seen = weakref.WeakSet(t.untyped_storage() for t in ignored)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and t.untyped_storage() not in self.seen:
                storage = t.untyped_storage()
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


class Walk(NamedTuple):
    """Counts of one forward and backward of a batch."""

    forward: int  # FLOPs of matmuls and attention
    backward: int  # FLOPs, without those of recomputation
    blocks_forward: int  # FLOPs of all blocks in `forward`
    saved: int  # bytes that the forward saves for the backward
    saved_per_block: int
    peak: int  # most bytes of activations and their gradients at once
    parameters: int  # number of parameters


@functools.cache
def walk(model: ModelConfig, batch: int, dtype: torch.dtype, recompute: str) -> Walk:
    """Count a training forward and backward of `batch` images, of model.keep_tokens of the tokens between the dense blocks, with
    parameters in `dtype`. recompute: "none" | "light" | "full", as train.recompute.

    FLOPs: 2·M·N·K per Linear, and again for each of its two gradients that is needed; 4·T²·H per attention and twice that in the
    backward (the second score matmul of a fused backward is not counted: these are model FLOPs). Gradients of parameters do not
    count in `peak`.
    """
    if model.attention == "flash":  # saves the same as sdpa's fused kernels
        model = dataclasses.replace(model, attention="sdpa")
    with torch.device("meta"):
        dit = DiT(model)
    dit.to("meta", dtype).train().set_recompute(recompute)

    def drop_gradient(p: nn.Parameter) -> None:  # as ZeRO does, which moves each gradient into a bucket
        p.grad = None

    for p in dit.parameters():
        p.register_post_accumulate_grad_hook(drop_gradient)
    live = LiveBytes([*dit.parameters(), *dit.buffers()])
    forward, backward = 0, 0  # FLOPs
    block_edges = []  # (live bytes, forward FLOPs) before each block and after it

    def linear(module: nn.Linear, inputs: tuple, out: Tensor) -> None:
        nonlocal forward, backward
        flops = 2 * out.numel() * module.in_features
        forward += flops
        backward += flops * (1 + inputs[0].requires_grad)

    def mlp(module: Mlp, inputs: tuple, out: Tensor) -> None:  # it calls ops on its Linears' weights, not the Linears
        nonlocal forward, backward
        flops = 2 * (out.numel() // out.shape[-1]) * (module.up.weight.numel() + module.down.weight.numel())
        forward += flops
        backward += 2 * flops

    def attention(module: Attention, inputs: tuple, out: Tensor) -> None:
        nonlocal forward, backward
        B, T, H = out.shape
        forward += 4 * B * T * T * H
        backward += 8 * B * T * T * H

    counters: dict[type[nn.Module], Callable] = {nn.Linear: linear, Mlp: mlp, Attention: attention}
    for module in dit.modules():
        for kind, count in counters.items():
            if isinstance(module, kind):
                module.register_forward_hook(count)

    def mark_edge(*_) -> None:
        block_edges.append((live.now, forward))

    for block in dit.blocks:
        block.register_forward_pre_hook(mark_edge)
        block.register_forward_hook(mark_edge)
    x = torch.empty(batch, model.in_channels, model.input_size, model.input_size, device="meta")
    t, labels = torch.empty(batch, device="meta"), torch.empty(batch, dtype=torch.int64, device="meta")
    chosen = ()
    if model.dense_blocks:
        tokens = torch.empty(batch, model.kept_tokens, dtype=torch.int64, device="meta")
        chosen = tokens, torch.empty(batch, dtype=torch.bool, device="meta")
    with kernels.backend("triton"), live:
        v = dit(x, t, labels, *chosen)
        saved = live.now
        forward_flops, backward_flops = forward, backward  # now: recomputation runs the hooks again in the backward
        edges = block_edges.copy()
        v.backward(torch.empty_like(v))
    return Walk(
        forward=forward_flops,
        backward=backward_flops,
        blocks_forward=sum(after[1] - before[1] for before, after in zip(edges[::2], edges[1::2], strict=True)),
        saved=saved,
        saved_per_block=(edges[-1][0] - edges[0][0]) // len(dit.blocks),
        peak=live.peak,
        parameters=dit.num_parameters,
    )
