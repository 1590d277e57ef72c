"""The launcher's dictionary of compiled kernels, with a kernel that only notes how it is launched."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fastdit.kernels import library


class Tensor(torch.Tensor):
    """A CPU tensor that says it is on the first CUDA device."""

    def get_device(self) -> int:
        return 0


class Kernel:
    """What Triton would be asked for, and what its compiled kernel would be launched with."""

    arg_names = ("x", "y", "n", "ROWS")

    def __init__(self) -> None:
        self.asked, self.launched = [], []

    def __getitem__(self, grid):
        def ask(*args, **options):
            self.asked.append((grid, args, options))
            run = lambda *launched: self.launched.append(launched)
            return SimpleNamespace(run=run, function="function", packed_metadata="metadata")

        return ask


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: "stream", raising=False)
    monkeypatch.setattr(library, "_compiled", {})
    return Kernel()


def tensor(dtype=torch.float32, offset=0):
    return torch.zeros(64, dtype=dtype).as_subclass(Tensor)[offset:]


def test_a_second_launch_asks_triton_nothing(kernel):
    x, y = tensor(), tensor()
    library.launch(kernel, (3,), x, x, y, 5, ROWS=2, num_warps=4)
    assert kernel.asked == [((3,), (x, y, 5), {"ROWS": 2, "num_warps": 4, "enable_fp_fusion": True})] and not kernel.launched
    library.launch(kernel, (7, 2), x, y, x, 5, ROWS=2, num_warps=4)
    assert len(kernel.asked) == 1
    numbers = y.data_ptr(), x.data_ptr(), 5, 2  # the kernel's arguments in its order; ROWS was given by name
    assert kernel.launched == [(7, 2, 1, "stream", "function", "metadata", None, None, None, *numbers)]


@pytest.mark.parametrize(
    "other",
    [
        dict(x=tensor(torch.bfloat16)),
        dict(x=tensor(offset=1)),  # no longer on a multiple of 16 bytes
        dict(y=None),
        dict(n=6),
        dict(rows=4),
        dict(warps=8),
    ],
    ids=lambda other: next(iter(other)),
)
def test_whatever_may_be_another_kernel_is_asked_for(kernel, other):
    def launch(x, y, n=5, rows=2, warps=4):
        library.launch(kernel, (1,), tensor(), x, y, n, ROWS=rows, num_warps=warps)

    first = dict(x=tensor(), y=tensor())
    for given in (first, {**first, **other}, first, {**first, **other}):
        launch(**given)
    assert len(kernel.asked) == 2 and len(kernel.launched) == 2


def test_another_device_than_the_current_one_is_made_current(kernel, monkeypatch):
    notes = []

    @contextmanager
    def device_of(like):
        notes.append("in")
        yield
        notes.append(len(kernel.asked))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    library.launch(kernel, (1,), tensor(), tensor(), None, 5, ROWS=2)
    assert notes == ["in", 1]
