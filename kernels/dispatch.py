"""Which implementation of an op runs, and the checks that every op makes before it runs one."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from triton import knobs

from .library import EXTENSION

BACKENDS = ("auto", "triton", "cpp", "reference")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# A plain global, not a ContextVar: a compiled function guards on it and re-specialises when it changes.
_setting = os.environ.get("FASTDIT_KERNELS", "auto")
# Triton decides at decoration, so at import, whether its kernels are interpreted; so does this.
INTERPRETED = bool(knobs.runtime.interpret)


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"kernel backend {name!r} is unknown: choose one of {', '.join(BACKENDS)}")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Set the process-wide backend inside a `with` block: "auto" | "triton" | "cpp" | "reference".

    The environment variable FASTDIT_KERNELS sets the default, checked when an op runs. Raises ValueError for an
    unknown name.
    """
    global _setting
    _check_name(name)
    before, _setting = _setting, name
    try:
        yield
    finally:
        _setting = before


def keep_backend() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the contexts for torch.utils.checkpoint(…, context_fn=keep_backend): the recomputation runs on the backend of the
    forward, even if the backward runs outside of the `with backend(…)` block."""
    return nullcontext(), backend(_setting)


def backend_in_use(device: torch.device) -> str:
    """Return the backend of ops on tensors of `device`: "triton", "cpp" or "reference".

    `auto` is Triton on CUDA, C++ on a CPU if the extension was built, and else the reference. On the meta device every backend
    gives its shapes. Raises RuntimeError if the chosen backend cannot run on `device`, ValueError if FASTDIT_KERNELS names no
    backend.
    """
    _check_name(_setting)
    if device.type == "meta":
        return "reference" if _setting == "auto" else _setting
    if _setting == "auto":
        return "triton" if device.type == "cuda" else "cpp" if device.type == "cpu" and EXTENSION else "reference"
    if _setting == "triton" and device.type != "cuda" and not (device.type == "cpu" and INTERPRETED):
        raise RuntimeError(f"kernel backend 'triton' cannot run on {device.type}: set TRITON_INTERPRET=1 (CPU) or use 'auto'")
    if _setting == "cpp" and not EXTENSION:
        raise RuntimeError("kernel backend 'cpp' is not built: install with FASTDIT_BUILD_EXT=1, or use 'auto' or 'reference'")
    if _setting == "cpp" and device.type != "cpu":
        raise RuntimeError(f"kernel backend 'cpp' cannot run on {device.type}: use 'auto'")
    return _setting


def choose_backend(op: str, *tensors: Tensor | None) -> str:
    """Return the backend for one call of `op`. Raises the errors of `backend_in_use`, and ValueError for fp64 unless the backend is
    the reference."""
    given = [t for t in tensors if t is not None]
    name = backend_in_use(given[0].device)
    if name != "reference" and any(t.dtype == torch.float64 for t in given):
        raise ValueError(f"{op}: the {name} kernels do not compute in float64: use float32 or kernels.backend('reference')")
    return name


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that an op computes in: fp32, or fp64 for fp64 inputs (references only)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_float(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are floating point and lie on one device."""
    first = next(t for t in tensors.values() if t is not None)
    for name, t in tensors.items():
        if t is None:
            continue
        if t.dtype not in FLOATS:
            raise ValueError(f"{op}: {name} has dtype {t.dtype}, but it must be a floating-point tensor")
        if t.device != first.device:
            raise ValueError(f"{op}: {name} is on {t.device}, but the first input is on {first.device}: move it there")


def check_shape(op: str, name: str, t: Tensor, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless `t` has exactly the expected shape."""
    if t.shape != expected:
        raise ValueError(f"{op}: {name} has shape {list(t.shape)}, but {list(expected)} is needed here")


def check_tokens(op: str, name: str, x: Tensor) -> tuple[int, int, int]:
    """Raise ValueError unless `x` is [B,T,H]; return (B, T, H)."""
    if x.ndim != 3:
        raise ValueError(f"{op}: {name} has shape {list(x.shape)}, but [batch, tokens, width] is needed")
    B, T, H = x.shape
    return B, T, H


def check_no_grad(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError if a tensor that the op does not differentiate requires grad."""
    for name, t in tensors.items():
        if t is not None and t.requires_grad:
            raise ValueError(f"{op}: {name} requires grad, but the op does not differentiate it: pass {name}.detach()")
