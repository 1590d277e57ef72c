"""The op tests: one thread, and the tolerance that they share.

FASTDIT_NO_VALUES=1 is for a CUDA host whose kernels do nothing (the CUDA builds of torch and triton on libraries that only answer):
the tests then call, compile and launch everything, and compare shapes and dtypes but no values. Tests that compare values, other
than by torch.equal and assert_close, take the fixture `values` and are skipped.
"""

import os
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)
NO_VALUES = os.environ.get("FASTDIT_NO_VALUES") == "1"


def pytest_report_header() -> str | None:
    return "FASTDIT_NO_VALUES=1: kernel tests launch everything and compare no values" if NO_VALUES else None


def same_layout(actual: torch.Tensor, expected: torch.Tensor, **tolerances: float) -> bool:
    """Replace torch.equal and torch.testing.assert_close if no kernel computes."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    return True


opcheck = torch.library.opcheck


def fakes_have_the_layout(op: Callable, arguments: tuple, **options) -> None:
    """Replace torch.library.opcheck if no kernel computes: its other checks compare values."""
    opcheck(op, arguments, test_utils="test_faketensor")


@pytest.fixture(scope="session", autouse=True)
def no_values():
    """Compare no values if FASTDIT_NO_VALUES=1; refused on a device that computes."""
    if not NO_VALUES:
        yield
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.ones((), device=device).item() == 1:
        pytest.exit(f"FASTDIT_NO_VALUES=1, but {device} computes: unset it", returncode=2)
    torch.backends.cuda.enable_cudnn_sdp(False)  # its front end asks the driver for more than such a host answers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "equal", same_layout)
        patch.setattr(torch.testing, "assert_close", same_layout)
        patch.setattr(torch.library, "opcheck", fakes_have_the_layout)
        yield


@pytest.fixture
def values():
    """Skip a test that compares values by itself if FASTDIT_NO_VALUES=1."""
    if NO_VALUES:
        pytest.skip("needs values, and FASTDIT_NO_VALUES=1")


@pytest.fixture
def assert_close(request):
    """assert_close(actual, truth, eager, terms=1): the derived tolerance of all kernel tests.

    max|actual − truth| <= 2·max|eager − truth| + atol, where `truth` is the fp64 reference of the same inputs and `eager` the
    naive chain of PyTorch ops with each step rounded to the dtype of `actual`. atol is 4 units in the last place of the largest
    value in fp32, growing as √terms for a sum; and one unit of bf16 if Triton's interpreter stores bf16, which it truncates instead
    of rounding.
    """
    interpreted = request.node.callspec.params.get("backend") != "cpp" and not torch.cuda.is_available()

    def check(actual: torch.Tensor, truth: torch.Tensor, eager: torch.Tensor, terms: int = 1) -> None:
        assert actual.shape == truth.shape == eager.shape
        assert actual.dtype == eager.dtype
        if NO_VALUES or not truth.numel():
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
    """Fill what ops allocate with new_empty with NaN, between two bands of NaN that must be untouched at the end: neither the
    interpreter nor a GPU reports a store past the end or a read of memory that was never written."""
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
    assert NO_VALUES or all(buffer[:band].isnan().all() and buffer[-band:].isnan().all() for buffer in buffers), (
        "a store outside of its tensor"
    )


def _between_nans(t: torch.Tensor) -> torch.Tensor:
    """Return the same values and shape as a view of a tensor that has NaN on both sides of its rows and of its first dimension."""
    wide = t.new_full((t.shape[0] + 2, *t.shape[1:-1], t.shape[-1] + 32), float("nan"))
    view = wide[1:-1, ..., 16:-16]
    return view.copy_(t)


@pytest.fixture(scope="session")
def between_nans():
    return _between_nans


class RecordedOps(TorchDispatchMode):
    """The names of all operators that run inside the `with` block, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__.partition(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="session")
def recorded_ops():
    return RecordedOps
