"""attention: every kind against fp64, and what can be said of the CUDA kinds without a GPU. B, N heads, T tokens, D head dim."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit import attention as module
from fastdit import cli, distributed, kernels
from fastdit.attention import attention
from fastdit.config import Config, InputError


def projected(B, T, N, D, dtype=torch.float32, device="cpu"):
    """q, k, v [B,N,T,D] as qk_norm_rope leaves them: q and k views of token-major memory, v a view of packed qkv."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, T, 3 * N * D, generator=generator).to(device, dtype)
    with kernels.backend("reference"):
        q, k, v = kernels.qk_norm_rope(qkv, None, None, None, None, N, 1e-6)
    token_major = lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)
    return token_major(q), token_major(k), v


def naive(q, k, v):
    """The formula, each step rounded to the dtype of q."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def run(function, tensors, grad):
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = function(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


@pytest.mark.parametrize("kind", ["auto", "sdpa", "matmul"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 7, 3, 64), (1, 64, 2, 72), (3, 5, 2, 8)])
def test_every_kind_matches_fp64(kind, dtype, size):
    """Outputs and gradients: at most twice the error of the naive chain in the same dtype, plus 4 last places of fp32."""
    tensors = projected(*size, dtype=dtype)
    B, T, N, D = size
    grad = torch.randn(B, T, N * D, generator=torch.Generator().manual_seed(1)).to(dtype)
    actual = run(lambda *t: attention(*t, kind), tensors, grad)
    truth = run(naive, [t.double() for t in tensors], grad.double())
    for a, t, e in zip(actual, truth, run(naive, tensors, grad), strict=True):
        assert a.dtype == dtype and a.shape == t.shape
        error, naive_error = ((x.double() - t).abs().max() for x in (a, e))
        assert error <= 2 * naive_error + 4 * torch.finfo(torch.float32).eps * t.abs().max()


@pytest.mark.parametrize("tokens", [7, 64, module.MATMUL_MAX_TOKENS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_both_sides_of_the_switch(tokens, dtype):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, tokens, 16, generator=g).to(dtype) for _ in range(3))
    truth = torch.softmax(q.double() @ k.double().transpose(-1, -2) / 4, -1) @ v.double()
    got = attention(q, k, v)
    assert got.shape == (2, tokens, 48) and got.dtype == dtype
    # values average over tokens: an ulp of each factor, the weights' own rounding, and the store
    bound = 4 * torch.finfo(dtype).eps * v.abs().max().item()
    assert (got.double() - truth.transpose(1, 2).flatten(2)).abs().max() < bound


@pytest.mark.parametrize("kind", ["sdpa", "matmul"])
def test_one_token_attends_to_itself(kind):
    q, k, v = projected(3, 1, 2, 8)
    assert torch.equal(attention(q, k, v, kind), v.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("operator", ["_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention"])
@pytest.mark.parametrize("D", [64, 72])
def test_cuda_kernels_keep_the_token_major_layout(operator, D):
    """Shapes and strides of the CUDA kernels, asked on the meta device: joining the heads afterwards is a view."""
    q, k, v = projected(2, 256, 6, D, dtype=torch.bfloat16, device="meta")
    assert not q.is_contiguous() and not v.transpose(1, 2).is_contiguous()
    more = (None, True) if "cudnn" in operator else ()
    out = getattr(torch.ops.aten, operator)(q, k, v, *more)[0]
    assert out.transpose(1, 2).is_contiguous()


def test_gradients_keep_the_token_major_layout():
    """dq, dk and dv of the flash kernel, on the meta device, are token-major as qk_norm_rope's backward reads them best."""
    q, k, v = projected(2, 256, 6, 64, dtype=torch.bfloat16, device="meta")
    out, logsumexp, cum_q, cum_k, max_q, max_k, seed, offset, _ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        out, q, k, v, out, logsumexp, cum_q, cum_k, max_q, max_k, 0.0, False, seed, offset
    )
    assert all(g.transpose(1, 2).is_contiguous() for g in gradients)


class Recorded(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__.partition(".")[0])
        return function(*args, **(kwargs or {}))


def test_sdpa_copies_nothing():
    tensors = [t.requires_grad_() for t in projected(2, 16, 3, 64)]
    with Recorded() as recorded:
        out = attention(*tensors, "sdpa")
        torch.autograd.grad(out, tensors, torch.ones(out.shape))
    assert not {"clone", "copy_", "_to_copy", "contiguous"} & set(recorded.names)
    assert any("attention" in name and "backward" in name for name in recorded.names)


def flash_attn_2(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, deterministic=False):
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def flash_attn_3(q, k, v, softmax_scale=None, causal=False, *, deterministic=False):
    return flash_attn_2(q, k, v), torch.zeros(q.shape[0], q.shape[2], q.shape[1])


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("function", [flash_attn_2, flash_attn_3])
def test_flash_attn_packages(monkeypatch, function, deterministic):
    """Token-major arguments without a copy, a result with or without logsumexp, and the deterministic flag when it is asked for."""
    seen = {}

    def flash_attn_func(q, k, v, **options):
        assert q.shape == k.shape == v.shape == (2, 16, 3, 64)
        assert q.is_contiguous() and v.data_ptr() == tensors[2].data_ptr()
        seen.update(options)
        return function(q, k, v, **options)

    tensors = projected(2, 16, 3, 64)
    fake = ModuleType("flash_attn")
    fake.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    out = module._flash(*tensors)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*tensors))
    assert seen == ({"deterministic": True} if deterministic else {})


@pytest.mark.parametrize(
    ("dtype", "deterministic", "expected"),
    [
        (torch.bfloat16, False, [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]),
        (torch.bfloat16, True, [SDPBackend.FLASH_ATTENTION]),
        (torch.float32, False, [SDPBackend.EFFICIENT_ATTENTION]),
    ],
)
def test_cuda_never_allows_the_math_fallback(monkeypatch, dtype, deterministic, expected):
    """A stand-in for CUDA tensors: which kernels PyTorch may choose from. The order is PyTorch's own."""
    allowed = []
    monkeypatch.setattr(module, "sdpa_kernel", lambda backends: allowed.append(backends) or nullcontext())
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: None)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    q = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
    module._sdpa(q, q, q)
    assert allowed == [expected]


@pytest.mark.parametrize("training", [False, True])
def test_fused_kernels_are_asked_of_pytorch(monkeypatch, training):
    """With q as the model's, which needs a gradient in training."""
    asked = []

    def can_use(answer):
        return lambda params: asked.append((params.query.shape, params.query.dtype, params.query.requires_grad)) or answer

    for name, answer in (("cudnn", False), ("flash", True), ("efficient", True)):
        monkeypatch.setattr(torch.backends.cuda, f"can_use_{name}_attention", can_use(answer))
    model, cpu = Config().model, torch.device("cpu")
    assert module.fused_kernels(model, torch.bfloat16, cpu, training) == ["Flash"]
    D, T = model.width // model.heads, (model.input_size // model.patch_size) ** 2
    assert asked == [((1, model.heads, T, D), torch.bfloat16, training)] * 2
    assert module.fused_kernels(model, torch.float32, cpu, training) == ["memory-efficient"]


def test_a_card_without_a_fused_kernel_is_one_sentence_at_the_start(monkeypatch, capsys):
    cuda, model = torch.device("cuda"), Config().model
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(module, "fused_kernels", lambda model, dtype, *_: ["memory-efficient"] * (dtype == torch.float32))
    module.check(model, torch.float32, cpu := torch.device("cpu"), True)
    module.check(model, torch.bfloat16, cpu, True)
    module.check(model, torch.float32, cuda, True)
    module.check(replace(model, attention="matmul"), torch.bfloat16, cuda, True)
    with pytest.raises(InputError, match=r"Tesla T4 has no fused attention kernel for bfloat16 and a head dim of \d+: use fp32"):
        module.check(model, torch.bfloat16, cuda, True)
    monkeypatch.setattr(distributed, "start", lambda *_: distributed.World(0, 1, cuda, None))
    assert cli.main(["train", "train.precision=bf16"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("fastdit: Tesla T4 has no fused attention kernel")


def test_auto_takes_matmul_for_short_bf16_on_a_cpu(monkeypatch):
    q = projected(1, 8, 1, 8, dtype=torch.bfloat16)[0]
    assert module._choose_kind(q) == "matmul"
    assert module._choose_kind(q.float()) == module._choose_kind(q.to("meta")) == "sdpa"
    monkeypatch.setattr(module, "MATMUL_MAX_TOKENS", 7)
    assert module._choose_kind(q) == "sdpa"


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        for dtype in (torch.float32, torch.bfloat16):
            tensors = projected(batch, 8, 2, 8, dtype=dtype)
            assert torch.equal(compiled(*tensors), attention(*tensors))


def test_bad_input():
    tensors = projected(1, 8, 1, 8)
    with pytest.raises(ValueError, match="attention kind 'quick' is unknown: choose one of auto, flash, sdpa, matmul"):
        attention(*tensors, "quick")
    with pytest.raises(ValueError, match=r"'flash' needs flash-attn .* not torch.float32 on cpu"):
        attention(*tensors, "flash")
