"""flow_interpolate: the point between data and noise at time t. B batch, C/h/w the latent."""

from torch import Tensor

from .dispatch import backend_in_use, check_float, check_no_grad, check_shape, compute_dtype


def flow_interpolate_reference(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """`flow_interpolate` in plain PyTorch: fp32 maths (fp64 for fp64 input), one rounding at the end."""
    dtype = compute_dtype(x0)
    t = t.to(dtype).view(-1, *(1,) * (x0.ndim - 1))
    return ((1 - t) * x0.to(dtype) + t * noise.to(dtype)).to(x0.dtype)


def flow_interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1−t)·x0 + t·noise, the straight path of rectified flow (arXiv:2209.03003, equation 1; t = 1 is noise here).

    x0, noise [B,C,h,w]; t [B]. Returns x_t [B,C,h,w] in the dtype of x0; maths in fp32. Differentiates x0 and noise.
    Raises ValueError for other shapes, a t that requires grad, integer tensors or tensors on two devices.
    """
    op = "flow_interpolate"
    check_float(op, x0=x0, noise=noise, t=t)
    check_shape(op, "noise", noise, tuple(x0.shape))
    check_shape(op, "t", t, tuple(x0.shape[:1]))
    check_no_grad(op, t=t)
    backend_in_use(x0.device)
    return flow_interpolate_reference(x0, noise, t)
