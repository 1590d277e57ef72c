"""Triton's kernels run in its interpreter here, on one thread: both must be decided before triton is imported."""

import os

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def assert_close(request):
    """assert_close(actual, truth, eager, terms=1): the derived tolerance of all kernel tests.

    max|actual − truth| <= 2·max|eager − truth| + atol, where `truth` is the fp64 reference of the same inputs and `eager` the
    naive chain of PyTorch ops with each step rounded to the dtype of `actual`. atol is 4 units of the last place of the largest
    value in fp32, growing as √terms for a sum; and where Triton's interpreter stores bf16, which it truncates instead of
    rounding, one unit of bf16.
    """
    interpreted = request.node.callspec.params.get("backend") != "cpp" and not torch.cuda.is_available()

    def check(actual: torch.Tensor, truth: torch.Tensor, eager: torch.Tensor, terms: int = 1) -> None:
        assert actual.shape == truth.shape == eager.shape
        assert actual.dtype == eager.dtype
        if not truth.numel():
            return
        truth = truth.double()
        largest = truth.abs().max().item()
        atol = 4 * terms**0.5 * torch.finfo(torch.float32).eps * largest
        if actual.dtype == torch.bfloat16 and interpreted:
            atol += torch.finfo(torch.bfloat16).eps * largest
        error, eager_error = ((t.double() - truth).abs().max().item() for t in (actual, eager))
        assert error <= 2 * eager_error + atol, f"error {error:.3g}, eager {eager_error:.3g}, atol {atol:.3g}"

    return check


@pytest.fixture
def guarded_memory(monkeypatch):
    """What ops allocate with new_empty is full of NaN and lies between two bands of NaN, which must be whole at the end: neither
    the interpreter nor a GPU reports a store past the end, or a read of what was never written."""
    allocate, band, buffers = torch.Tensor.new_empty, 2**16, []  # wider than any tile

    def guarded(self, size, **options):
        if "device" in options or not options.get("dtype", self.dtype).is_floating_point:
            return allocate(self, size, **options)  # the interpreter's own
        size = torch.Size((size,) if isinstance(size, int) else size)
        buffer = allocate(self, size.numel() + 2 * band, **options).fill_(float("nan"))
        buffers.append(buffer)
        return buffer[band : band + size.numel()].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    yield
    assert all(buffer[:band].isnan().all() and buffer[-band:].isnan().all() for buffer in buffers), "a store outside of its tensor"


def _between_nans(t: torch.Tensor) -> torch.Tensor:
    """The same values and shape, as a view of a tensor whose rows, and whose first dimension, go on with NaN on both sides."""
    wide = t.new_full((t.shape[0] + 2, *t.shape[1:-1], t.shape[-1] + 32), float("nan"))
    view = wide[1:-1, ..., 16:-16]
    return view.copy_(t)


@pytest.fixture(scope="session")
def between_nans():
    return _between_nans
