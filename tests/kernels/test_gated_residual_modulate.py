"""gated_residual_modulate: kernels against the reference and against the two ops that it fuses. B batch, T tokens, H width."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from backends import BACKENDS, DEVICE, interpretable, zeros
from fastdit import kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# seconds each in Triton's interpreter
LARGE = [pytest.param(size, marks=pytest.mark.slow) for size in [(2, 64, 1152), (1, 256, 64)]]
LARGER_BATCH = pytest.param((5, 25, 384), marks=pytest.mark.slow)


def eager(x, branch, gate, shift, scale, eps=1e-5, bias=None):
    """The naive chain, each step rounded to the dtype of x."""
    if bias is not None:
        branch = branch + bias.to(branch.dtype)
    gate, shift, scale = (t.to(x.dtype)[:, None] for t in (gate, shift, scale))
    r = x + gate * branch.to(x.dtype)
    return r, F.layer_norm(r, r.shape[-1:], eps=eps) * (1 + scale) + shift


def inputs(B, T, H, dtype=torch.float32, modulation_dtype=None):
    """(x, branch, gate, shift, scale) and the gradients of r and y; gate, shift and scale are views of one [B,6H] tensor."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)
    modulation = randn(B, 6 * H).to(modulation_dtype or dtype).chunk(6, dim=1)[2:5]
    x = (randn(B, T, H) * 0.5 - 2.3).to(dtype)
    return (x, randn(B, T, H).to(dtype), *modulation), tuple(randn(B, T, H).to(dtype) for _ in range(2))


def run(function, arguments, grads, *options):
    """r, y and the gradients of x, branch, gate, shift and scale."""
    arguments = [a.detach().requires_grad_() for a in arguments]
    outputs = function(*arguments, *options)
    return *(t.detach() for t in outputs), *torch.autograd.grad(outputs, arguments, grads)


def with_bias(function, eps=1e-5):
    """`function` with the bias as its sixth input."""
    return lambda x, branch, gate, shift, scale, bias: function(x, branch, gate, shift, scale, eps, bias)


def check_bias(assert_close, backend, arguments, grads, bias):
    """As `check`, with a bias: outputs and six gradients against fp64, the same bits again. dbias sums over all tokens."""
    arguments = (*arguments, bias)
    with kernels.backend(backend):
        actual, again = (run(with_bias(kernels.gated_residual_modulate), arguments, grads) for _ in range(2))
    reference = with_bias(kernels.gated_residual_modulate_reference)
    truth = run(reference, [a.double() for a in arguments], [g.double() for g in grads])
    B, T, _ = grads[0].shape
    for a, b, t, e, n in zip(
        actual, again, truth, run(with_bias(eager), arguments, grads), (1, 1, 1, 1, T, T, T, B * T), strict=True
    ):
        assert torch.equal(a, b)
        assert_close(a, t, e, terms=max(1, n))


def bias_for(arguments, dtype=None):
    x = arguments[0]
    return torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(1)).to(x.device, dtype or x.dtype)


def check(assert_close, backend, arguments, grads, *options):
    """r, y and gradients against fp64, in the dtypes of the inputs."""
    with kernels.backend(backend):
        actual = run(kernels.gated_residual_modulate, arguments, grads, *options)
    reference = kernels.gated_residual_modulate_reference
    truth = run(reference, [a.double() for a in arguments], [g.double() for g in grads], *options)
    terms = (1, 1, 1, 1, *3 * [grads[0].shape[1]])
    for a, t, e, n in zip(actual, truth, run(eager, arguments, grads, *options), terms, strict=True):
        assert_close(a, t, e, terms=n)


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 64), (2, 7, 123), (5, 7, 384), (2, 3, 1152)])
def test_matches_fp64(assert_close, backend, dtype, size):
    check(assert_close, backend, *inputs(*size, dtype=dtype))


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(2, 25, 64), (2, 9, 1100), (1, 64, 1088), *LARGE])
def test_matches_fp64_in_parts(assert_close, backend, size):
    """Samples that several programs share (25 tokens as 9 + 9 + 7), and rows of two tiles, at 1100 with dead lanes in the tail."""
    check(assert_close, backend, *inputs(*size))


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 64), (2, 7, 123), (2, 3, 1152), LARGER_BATCH])
def test_bias_matches_fp64(assert_close, backend, dtype, size):
    arguments, grads = inputs(*size, dtype=dtype)
    check_bias(assert_close, backend, arguments, grads, bias_for(arguments))


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(2, 25, 64), (2, 9, 1100), (1, 64, 1088), LARGE[1]])
def test_bias_matches_fp64_in_parts(assert_close, backend, size):
    arguments, grads = inputs(*size)
    check_bias(assert_close, backend, arguments, grads, bias_for(arguments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_of_other_dtypes_and_layouts(assert_close, between_nans, backend):
    arguments, grads = inputs(2, 25, 64, torch.bfloat16, torch.float32)
    check_bias(assert_close, backend, arguments, grads, bias_for(arguments, torch.float16))
    x, branch, *m = arguments
    check_bias(assert_close, backend, (x, branch.float(), *m), grads, bias_for(arguments, torch.float32))
    arguments, grads = inputs(2, 7, 64)
    wide = torch.cat((bias_for(arguments), bias_for(arguments)))
    check_bias(assert_close, backend, [between_nans(t) for t in arguments], [between_nans(t) for t in grads], wide[::2])
    check_bias(assert_close, backend, arguments, grads, wide[:1].expand(64))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_is_added_in_fp32(backend, dtype):
    """r rounds once: with values that cancel, a sum that is rounded to bf16 first would lose most of the bias."""
    (x, _, gate, shift, scale), _ = inputs(2, 7, 64, dtype)
    fractions = torch.arange(64, device=DEVICE) / 64
    branch, bias = torch.full_like(x, -256.0), 257.0 + fractions
    with kernels.backend(backend):
        r, _ = kernels.gated_residual_modulate(torch.zeros_like(x), branch, torch.ones_like(gate), shift, scale, bias=bias)
    assert torch.equal(r, (1 + fractions).to(dtype).expand_as(r))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(5, 256, 384), (2, 256, 1152), (5, 64, 1088), (2, 64, 768), (1, 7, 4096)])
def test_matches_fp64_at_model_sizes(assert_close, backend, dtype, size):
    arguments, grads = inputs(*interpretable(backend, size), dtype=dtype)
    check(assert_close, backend, arguments, grads)
    check_bias(assert_close, backend, arguments, grads, bias_for(arguments))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_two_ops(backend, dtype):
    """r is gated_residual's and y is modulate's of that r, bit for bit: the norm sees r as it is stored."""
    (x, branch, gate, shift, scale), _ = inputs(2, 7, 64, dtype)
    with kernels.backend(backend):
        r, y = kernels.gated_residual_modulate(x, branch, gate, shift, scale)
        assert torch.equal(r, kernels.gated_residual(x, branch, gate))
        assert torch.equal(y, kernels.modulate(r, shift, scale))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unused", [0, 1])
def test_one_output_used(assert_close, backend, unused):
    """A loss that reads only y, or only r: as if the other's gradient were zeros."""
    arguments, grads = inputs(2, 25, 64)
    wanted = [a.detach().requires_grad_() for a in arguments]
    with kernels.backend(backend):
        output = kernels.gated_residual_modulate(*wanted)[1 - unused]
    actual = torch.autograd.grad(output, wanted, grads[1 - unused], allow_unused=True, materialize_grads=True)
    grads = [torch.zeros_like(g) if i == unused else g for i, g in enumerate(grads)]
    reference = kernels.gated_residual_modulate_reference
    truth = run(reference, [a.double() for a in arguments], [g.double() for g in grads])[2:]
    for a, t, e in zip(actual, truth, run(eager, arguments, grads)[2:], strict=True):
        assert_close(a, t, e, terms=25)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(2, 7, 123), (2, 25, 64)])
def test_reruns_are_bitwise_equal(backend, size):
    arguments, grads = inputs(*size)
    with kernels.backend(backend):
        first, second = (run(kernels.gated_residual_modulate, arguments, grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_changes_nothing(backend):
    arguments, grads = inputs(2, 25, 64)
    recomputed = lambda *a: checkpoint(kernels.gated_residual_modulate, *a, use_reentrant=False)
    with kernels.backend(backend):
        first, second = (run(f, arguments, grads) for f in (kernels.gated_residual_modulate, recomputed))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes(assert_close, backend):
    """fp32 or fp16 modulation of a bf16 stream: each gradient comes back in the dtype of its input."""
    check(assert_close, backend, *inputs(2, 25, 64, torch.bfloat16, torch.float32))
    (x, branch, gate, shift, scale), grads = inputs(2, 7, 64, torch.bfloat16)
    check(assert_close, backend, (x, branch.float(), gate, shift.half(), scale.float()), grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("guarded_memory")
def test_layouts(assert_close, between_nans, backend):
    """Slices of wider tensors, transposed and expanded inputs, and gradients that are transposed, expanded or one number."""
    (x, branch, gate, shift, scale), (dr, dy) = inputs(2, 7, 64)
    m, one = (gate, shift, scale), dr.new_tensor(0.5).expand(2, 7, 64)
    check(assert_close, backend, [between_nans(t) for t in (x, branch, *m)], (between_nans(dr), between_nans(dy)))
    check(assert_close, backend, (x.transpose(0, 1).contiguous().transpose(0, 1), branch.mT.contiguous().mT, *m), (dr, dy))
    check(assert_close, backend, (x.mT.contiguous().mT, branch, gate, shift.T.contiguous().T, scale), (dr.mT.contiguous().mT, one))
    check(assert_close, backend, (x, branch[:1].expand(2, 7, 64), *(t[:1].expand(2, 64) for t in m)), (one, dy.mT.contiguous().mT))
    check(assert_close, backend, (x[:, :1].expand(2, 7, 64), branch, *m), (dr[:, :1].expand(2, 7, 64), dy[:1].expand(2, 7, 64)))


@pytest.mark.usefixtures("values")
@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes(assert_close, backend):
    """Rows of zeros, scale = −1 (y is the shift) and gate = 0 (r is x)."""
    (x, branch, gate, shift, scale), grads = inputs(2, 3, 123)
    zero = torch.zeros_like(x)
    check(assert_close, backend, (zero, zero, gate, shift, scale), grads)
    with kernels.backend(backend):
        r, y, dx, dbranch, *_ = run(
            kernels.gated_residual_modulate, (x, branch, torch.zeros_like(gate), shift, -torch.ones_like(scale)), grads
        )
    assert torch.equal(r, x) and torch.equal(y, shift[:, None].expand_as(y))
    assert torch.equal(dx, grads[0]) and not dbranch.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps(assert_close, backend):
    check(assert_close, backend, *inputs(2, 3, 64), 0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(0, 7, 64), (2, 0, 64)])
def test_empty(backend, size):
    arguments, grads = inputs(*size)
    with kernels.backend(backend):
        r, y, dx, dbranch, *modulation = run(kernels.gated_residual_modulate, arguments, grads)
        dbias = run(with_bias(kernels.gated_residual_modulate), (*arguments, bias_for(arguments)), grads)[-1]
    assert r.shape == y.shape == dx.shape == dbranch.shape == size
    assert all(torch.equal(t, zeros(size[0], 64)) for t in modulation)
    assert torch.equal(dbias, zeros(64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    """Everything for one layout; schema and strides of the fakes for the others (tracing is what takes the time)."""
    (x, branch, *m), (dr, _) = inputs(2, 7, 64)
    names = (f"gated_residual_modulate_{name}_{backend}" for name in ("forward", "backward"))
    forward, backward = (getattr(torch.ops.fastdit, name) for name in names)
    stats = torch.stack((x.mean(-1), x.std(-1).reciprocal()))
    quick = {"test_utils": ("test_schema", "test_faketensor")}
    for given, options in ((branch, {}), (branch.mT.contiguous().mT, quick), (branch[:1].expand(2, 7, 64), quick)):
        torch.library.opcheck(forward, (x, given, *m, 1e-5), **options)
        torch.library.opcheck(backward, (dr, x.new_ones(()).expand(2, 7, 64), x, given, stats, *m), **options)
    torch.library.opcheck(backward, (None, dr, x, branch, stats, *m), **quick)
    bias = bias_for((x,)).half()
    torch.library.opcheck(forward, (x, branch, *m, 1e-5, bias))
    torch.library.opcheck(backward, (dr, dr, x, branch, stats, *m, bias))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(backend, compiler):
    """fullgraph, forward and backward, and again with a second batch size."""
    torch._dynamo.reset()
    compiled = torch.compile(kernels.gated_residual_modulate, fullgraph=True, backend=compiler)
    with kernels.backend(backend):
        for batch in (2, 3, 5):
            arguments, grads = inputs(batch, 7, 64)
            both = (run(f, arguments, grads) for f in (compiled, kernels.gated_residual_modulate))
            assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
            more = (*arguments, bias_for(arguments))
            both = (run(with_bias(f), more, grads) for f in (compiled, kernels.gated_residual_modulate))
            assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend):
    arguments, grads = inputs(2, 7, 64)
    before = [t.clone() for t in (*arguments, *grads)]
    with kernels.backend(backend):
        run(kernels.gated_residual_modulate, arguments, grads)
    assert all(torch.equal(a, b) for a, b in zip((*arguments, *grads), before, strict=True))


@pytest.mark.usefixtures("values")
def test_reference_formula():
    """The two formulas in fp64, and the gradients by differences."""
    (x, branch, gate, shift, scale), _ = inputs(2, 3, 5, dtype=torch.float64)
    r, y = kernels.gated_residual_modulate_reference(x, branch, gate, shift, scale)
    torch.testing.assert_close(r, x + gate[:, None] * branch, rtol=1e-14, atol=0)
    centred = r - r.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(y, normed * (1 + scale[:, None]) + shift[:, None], rtol=1e-12, atol=1e-12)
    wanted = [t.clone().requires_grad_() for t in (x, branch, gate, shift, scale)]
    assert torch.autograd.gradcheck(kernels.gated_residual_modulate_reference, wanted)


def test_reference_norms_the_rounded_r():
    (x, branch, gate, shift, scale), _ = inputs(2, 3, 64, torch.bfloat16)
    r, y = kernels.gated_residual_modulate_reference(x, branch, gate, shift, scale)
    assert torch.equal(y, kernels.modulate_reference(r, shift, scale))


def _bad(message, **changed):
    shapes = {"x": (2, 7, 8), "branch": (2, 7, 8), "gate": (2, 8), "shift": (2, 8), "scale": (2, 8)}
    return {name: zeros(shape) for name, shape in shapes.items()} | changed, message


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        _bad(r"\[batch, tokens, width\] is needed", x=zeros(7, 8)),
        _bad(r"branch has shape \[2, 6, 8\], but \[2, 7, 8\]", branch=zeros(2, 6, 8)),
        _bad(r"shift has shape \[2, 9\], but \[2, 8\]", shift=zeros(2, 9)),
        _bad(r"scale has shape \[1, 8\], but \[2, 8\]", scale=zeros(1, 8)),
        _bad("gate has dtype torch.int64", gate=zeros(2, 8, dtype=torch.int64)),
        _bad("scale is on meta", scale=zeros(2, 8, device="meta")),
        _bad(r"bias has shape \[9\], but \[8\]", bias=zeros(9)),
    ],
)
def test_bad_input(monkeypatch, backend, arguments, message):
    """One sentence, and before any kernel is launched."""
    module = sys.modules["fastdit.kernels.gated_residual_modulate"]
    monkeypatch.setattr(module, "launch", lambda *_, **__: pytest.fail("launched"))
    with kernels.backend(backend), pytest.raises(ValueError, match=message):
        kernels.gated_residual_modulate(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp64_needs_the_reference(backend):
    arguments, _ = inputs(2, 7, 64)
    with kernels.backend(backend), pytest.raises(ValueError, match="do not compute in float64"):
        kernels.gated_residual_modulate(*arguments[:4], arguments[4].double())
