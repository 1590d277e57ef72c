"""qk_norm_rope: kernels against the reference, and the reference against two formulas. B batch, T tokens, N heads, D head dim."""

import pytest
import torch
import torch.nn.functional as F

from backends import BACKENDS, DEVICE, interpretable, zeros
from fastdit import kernels
from fastdit.kernels import tuning
from fastdit.kernels.qk_norm_rope import _chunks

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6


def tables(T: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin fp32 [T,D/2] of the angles t·10000^(−2j/D)."""
    angles = torch.arange(T)[:, None] * 10_000.0 ** (-torch.arange(D // 2) / (D // 2))
    return angles.cos().to(DEVICE), angles.sin().to(DEVICE)


def inputs(B, T, N, D, dtype=torch.float32, norm=(True, True), rotate=True, weight_dtype=None):
    """(qkv, q_weight, k_weight, cos, sin, N, EPS) and the gradients of q, k, v."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)
    qkv = (randn(B, T, 3 * N * D) * 2 - 0.3).to(dtype)
    weights = [(1 + 0.3 * randn(D)).to(weight_dtype or dtype) if flag else None for flag in norm]
    cos, sin = tables(T, D) if rotate else (None, None)
    return (qkv, *weights, cos, sin, N, EPS), tuple(randn(B, N, T, D).to(dtype) for _ in range(3))


def eager(qkv, q_weight, k_weight, cos, sin, N, eps):
    """The naive chain, each step rounded to the dtype of qkv."""
    q, k, v = qkv.unflatten(-1, (3, N, -1)).permute(2, 0, 3, 1, 4)
    outputs = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        if weight is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
        if cos is not None:
            c, s = (table.to(x.dtype).unsqueeze(-3) for table in (cos, sin))
            x1, x2 = x.chunk(2, dim=-1)
            x = torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1)
        outputs.append(x)
    return *outputs, v


def run(function, arguments, grads):
    """Outputs and gradients of qkv and of the weights that there are."""
    arguments = [a.detach() if torch.is_tensor(a) else a for a in arguments]
    wanted = [a.requires_grad_() for a in arguments[:3] if a is not None]
    outputs = function(*arguments)
    return *(t.detach() for t in outputs), *torch.autograd.grad(outputs, wanted, grads)


def double(values):
    return tuple(v.double() if torch.is_tensor(v) else v for v in values)


def check(assert_close, backend, arguments, grads):
    """Outputs and gradients against fp64, and bitwise equal on a second run."""
    with kernels.backend(backend):
        actual, again = (run(kernels.qk_norm_rope, arguments, grads) for _ in range(2))
    truth = run(kernels.qk_norm_rope_reference, double(arguments), double(grads))
    chain = run(eager, arguments, grads)
    for i, (a, b, t, e) in enumerate(zip(actual, again, truth, chain, strict=True)):
        assert torch.equal(a, b)
        assert_close(a, t, e, terms=grads[0].shape[:3].numel() if i > 3 else 1)
    assert torch.equal(actual[2].double(), truth[2])  # v is moved, never computed


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size", [(1, 1, 1, 64), (2, 7, 3, 64), (5, 7, 2, 72), (1, 64, 2, 64), (1, 256, 1, 64), (2, 3, 1, 256), (2, 5, 2, 6)]
)
def test_matches_fp64(assert_close, backend, dtype, size):
    check(assert_close, backend, *inputs(*size, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(5, 256, 6, 64), (2, 256, 16, 72), (2, 64, 18, 64)])
def test_matches_fp64_at_model_sizes(assert_close, backend, size):
    check(assert_close, backend, *inputs(*interpretable(backend, size)))


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("rotate", [True, False])
def test_without_norm_or_rotation(assert_close, backend, norm, rotate):
    check(assert_close, backend, *inputs(2, 5, 2, 8, norm=norm, rotate=rotate))


def of_chosen_tokens(arguments):
    """The arguments with tables of the tokens that each sample keeps of twice as many, [B,T,D/2]."""
    qkv, q_weight, k_weight, cos, _, *rest = arguments
    B, T, D = *qkv.shape[:2], 2 * cos.shape[1]
    tokens = torch.stack([torch.randperm(2 * T, generator=torch.Generator().manual_seed(b))[:T] for b in range(B)]).to(DEVICE)
    return qkv, q_weight, k_weight, *(table[tokens] for table in tables(2 * T, D)), *rest


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(2, 7, 3, 64), (5, 7, 2, 72), (3, 1, 1, 6), (1, 33, 2, 32)])
def test_tables_of_each_sample(assert_close, between_nans, backend, size):
    """Against fp64, also with tables that are not contiguous; and where all samples have the same tokens, the shared table's
    result to the bit."""
    arguments, grads = inputs(*size)
    chosen = of_chosen_tokens(arguments)
    check(assert_close, backend, chosen, grads)
    check(assert_close, backend, (*chosen[:3], chosen[3].mT.contiguous().mT, between_nans(chosen[4]), *chosen[5:]), grads)
    same = *arguments[:3], *(table.repeat(size[0], 1, 1) for table in arguments[3:5]), *arguments[5:]
    with kernels.backend(backend):
        for a, b in zip(*(run(kernels.qk_norm_rope, each, grads) for each in (arguments, same)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_of_gradients(assert_close, backend):
    """q, k and v gradients as attention kernels leave them: token-major, transposed, expanded, one stride-0 number."""
    arguments, (dq, dk, dv) = inputs(2, 7, 3, 8)
    token_major = lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)
    transposed = lambda t: t.mT.contiguous().mT
    check(assert_close, backend, arguments, (token_major(dq), transposed(dk), dv))
    check(assert_close, backend, arguments, (transposed(dq), dk[..., :1].expand_as(dk), transposed(dv)))
    check(assert_close, backend, arguments, (dq.new_tensor(0.5).expand_as(dq), dk[:, :1].expand_as(dk), dv[:1].expand_as(dv)))


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_of_inputs(assert_close, between_nans, backend):
    (qkv, *rest), grads = inputs(2, 7, 3, 8)
    check(assert_close, backend, (between_nans(qkv), *rest), grads)
    check(assert_close, backend, (qkv.transpose(0, 1).contiguous().transpose(0, 1), *rest), grads)
    check(assert_close, backend, (qkv.mT.contiguous().mT, *rest), grads)
    check(assert_close, backend, (qkv[:1].expand(2, 7, -1), *rest), grads)
    check(assert_close, backend, (qkv[:, :1].expand(2, 7, -1), *rest), grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_layout(backend):
    """q and k are views of token-major memory, of head-major memory in C++; v is a view of qkv; the gradient of qkv is one
    contiguous tensor."""
    (qkv, *rest), grads = inputs(2, 7, 3, 8)
    qkv.requires_grad_()
    with kernels.backend(backend):
        q, k, v = kernels.qk_norm_rope(qkv, *rest)
    assert all((t if backend == "cpp" else t.transpose(1, 2)).is_contiguous() for t in (q, k))
    assert v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    assert torch.autograd.grad((q, k, v), qkv, grads)[0].is_contiguous()


@pytest.mark.parametrize("backend", ["triton"])
def test_nothing_is_copied_around_attention(recorded_ops, backend):
    """From qkv through fused attention to the packed gradient: one op in each direction, no clone, copy, zero-fill or add."""
    (qkv, *rest), _ = inputs(2, 7, 3, 64, dtype=torch.bfloat16)
    qkv.requires_grad_()
    with kernels.backend(backend), recorded_ops() as recorded:
        out = F.scaled_dot_product_attention(*kernels.qk_norm_rope(qkv, *rest)).transpose(1, 2).flatten(2)
        torch.autograd.grad(out, qkv, torch.ones(2, 7, 192, dtype=out.dtype, device=DEVICE))
    work = {
        name for name in recorded.names if name not in ("view", "_unsafe_view", "transpose", "select", "detach", "ones", "alias")
    }
    expected = {f"qk_norm_rope_{direction}_{backend}" for direction in ("forward", "backward")}
    kinds = ["flash_attention_for_cpu"] if DEVICE.type == "cpu" else ["cudnn_attention", "flash_attention"]  # PyTorch's choice
    names = [f"_scaled_dot_product_{kind}" for kind in kinds]
    assert work in [expected | {name, f"{name}_backward"} for name in names]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [0, 1, 2])
def test_unused_outputs(backend, used):
    """The gradient of an output that is not used is zero, not whatever was in memory."""
    (qkv, *rest), grads = inputs(2, 5, 2, 8)
    qkv.requires_grad_()
    with kernels.backend(backend):
        (grad,) = torch.autograd.grad(kernels.qk_norm_rope(qkv, *rest)[used], qkv, grads[used])
    (truth,) = torch.autograd.grad(kernels.qk_norm_rope_reference(qkv, *rest)[used], qkv, grads[used])
    torch.testing.assert_close(grad, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_mixed_dtypes(assert_close, backend, dtype, weight_dtype):
    """Each gradient in the dtype of its input; also when the two weights differ."""
    arguments, grads = inputs(2, 5, 2, 8, dtype=dtype, weight_dtype=weight_dtype)
    check(assert_close, backend, arguments, grads)
    arguments = (*arguments[:2], arguments[2].bfloat16(), *arguments[3:])
    check(assert_close, backend, arguments, grads)


@pytest.mark.usefixtures("values")
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_of_zeros(backend):
    """x·rsqrt(0 + eps) is 0, and its gradient g·weight/√eps, not NaN."""
    (_, q_weight, *rest), grads = inputs(1, 3, 2, 8, rotate=False)
    qkv = zeros(1, 3, 48)
    with kernels.backend(backend):
        q, _, _, dqkv, *_ = run(kernels.qk_norm_rope, (qkv, q_weight, *rest), grads)
    assert not q.any()
    expected = (grads[0].transpose(1, 2) * q_weight * EPS**-0.5).flatten(2)
    torch.testing.assert_close(dqkv[..., :16], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(0, 7, 2, 8), (2, 0, 2, 8)])
def test_empty(backend, size):
    arguments, grads = inputs(*size)
    with kernels.backend(backend):
        q, _, v, dqkv, dq_weight, dk_weight = run(kernels.qk_norm_rope, arguments, grads)
    assert q.shape == v.shape == grads[0].shape and dqkv.shape == arguments[0].shape
    assert torch.equal(dq_weight, zeros(8)) and torch.equal(dk_weight, zeros(8))


@pytest.mark.parametrize("arch", tuning.MULTIPROCESSORS)
@pytest.mark.parametrize("D", [64, 72])
def test_backward_is_one_wave(arch, D):
    """The programs of the three parts cover all tiles, none is empty, and no more are launched than run at once."""
    for tiles in (1, 3, 4, 5, 1000, 1536, 4608, 4_718_592):
        programs, iterations = _chunks(tiles, D, arch)
        assert programs * iterations >= tiles > (programs - 1) * iterations
        assert 3 * programs <= 6 * tuning.MULTIPROCESSORS[arch]


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_are_refused(backend):
    """The backward op is opaque: a gradient through it would be lost without a word."""
    (qkv, *rest), _ = inputs(2, 5, 2, 8)
    with kernels.backend(backend):
        out = kernels.qk_norm_rope(qkv.requires_grad_(), *rest)[0]
    (first,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    forward, backward = (getattr(torch.ops.fastdit, f"qk_norm_rope_{d}_{backend}") for d in ("forward", "backward"))
    arguments, grads = inputs(2, 3, 2, 8)
    without, _ = inputs(2, 3, 2, 8, norm=(False, False), rotate=False)
    strided = (arguments[0].transpose(0, 1).contiguous().transpose(0, 1), *arguments[1:])
    for a, g in (
        (arguments, grads),
        (of_chosen_tokens(arguments), grads),
        (without, grads),
        (strided, [t[:, :1].mT.contiguous().mT.expand_as(t) for t in grads]),
    ):
        torch.library.opcheck(forward, a)
        torch.library.opcheck(backward, (*g, *a))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(backend, compiler):
    """fullgraph, forward and backward, and again with other batch sizes."""
    torch._dynamo.reset()
    compiled = torch.compile(kernels.qk_norm_rope, fullgraph=True, backend=compiler)
    with kernels.backend(backend):
        for batch in (2, 3, 5):
            case = inputs(batch, 5, 2, 8)
            for a, b in zip(run(compiled, *case), run(kernels.qk_norm_rope, *case), strict=True):
                assert torch.equal(a, b) and a.stride() == b.stride()


def test_reference_is_a_complex_rotation():
    """In fp64, with (x[j], x[j + D/2]) as a complex number: x̂·weight·e^(i·angle)."""
    (qkv, q_weight, k_weight, cos, sin, N, eps), _ = inputs(2, 7, 3, 8, dtype=torch.float64)
    q, k, v = kernels.qk_norm_rope_reference(qkv, q_weight, k_weight, cos.double(), sin.double(), N, eps)
    parts = qkv.view(2, 7, 3, N, 8)
    for i, (out, weight) in enumerate(((q, q_weight), (k, k_weight))):
        x = parts[:, :, i]
        x = x / (x.square().sum(-1, keepdim=True) / 8 + eps).sqrt() * weight
        rotated = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos.double(), sin.double())[:, None]
        expected = torch.cat((rotated.real, rotated.imag), dim=-1).transpose(1, 2)
        torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-14)
    assert torch.equal(v, parts[:, :, 2].transpose(1, 2))


def test_reference_rotates_each_pair_by_its_angle():
    """Element by element, as the real 2x2 rotation matrix."""
    (qkv, _, _, cos, sin, N, eps), _ = inputs(1, 5, 2, 6, dtype=torch.float64, norm=(False, False))
    q = kernels.qk_norm_rope_reference(qkv, None, None, cos.double(), sin.double(), N, eps)[0]
    for t in range(5):
        for head in range(N):
            x = qkv[0, t, head * 6 : head * 6 + 6]
            for j in range(3):
                c, s = cos[t, j].double(), sin[t, j].double()
                expected = torch.stack((x[j] * c - x[j + 3] * s, x[j + 3] * c + x[j] * s))
                torch.testing.assert_close(q[0, head, t, j::3], expected, rtol=1e-14, atol=1e-15)


@pytest.mark.usefixtures("values")
def test_reference_gradients():
    arguments, _ = inputs(1, 3, 2, 4, dtype=torch.float64)
    function = lambda qkv, q_weight, k_weight: kernels.qk_norm_rope_reference(qkv, q_weight, k_weight, *double(arguments[3:]))
    assert torch.autograd.gradcheck(function, [a.requires_grad_() for a in arguments[:3]])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": zeros(2, 3, 49)}, "width 49, which is not 3 x 2 heads"),
        ({"qkv": zeros(2, 3, 3 * 2 * 7)}, "head dim is 7, but it must be even and at most 256"),
        ({"qkv": zeros(2, 3, 3 * 2 * 258)}, "head dim is 258"),
        ({"qkv": zeros(3, 48)}, r"\[batch, tokens, width\] is needed"),
        ({"qkv": zeros(2, 3, 48, dtype=torch.int32)}, "must be a floating-point tensor"),
        ({"num_heads": 0}, "not 3 x 0 heads"),
        ({"q_weight": zeros(9)}, r"q_weight has shape \[9\], but \[8\]"),
        ({"k_weight": zeros(8, device="meta")}, "k_weight is on meta"),
        ({"cos": zeros(4, 4)}, r"cos has shape \[4, 4\], but \[3, 4\]"),
        ({"sin": zeros(3, 4, dtype=torch.bfloat16)}, "rotary tables must stay in float32"),
        ({"cos": zeros(2, 3, 4)}, r"sin has shape \[3, 4\], but \[2, 3, 4\]"),
        ({"cos": zeros(3, 3, 4), "sin": zeros(3, 3, 4)}, r"cos has shape \[3, 3, 4\], but \[2, 3, 4\]"),
        ({"sin": None}, "one of cos and sin is None"),
        ({"cos": zeros(3, 4, requires_grad=True)}, "cos requires grad"),
    ],
)
def test_bad_input(backend, change, message):
    names = ("qkv", "q_weight", "k_weight", "cos", "sin", "num_heads", "eps")
    arguments = dict(zip(names, inputs(2, 3, 2, 8)[0], strict=True)) | change
    with kernels.backend(backend), pytest.raises(ValueError, match=message):
        kernels.qk_norm_rope(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp64_needs_the_reference(backend):
    with kernels.backend(backend), pytest.raises(ValueError, match="do not compute in float64"):
        kernels.qk_norm_rope(*double(inputs(2, 3, 2, 8)[0]))
