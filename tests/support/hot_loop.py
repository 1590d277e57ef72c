"""HotLoopGuard: counts the operations that PyTorch dispatches, to find those that a training step must not run."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

# Operations that read a device value on the host: on a GPU each waits for all earlier work.
SYNCS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal")


class HotLoopGuard(TorchDispatchMode):
    """Counts operations by name in `counts`; `large_slices` lists backward slices of tensors with at least `columns` columns,
    each of which would zero-fill and add the whole tensor."""

    def __init__(self, columns: int = 1 << 62) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.columns = columns
        self.large_slices: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        self.counts[name] += 1
        out = func(*args, **(kwargs or {}))
        if name in ("aten.slice_backward", "aten.select_backward") and out[0].numel() >= self.columns:
            self.large_slices.append((name, tuple(out.shape)))
        return out

    @property
    def syncs(self) -> int:
        return sum(self.counts[name] for name in SYNCS)
