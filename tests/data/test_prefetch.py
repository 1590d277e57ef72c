"""The ring of host buffers: none is overwritten while it is copied."""

import threading

import pytest
import torch

from fastdit.data import prefetch


class LateCopier:
    """Copies that read their source late, as a device's do: 20 ms after they were asked for."""

    def __init__(self):
        self.late = []

    def __call__(self, slot):
        copy = torch.full_like(slot, torch.nan)
        timer = threading.Timer(0.02, lambda: copy.copy_(slot))
        timer.start()
        self.late.append(timer)
        return copy, timer.join


@pytest.mark.parametrize("waits", [True, False])
def test_a_buffer_is_not_written_while_its_copy_runs(waits):
    """With a copier that is late; the same test fails when the ring does not wait."""
    ring = prefetch.Ring(lambda position, slot: slot.fill_(position), (1000,), torch.float32, torch.device("cpu"))
    late = LateCopier()
    ring.copy = late if waits else lambda slot: (late(slot)[0], lambda: None)
    batches = [ring.next(position) for position in [*range(10), *range(5, 8)]]
    for timer in late.late:
        timer.join()
    right = [bool((batch == position).all()) for batch, position in zip(batches, [*range(10), *range(5, 8)], strict=True)]
    assert all(right) == waits
