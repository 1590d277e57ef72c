"""How every op is registered with torch.library, how every Triton kernel is launched, and where the C++ kernels are.

An op has two library ops for each backend, `fastdit::<op>_forward_<backend>` and `fastdit::<op>_backward_<backend>`: functional
(they allocate what they return, and nothing they return aliases an input or another output), opaque to the compiler, without
registered autograd. The public function joins the pair with a torch.autograd.Function. Measured by others, the dispatcher takes 6
us of a call this way, `custom_op` 11 and a registered autograd 25 more (pytorch #177109, attention-gym #302).
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

# The C++ kernels (csrc/), if setup.py built them: torch.ops.fastdit_cpp.<op>_forward and _backward write into what they are given.
EXTENSION = next(Path(__file__).parent.glob("_cpp*.so"), None)
if EXTENSION:
    try:
        torch.ops.load_library(EXTENSION)
    except OSError as error:
        raise ImportError(f"{EXTENSION} does not fit this torch {torch.__version__}: run launch/install.sh again") from error
cpp = torch.ops.fastdit_cpp
INSTRUCTION_SETS = ("baseline", "AVX2", "AVX-512", "AMX")  # which of them runs, the processor and FASTDIT_ISA decide: cpp.isa()


def register(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Decorator: register a function as the library op `fastdit::<schema>`; `fake` gives shapes, dtypes and strides alone."""
    name = schema.partition("(")[0]

    def decorate(function: Callable) -> Callable:
        _LIBRARY.define(schema, tags=_TAGS)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastdit::{name}", fake, lib=_LIBRARY)
        return function

    return decorate


def find(name: str, backend: str) -> Callable:
    """The library op `fastdit::<name>_<backend>`, for example find("swiglu_forward", "triton")."""
    return getattr(torch.ops.fastdit, f"{name}_{backend}")


# (kernel, device, options, dtypes and alignments of pointers, numbers) -> what a launch needs of Triton's compiled kernel
_compiled: dict[tuple, tuple] = {}


def launch(kernel: Callable, grid: tuple[int, ...], like: Tensor, *args, **options) -> None:
    """Run a Triton kernel on the device of `like`, which need not be the current one.

    Most of a launch by Triton's own way finds out which compiled kernel the arguments ask for. A second launch with the same
    dtypes, alignments, numbers and options finds it in a dictionary whose key says more than Triton's own, so that it can name no
    other kernel. Pointers are handed over as numbers, which spares the driver a question about each.
    Fusion of a·b+c into one rounding is asked for by name: Triton 3.10 changes the default, and it changes the last bit.
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
        named = [options[name] for name in kernel.arg_names[len(args) :]]  # of the kernel's arguments, those given by name
        _compiled[key] = compiled.run, compiled.function, compiled.packed_metadata, named, kernel  # which keeps its id
        return
    run, function, metadata, named, _ = launcher
    x, y, z = (*grid, 1, 1)[:3]
    run(x, y, z, torch._C._cuda_getCurrentRawStream(index), function, metadata, None, None, None, *values, *named)


def cdiv(a: int, b: int) -> int:
    """a/b rounded up. On the host, where triton.cdiv takes microseconds to see that it was given no constants of a kernel."""
    return -(-a // b)


def inner_contiguous(t: Tensor) -> Tensor:
    """`t` itself when its last dimension has stride 1, as the kernels need; else a copy (transposed and expanded rows)."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


@triton.jit
def load_columns(row, columns, H: tl.constexpr):
    """The given columns of a row in fp32; 0 from column H on."""
    return tl.load(row + columns, mask=columns < H, other=0.0).to(tl.float32)
