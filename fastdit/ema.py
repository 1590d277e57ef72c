"""Exponential moving average of the fp32 master weights, sharded as ZeRO shards them: no communication, no second copy."""

import torch
import torch.distributed as dist
from torch import Tensor

from fastdit.engine import Fragment, World


class ShardedEma:
    """fp32 averages of the fragments that this rank owns.

    After update n (from 0): ema ← d·ema + (1−d)·master with d = min(decay, (1+n)/(10+n)); the ramp lets the average forget
    the random start of a short run.
    """

    def __init__(self, fragments: list[Fragment], decay: float) -> None:
        self.fragments, self.decay, self.updates = fragments, decay, 0
        self.averages = [f.master.clone() for f in fragments]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        if self.averages:  # torch._foreach_* refuses empty lists, and a rank may own nothing
            torch._foreach_lerp_(self.averages, [f.master for f in self.fragments], 1 - decay)


@torch.no_grad()
def gather(ema: ShardedEma, shapes: dict[str, torch.Size], world: World) -> dict[str, Tensor]:
    """Whole fp32 EMA parameters on every rank, one all-reduce a parameter. All ranks must call it."""
    own: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in shapes}
    for fragment, average in zip(ema.fragments, ema.averages, strict=True):
        own[fragment.name].append((fragment.start, average))
    whole = {}
    for name, shape in shapes.items():
        flat = torch.zeros(shape.numel(), device=world.device)
        for start, average in own[name]:
            flat[start : start + average.numel()] = average
        dist.all_reduce(flat)
        whole[name] = flat.view(shape)
    return whole
