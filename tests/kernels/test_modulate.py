"""modulate: kernels against the reference, and the reference against its formula. B batch, T tokens, H width."""

import sys

import pytest
import torch
import torch.nn.functional as F

from backends import BACKENDS, DEVICE, interpretable, zeros
from fastdit import kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def eager(x, shift, scale, eps=1e-5):
    """The naive chain, each step rounded to the dtype of x."""
    shift, scale = shift.to(x.dtype)[:, None], scale.to(x.dtype)[:, None]
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def inputs(B, T, H, dtype=torch.float32, modulation_dtype=None):
    """(x, shift, scale) and the gradient of y; x has the mean −2.3, shift and scale are views of one [B,6H] tensor."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)
    shift, scale = randn(B, 6 * H).to(modulation_dtype or dtype).chunk(6, dim=1)[1:3]
    return ((randn(B, T, H) * 0.5 - 2.3).to(dtype), shift, scale), randn(B, T, H).to(dtype)


def run(function, arguments, grad, *options):
    """y and the gradients of x, shift and scale."""
    arguments = [a.detach().requires_grad_() for a in arguments]
    y = function(*arguments, *options)
    return y.detach(), *torch.autograd.grad(y, arguments, grad)


def check(assert_close, backend, arguments, grad):
    """y and gradients against fp64, in the dtypes of the inputs."""
    with kernels.backend(backend):
        actual = run(kernels.modulate, arguments, grad)
    truth = run(kernels.modulate_reference, [a.double() for a in arguments], grad.double())
    terms = (1, 1, grad.shape[1], grad.shape[1])
    for a, t, e, n in zip(actual, truth, run(eager, arguments, grad), terms, strict=True):
        assert_close(a, t, e, terms=n)


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 64), (2, 7, 123), (5, 7, 384), (2, 3, 1152)])
def test_matches_fp64(assert_close, backend, dtype, size):
    check(assert_close, backend, *inputs(*size, dtype=dtype))


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(2, 25, 64), (2, 9, 1100), (1, 64, 1088), (2, 64, 1152), (1, 256, 64)])
def test_matches_fp64_in_parts(assert_close, backend, size):
    """Samples that several programs share (25 tokens as 9 + 9 + 7), and rows of two tiles, at 1100 with dead lanes in the tail."""
    check(assert_close, backend, *inputs(*size))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(2, 7, 123), (2, 25, 64)])
def test_reruns_are_bitwise_equal(backend, size):
    arguments, grad = inputs(*size)
    with kernels.backend(backend):
        first, second = (run(kernels.modulate, arguments, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(5, 256, 384), (2, 256, 1152), (5, 64, 1088), (2, 64, 768), (1, 7, 4096)])
def test_matches_fp64_at_model_sizes(assert_close, backend, dtype, size):
    check(assert_close, backend, *inputs(*interpretable(backend, size), dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes(assert_close, backend):
    """fp32 or fp16 modulation of a bf16 stream: each gradient comes back in the dtype of its input."""
    check(assert_close, backend, *inputs(2, 25, 64, torch.bfloat16, torch.float32))
    (x, shift, scale), grad = inputs(2, 7, 64, torch.bfloat16)
    check(assert_close, backend, (x, shift.half(), scale.float()), grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("guarded_memory")
def test_layouts(assert_close, between_nans, backend):
    """Slices of wider tensors, transposed and expanded inputs, and gradients that are transposed, expanded or one number."""
    (x, shift, scale), grad = inputs(2, 7, 64)
    check(assert_close, backend, [between_nans(t) for t in (x, shift, scale)], between_nans(grad))
    check(assert_close, backend, (x.transpose(0, 1).contiguous().transpose(0, 1), shift, scale), grad)
    check(assert_close, backend, (x.mT.contiguous().mT, shift.T.contiguous().T, scale), grad.mT.contiguous().mT)
    check(assert_close, backend, (x[:1].expand(2, 7, 64), shift[:1].expand(2, 64), scale[:1].expand(2, 64)), grad)
    check(assert_close, backend, (x[:, :1].expand(2, 7, 64), shift[:, :1].expand(2, 64), scale), grad[:, :1].expand(2, 7, 64))
    check(assert_close, backend, (x, shift, scale), grad.new_tensor(0.5).expand(2, 7, 64))


@pytest.mark.usefixtures("values")
@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes(assert_close, backend):
    """A row of zeros gives the shift exactly; scale = −1 gives it everywhere, with a gradient of scale and none of x."""
    (x, shift, scale), grad = inputs(2, 3, 123)
    zero = x.index_fill(1, torch.tensor([1], device=DEVICE), 0)
    check(assert_close, backend, (zero, shift, scale), grad)
    with kernels.backend(backend):
        assert torch.equal(kernels.modulate(zero, shift, scale)[:, 1], shift)
        y, dx, dshift, dscale = run(kernels.modulate, (x, shift, -torch.ones_like(scale)), grad)
    assert torch.equal(y, shift[:, None].expand_as(y))
    assert not dx.any() and dshift.any() and dscale.any()


@pytest.mark.usefixtures("values")
@pytest.mark.parametrize("backend", BACKENDS)
def test_variance_does_not_cancel(backend):
    """A mean of 1000 standard deviations: the sum that makes the mean may err by √H roundings of it, and E[x²] − mean² in fp32
    would be wrong by a tenth of the variance."""
    (x, shift, scale), _ = inputs(2, 3, 123)
    x = x - 500
    with kernels.backend(backend):
        y = kernels.modulate(x, shift, scale)
    truth = kernels.modulate_reference(x.double(), shift.double(), scale.double())
    bound = 4 * 123**0.5 * torch.finfo(torch.float32).eps * 1000 * (1 + scale).abs().max()
    assert (y - truth).abs().max() <= bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps(assert_close, backend):
    (x, shift, scale), grad = inputs(2, 3, 64)
    with kernels.backend(backend):
        actual = run(kernels.modulate, (x, shift, scale), grad, 0.5)
    truth = run(kernels.modulate_reference, (x.double(), shift.double(), scale.double()), grad.double(), 0.5)
    for a, t, e in zip(actual, truth, run(eager, (x, shift, scale), grad, 0.5), strict=True):
        assert_close(a, t, e, terms=3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(0, 7, 64), (2, 0, 64)])
def test_empty(backend, size):
    arguments, grad = inputs(*size)
    with kernels.backend(backend):
        y, dx, dshift, dscale = run(kernels.modulate, arguments, grad)
    assert y.shape == dx.shape == size
    assert torch.equal(dshift, zeros(size[0], 64)) and torch.equal(dscale, dshift)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    """Everything for one layout; schema and strides of the fakes for the others (tracing is what takes the time)."""
    (x, shift, scale), _ = inputs(2, 7, 64)
    forward, backward = (getattr(torch.ops.fastdit, f"modulate_{name}_{backend}") for name in ("forward", "backward"))
    quick = {"test_utils": ("test_schema", "test_faketensor")}
    for given, options in ((x, {}), (x.mT.contiguous().mT, quick), (x[:1].expand(2, 7, 64), quick)):
        torch.library.opcheck(forward, (given, shift, scale, 1e-5), **options)
        stats = torch.stack((given.mean(-1), given.std(-1).reciprocal()))
        torch.library.opcheck(backward, (x.new_ones(()).expand(2, 7, 64), given, stats, shift, scale), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(backend, compiler):
    """fullgraph, forward and backward, and again with a second batch size."""
    torch._dynamo.reset()
    compiled = torch.compile(kernels.modulate, fullgraph=True, backend=compiler)
    with kernels.backend(backend):
        for batch in (2, 3, 5):
            arguments, grad = inputs(batch, 7, 64)
            for a, b in zip(run(compiled, arguments, grad), run(kernels.modulate, arguments, grad), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend):
    arguments, grad = inputs(2, 7, 64)
    before = [t.clone() for t in (*arguments, grad)]
    with kernels.backend(backend):
        run(kernels.modulate, arguments, grad)
    assert all(torch.equal(a, b) for a, b in zip((*arguments, grad), before, strict=True))


@pytest.mark.usefixtures("values")
def test_reference_formula():
    """(x − mean)/√(var + eps)·(1 + scale) + shift in fp64, and its gradients by differences."""
    (x, shift, scale), _ = inputs(2, 3, 5, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(kernels.modulate_reference(x, shift, scale), y, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(kernels.modulate_reference, [t.clone().requires_grad_() for t in (x, shift, scale)])


BAD = [
    ((zeros(7, 8), zeros(7, 8), zeros(7, 8)), r"\[batch, tokens, width\] is needed"),
    ((zeros(2, 7, 8), zeros(1, 8), zeros(2, 8)), r"shift has shape \[1, 8\], but \[2, 8\]"),
    ((zeros(2, 7, 8), zeros(2, 8), zeros(2, 9)), r"scale has shape \[2, 9\], but \[2, 8\]"),
    ((zeros(2, 7, 8, dtype=torch.int32), zeros(2, 8), zeros(2, 8)), "x has dtype torch.int32"),
    ((zeros(2, 7, 8), zeros(2, 8), zeros(2, 8, device="meta")), "scale is on meta"),
]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input(monkeypatch, backend, arguments, message):
    """One sentence, and before any kernel is launched."""
    monkeypatch.setattr(sys.modules["fastdit.kernels.modulate"], "launch", lambda *_, **__: pytest.fail("launched"))
    with kernels.backend(backend), pytest.raises(ValueError, match=message):
        kernels.modulate(*arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_only_the_reference_does(backend):
    with kernels.backend(backend):
        with pytest.raises(ValueError, match="do not compute in float64"):
            kernels.modulate(zeros(2, 7, 8), zeros(2, 8), zeros(2, 8, dtype=torch.float64))
        with pytest.raises(ValueError, match="width 8193 is over 8192"):
            kernels.modulate(zeros(1, 1, 8193), zeros(1, 8193), zeros(1, 8193))
