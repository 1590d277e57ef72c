"""Full bidirectional attention. B batch size, N heads, T tokens, D head dim."""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdit.config import InputError, ModelConfig

KINDS = ("auto", "flash", "sdpa", "matmul")
# Up to this length plain matmuls beat torch 2.13's CPU flash kernel in bf16. Two Zen 5 cores, batch 8 x 6 heads, forward + backward
# in ms, matmul against flash: D = 64: 0.8 | 3.6 at 64 tokens, 12 | 19 at 256, 50 | 63 at 512, 187 | 203 at 1024, 714 | 792 at 2048;
# D = 72: 0.7 | 3.7, 6.9 | 21, 26 | 70, 200 | 224, 833 | 986. From 1024 on the 8-18 % are not worth saving [B,N,T,T] for backward.
MATMUL_MAX_TOKENS = 512
KERNEL_NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "Flash",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
}
HAS_FLASH = find_spec("flash_attn") is not None


def _choose_kind(q: Tensor) -> str:
    """Return the fastest kind for q [B,N,T,D] that needs no further package."""
    short = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= MATMUL_MAX_TOKENS
    return "matmul" if short else "sdpa"


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the flash-attn package, which takes [B,T,N,D]. Some versions return (out, logsumexp), others only out."""
    from flash_attn import flash_attn_func

    # By default its backward adds into dq with atomics.
    options = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
    result = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options)
    return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)


def _allowed(dtype: torch.dtype) -> list[SDPBackend]:
    """Return the fused CUDA kernels of PyTorch that may run."""
    if dtype == torch.float32:
        return [SDPBackend.EFFICIENT_ATTENTION]  # the only fused one in fp32: for debugging
    if torch.are_deterministic_algorithms_enabled():
        return [SDPBackend.FLASH_ATTENTION]  # cuDNN's backward adds with atomics
    return [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


def fused_kernels(model: ModelConfig, dtype: torch.dtype, device: torch.device, training: bool) -> list[str]:
    """Return the names of the allowed kernels that can run a model's attention on a CUDA device, with its backward if training."""
    T, N = (model.input_size // model.patch_size) ** 2, model.heads
    q = torch.empty(1, T, N, model.width // N, dtype=dtype, device=device).transpose(1, 2).requires_grad_(training)
    params = torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, False, False)
    can_use = {
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.can_use_cudnn_attention,
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.can_use_flash_attention,
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.can_use_efficient_attention,
    }
    return [KERNEL_NAMES[backend] for backend in _allowed(dtype) if can_use[backend](params)]


def check(model: ModelConfig, dtype: torch.dtype, device: torch.device, training: bool) -> None:
    """Raise InputError if a model's attention would find no fused CUDA kernel in the middle of a step.

    There is none for bf16 before Ampere, and for the backward of head dims 193 to 224 on sm_86, sm_89 and sm_120.
    """
    if device.type != "cuda" or model.attention not in ("auto", "sdpa") or fused_kernels(model, dtype, device, training):
        return
    name, dtype_name = torch.cuda.get_device_name(device), str(dtype).removeprefix("torch.")
    raise InputError(
        f"{name} has no fused attention kernel for {dtype_name} and a head dim of {model.width // model.heads}: use fp32 "
        "(train.precision, --dtype), more model.heads, or model.attention=matmul"
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's scaled_dot_product_attention.

    On CUDA its unfused fallback is an error instead: it copies q, k and v and takes an order of magnitude more memory. On the meta
    device the shapes are those of a fused kernel, which saves the same for its backward on a CPU and on CUDA: q, k, v, out and
    logsumexp.
    """
    if q.device.type == "meta":
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v)
    # Without set_priority: PyTorch prefers cuDNN to Flash only on the cards and with the versions of cuDNN where that is right.
    with sdpa_kernel(_allowed(q.dtype)):
        return F.scaled_dot_product_attention(q, k, v)


def _matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    return torch.matmul(scores.softmax(-1), v)


def attention(q: Tensor, k: Tensor, v: Tensor, kind: str = "auto") -> Tensor:
    """Return softmax(q·kᵀ/√D)·v without a mask (arXiv:1706.03762, equation 1), heads joined: [B,T,N·D] in the dtype of q.

    q, k, v: [B,N,T,D], any strides; the fused kinds take token-major views, which qk_norm_rope returns, without copies.
    kind: "sdpa": PyTorch's, on CUDA cuDNN's or the Flash kernel (fp32: the memory-efficient one), never its slow fallback;
    "flash": the flash-attn package, on CUDA; "matmul": two batched products, for short sequences in bf16 on a CPU; "auto": matmul
    for those and sdpa otherwise. Raises ValueError if the kind is unknown or flash cannot run, RuntimeError if no fused CUDA kernel
    takes the input.
    """
    if kind not in KINDS:
        raise ValueError(f"attention kind {kind!r} is unknown: choose one of {', '.join(KINDS)}")
    if kind == "flash" and (not HAS_FLASH or q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16)):
        installed = "installed" if HAS_FLASH else "not installed"
        raise ValueError(f"attention 'flash' needs flash-attn ({installed}) and fp16 or bf16 on CUDA, not {q.dtype} on {q.device}")
    run = {"flash": _flash, "sdpa": _sdpa, "matmul": _matmul}[_choose_kind(q) if kind == "auto" else kind]
    return run(q, k, v).transpose(1, 2).flatten(2)
