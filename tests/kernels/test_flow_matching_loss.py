"""flow_matching_loss: kernels against the reference, and the reference against its formula."""

import pytest
import torch

from backends import BACKENDS, DEVICE, zeros
from fastdit import kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 4, 8, 8), (2, 3, 7, 5), (5, 4, 32, 32), (3, 1)]


def inputs(*shape, dtype=torch.float32, weighted=True):
    """(v, x0, noise, weight) and the gradient of the losses. Samples differ in weight and in the size of their error."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *s: torch.randn(*s, generator=generator).to(DEVICE)
    size = torch.arange(1.0, shape[0] + 1, device=DEVICE).view(-1, *(1,) * (len(shape) - 1))
    tensors = [t.to(dtype) for t in (randn(*shape) * size, randn(*shape) - 2.3, randn(*shape))]
    return (*tensors, torch.rand(shape[0], generator=generator).to(DEVICE) + 0.1 if weighted else None), randn(shape[0])


def eager(v, x0, noise, weight):
    """The naive chain, each step rounded to the dtype of v, the mean in fp32 as under autocast."""
    loss = (v - (noise - x0)).square().flatten(1).float().mean(1)
    return loss if weight is None else loss * weight


def run(function, arguments, grad):
    v, *rest = arguments
    v = v.detach().requires_grad_()
    loss = function(v, *rest)
    return loss.detach(), *torch.autograd.grad(loss, v, grad)


def check(assert_close, backend, arguments, grad):
    """Losses and gradient against fp64, and bitwise equal on a second run."""
    with kernels.backend(backend):
        actual, again = (run(kernels.flow_matching_loss, arguments, grad) for _ in range(2))
    double = [None if a is None else a.double() for a in arguments]
    truth = run(kernels.flow_matching_loss_reference, double, grad.double())
    for a, b, t, e in zip(actual, again, truth, run(eager, arguments, grad), strict=True):
        assert torch.equal(a, b)
        assert_close(a, t, e)
    assert actual[0].dtype == torch.float32


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_fp64(assert_close, backend, dtype, shape):
    check(assert_close, backend, *inputs(*shape, dtype=dtype))
    check(assert_close, backend, *inputs(*shape, dtype=dtype, weighted=False))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_fp64_in_pixels(assert_close, backend):
    check(assert_close, backend, *inputs(2, 3, 256, 256))


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(assert_close, between_nans, backend):
    """Slices of a wider tensor, channels-last and expanded inputs, strided weights, and a stride-0 gradient as .mean() gives."""
    (v, x0, noise, weight), grad = inputs(3, 4, 8, 8)
    check(assert_close, backend, (between_nans(v), between_nans(x0), between_nans(noise), weight), grad)
    last = v.contiguous(memory_format=torch.channels_last)
    check(assert_close, backend, (last, x0[:1].expand_as(x0), noise[:, :1].expand_as(noise), weight), grad)
    check(assert_close, backend, (v, x0, noise, weight.repeat_interleave(2)[::2]), grad.new_tensor(1 / 3).expand(3))
    check(assert_close, backend, (v, x0, noise, weight[:1].expand(3)), grad.repeat_interleave(2)[::2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes(backend):
    """bf16 targets and weights with fp32 v: the gradient is fp32, exact but for fp32 rounding."""
    (v, x0, noise, weight), grad = inputs(2, 4, 8, 8)
    arguments = v, x0.bfloat16(), noise.half(), weight.bfloat16()
    with kernels.backend(backend):
        loss, grad_v = run(kernels.flow_matching_loss, arguments, grad)
    expected, expected_grad = run(kernels.flow_matching_loss_reference, arguments, grad)
    assert grad_v.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad_v, expected_grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_gradients_below_its_smallest_normal_number_come_back_under_loss_scaling(backend):
    """Errors of 0.01 over 4096 elements: a gradient of 5e-6 is subnormal in fp16, but scaled by 2^16 it keeps all its bits."""
    x0, noise = zeros(1, 4096), zeros(1, 4096)
    v = torch.linspace(0.01, 0.011, 4096, device=DEVICE)[None].half()
    with kernels.backend(backend):
        _, grad_v = run(kernels.flow_matching_loss, (v, x0, noise, None), torch.tensor([2.0**16], device=DEVICE))
    assert torch.equal(grad_v, v * 32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_grad(backend):
    """No gradient is written when nobody asks for one, and the losses are the same bits."""
    (v, *rest), _ = inputs(2, 4, 8, 8)
    with kernels.backend(backend):
        loss = kernels.flow_matching_loss(v.requires_grad_(), *rest)
        assert torch.equal(kernels.flow_matching_loss(v.detach(), *rest), loss)
        with torch.no_grad():
            without = kernels.flow_matching_loss(v, *rest)
    assert torch.equal(without, loss) and not without.requires_grad
    op = getattr(torch.ops.fastdit, f"flow_matching_loss_forward_{backend}")
    assert op(v.detach(), *rest, False)[1].numel() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice(backend):
    """The saved error is not consumed: a retained graph gives the same gradient again."""
    (v, *rest), grad = inputs(2, 4, 8, 8)
    with kernels.backend(backend):
        loss = kernels.flow_matching_loss(v.requires_grad_(), *rest)
    first = torch.autograd.grad(loss, v, grad, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(loss, v, grad)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    arguments, grad = inputs(0, 4, 8, 8)
    with kernels.backend(backend):
        loss, grad_v = run(kernels.flow_matching_loss, arguments, grad)
        assert loss.shape == (0,) and grad_v.shape == (0, 4, 8, 8)
        nothing = kernels.flow_matching_loss(*inputs(2, 0)[0])  # the mean of no elements, as in PyTorch
    torch.testing.assert_close(nothing, torch.full_like(nothing, float("nan")), equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_are_refused(backend):
    """The backward op is opaque: a gradient through it would be lost without a word."""
    (v, *rest), _ = inputs(2, 4, 8, 8)
    with kernels.backend(backend):
        out = kernels.flow_matching_loss(v.requires_grad_(), *rest)
    (first,) = torch.autograd.grad(out.square().sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    forward, backward = (getattr(torch.ops.fastdit, f"flow_matching_loss_{d}_{backend}") for d in ("forward", "backward"))
    (v, x0, noise, weight), grad = inputs(2, 4, 8, 8, dtype=torch.float16)
    for case in ((v, x0, noise, weight, True), (v, x0[:1].expand_as(x0), noise, None, False)):
        torch.library.opcheck(forward, case)
    torch.library.opcheck(backward, (grad, v, weight))
    torch.library.opcheck(backward, (grad.new_ones(()).expand(2), v, None))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(backend, compiler):
    """fullgraph, forward and backward, and again with other batch sizes."""
    torch._dynamo.reset()
    compiled = torch.compile(kernels.flow_matching_loss, fullgraph=True, backend=compiler)
    with kernels.backend(backend):
        for batch in (2, 3, 5):
            case = inputs(batch, 4, 8, 8)
            for a, b in zip(run(compiled, *case), run(kernels.flow_matching_loss, *case), strict=True):
                assert torch.equal(a, b)


@pytest.mark.usefixtures("values")
def test_reference_formula():
    (v, x0, noise, weight), _ = inputs(3, 2, 2, 2, dtype=torch.float64)
    loss = kernels.flow_matching_loss_reference(v, x0, noise, weight)
    for b in range(3):
        expected = weight[b] * sum(
            (a - (n - x)) ** 2 for a, x, n in zip(*(t[b].flatten().tolist() for t in (v, x0, noise)), strict=True)
        )
        torch.testing.assert_close(loss[b], expected.double() / 8, rtol=1e-6, atol=0)
    weight = weight.double()
    function = lambda v: kernels.flow_matching_loss_reference(v, x0, noise, weight)
    assert torch.autograd.gradcheck(function, v.requires_grad_())


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": zeros(2)}, r"v has shape \[2\], but \[batch, ...\]"),
        ({"x0": zeros(2, 4, 8, 7)}, r"x0 has shape \[2, 4, 8, 7\], but \[2, 4, 8, 8\]"),
        ({"noise": zeros(1, 4, 8, 8)}, r"noise has shape \[1, 4, 8, 8\]"),
        ({"weight": zeros(2, 1)}, r"weight has shape \[2, 1\], but \[2\]"),
        ({"x0": zeros(2, 4, 8, 8, requires_grad=True)}, "x0 requires grad"),
        ({"weight": zeros(2, requires_grad=True)}, "weight requires grad"),
        ({"v": zeros(2, 4, 8, 8, dtype=torch.uint8)}, "v has dtype torch.uint8"),
        ({"noise": zeros(2, 4, 8, 8, device="meta")}, "noise is on meta"),
    ],
)
def test_bad_input(backend, change, message):
    arguments = dict(zip(("v", "x0", "noise", "weight"), inputs(2, 4, 8, 8)[0], strict=True)) | change
    with kernels.backend(backend), pytest.raises(ValueError, match=message):
        kernels.flow_matching_loss(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp64_needs_the_reference(backend):
    (v, *rest), _ = inputs(2, 4, 8, 8)
    with kernels.backend(backend), pytest.raises(ValueError, match="do not compute in float64"):
        kernels.flow_matching_loss(v.double(), *rest)
