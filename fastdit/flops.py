"""FLOPs and activations of a model, counted on the meta device, which computes shapes only. B images, T tokens, H width."""

import dataclasses
import functools
import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit import kernels
from fastdit.config import ModelConfig
from fastdit.model import Attention, DiT, Mlp


class Live(TorchDispatchMode):
    """Counts the bytes that live tensors take, from their creation to the end of their storage."""

    def __init__(self, ignored: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
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
    """One forward and backward of a batch on the meta device."""

    forward: int  # FLOPs of matmuls and attention
    backward: int  # without what is recomputed
    blocks_forward: int  # the share of the blocks in `forward`
    kept: int  # bytes that the forward leaves for the backward
    kept_block: int  # of them a block's
    peak: int  # most bytes of activations and their gradients at once
    parameters: int


@functools.cache
def walk(model: ModelConfig, batch: int, dtype: torch.dtype, recompute: str) -> Walk:
    """Count a forward and backward of `batch` images. recompute: "none" | "light" | "full", as train.recompute.

    FLOPs: 2·M·N·K of every Linear, and again for each of its two gradients that is needed; 4·T²·H of attention and twice that
    backward (a fused backward's second score matmul is not counted: model FLOPs). Parameters' gradients are not in `peak`.
    """
    if model.attention == "flash":  # keeps the same as sdpa's fused kernels
        model = dataclasses.replace(model, attention="sdpa")
    with torch.device("meta"):
        dit = DiT(model)
    dit.to("meta", dtype).train().set_recompute(recompute)
    for p in dit.parameters():  # ZeRO moves each gradient into a bucket
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    live = Live([*dit.parameters(), *dit.buffers()])
    forward, backward, edges = 0, 0, []

    def linear(module: nn.Linear, inputs: tuple, out: Tensor) -> None:
        nonlocal forward, backward
        flops = 2 * out.numel() * module.in_features
        forward += flops
        backward += flops * (1 + inputs[0].requires_grad)

    def mlp(module: Mlp, inputs: tuple, out: Tensor) -> None:  # which calls ops on its Linears' weights
        nonlocal forward, backward
        flops = 2 * (out.numel() // out.shape[-1]) * (module.up.weight.numel() + module.down.weight.numel())
        forward += flops
        backward += 2 * flops

    def attention(module: Attention, inputs: tuple, out: Tensor) -> None:
        nonlocal forward, backward
        B, T, H = out.shape
        forward += 4 * B * T * T * H
        backward += 8 * B * T * T * H

    for module in dit.modules():
        for kind, count in ((nn.Linear, linear), (Mlp, mlp), (Attention, attention)):
            if isinstance(module, kind):
                module.register_forward_hook(count)
    mark = lambda *_: edges.append((live.now, forward))
    dit.blocks[0].register_forward_pre_hook(mark)
    dit.blocks[-1].register_forward_hook(mark)
    x = torch.empty(batch, model.in_channels, model.input_size, model.input_size, device="meta")
    t, labels = torch.empty(batch, device="meta"), torch.empty(batch, dtype=torch.int64, device="meta")
    with kernels.backend("triton"), live:
        v = dit(x, t, labels)
        kept, first_pass = live.now, (forward, backward)
        (before, flops_before), (after, flops_after) = edges
        v.backward(torch.empty_like(v))
    return Walk(*first_pass, flops_after - flops_before, kept, (after - before) // len(dit.blocks), live.peak, dit.num_parameters)
