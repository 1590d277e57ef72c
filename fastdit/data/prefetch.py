"""Host memory -> device: batches that a thread fills ahead, in pinned memory on CUDA, copied without waiting."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

SLOTS = 3

Copy = Callable[[Tensor], tuple[Tensor, Callable[[], None]]]


def copy_to(device: torch.device) -> Copy:
    """A function that begins to copy a host tensor to the device; it returns the copy, which later work on the device waits for,
    and what waits on the host until the source may be written again."""

    def to_cuda(slot: Tensor) -> tuple[Tensor, Callable[[], None]]:
        there = slot.to(device, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(device))
        return there, done.synchronize

    return to_cuda if device.type == "cuda" else lambda slot: (slot.clone(), lambda: None)


class Ring:
    """Batches in the order of their positions, through a ring of host buffers."""

    def __init__(
        self, fill: Callable[[int, Tensor], None], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        """fill(position, slot) writes a batch of `shape` into a host tensor, in a thread."""
        self.fill, self.copy = fill, copy_to(device)
        self.slots = [torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda") for _ in range(SLOTS)]
        self.free: list[Callable[[], None]] = [lambda: None] * SLOTS  # waits until a slot may be written
        self._pool, self._filling, self.position = ThreadPoolExecutor(1), deque(), -1

    def next(self, position: int) -> Tensor:
        """The batch at `position` on the device. Positions that follow on one another are there at once."""
        if position != self.position:
            for future in self._filling:
                future.result()
            self._filling: deque[Future] = deque(self._pool.submit(self._fill, position + i) for i in range(SLOTS))
        slot = self._filling.popleft().result()
        batch, self.free[slot] = self.copy(self.slots[slot])
        self.position = position + 1
        self._filling.append(self._pool.submit(self._fill, position + SLOTS))
        return batch

    def _fill(self, position: int) -> int:
        slot = position % SLOTS
        self.free[slot]()
        self.fill(position, self.slots[slot])
        return slot
