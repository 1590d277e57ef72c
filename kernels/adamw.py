"""adamw_step: one step of an optimizer as one pass over its tensors: AdamW, moving averages, the model's own weights.

P parameters, k moving averages, C blocks of BLOCK elements. It works in place, as an optimizer does, and on the addresses of
tensors: it is no library op, and nothing differentiates or traces it. One launch, which does not wait and uses no atomics.

Elements are rounded as torch's fused AdamW on a CPU with FMA rounds them (except the last ones of a tensor whose size is no
multiple of 16: their second moments may differ by a unit in the last place), and averages as torch.lerp.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import backend_in_use
from .library import cpp, launch

# per parameter, with bf16 gradients and weights and one average: gradient 2, master, two moments and average 8 each, weight 2
BYTES = (36, 0)
BLOCK = 1024  # elements per Triton program, and per C++ unit
_NUMBERS = 7  # numbers of every step, before the averages' weights
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class AdamWTensors:
    """The tensors of P parameters that `adamw_step` works on, and their addresses on the device.

    The tensors must not move. All steps of one object must run on one stream: the upload of a step overwrites what the step before
    it read.
    """

    def __init__(
        self, masters: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
        copies: Sequence[Tensor] | None = None, averages: Sequence[Sequence[Tensor]] = (),
    ) -> None:  # fmt: skip
        """masters, exp_avgs, exp_avg_sqs, and each of the k averages: P contiguous tensors, fp32 (fp64: reference only). copies: P
        tensors of one lower precision, updated with the masters, or None. Raises ValueError for other lengths, dtypes and
        layouts."""
        self.masters = list(masters)
        self.exp_avgs = list(exp_avgs)
        self.exp_avg_sqs = list(exp_avg_sqs)
        self.copies = None if copies is None else list(copies)
        self.averages = [list(average) for average in averages]
        states = {"exp_avgs": self.exp_avgs, "exp_avg_sqs": self.exp_avg_sqs}
        states |= {f"averages[{i}]": average for i, average in enumerate(self.averages)}
        _check("masters", self.masters, self.masters, (torch.float32, torch.float64))
        for name, tensors in states.items():
            _check(name, tensors, self.masters, (self.masters[0].dtype,))
        if self.copies is not None:
            _check("copies", self.copies, self.masters, tuple(_TYPES))
        self.device = self.masters[0].device
        self._upload_addresses()

    def _upload_addresses(self) -> None:
        """`table` int64 [4+1+k, P]: addresses of master and moments, number of elements, address of copy (or 0) and averages.
        `blocks` int32 [C,2]: parameter and block in it. `changing` int64 [7+k+P]: what `upload` writes."""
        sizes = [master.numel() for master in self.masters]
        copies = [0] * len(sizes) if self.copies is None else _addresses(self.copies)
        rows = [_addresses(self.masters), _addresses(self.exp_avgs), _addresses(self.exp_avg_sqs), sizes, copies]
        blocks = [(i, block) for i, size in enumerate(sizes) for block in range(-(-size // BLOCK))]
        self.table = torch.tensor(rows + [_addresses(average) for average in self.averages], device=self.device)
        self.blocks = torch.tensor(blocks, dtype=torch.int32, device=self.device).view(-1, 2)
        count = _NUMBERS + len(self.averages) + len(sizes)
        self.changing = torch.empty(count, dtype=torch.int64, device=self.device)
        self._uploaded: list[int] = []

    def upload(self, numbers: list[float], gradients: Sequence[Tensor]) -> None:
        """Write a step's numbers, as the bits of fp32, and the addresses of its gradients, unless they are on the device already.
        On CUDA the copy is from pinned memory and does not wait: the allocator of pinned memory holds it until the copy is done.

        Raises RuntimeError during the capture of a CUDA graph, whose replays would copy again from memory that is freed by then.
        """
        numbers = numbers + [0.0] * (_NUMBERS + len(self.averages) - len(numbers))
        bits = np.array(numbers).astype(np.float32).view(np.int32).tolist()
        values = bits + _addresses(gradients)
        if values == self._uploaded:
            return
        cuda = self.device.type == "cuda"
        if cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("adamw_step: a new upload cannot be captured: take the same step, in place, before the capture")
        self.changing.copy_(torch.tensor(values, device="cpu", pin_memory=cuda), non_blocking=True)
        self._uploaded = values


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def _check(name: str, tensors: Sequence[Tensor], masters: Sequence[Tensor], dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise ValueError unless `tensors` match the masters one by one, are contiguous, and have one dtype out of `dtypes`."""
    if not tensors or len(tensors) != len(masters):
        raise ValueError(f"adamw_step: {name} has {len(tensors)} tensors, but one for each of {len(masters)} parameters is needed")
    dtype, device = tensors[0].dtype, masters[0].device
    if dtype not in dtypes:
        raise ValueError(f"adamw_step: {name} has dtype {dtype}, but {' or '.join(map(str, dtypes))} is needed")
    for i, (t, master) in enumerate(zip(tensors, masters, strict=True)):
        if t.numel() != master.numel() or t.dtype != dtype or t.device != device or not t.is_contiguous():
            raise ValueError(
                f"adamw_step: {name}[{i}] is {t.dtype} {list(t.shape)}, strides {list(t.stride())}, on {t.device}, but "
                f"{master.numel()} contiguous elements of {dtype} on {device} are needed"
            )


def adamw_step_reference(
    tensors: AdamWTensors, gradients: Sequence[Tensor], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
    step: int, grad_scale: Tensor, found_inf: Tensor, weights: Sequence[float] = (),
) -> None:  # fmt: skip
    """`adamw_step` in plain PyTorch: torch's own fused AdamW, lerp and cast; a copy of the gradients in the masters' dtype."""
    masters = tensors.masters
    skipped = found_inf != 0
    torch._fused_adamw_(
        masters, [g.to(m.dtype).view_as(m) / grad_scale for g, m in zip(gradients, masters, strict=True)],
        [t.view_as(m) for t, m in zip(tensors.exp_avgs, masters, strict=True)],
        [t.view_as(m) for t, m in zip(tensors.exp_avg_sqs, masters, strict=True)], [],
        [torch.full((), step, dtype=torch.float32, device=tensors.device) for _ in masters], lr=lr, beta1=betas[0], beta2=betas[1],
        weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False, found_inf=skipped.float(),
    )  # fmt: skip
    for average, weight in zip(tensors.averages, weights, strict=False):
        for a, master in zip(average, masters, strict=True):
            a.copy_(torch.where(skipped, a, a.lerp(master.view_as(a), weight)))
    for copy, master in zip(tensors.copies or (), masters, strict=False):
        copy.copy_(torch.where(skipped, copy, master.to(copy.dtype).view_as(copy)))


@triton.jit
def _number(changing_ptr, i):
    return tl.load(changing_ptr + i).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _element_ptrs(address, element, TYPE: tl.constexpr, FULL: tl.constexpr):
    """Pointers to the given elements of a tensor of TYPE at an address, which is a multiple of 16 bytes if FULL."""
    first_ptr = address.to(tl.pointer_type(TYPE))
    if FULL:
        first_ptr = tl.multiple_of(first_ptr, 16)
    return first_ptr + element


@triton.jit
def _load(ptr, mask, FULL: tl.constexpr):
    values = tl.load(ptr) if FULL else tl.load(ptr, mask=mask, other=0.0)
    return values.to(tl.float32)


@triton.jit
def _store(ptr, values, mask, FULL: tl.constexpr):
    if FULL:
        tl.store(ptr, values)
    else:
        tl.store(ptr, values, mask=mask)


@triton.jit
def _update_block(
    row_ptr, changing_ptr, address, start, n, scale, P, FIRST: tl.constexpr, GRADIENT: tl.constexpr, COPY: tl.constexpr,
    AVERAGES: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Elements start .. start+BLOCK of a parameter of n elements. FULL: none is past the end, and all tensors are aligned to 16
    bytes."""
    element = start + tl.arange(0, BLOCK)
    mask = element < n
    master_ptr = _element_ptrs(tl.load(row_ptr), element, tl.float32, FULL)
    exp_avg_ptr = _element_ptrs(tl.load(row_ptr + P), element, tl.float32, FULL)
    exp_avg_sq_ptr = _element_ptrs(tl.load(row_ptr + 2 * P), element, tl.float32, FULL)
    g = tl.div_rn(_load(_element_ptrs(address, element, GRADIENT, FULL), mask, FULL), scale)
    p, m, v = _load(master_ptr, mask, FULL), _load(exp_avg_ptr, mask, FULL), _load(exp_avg_sq_ptr, mask, FULL)
    weight = _number(changing_ptr, 4)
    m = tl.fma(g - m, tl.where(weight < 0.5, weight, weight - 1), tl.where(weight < 0.5, m, g))
    v = tl.fma(g * _number(changing_ptr, 6), g, v * _number(changing_ptr, 5))
    denominator = tl.div_rn(tl.sqrt_rn(v), _number(changing_ptr, 2)) + _number(changing_ptr, 3)
    p = p * _number(changing_ptr, 0) - tl.div_rn(_number(changing_ptr, 1) * m, denominator)
    _store(exp_avg_ptr, m, mask, FULL)
    _store(exp_avg_sq_ptr, v, mask, FULL)
    _store(master_ptr, p, mask, FULL)
    if COPY is not None:
        _store(_element_ptrs(tl.load(row_ptr + 4 * P), element, COPY, FULL), p.to(COPY), mask, FULL)
    for k in tl.static_range(AVERAGES):
        average_ptr = _element_ptrs(tl.load(row_ptr + (5 + k) * P), element, tl.float32, FULL)
        weight = _number(changing_ptr, FIRST + k)
        a = _load(average_ptr, mask, FULL)
        a = tl.fma(p - a, tl.where(weight < 0.5, weight, weight - 1), tl.where(weight < 0.5, a, p))
        _store(average_ptr, a, mask, FULL)


@triton.jit(do_not_specialize=["P", "gradients"])
def adamw_step_kernel(
    blocks_ptr, table_ptr, changing_ptr, grad_scale_ptr, found_inf_ptr, P, gradients, FIRST: tl.constexpr, GRADIENT: tl.constexpr,
    COPY: tl.constexpr, AVERAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes one block. Nothing is written unless found_inf is 0. gradients: index of the first gradient's address in
    `changing`."""
    pid, P = tl.program_id(0).to(tl.int64), P.to(tl.int64)
    skipped, scale = tl.load(found_inf_ptr) != 0, tl.load(grad_scale_ptr)
    parameter = tl.load(blocks_ptr + 2 * pid).to(tl.int64)
    start = tl.load(blocks_ptr + 2 * pid + 1).to(tl.int64) * BLOCK
    row_ptr, n = table_ptr + parameter, tl.load(table_ptr + parameter + 3 * P)
    address = tl.load(changing_ptr + (gradients.to(tl.int64) + parameter))
    bits = address | tl.load(row_ptr) | tl.load(row_ptr + P) | tl.load(row_ptr + 2 * P) | tl.load(row_ptr + 4 * P)
    for k in tl.static_range(AVERAGES):
        bits |= tl.load(row_ptr + (5 + k) * P)
    if skipped == 0:
        if (bits % 16 == 0) & (start + BLOCK <= n):
            _update_block(row_ptr, changing_ptr, address, start, n, scale, P, FIRST, GRADIENT, COPY, AVERAGES, BLOCK, True)
        else:
            _update_block(row_ptr, changing_ptr, address, start, n, scale, P, FIRST, GRADIENT, COPY, AVERAGES, BLOCK, False)


def adamw_step(
    tensors: AdamWTensors, gradients: Sequence[Tensor], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
    step: int, grad_scale: Tensor, found_inf: Tensor, weights: Sequence[float] = (),
) -> None:  # fmt: skip
    """Take step number `step` (from 1) of AdamW (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2), in place.

    gradients: P contiguous tensors, bf16, fp16 or fp32. grad_scale: fp32 scalar on the device, the divisor of the gradients.
    found_inf: fp32 scalar on the device; unless it is 0 nothing is written. weights: one number per average, for a <- a +
    weight·(master - a) with the new master; empty: this step leaves the averages as they are. The bias corrections are computed on
    the host in double precision. The call does not wait for the device. A CUDA graph may capture a step only right after the same
    step was taken outside of it: the graph then holds the launch and no upload. Raises ValueError for other lengths, dtypes,
    layouts and devices.
    """
    _check("gradients", gradients, tensors.masters, tuple(_TYPES))
    if weights and len(weights) != len(tensors.averages):
        raise ValueError(f"adamw_step: {len(weights)} weights were given for {len(tensors.averages)} averages")
    hyperparameters = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=step)
    backend = backend_in_use(tensors.device)
    if backend == "reference":
        adamw_step_reference(
            tensors, gradients, **hyperparameters, grad_scale=grad_scale, found_inf=found_inf, weights=weights
        )  # fmt: skip
    elif tensors.masters[0].dtype == torch.float64:
        raise ValueError(f"adamw_step: the {backend} kernels do not compute in float64: use kernels.backend('reference')")
    elif len(tensors.blocks):
        for name, scalar in (("grad_scale", grad_scale), ("found_inf", found_inf)):  # the kernels read their memory as fp32
            if scalar.numel() != 1 or scalar.dtype != torch.float32 or scalar.device != tensors.device:
                raise ValueError(
                    f"adamw_step: {name} is {scalar.dtype} {list(scalar.shape)} on {scalar.device}, but one torch.float32 on "
                    f"{tensors.device} is needed"
                )
        _run(backend, tensors, gradients, grad_scale, found_inf, weights, **hyperparameters)
    # so that a backward through weights that autograd saved before this step raises an error
    torch.autograd.graph.increment_version([*tensors.masters, *(tensors.copies or ())])


def _run(
    backend: str, tensors: AdamWTensors, gradients: Sequence[Tensor], grad_scale: Tensor, found_inf: Tensor,
    weights: Sequence[float], lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    step_size, root = lr / (1 - betas[0] ** step), math.sqrt(1 - betas[1] ** step)
    tensors.upload([1 - lr * weight_decay, step_size, root, eps, 1 - betas[0], betas[1], 1 - betas[1], *weights], gradients)
    copy = tensors.copies[0] if tensors.copies else None
    if backend == "cpp":
        cpp.adamw_step(tensors.blocks, tensors.table, tensors.changing, gradients[0], copy, grad_scale, found_inf, len(weights))
        return
    launch(
        adamw_step_kernel, (len(tensors.blocks),), tensors.table, tensors.blocks, tensors.table, tensors.changing, grad_scale,
        found_inf, len(tensors.masters), _NUMBERS + len(tensors.averages), _NUMBERS, _TYPES[gradients[0].dtype],
        None if copy is None else _TYPES[copy.dtype], len(weights), BLOCK, num_warps=4,
    )  # fmt: skip
