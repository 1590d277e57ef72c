"""Triton's kernels run in its interpreter where there is no GPU, on one thread: both must be decided before triton is imported.

FASTDIT_NO_VALUES=1 is for a CUDA host whose kernels do nothing (the CUDA builds of torch and triton on libraries that only answer):
the tests then call, compile and launch everything, compare shapes and dtypes, and no values. Tests that assert on values in their
own words take the fixture `values` and are skipped.
"""

import os
from collections.abc import Callable

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
NO_VALUES = os.environ.get("FASTDIT_NO_VALUES") == "1"


def pytest_report_header() -> str | None:
    return "FASTDIT_NO_VALUES=1: kernel tests launch everything and compare no values" if NO_VALUES else None


def same_layout(actual: torch.Tensor, expected: torch.Tensor, **tolerances: float) -> bool:
    """In place of torch.equal and torch.testing.assert_close where no kernel computes."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    return True


opcheck = torch.library.opcheck


def fakes_have_the_layout(op: Callable, arguments: tuple, **options) -> None:
    """In place of torch.library.opcheck there: the other checks compare values."""
    opcheck(op, arguments, test_utils="test_faketensor")


@pytest.fixture(scope="session", autouse=True)
def no_values():
    """Where FASTDIT_NO_VALUES=1, which a device that computes refuses."""
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
    """For tests that assert on values in their own words."""
    if NO_VALUES:
        pytest.skip("needs values, and FASTDIT_NO_VALUES=1")


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
    assert NO_VALUES or all(buffer[:band].isnan().all() and buffer[-band:].isnan().all() for buffer in buffers), (
        "a store outside of its tensor"
    )


def _between_nans(t: torch.Tensor) -> torch.Tensor:
    """The same values and shape, as a view of a tensor whose rows, and whose first dimension, go on with NaN on both sides."""
    wide = t.new_full((t.shape[0] + 2, *t.shape[1:-1], t.shape[-1] + 32), float("nan"))
    view = wide[1:-1, ..., 16:-16]
    return view.copy_(t)


@pytest.fixture(scope="session")
def between_nans():
    return _between_nans
