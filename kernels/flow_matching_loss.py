"""flow_matching_loss: squared error of the velocity, a value a sample. B batch, C/h/w the latent."""

from torch import Tensor

from .dispatch import backend_in_use, check_float, check_no_grad, check_shape, compute_dtype


def flow_matching_loss_reference(v: Tensor, x0: Tensor, noise: Tensor, weight: Tensor | None = None) -> Tensor:
    """`flow_matching_loss` in plain PyTorch: fp32 maths and result (fp64 for fp64 input)."""
    dtype = compute_dtype(v)
    error = v.to(dtype) - (noise.to(dtype) - x0.to(dtype))
    loss = error.square().flatten(1).mean(1)
    return loss if weight is None else loss * weight.to(dtype)


def flow_matching_loss(v: Tensor, x0: Tensor, noise: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over each sample of weight·(v − (noise − x0))²: the flow-matching loss for the straight path (arXiv:2210.02747).

    v, x0, noise [B,C,h,w]; weight [B] or None (ones). Returns [B] in fp32; differentiates v only, in the dtype of v.
    Raises ValueError for other shapes, any other input that requires grad, integer tensors or tensors on two devices.
    """
    op = "flow_matching_loss"
    check_float(op, v=v, x0=x0, noise=noise, weight=weight)
    check_shape(op, "x0", x0, tuple(v.shape))
    check_shape(op, "noise", noise, tuple(v.shape))
    if weight is not None:
        check_shape(op, "weight", weight, tuple(v.shape[:1]))
    check_no_grad(op, x0=x0, noise=noise, weight=weight)
    backend_in_use(v.device)
    return flow_matching_loss_reference(v, x0, noise, weight)
