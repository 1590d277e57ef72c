"""swiglu and swiglu_linear: kernels against the reference, and the reference against its formula. M rows, F hidden width."""

import pytest
import torch
import torch.nn.functional as F

from backends import BACKENDS, DEVICE, interpretable, zeros
from fastdit import kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# seconds each in Triton's interpreter
LARGE = [pytest.param(shape, marks=pytest.mark.slow) for shape in [(2, 64, 1024), (1, 256, 128), (1, 257, 128)]]


def eager(packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The naive chain, each step rounded to the dtype of packed."""
    if bias is not None:
        packed = packed + bias.to(packed.dtype)
    value, gate = packed.chunk(2, dim=-1)
    return value * F.silu(gate)


def run(function, packed: torch.Tensor, grad: torch.Tensor, *more: torch.Tensor, **options) -> tuple[torch.Tensor, ...]:
    """The output, and the gradients of packed and `more` inputs."""
    wanted = [t.detach().requires_grad_() for t in (packed, *more)]
    out = function(*wanted, **options)
    return out.detach(), *torch.autograd.grad(out, wanted, grad)


def check(assert_close, backend: str, packed: torch.Tensor, grad: torch.Tensor, *bias: torch.Tensor) -> None:
    """Output and gradients against fp64, and bitwise equal on a second run."""
    with kernels.backend(backend):
        actual, again = (run(kernels.swiglu, packed, grad, *bias) for _ in range(2))
    truth = run(kernels.swiglu_reference, packed.double(), grad.double(), *(b.double() for b in bias))
    terms = 1, 1, grad.numel() // max(1, grad.shape[-1])  # the bias's gradient is a sum over the rows
    for a, b, t, e, n in zip(actual, again, truth, run(eager, packed, grad, *bias), terms, strict=False):
        assert torch.equal(a, b)
        assert_close(a, t, e, terms=n)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """packed [*shape, 2F] with a mean, and a gradient [*shape, F], from shape = (.., F)."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator) * 3 - 0.7
    return packed.to(DEVICE, dtype), torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def bias_of(packed: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A bias [2F] for packed, as large as its values."""
    return torch.randn(packed.shape[-1], generator=torch.Generator().manual_seed(1)).to(packed.device, dtype or packed.dtype) * 2


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 7, 123), (5, 7, 384), (3, 1088), (5,), *LARGE])
def test_matches_fp64(assert_close, backend, dtype, shape):
    check(assert_close, backend, *inputs(*shape, dtype=dtype))


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 7, 123), (5, 7, 384), (3, 1088), (5,), *LARGE])
def test_bias_matches_fp64(assert_close, backend, dtype, shape):
    """Its gradient sums over the rows of many programs, the last of which has fewer."""
    packed, grad = inputs(*shape, dtype=dtype)
    check(assert_close, backend, packed, grad, bias_of(packed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bias_of_another_dtype(assert_close, backend, dtype):
    """Added in fp32; its gradient comes back in its own dtype."""
    packed, grad = inputs(2, 25, 64, dtype=torch.bfloat16)
    check(assert_close, backend, packed, grad, bias_of(packed, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5, 256, 1024), (2, 256, 2688), (2, 64, 4352)])
def test_matches_fp64_at_model_sizes(assert_close, backend, shape):
    packed, grad = inputs(*interpretable(backend, shape))
    check(assert_close, backend, packed, grad)
    check(assert_close, backend, packed, grad, bias_of(packed))


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
    check(assert_close, backend, between_nans(packed), between_nans(grad), bias_of(torch.cat((packed, packed), -1))[::2])
    check(assert_close, backend, packed.transpose(0, 1).contiguous().transpose(0, 1), grad, bias_of(packed)[:1].expand(128))


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
        *_, grad_bias = run(kernels.swiglu, packed, grad, bias_of(packed))
    assert out.shape == grad.shape and grad_packed.shape == packed.shape
    assert torch.equal(grad_bias, zeros(packed.shape[-1]))


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
    bias = bias_of(packed).half()
    torch.library.opcheck(getattr(torch.ops.fastdit, f"swiglu_forward_{backend}"), (packed, bias))
    for given in (inputs(2, 7, 64)[0], packed):
        grad = given.new_ones((*given.shape[:-1], 64))
        torch.library.opcheck(getattr(torch.ops.fastdit, f"swiglu_backward_{backend}"), (grad, given, bias, True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(backend, compiler):
    """fullgraph, forward and backward, and again with a second batch size."""
    torch._dynamo.reset()
    compiled = torch.compile(kernels.swiglu, fullgraph=True, backend=compiler)
    with kernels.backend(backend):
        for batch in (2, 3, 5):
            packed, grad = inputs(batch, 7, 64)
            for more in ((), (bias_of(packed),)):
                both = run(compiled, packed, grad, *more), run(kernels.swiglu, packed, grad, *more)
                assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.usefixtures("values")
def test_reference_formula():
    """value·gate/(1 + e^−gate) in fp64, and its gradient by differences."""
    packed, _ = inputs(2, 5, dtype=torch.float64)
    bias = bias_of(packed)
    assert torch.equal(kernels.swiglu_reference(packed, bias), kernels.swiglu_reference(packed + bias))
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
    with kernels.backend(backend), pytest.raises(ValueError, match=r"bias has shape \[4\], but \[8\] is needed"):
        kernels.swiglu(zeros(2, 8), zeros(4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp64_needs_the_reference(backend):
    with kernels.backend(backend), pytest.raises(ValueError, match="do not compute in float64"):
        kernels.swiglu(zeros(2, 8, dtype=torch.float64))
    with kernels.backend(backend), pytest.raises(ValueError, match="do not compute in float64"):
        kernels.swiglu(zeros(2, 8), zeros(8, dtype=torch.float64))


def linear_inputs(*shape: int, dtype: torch.dtype = torch.float32, out: int = 48) -> tuple[torch.Tensor, ...]:
    """packed [*shape, 2F], a gradient [*shape, out], weight [out,F] and bias [2F], from shape = (.., F)."""
    packed, _ = inputs(*shape, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(out, shape[-1], generator=generator) / max(1, shape[-1]) ** 0.5
    grad = torch.randn(*shape[:-1], out, generator=generator)
    return packed, grad.to(DEVICE, dtype), weight.to(DEVICE, dtype), bias_of(packed)


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 7, 123), (3, 25, 384), (35, 64), (0, 7, 64), (2, 0, 64)])
def test_linear_matches_fp64(assert_close, backend, dtype, shape):
    """All outputs and gradients, which recomputing changes in no bit. terms: of sums over F, over the width, and over the rows."""
    arguments = linear_inputs(*shape, dtype=dtype)
    with kernels.backend(backend):
        actual, light = (run(kernels.swiglu_linear, *arguments, recompute=recompute) for recompute in (False, True))
    truth = run(kernels.swiglu_linear_reference, *(t.double() for t in arguments))
    naive = run(lambda packed, weight, bias: F.linear(eager(packed, bias), weight), *arguments)
    rows = arguments[1].numel() // 48
    for a, b, t, e, n in zip(actual, light, truth, naive, (shape[-1], 48, rows, 48 * rows), strict=True):
        assert torch.equal(a, b)
        assert_close(a, t, e, terms=max(1, n))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("compiled", [False, True])
def test_recompute_keeps_nothing_but_inputs(backend, compiled):
    """By what autograd saves; of a compiled graph these are the tensors that its forward hands to its backward."""
    torch._dynamo.reset()
    packed, grad, weight, bias = linear_inputs(2, 7, 64)
    hidden = 2 * 7 * 64
    function = torch.compile(kernels.swiglu_linear, fullgraph=True, backend="aot_eager") if compiled else kernels.swiglu_linear
    kept, gradients = {}, {}
    for recompute in (False, True):
        saved = []
        keep = lambda t, saved=saved: saved.append(t) or t
        with kernels.backend(backend), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            gradients[recompute] = run(function, packed, grad, weight, bias, recompute=recompute)
        kept[recompute] = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}.values()) // 4
    given = packed.numel() + weight.numel() + bias.numel()
    assert kept[True] <= given
    if backend != "reference":
        assert kept == {True: given, False: given + hidden}
    assert all(torch.equal(a, b) for a, b in zip(gradients[True], gradients[False], strict=True))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"packed": zeros(2, 7)}, r"last dimension must be value \| gate, so even"),
        ({"packed": zeros(8)}, r"packed has shape \[8\], but \[.., 2F\] with rows"),
        ({"bias": zeros(4)}, r"bias has shape \[4\], but \[8\]"),
        ({"weight": zeros(3, 5)}, r"weight has shape \[3, 5\], but \[any, 4\]"),
        ({"weight": zeros(3, 4, dtype=torch.float16)}, "weight has dtype torch.float16, but packed has torch.float32"),
        ({"weight": zeros(3, 4, device="meta")}, "weight is on meta"),
    ],
)
def test_linear_bad_input(backend, changed, message):
    arguments = {"packed": zeros(2, 8), "weight": zeros(3, 4), "bias": zeros(8)} | changed
    with kernels.backend(backend), pytest.raises(ValueError, match=message):
        kernels.swiglu_linear(**arguments)
