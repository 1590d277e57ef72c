"""swiglu: kernels against the reference, and the reference against its formula. M rows, F hidden width."""

import pytest
import torch
import torch.nn.functional as F

from backends import BACKENDS, DEVICE, zeros
from fastdit import kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def eager(packed: torch.Tensor) -> torch.Tensor:
    """The naive chain, each step rounded to the dtype of packed."""
    value, gate = packed.chunk(2, dim=-1)
    return value * F.silu(gate)


def run(function, packed: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    packed = packed.detach().requires_grad_()
    out = function(packed)
    return out.detach(), *torch.autograd.grad(out, packed, grad)


def check(assert_close, backend: str, packed: torch.Tensor, grad: torch.Tensor) -> None:
    """Output and gradient against fp64, and bitwise equal on a second run."""
    with kernels.backend(backend):
        actual, again = (run(kernels.swiglu, packed, grad) for _ in range(2))
    truth = run(kernels.swiglu_reference, packed.double(), grad.double())
    for a, b, t, e in zip(actual, again, truth, run(eager, packed, grad), strict=True):
        assert torch.equal(a, b)
        assert_close(a, t, e)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """packed [*shape, 2F] with a mean, and a gradient [*shape, F], from shape = (.., F)."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator) * 3 - 0.7
    return packed.to(DEVICE, dtype), torch.randn(*shape, generator=generator).to(DEVICE, dtype)


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 7, 123), (5, 7, 384), (2, 64, 1024), (3, 1088), (1, 256, 128), (5,)])
def test_matches_fp64(assert_close, backend, dtype, shape):
    check(assert_close, backend, *inputs(*shape, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5, 256, 1024), (2, 256, 2688), (2, 64, 4352)])
def test_matches_fp64_at_model_sizes(assert_close, backend, shape):
    check(assert_close, backend, *inputs(*shape))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("guarded_memory")
def test_layouts(assert_close, between_nans, backend):
    """Slices of a wider tensor, transposed inputs, and gradients that are transposed, expanded or a single stride-0 number."""
    packed, grad = inputs(2, 7, 64)
    check(assert_close, backend, between_nans(packed), between_nans(grad))
    check(assert_close, backend, packed.transpose(0, 1).contiguous().transpose(0, 1), grad)
    check(assert_close, backend, packed.mT.contiguous().mT, grad.mT.contiguous().mT)
    check(assert_close, backend, packed[:, :1].expand(2, 7, 128), grad[..., :1].expand(2, 7, 64))
    check(assert_close, backend, packed, grad.new_tensor(0.5).expand(2, 7, 64))
    check(assert_close, backend, packed[:, ::2], grad[:, ::2])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy, in the interpreter: 1/(1 + inf) is meant
@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes(backend):
    """Gates where the sigmoid is 0 or 1 to the last bit give exact values and gradients, never NaN; rows of zeros give zeros."""
    value, gate = torch.tensor([2.0, 2.0, 0.0]), torch.tensor([-200.0, 200.0, 0.0])
    with kernels.backend(backend):
        out, grad = run(kernels.swiglu, torch.cat((value, gate)).to(DEVICE), torch.ones(3, device=DEVICE))
    assert torch.equal(out, torch.tensor([-0.0, 400.0, 0.0], device=DEVICE))
    assert torch.equal(grad, torch.tensor([-0.0, 200.0, 0.0, 0.0, 2.0, 0.0], device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 7, 64), (2, 0, 64), (2, 7, 0)])
def test_empty(backend, shape):
    packed, grad = inputs(*shape)
    with kernels.backend(backend):
        out, grad_packed = run(kernels.swiglu, packed, grad)
    assert out.shape == grad.shape and grad_packed.shape == packed.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_are_refused(backend):
    """The backward op is opaque: a gradient through it would be lost without a word."""
    packed = inputs(2, 64)[0].requires_grad_()
    with kernels.backend(backend):
        out = kernels.swiglu(packed)
    (first,) = torch.autograd.grad(out.square().sum(), packed, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    for packed in (inputs(2, 7, 64)[0], inputs(7, 2, 64)[0].transpose(0, 1), zeros(1).expand(2, 128), inputs(0, 64)[0]):
        grad = packed.new_ones(()).expand(*packed.shape[:-1], packed.shape[-1] // 2)
        torch.library.opcheck(getattr(torch.ops.fastdit, f"swiglu_forward_{backend}"), (packed,))
        torch.library.opcheck(getattr(torch.ops.fastdit, f"swiglu_backward_{backend}"), (grad, packed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(backend, compiler):
    """fullgraph, forward and backward, and again with a second batch size."""
    torch._dynamo.reset()
    compiled = torch.compile(kernels.swiglu, fullgraph=True, backend=compiler)
    with kernels.backend(backend):
        for batch in (2, 3, 5):
            packed, grad = inputs(batch, 7, 64)
            for a, b in zip(run(compiled, packed, grad), run(kernels.swiglu, packed, grad), strict=True):
                assert torch.equal(a, b)


def test_backend_of_the_forward_runs_the_backward():
    packed, grad = inputs(2, 64)
    packed.requires_grad_()
    with kernels.backend("triton"):
        out = kernels.swiglu(packed)
    with kernels.backend("reference"):
        assert type(out.grad_fn).__name__ == "_SwiGLUBackward"
        torch.autograd.grad(out, packed, grad)
        assert type(kernels.swiglu(packed).grad_fn).__name__ != "_SwiGLUBackward"


@pytest.mark.usefixtures("values")
def test_reference_formula():
    """value·gate/(1 + e^−gate) in fp64, and its gradient by differences."""
    packed, _ = inputs(2, 5, dtype=torch.float64)
    value, gate = packed[:, :5], packed[:, 5:]
    torch.testing.assert_close(kernels.swiglu_reference(packed), value * gate / (1 + torch.exp(-gate)), rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(kernels.swiglu_reference, packed.requires_grad_())


def test_reference_rounds_once():
    packed, _ = inputs(3, 64, dtype=torch.bfloat16)
    assert torch.equal(kernels.swiglu_reference(packed), kernels.swiglu_reference(packed.float()).bfloat16())


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (zeros(2, 7), r"last dimension must be value \| gate, so even"),
        (zeros(()), "last dimension"),
        (zeros(2, 8, dtype=torch.int64), "must be a floating-point tensor"),
    ],
)
def test_bad_input(backend, packed, message):
    with kernels.backend(backend), pytest.raises(ValueError, match=message):
        kernels.swiglu(packed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp64_needs_the_reference(backend):
    with kernels.backend(backend), pytest.raises(ValueError, match="do not compute in float64"):
        kernels.swiglu(zeros(2, 8, dtype=torch.float64))
