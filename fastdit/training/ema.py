"""Exponential moving average of the fp32 master weights, sharded as ZeRO shards them: no communication, no second copy."""

import torch
import torch.distributed as dist
from torch import Tensor

from fastdit.distributed import World
from fastdit.training.engine import Fragment
from fastdit.training.optimizer import OneRankAdamW


class ShardedEma:
    """fp32 averages of the fragments that this rank owns.

    After update n (from 0): ema ← d·ema + (1−d)·master with d = min(decay, (1+n)/(10+n)); the ramp lets the average forget
    the random start of a short run.
    """

    def __init__(self, fragments: list[Fragment], decay: float, *more: float, optimizer: OneRankAdamW | None = None) -> None:
        """more: decays of further averages, kept beside the first. optimizer: of one rank, whose steps are to update the averages
        themselves, in their pass over the masters; the fragments are its masters."""
        self.fragments, self.updates, self.optimizer = fragments, 0, optimizer
        self.kinds = {"ema": decay, **{f"ema_{d:g}": d for d in more}}  # as they are called in checkpoints
        self.all = {kind: [f.master.clone() for f in fragments] for kind in self.kinds}
        if optimizer:
            optimizer.averages = list(self.all.values())

    @property
    def averages(self) -> list[Tensor]:
        """Of the first decay."""
        return self.all["ema"]

    def _weights(self) -> list[float]:
        """Of the masters in each average, in the next update."""
        ramp = (1 + self.updates) / (10 + self.updates)
        return [1 - min(decay, ramp) for decay in self.kinds.values()]

    def announce(self) -> None:
        """Before a step that `update` follows if it is taken: where the optimizer updates the averages, it does so in this step."""
        if self.optimizer:
            self.optimizer.average_weights = self._weights()

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages after a step, or count that the optimizer did."""
        weights = self._weights()
        self.updates += 1
        if self.optimizer or not self.fragments:  # torch._foreach_* refuses empty lists, and a rank may own nothing
            return
        for averages, weight in zip(self.all.values(), weights, strict=True):
            torch._foreach_lerp_(averages, [f.master for f in self.fragments], weight)


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
