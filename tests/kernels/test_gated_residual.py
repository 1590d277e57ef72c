"""gated_residual: kernels against the reference, and the reference against its formula. B batch, T tokens, H width."""

import sys

import pytest
import torch

from backends import BACKENDS, DEVICE, interpretable, zeros
from fastdit import kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def eager(x, branch, gate):
    """The naive chain, each step rounded to the dtype of x."""
    return x + gate.to(x.dtype)[:, None] * branch.to(x.dtype)


def inputs(B, T, H, dtype=torch.float32, modulation_dtype=None):
    """(x, branch, gate) and the gradient of r; x has the mean −2.3, gate is a view of a [B,6H] tensor."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)
    gate = randn(B, 6 * H).to(modulation_dtype or dtype).chunk(6, dim=1)[2]
    return ((randn(B, T, H) * 0.5 - 2.3).to(dtype), randn(B, T, H).to(dtype), gate), randn(B, T, H).to(dtype)


def run(function, arguments, grad):
    """r and the gradients of x, branch and gate."""
    arguments = [a.detach().requires_grad_() for a in arguments]
    r = function(*arguments)
    return r.detach(), *torch.autograd.grad(r, arguments, grad)


def check(assert_close, backend, arguments, grad):
    """r and gradients against fp64, in the dtypes of the inputs."""
    with kernels.backend(backend):
        actual = run(kernels.gated_residual, arguments, grad)
    truth = run(kernels.gated_residual_reference, [a.double() for a in arguments], grad.double())
    for a, t, e, n in zip(actual, truth, run(eager, arguments, grad), (1, 1, 1, grad.shape[1]), strict=True):
        assert_close(a, t, e, terms=n)


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size", [(1, 1, 64), (2, 7, 123), (5, 7, 384), (2, 64, 768), (5, 64, 1088), (2, 64, 1152), (1, 256, 1152), (2, 33, 1000)]
)
def test_matches_fp64(assert_close, backend, dtype, size):
    check(assert_close, backend, *inputs(*size, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(5, 256, 384), (5, 256, 1152), (2, 256, 1088), (1, 7, 9000)])
def test_matches_fp64_at_model_sizes(assert_close, backend, dtype, size):
    check(assert_close, backend, *inputs(*interpretable(backend, size), dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(2, 7, 123), (2, 256, 64)])
def test_reruns_are_bitwise_equal(backend, size):
    arguments, grad = inputs(*size)
    with kernels.backend(backend):
        first, second = (run(kernels.gated_residual, arguments, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes(assert_close, backend):
    """Branch and gate in other dtypes than the stream: each gradient comes back in the dtype of its input."""
    (x, branch, gate), grad = inputs(2, 64, 64, torch.bfloat16, torch.float32)
    check(assert_close, backend, (x, branch, gate), grad)
    check(assert_close, backend, (x.float(), branch, gate.bfloat16()), grad.float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("guarded_memory")
def test_layouts(assert_close, between_nans, backend):
    """Slices of wider tensors, transposed and expanded inputs, and gradients that are transposed, expanded or one number."""
    (x, branch, gate), grad = inputs(2, 7, 64)
    check(assert_close, backend, [between_nans(t) for t in (x, branch, gate)], between_nans(grad))
    check(assert_close, backend, (x.transpose(0, 1).contiguous().transpose(0, 1), branch.mT.contiguous().mT, gate), grad)
    check(assert_close, backend, (x.mT.contiguous().mT, branch, gate.T.contiguous().T), grad.mT.contiguous().mT)
    check(assert_close, backend, (x, branch[:1].expand(2, 7, 64), gate[:1].expand(2, 64)), grad[:, :1].expand(2, 7, 64))
    check(assert_close, backend, (x[:, :1].expand(2, 7, 64), branch, gate), grad.new_tensor(0.5).expand(2, 7, 64))


@pytest.mark.usefixtures("values")
@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes(backend):
    """A gate of zero gives x itself and no gradient of branch; a branch of zeros gives x and no gradient of gate."""
    (x, branch, gate), grad = inputs(2, 7, 64)
    with kernels.backend(backend):
        r, dx, dbranch, dgate = run(kernels.gated_residual, (x, branch, torch.zeros_like(gate)), grad)
        assert torch.equal(r, x) and torch.equal(dx, grad) and not dbranch.any() and dgate.any()
        r, _, dbranch, dgate = run(kernels.gated_residual, (x, torch.zeros_like(branch), gate), grad)
        assert torch.equal(r, x) and dbranch.any() and not dgate.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(0, 7, 64), (2, 0, 64)])
def test_empty(backend, size):
    arguments, grad = inputs(*size)
    with kernels.backend(backend):
        r, dx, dbranch, dgate = run(kernels.gated_residual, arguments, grad)
    assert r.shape == dx.shape == dbranch.shape == size
    assert torch.equal(dgate, zeros(size[0], 64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    """Everything for one layout; schema and strides of the fakes for the others (tracing is what takes the time)."""
    (x, branch, gate), _ = inputs(2, 7, 64)
    forward, backward = (getattr(torch.ops.fastdit, f"gated_residual_{name}_{backend}") for name in ("forward", "backward"))
    quick = {"test_utils": ("test_schema", "test_faketensor")}
    for given, options in ((branch, {}), (branch.mT.contiguous().mT, quick), (branch[:1].expand(2, 7, 64), quick)):
        torch.library.opcheck(forward, (x, given, gate), **options)
        torch.library.opcheck(backward, (x.new_ones(()).expand(2, 7, 64), given, gate), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(backend, compiler):
    """fullgraph, forward and backward, and again with a second batch size."""
    torch._dynamo.reset()
    compiled = torch.compile(kernels.gated_residual, fullgraph=True, backend=compiler)
    with kernels.backend(backend):
        for batch in (2, 3, 5):
            arguments, grad = inputs(batch, 7, 64)
            for a, b in zip(run(compiled, arguments, grad), run(kernels.gated_residual, arguments, grad), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend):
    arguments, grad = inputs(2, 7, 64)
    before = [t.clone() for t in (*arguments, grad)]
    with kernels.backend(backend):
        run(kernels.gated_residual, arguments, grad)
    assert all(torch.equal(a, b) for a, b in zip((*arguments, grad), before, strict=True))


@pytest.mark.usefixtures("values")
def test_reference_formula():
    """x + gate·branch in fp64, and its gradients by differences."""
    (x, branch, gate), _ = inputs(2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(kernels.gated_residual_reference(x, branch, gate), x + gate[:, None] * branch, rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(kernels.gated_residual_reference, [t.clone().requires_grad_() for t in (x, branch, gate)])


BAD = [
    ((zeros(7, 8), zeros(7, 8), zeros(7, 8)), r"\[batch, tokens, width\] is needed"),
    ((zeros(2, 7, 8), zeros(2, 7, 9), zeros(2, 8)), r"branch has shape \[2, 7, 9\], but \[2, 7, 8\]"),
    ((zeros(2, 7, 8), zeros(2, 7, 8), zeros(1, 8)), r"gate has shape \[1, 8\], but \[2, 8\]"),
    ((zeros(2, 7, 8), zeros(2, 7, 8).long(), zeros(2, 8)), "branch has dtype torch.int64"),
    ((zeros(2, 7, 8), zeros(2, 7, 8), zeros(2, 8, device="meta")), "gate is on meta"),
]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input(monkeypatch, backend, arguments, message):
    """One sentence, and before any kernel is launched."""
    monkeypatch.setattr(sys.modules["fastdit.kernels.gated_residual"], "launch", lambda *_, **__: pytest.fail("launched"))
    with kernels.backend(backend), pytest.raises(ValueError, match=message):
        kernels.gated_residual(*arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp64_needs_the_reference(backend):
    (x, branch, gate), _ = inputs(2, 7, 64)
    with kernels.backend(backend), pytest.raises(ValueError, match="do not compute in float64"):
        kernels.gated_residual(x, branch.double(), gate)
