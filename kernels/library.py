"""The registration of ops with torch.library, the launch of Triton kernels, and the C++ extension.

An op has two library ops for each backend, `fastdit::<op>_forward_<backend>` and `fastdit::<op>_backward_<backend>`: functional
(they allocate their outputs, and no output aliases an input or another output), opaque to the compiler, without
registered autograd. The public function joins the pair with a torch.autograd.Function. Others measured that the dispatcher takes
6 us per call this way, 11 us with `custom_op` and 25 us more with a registered autograd (pytorch #177109, attention-gym #302).
Opaque ops cost their signature several times over: schema, fake, Triton, C++, reference and public function each state it.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

_LIBRARY = torch.library.Library("fastdit", "FRAGMENT")
# The kernels take strides as they come: Inductor must not change the layout of what it feeds them.
_TAGS = (getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),)

# The C++ kernels (csrc/), if setup.py built them: torch.ops.fastdit_cpp.<op>_forward and _backward write into the tensors they get.
EXTENSION = next(Path(__file__).parent.glob("_cpp*.so"), None)
if EXTENSION:
    try:
        torch.ops.load_library(EXTENSION)
    except OSError as error:
        raise ImportError(f"{EXTENSION} does not fit this torch {torch.__version__}: run launch/install.sh again") from error
cpp = torch.ops.fastdit_cpp
# cpp.isa() is the index of the one in use, which the processor and FASTDIT_ISA decide
INSTRUCTION_SETS = ("baseline", "AVX2", "AVX-512", "AMX")


def register(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Decorator: register a function as the library op `fastdit::<schema>`; `fake` returns tensors of its
    outputs' shapes, dtypes and strides without computing."""
    name = schema.partition("(")[0]

    def decorate(function: Callable) -> Callable:
        _LIBRARY.define(schema, tags=_TAGS)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastdit::{name}", fake, lib=_LIBRARY)
        return function

    return decorate


def find(name: str, backend: str) -> Callable:
    """Return the library op `fastdit::<name>_<backend>`, for example find("swiglu_forward", "triton")."""
    return getattr(torch.ops.fastdit, f"{name}_{backend}")


# (kernel, device, options, dtypes and alignments of pointers, numbers) -> what a launch needs of Triton's compiled kernel
_compiled: dict[tuple, tuple] = {}


def launch(kernel: Callable, grid: tuple[int, ...], like: Tensor, *args, **options) -> None:
    """Run a Triton kernel on the device of `like`, which need not be the current one.

    Most of the time of Triton's own launch goes into choosing the compiled kernel for the arguments. A second launch with the same
    dtypes, alignments, numbers and options reads it from a dictionary, whose key is finer than Triton's own, so that it never
    selects another kernel. Pointers are passed as numbers, which spares a query of the driver per pointer.
    enable_fp_fusion, a·b+c with one rounding, is passed explicitly: Triton 3.10 changes its default, which changes the last bit.
    """
    index = like.get_device()
    if index < 0 or index != torch.cuda.current_device():  # the interpreter; another device
        with torch.cuda.device_of(like):
            kernel[grid](*args, **options, enable_fp_fusion=True)
        return
    key, values = [id(kernel), index, *options.values()], []
    for value in args:
        if isinstance(value, Tensor):
            value = value.data_ptr()
            key += (args[len(values)].dtype, value % 16)
        else:
            key.append(value)
        values.append(value)
    launcher = _compiled.get(key := tuple(key))
    if launcher is None:
        compiled = kernel[grid](*args, **options, enable_fp_fusion=True)
        if compiled is None:  # interpreted
            return
        named = [options[name] for name in kernel.arg_names[len(args) :]]  # arguments of the kernel that were given by name
        # with the kernel, so that its id is not given to another one
        _compiled[key] = (compiled.run, compiled.function, compiled.packed_metadata, named, kernel)
        return
    run, function, metadata, named, _ = launcher
    x, y, z = (*grid, 1, 1)[:3]
    run(x, y, z, torch._C._cuda_getCurrentRawStream(index), function, metadata, None, None, None, *values, *named)


def cdiv(a: int, b: int) -> int:
    """Return a/b rounded up. On the host triton.cdiv takes microseconds, because it looks for constants of a kernel first."""
    return -(-a // b)


def inner_contiguous(t: Tensor) -> Tensor:
    """Return `t` if its last dimension has stride 1, as the kernels need; else a copy (transposed and expanded rows)."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


@triton.jit
def load_columns(row, columns, H: tl.constexpr):
    """Return the given columns of a row in fp32; 0 from column H on."""
    return tl.load(row + columns, mask=columns < H, other=0.0).to(tl.float32)
