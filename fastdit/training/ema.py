"""Exponential moving averages of the fp32 master weights, sharded as ZeRO shards them: no communication, no second copy."""

import torch
import torch.distributed as dist
from torch import Tensor

from fastdit.distributed import World
from fastdit.training.engine import Fragment
from fastdit.training.optimizer import OneRankOptimizer


class ShardedEma:
    """fp32 averages of the fragments that this rank owns.

    Update n (from 0) sets ema ← d·ema + (1−d)·master with d = min(decay, (1+n)/(10+n)). The ramp lets the average forget the random
    initial weights early.
    """

    def __init__(self, fragments: list[Fragment], decay: float, *more: float, optimizer: OneRankOptimizer | None = None) -> None:
        """fragments: what this rank owns. more: decays of further averages. optimizer: that of a rank without ZeRO, whose
        masters are the fragments; it updates the averages itself, in its pass over the masters."""
        self.fragments = fragments
        self.updates = 0
        self.optimizer = optimizer
        self.decays = {"ema": decay, **{f"ema_{d:g}": d for d in more}}  # by the names that checkpoints use
        self.all = {kind: [f.master.clone() for f in fragments] for kind in self.decays}
        if optimizer:
            optimizer.averages = list(self.all.values())

    @property
    def averages(self) -> list[Tensor]:
        """The averages of the first decay, one per fragment."""
        return self.all["ema"]

    def _weights(self) -> list[float]:
        """Return the weight of the masters in each average, for the next update."""
        ramp = (1 + self.updates) / (10 + self.updates)
        return [1 - min(decay, ramp) for decay in self.decays.values()]

    def announce(self) -> None:
        """Announce before a step that `update` follows if it is applied: an optimizer that updates the averages does so in it."""
        if self.optimizer:
            self.optimizer.average_weights = self._weights()

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages after a step, or count the update that the optimizer made."""
        weights = self._weights()
        self.updates += 1
        if self.optimizer or not self.fragments:  # a rank may own nothing, and torch._foreach_* refuses empty lists
            return
        for averages, weight in zip(self.all.values(), weights, strict=True):
            torch._foreach_lerp_(averages, [f.master for f in self.fragments], weight)


@torch.no_grad()
def gather(ema: ShardedEma, shapes: dict[str, torch.Size], world: World) -> dict[str, Tensor]:
    """Return the complete fp32 averages of the first decay on every rank, under ZeRO by one all-reduce per parameter.

    shapes: of all parameters, by name. All ranks must call it.
    """
    pieces: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in shapes}
    for fragment, average in zip(ema.fragments, ema.averages, strict=True):
        pieces[fragment.name].append((fragment.start, average))
    parameters = {}
    for name, shape in shapes.items():
        flat = torch.zeros(shape.numel(), device=world.device)
        for start, average in pieces[name]:
            flat[start : start + average.numel()] = average
        if not ema.optimizer:  # else each rank has all of it
            dist.all_reduce(flat)
        parameters[name] = flat.view(shape)
    return parameters
