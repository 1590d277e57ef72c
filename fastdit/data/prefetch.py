"""Host memory to device: batches that a thread fills ahead, in pinned memory on CUDA, copied without waiting."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

SLOTS = 3  # host buffers: one is copied while the others are filled

Wait = Callable[[], None]  # blocks the host until a copy is done
Copy = Callable[[Tensor], tuple[Tensor, Wait]]


def _no_wait() -> None:
    pass


def copy_to(device: torch.device) -> Copy:
    """Return a function that starts to copy a host tensor to the device.

    It returns the copy, which later work on the device waits for, and a Wait after which the source may be overwritten.
    """

    def to_cuda(slot: Tensor) -> tuple[Tensor, Wait]:
        copy = slot.to(device, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(device))
        return copy, done.synchronize

    def to_cpu(slot: Tensor) -> tuple[Tensor, Wait]:
        return slot.clone(), _no_wait

    return to_cuda if device.type == "cuda" else to_cpu


class Ring:
    """Batches in the order of their positions, through a ring of SLOTS host buffers."""

    def __init__(
        self, fill: Callable[[int, Tensor], None], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        """fill(position, slot) writes the batch at a position to a host tensor of `shape`; it is called in a thread."""
        self.fill = fill
        self.copy = copy_to(device)
        self.slots = [torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda") for _ in range(SLOTS)]
        self.copied: list[Wait] = [_no_wait] * SLOTS  # by slot: after it the slot may be overwritten
        self.position = -1
        self._filling: deque[Future] = deque()
        self._pool = ThreadPoolExecutor(1)

    def next(self, position: int) -> Tensor:
        """Return the batch at `position` on the device. A batch that follows on the last one is already filled."""
        if position != self.position:
            for future in self._filling:
                future.result()
            self._filling = deque(self._pool.submit(self._fill, position + i) for i in range(SLOTS))
        slot = self._filling.popleft().result()
        batch, self.copied[slot] = self.copy(self.slots[slot])
        self.position = position + 1
        self._filling.append(self._pool.submit(self._fill, position + SLOTS))
        return batch

    def _fill(self, position: int) -> int:
        slot = position % SLOTS
        self.copied[slot]()
        self.fill(position, self.slots[slot])
        return slot
