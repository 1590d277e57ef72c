"""flow_interpolate: the point between data and noise at time t. B batch, C/h/w the latent, W = C·h·w its elements.

One pass. Saved for the backward: t only. Training needs no gradient here, so the backward is one plain pass that writes both
gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import check_float, check_no_grad, check_shape, choose_backend, compute_dtype
from .library import cdiv, cpp, find, inner_contiguous, launch, register

BYTES = (6, 0)  # per element of x0 in bf16: x0, noise, x_t; x0 and noise are data, which have no gradient in training
BLOCK = 1024  # 8 elements per thread on 4 warps: 128-bit accesses of bf16


def flow_interpolate_reference(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """`flow_interpolate` in plain PyTorch: fp32 maths (fp64 for fp64 input), one rounding at the end."""
    dtype = compute_dtype(x0)
    t = t.to(dtype).view(-1, *(1,) * (x0.ndim - 1))
    return ((1 - t) * x0.to(dtype) + t * noise.to(dtype)).to(x0.dtype)


@triton.jit
def flow_interpolate_forward_kernel(
    x0_ptr, noise_ptr, t_ptr, out_ptr, x0_stride_b, noise_stride_b, t_stride_b, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK elements of one sample; samples and blocks share grid axis 0, because axis 1 ends at 65535."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // tl.cdiv(WIDTH, BLOCK)
    columns = (pid % tl.cdiv(WIDTH, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    t = tl.load(t_ptr + b * t_stride_b).to(tl.float32)
    x0 = tl.load(x0_ptr + b * x0_stride_b + columns, mask=mask).to(tl.float32)
    noise = tl.load(noise_ptr + b * noise_stride_b + columns, mask=mask).to(tl.float32)
    out = (1 - t) * x0 + t * noise
    tl.store(out_ptr + b * WIDTH + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def flow_interpolate_backward_kernel(
    dout_ptr, t_ptr, dx0_ptr, dnoise_ptr, dout_stride_b, t_stride_b, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """dx0 = (1−t)·dx_t, dnoise = t·dx_t."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // tl.cdiv(WIDTH, BLOCK)
    columns = (pid % tl.cdiv(WIDTH, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    t = tl.load(t_ptr + b * t_stride_b).to(tl.float32)
    dout = tl.load(dout_ptr + b * dout_stride_b + columns, mask=mask).to(tl.float32)
    target = b * WIDTH + columns
    tl.store(dx0_ptr + target, ((1 - t) * dout).to(dx0_ptr.dtype.element_ty), mask=mask)
    tl.store(dnoise_ptr + target, (t * dout).to(dnoise_ptr.dtype.element_ty), mask=mask)


def per_sample(t: Tensor) -> Tensor:
    """Return [B,...] as [B,W] with contiguous samples: a view, or a copy if the elements of a sample are strided."""
    return inner_contiguous(t.flatten(1))


def check_samples(op: str, name: str, t: Tensor) -> None:
    """Raise ValueError unless `t` has a batch dimension and at least one more."""
    if t.ndim < 2:
        raise ValueError(f"{op}: {name} has shape {list(t.shape)}, but [batch, ...] is needed")


def _forward_fake(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return x0.new_empty(x0.shape)


def _backward_fake(dout: Tensor, t: Tensor, noise_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return dout.new_empty(dout.shape), dout.new_empty(dout.shape, dtype=noise_dtype)


@register("flow_interpolate_forward_triton(Tensor x0, Tensor noise, Tensor t) -> Tensor", _forward_fake)
def _forward_triton(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    out = _forward_fake(x0, noise, t)
    if out.numel():
        x0, noise = per_sample(x0), per_sample(noise)
        B, W = x0.shape
        grid = (B * cdiv(W, BLOCK),)
        strides = x0.stride(0), noise.stride(0), t.stride(0)
        launch(flow_interpolate_forward_kernel, grid, x0, x0, noise, t, out, *strides, W, BLOCK, num_warps=4)
    return out


@register("flow_interpolate_backward_triton(Tensor dout, Tensor t, ScalarType noise_dtype) -> (Tensor, Tensor)", _backward_fake)
def _backward_triton(dout: Tensor, t: Tensor, noise_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    dx0, dnoise = _backward_fake(dout, t, noise_dtype)
    if dout.numel():
        dout = per_sample(dout)
        B, W = dout.shape
        grid = (B * cdiv(W, BLOCK),)
        tensors = dout, t, dx0, dnoise
        launch(flow_interpolate_backward_kernel, grid, dout, *tensors, dout.stride(0), t.stride(0), W, BLOCK, num_warps=4)
    return dx0, dnoise


@register("flow_interpolate_forward_cpp(Tensor x0, Tensor noise, Tensor t) -> Tensor", _forward_fake)
def _forward_cpp(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    out = _forward_fake(x0, noise, t)
    if out.numel():
        cpp.flow_interpolate_forward(per_sample(x0), per_sample(noise), t, out)
    return out


@register("flow_interpolate_backward_cpp(Tensor dout, Tensor t, ScalarType noise_dtype) -> (Tensor, Tensor)", _backward_fake)
def _backward_cpp(dout: Tensor, t: Tensor, noise_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    dx0, dnoise = _backward_fake(dout, t, noise_dtype)
    if dout.numel():
        cpp.flow_interpolate_backward(per_sample(dout), t, dx0, dnoise)
    return dx0, dnoise


class _FlowInterpolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x0: Tensor, noise: Tensor, t: Tensor, backend: str) -> Tensor:
        ctx.backend = backend
        ctx.noise_dtype = noise.dtype
        ctx.save_for_backward(t)
        return find("flow_interpolate_forward", backend)(x0, noise, t)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        dx0, dnoise = find("flow_interpolate_backward", ctx.backend)(dout, *ctx.saved_tensors, ctx.noise_dtype)
        return dx0, dnoise, None, None


def flow_interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return x_t = (1−t)·x0 + t·noise, the straight path of rectified flow (arXiv:2209.03003, equation 1; t = 1 is noise here).

    x0, noise [B,C,h,w]; t [B]. Returns x_t [B,C,h,w], contiguous, in the dtype of x0; maths in fp32. Differentiates x0 and
    noise, each in its own dtype. Samples whose elements are strided (channels-last) are copied.
    Raises ValueError for other shapes, a t that requires grad, integer tensors, tensors on two devices, or fp64 outside the
    reference.
    """
    op = "flow_interpolate"
    check_float(op, x0=x0, noise=noise, t=t)
    check_samples(op, "x0", x0)
    check_shape(op, "noise", noise, tuple(x0.shape))
    check_shape(op, "t", t, tuple(x0.shape[:1]))
    check_no_grad(op, t=t)
    backend = choose_backend(op, x0, noise, t)
    return flow_interpolate_reference(x0, noise, t) if backend == "reference" else _FlowInterpolate.apply(x0, noise, t, backend)
