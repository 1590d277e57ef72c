"""flow_interpolate: kernels against the reference, and the reference against its formula."""

import pytest
import torch

from backends import BACKENDS, DEVICE, zeros
from fastdit import kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 4, 8, 8), (2, 3, 7, 5), (5, 4, 16, 16), (3, 1)]


def inputs(*shape, dtype=torch.float32, noise_dtype=None):
    """(x0, noise, t) and the gradient of x_t. Every sample has its own t, 0 and 1 among them."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda: torch.randn(*shape, generator=generator).to(DEVICE)
    t = torch.tensor([0.3, 0.0, 1.0, 0.9, 0.6], device=DEVICE)[: shape[0]]
    return ((randn() - 2.3).to(dtype), randn().to(noise_dtype or dtype), t), randn().to(dtype)


def eager(x0, noise, t):
    """The naive chain, each step rounded to the dtype of x0."""
    t = t.to(x0.dtype).view(-1, *(1,) * (x0.ndim - 1))
    return (1 - t) * x0 + t * noise.to(x0.dtype)


def run(function, arguments, grad):
    x0, noise, t = (a.detach() for a in arguments)
    wanted = x0.requires_grad_(), noise.requires_grad_()
    out = function(x0, noise, t)
    return out.detach(), *torch.autograd.grad(out, wanted, grad)


def check(assert_close, backend, arguments, grad):
    """Output and gradients against fp64, and bitwise equal on a second run."""
    with kernels.backend(backend):
        actual, again = (run(kernels.flow_interpolate, arguments, grad) for _ in range(2))
    truth = run(kernels.flow_interpolate_reference, [a.double() for a in arguments], grad.double())
    for a, b, t, e in zip(actual, again, truth, run(eager, arguments, grad), strict=True):
        assert torch.equal(a, b)
        assert_close(a, t, e)


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_fp64(assert_close, backend, dtype, shape):
    check(assert_close, backend, *inputs(*shape, dtype=dtype))


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(assert_close, between_nans, backend):
    """Slices of a wider tensor, channels-last and expanded inputs and gradients, a strided t."""
    (x0, noise, t), grad = inputs(3, 4, 8, 8)
    check(assert_close, backend, (between_nans(x0), between_nans(noise), t), between_nans(grad))
    last = dict(memory_format=torch.channels_last)
    check(assert_close, backend, (x0.contiguous(**last), noise, t), grad.contiguous(**last))
    check(assert_close, backend, (x0[:1].expand_as(x0), noise[:, :1].expand_as(noise), t), grad.new_tensor(0.5).expand_as(grad))
    check(assert_close, backend, (x0, noise, t[:1].expand(3)), grad[:1].expand_as(grad))
    check(assert_close, backend, (x0, noise, t.repeat_interleave(2)[::2]), grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "noise_dtype"), [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_mixed_dtypes(assert_close, backend, dtype, noise_dtype):
    """x_t in the dtype of x0, each gradient in the dtype of its input."""
    check(assert_close, backend, *inputs(2, 4, 8, 8, dtype=dtype, noise_dtype=noise_dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ends_are_exact(backend):
    """t = 0 is the data and t = 1 the noise, to the last bit."""
    (x0, noise, _), _ = inputs(2, 4, 8, 8)
    with kernels.backend(backend):
        out = kernels.flow_interpolate(x0, noise, torch.tensor([0.0, 1.0], device=DEVICE))
    assert torch.equal(out[0], x0[0]) and torch.equal(out[1], noise[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (2, 0, 8, 8)])
def test_empty(backend, shape):
    arguments, grad = inputs(*shape)
    with kernels.backend(backend):
        assert all(t.shape == shape for t in run(kernels.flow_interpolate, arguments, grad))


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_are_refused(backend):
    """The backward op is opaque: a gradient through it would be lost without a word."""
    (x0, *rest), _ = inputs(2, 4, 8, 8)
    with kernels.backend(backend):
        out = kernels.flow_interpolate(x0.requires_grad_(), *rest)
    (first,) = torch.autograd.grad(out.square().sum(), x0, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    (x0, noise, t), grad = inputs(2, 4, 8, 8)
    forward, backward = (getattr(torch.ops.fastdit, f"flow_interpolate_{d}_{backend}") for d in ("forward", "backward"))
    for case in ((x0, noise, t), (x0.contiguous(memory_format=torch.channels_last), noise[:1].expand_as(noise), t)):
        torch.library.opcheck(forward, case)
    for case in (grad, grad.new_ones(()).expand_as(grad)):
        torch.library.opcheck(backward, (case, t, torch.bfloat16))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(backend, compiler):
    """fullgraph, forward and backward, and again with other batch sizes."""
    torch._dynamo.reset()
    compiled = torch.compile(kernels.flow_interpolate, fullgraph=True, backend=compiler)
    with kernels.backend(backend):
        for batch in (2, 3, 5):
            case = inputs(batch, 4, 8, 8)
            for a, b in zip(run(compiled, *case), run(kernels.flow_interpolate, *case), strict=True):
                assert torch.equal(a, b)


@pytest.mark.usefixtures("values")
def test_reference_formula():
    (x0, noise, t), _ = inputs(3, 2, 2, 2, dtype=torch.float64)
    out = kernels.flow_interpolate_reference(x0, noise, t)
    for b in range(3):
        torch.testing.assert_close(out[b], (1 - t[b].double()) * x0[b] + t[b].double() * noise[b], rtol=1e-15, atol=0)
    function = lambda x0, noise: kernels.flow_interpolate_reference(x0, noise, t)
    assert torch.autograd.gradcheck(function, (x0.requires_grad_(), noise.requires_grad_()))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": zeros(2)}, r"x0 has shape \[2\], but \[batch, ...\]"),
        ({"noise": zeros(2, 4, 8, 7)}, r"noise has shape \[2, 4, 8, 7\], but \[2, 4, 8, 8\]"),
        ({"t": zeros(3)}, r"t has shape \[3\], but \[2\]"),
        ({"t": zeros(2, requires_grad=True)}, "t requires grad"),
        ({"t": zeros(2, dtype=torch.int64)}, "t has dtype torch.int64"),
        ({"noise": zeros(2, 4, 8, 8, device="meta")}, "noise is on meta"),
    ],
)
def test_bad_input(backend, change, message):
    arguments = dict(zip(("x0", "noise", "t"), inputs(2, 4, 8, 8)[0], strict=True)) | change
    with kernels.backend(backend), pytest.raises(ValueError, match=message):
        kernels.flow_interpolate(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp64_needs_the_reference(backend):
    (x0, noise, t), _ = inputs(2, 4, 8, 8)
    with kernels.backend(backend), pytest.raises(ValueError, match="do not compute in float64"):
        kernels.flow_interpolate(x0, noise.double(), t)
