"""flow_interpolate: the point between data and noise at time t. B batch, C/h/w the latent, W = C·h·w its elements.

One pass (reads x0 and noise, writes x_t: 6 bytes an element in bf16). Saved for the backward: t alone. Training needs no gradient
here, so the backward is one plain pass that writes both gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import check_float, check_no_grad, check_shape, choose_backend, compute_dtype
from .library import cdiv, cpp, find, inner_contiguous, launch, register

BLOCK = 1024  # 8 elements a thread on 4 warps: 128-bit accesses of bf16


def flow_interpolate_reference(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """`flow_interpolate` in plain PyTorch: fp32 maths (fp64 for fp64 input), one rounding at the end."""
    dtype = compute_dtype(x0)
    t = t.to(dtype).view(-1, *(1,) * (x0.ndim - 1))
    return ((1 - t) * x0.to(dtype) + t * noise.to(dtype)).to(x0.dtype)


@triton.jit
def flow_interpolate_forward_kernel(
    x0_ptr, noise_ptr, t_ptr, out_ptr, x0_b, noise_b, t_b, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK elements of one sample; samples and blocks share grid axis 0, because axis 1 ends at 65535."""
    program = tl.program_id(0).to(tl.int64)
    b = program // tl.cdiv(WIDTH, BLOCK)
    column = (program % tl.cdiv(WIDTH, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    t = tl.load(t_ptr + b * t_b).to(tl.float32)
    x0 = tl.load(x0_ptr + b * x0_b + column, mask=mask).to(tl.float32)
    noise = tl.load(noise_ptr + b * noise_b + column, mask=mask).to(tl.float32)
    out = (1 - t) * x0 + t * noise
    tl.store(out_ptr + b * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def flow_interpolate_backward_kernel(
    grad_ptr, t_ptr, grad_x0_ptr, grad_noise_ptr, grad_b, t_b, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """dx0 = (1−t)·dx_t, dnoise = t·dx_t."""
    program = tl.program_id(0).to(tl.int64)
    b = program // tl.cdiv(WIDTH, BLOCK)
    column = (program % tl.cdiv(WIDTH, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    t = tl.load(t_ptr + b * t_b).to(tl.float32)
    grad = tl.load(grad_ptr + b * grad_b + column, mask=mask).to(tl.float32)
    target = b * WIDTH + column
    tl.store(grad_x0_ptr + target, ((1 - t) * grad).to(grad_x0_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_noise_ptr + target, (t * grad).to(grad_noise_ptr.dtype.element_ty), mask=mask)


def per_sample(t: Tensor) -> Tensor:
    """[B,...] -> [B,W] with contiguous samples: a view, unless a sample is strided inside (then a copy)."""
    return inner_contiguous(t.flatten(1))


def check_samples(op: str, name: str, t: Tensor) -> None:
    """Raise ValueError unless `t` has a batch dimension and at least one more."""
    if t.ndim < 2:
        raise ValueError(f"{op}: {name} has shape {list(t.shape)}, but [batch, ...] is needed")


def _forward_fake(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return x0.new_empty(x0.shape)


def _backward_fake(grad: Tensor, t: Tensor, noise_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape, dtype=noise_dtype)


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


@register("flow_interpolate_backward_triton(Tensor grad, Tensor t, ScalarType noise_dtype) -> (Tensor, Tensor)", _backward_fake)
def _backward_triton(grad: Tensor, t: Tensor, noise_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    grad_x0, grad_noise = _backward_fake(grad, t, noise_dtype)
    if grad.numel():
        grad = per_sample(grad)
        B, W = grad.shape
        grid = (B * cdiv(W, BLOCK),)
        tensors = grad, t, grad_x0, grad_noise
        launch(flow_interpolate_backward_kernel, grid, grad, *tensors, grad.stride(0), t.stride(0), W, BLOCK, num_warps=4)
    return grad_x0, grad_noise


@register("flow_interpolate_forward_cpp(Tensor x0, Tensor noise, Tensor t) -> Tensor", _forward_fake)
def _forward_cpp(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    out = _forward_fake(x0, noise, t)
    if out.numel():
        cpp.flow_interpolate_forward(per_sample(x0), per_sample(noise), t, out)
    return out


@register("flow_interpolate_backward_cpp(Tensor grad, Tensor t, ScalarType noise_dtype) -> (Tensor, Tensor)", _backward_fake)
def _backward_cpp(grad: Tensor, t: Tensor, noise_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    grad_x0, grad_noise = _backward_fake(grad, t, noise_dtype)
    if grad.numel():
        cpp.flow_interpolate_backward(per_sample(grad), t, grad_x0, grad_noise)
    return grad_x0, grad_noise


class _FlowInterpolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x0: Tensor, noise: Tensor, t: Tensor, backend: str) -> Tensor:
        ctx.backend, ctx.noise_dtype = backend, noise.dtype
        ctx.save_for_backward(t)
        return find("flow_interpolate_forward", backend)(x0, noise, t)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x0, grad_noise = find("flow_interpolate_backward", ctx.backend)(grad, *ctx.saved_tensors, ctx.noise_dtype)
        return grad_x0, grad_noise, None, None


def flow_interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1−t)·x0 + t·noise, the straight path of rectified flow (arXiv:2209.03003, equation 1; t = 1 is noise here).

    x0, noise [B,C,h,w]; t [B]. Returns x_t [B,C,h,w], contiguous, in the dtype of x0; maths in fp32. Differentiates x0 and
    noise, each in its own dtype. Triton copies samples that are strided inside (channels-last).
    Raises ValueError for other shapes, a t that requires grad, integer tensors, tensors on two devices, or fp64 outside the
    reference.
    """
    op = "flow_interpolate"
    check_float(op, x0=x0, noise=noise, t=t)
    check_samples(op, "x0", x0)
    check_shape(op, "noise", noise, tuple(x0.shape))
    check_shape(op, "t", t, tuple(x0.shape[:1]))
    check_no_grad(op, t=t)
    chosen = choose_backend(op, x0, noise, t)
    return flow_interpolate_reference(x0, noise, t) if chosen == "reference" else _FlowInterpolate.apply(x0, noise, t, chosen)
