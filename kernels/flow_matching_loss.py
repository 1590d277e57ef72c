"""flow_matching_loss: squared error of the velocity, one value per sample. B batch, C/h/w the latent, W = C·h·w its elements.

One pass forward and one backward, without fp32 temporaries. Saved for the backward: the error v − (noise − x0) in the dtype of v,
instead of v, x0 and noise. It is the gradient up to the factor 2·weight/W of the sample, which stays in fp32 and is multiplied in
by the backward: folded in early, an fp16 gradient of a mean over thousands of elements would lose its last bits to subnormals.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import check_float, check_no_grad, check_shape, choose_backend, compute_dtype
from .flow_interpolate import check_samples, per_sample
from .library import cdiv, cpp, find, launch, register

BYTES = (8, 4)  # per element of v in bf16: v, x0, noise, error; error, dv
BLOCK = 1024  # 8 elements per thread on 4 warps: 128-bit accesses of bf16


def flow_matching_loss_reference(v: Tensor, x0: Tensor, noise: Tensor, weight: Tensor | None = None) -> Tensor:
    """`flow_matching_loss` in plain PyTorch: fp32 maths and result (fp64 for fp64 input)."""
    dtype = compute_dtype(v)
    error = v.to(dtype) - (noise.to(dtype) - x0.to(dtype))
    loss = error.square().flatten(1).mean(1)
    return loss if weight is None else loss * weight.to(dtype)


@triton.jit
def flow_matching_loss_forward_kernel(
    v_ptr, x0_ptr, noise_ptr, weight_ptr, loss_ptr, error_ptr, v_stride_b, x0_stride_b, noise_stride_b, weight_stride_b,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sample per program: a latent has a few thousand elements, so launches are what counts, and one pass needs no second
    kernel for the sum. WIDTH is a constant of the model."""
    b = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < WIDTH
        v = tl.load(v_ptr + (b * v_stride_b + columns), mask=mask, other=0.0).to(tl.float32)
        x0 = tl.load(x0_ptr + (b * x0_stride_b + columns), mask=mask, other=0.0).to(tl.float32)
        noise = tl.load(noise_ptr + (b * noise_stride_b + columns), mask=mask, other=0.0).to(tl.float32)
        error = v - (noise - x0)
        total += error * error
        if error_ptr is not None:
            tl.store(error_ptr + (b * WIDTH + columns), error.to(error_ptr.dtype.element_ty), mask=mask)
    loss = tl.sum(total, axis=0) / WIDTH
    if weight_ptr is not None:
        loss *= tl.load(weight_ptr + b * weight_stride_b).to(tl.float32)
    tl.store(loss_ptr + b, loss)


@triton.jit
def flow_matching_loss_backward_kernel(
    dloss_ptr, error_ptr, weight_ptr, dv_ptr, dloss_stride_b, weight_stride_b, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """dv = dloss·weight·2/W·error. The factor is read on the device, so no scaling of the loss needs a host sync."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // tl.cdiv(WIDTH, BLOCK)
    columns = (pid % tl.cdiv(WIDTH, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    factor = tl.load(dloss_ptr + b * dloss_stride_b) * (2.0 / WIDTH)
    if weight_ptr is not None:
        factor *= tl.load(weight_ptr + b * weight_stride_b).to(tl.float32)
    error = tl.load(error_ptr + b * WIDTH + columns, mask=mask).to(tl.float32)
    tl.store(dv_ptr + b * WIDTH + columns, (factor * error).to(dv_ptr.dtype.element_ty), mask=mask)


def _forward_fake(v: Tensor, x0: Tensor, noise: Tensor, weight: Tensor | None, with_error: bool) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape[:1], dtype=torch.float32), v.new_empty(v.shape if with_error else 0)


def _backward_fake(dloss: Tensor, error: Tensor, weight: Tensor | None) -> Tensor:
    return error.new_empty(error.shape)


@register(
    "flow_matching_loss_forward_triton(Tensor v, Tensor x0, Tensor noise, Tensor? weight, bool with_error) -> (Tensor, Tensor)",
    _forward_fake,
)
def _forward_triton(v: Tensor, x0: Tensor, noise: Tensor, weight: Tensor | None, with_error: bool) -> tuple[Tensor, Tensor]:
    loss, error = _forward_fake(v, x0, noise, weight, with_error)
    if not v.numel():
        return loss.fill_(float("nan")), error  # the mean of no elements; an empty batch has no losses at all
    v, x0, noise = per_sample(v), per_sample(x0), per_sample(noise)
    B, W = v.shape
    tensors = v, x0, noise, weight, loss, error if with_error else None
    strides = v.stride(0), x0.stride(0), noise.stride(0), 0 if weight is None else weight.stride(0)
    launch(flow_matching_loss_forward_kernel, (B,), v, *tensors, *strides, W, BLOCK, num_warps=4)
    return loss, error


@register("flow_matching_loss_backward_triton(Tensor dloss, Tensor error, Tensor? weight) -> Tensor", _backward_fake)
def _backward_triton(dloss: Tensor, error: Tensor, weight: Tensor | None) -> Tensor:
    dv = _backward_fake(dloss, error, weight)
    if error.numel():
        B, W = len(error), error.numel() // len(error)
        grid = (B * cdiv(W, BLOCK),)
        strides = dloss.stride(0), 0 if weight is None else weight.stride(0)
        launch(flow_matching_loss_backward_kernel, grid, error, dloss, error, weight, dv, *strides, W, BLOCK, num_warps=4)
    return dv


@register(
    "flow_matching_loss_forward_cpp(Tensor v, Tensor x0, Tensor noise, Tensor? weight, bool with_error) -> (Tensor, Tensor)",
    _forward_fake,
)
def _forward_cpp(v: Tensor, x0: Tensor, noise: Tensor, weight: Tensor | None, with_error: bool) -> tuple[Tensor, Tensor]:
    loss, error = _forward_fake(v, x0, noise, weight, with_error)
    if not v.numel():
        return loss.fill_(float("nan")), error  # as above
    cpp.flow_matching_loss_forward(per_sample(v), per_sample(x0), per_sample(noise), weight, loss, error)
    return loss, error


@register("flow_matching_loss_backward_cpp(Tensor dloss, Tensor error, Tensor? weight) -> Tensor", _backward_fake)
def _backward_cpp(dloss: Tensor, error: Tensor, weight: Tensor | None) -> Tensor:
    dv = _backward_fake(dloss, error, weight)
    if error.numel():
        cpp.flow_matching_loss_backward(dloss, error.flatten(1), weight, dv)
    return dv


class _FlowMatchingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v: Tensor, x0: Tensor, noise: Tensor, weight: Tensor | None, backend: str, with_error: bool) -> Tensor:
        ctx.backend = backend
        loss, error = find("flow_matching_loss_forward", backend)(v, x0, noise, weight, with_error)
        ctx.save_for_backward(error, weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return find("flow_matching_loss_backward", ctx.backend)(dloss, *ctx.saved_tensors), None, None, None, None, None


def flow_matching_loss(v: Tensor, x0: Tensor, noise: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean over each sample of weight·(v − (noise − x0))²: the flow-matching loss for the straight path
    (arXiv:2210.02747).

    v, x0, noise [B,C,h,w]; weight [B] or None (ones). Returns [B] in fp32; differentiates v only, in the dtype of v.
    Samples whose elements are strided (channels-last) are copied.
    Raises ValueError for other shapes, any other input that requires dloss, integer tensors, tensors on two devices, or fp64
    outside the reference.
    """
    op = "flow_matching_loss"
    check_float(op, v=v, x0=x0, noise=noise, weight=weight)
    check_samples(op, "v", v)
    check_shape(op, "x0", x0, tuple(v.shape))
    check_shape(op, "noise", noise, tuple(v.shape))
    if weight is not None:
        check_shape(op, "weight", weight, tuple(v.shape[:1]))
    check_no_grad(op, x0=x0, noise=noise, weight=weight)
    backend = choose_backend(op, v, x0, noise, weight)
    if backend == "reference":
        return flow_matching_loss_reference(v, x0, noise, weight)
    return _FlowMatchingLoss.apply(v, x0, noise, weight, backend, v.requires_grad and torch.is_grad_enabled())
