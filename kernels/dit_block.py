"""dit_block: a DiT block as one op for sampling, without gradients, on a CPU's bf16 matrix units (AMX).

B batch, T tokens, H width, N heads, F SwiGLU hidden. As separate ops, a block writes and reads the results of its matmuls eight
times, which is most of its time if AMX multiplies. Here the ops after a matmul work on its fp32 sums, mostly while the next sums
are computed. Only the inputs of the matmuls and the two streams are rounded to bf16.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import backend_in_use, check_float, check_shape, check_tokens
from .gated_residual_modulate import gated_residual_modulate_reference
from .library import INSTRUCTION_SETS, cpp, inner_contiguous
from .qk_norm_rope import qk_norm_rope_reference
from .swiglu import swiglu_reference

TILE, BLOCK = 16, 32  # rows and columns that AMX, and csrc/tile.h, multiply at once


class BlockWeights(NamedTuple):
    """Linear weights [out, in] and biases [out] of a block, in the layout of fastdit's model; q_weight and k_weight [D] or None."""

    qkv: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    out: Tensor
    up: Tensor  # (value | gate)
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor


def dit_block_reference(
    x: Tensor, y: Tensor, modulation: tuple[Tensor, ...], weights: BlockWeights, cos: Tensor | None, sin: Tensor | None, heads: int,
    qk_eps: float, eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`dit_block` in plain PyTorch, with weights that are not packed: every matmul and op rounds to the dtype of x."""
    gate1, shift2, scale2, gate2, next_shift, next_scale = modulation
    qkv = F.linear(y, weights.qkv)
    q, k, v = qk_norm_rope_reference(qkv, weights.q_weight, weights.k_weight, cos, sin, heads, qk_eps)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x, y = gated_residual_modulate_reference(x, F.linear(attended, weights.out), gate1, shift2, scale2, eps)
    hidden = swiglu_reference(F.linear(y, weights.up, weights.up_bias))
    return gated_residual_modulate_reference(
        x, F.linear(hidden, weights.down, weights.down_bias), gate2, next_shift, next_scale, eps
    )


def dit_block_fits(tokens: int, width: int, heads: int, hidden: int) -> bool:
    """Return whether `dit_block` takes blocks of these sizes: all multiples of 32, heads of 32, 64, 96 or 128."""
    if min(width, heads, hidden) <= 0 or width % heads or width // heads > 128:
        return False
    return not any(n % BLOCK for n in (tokens, width, hidden, width // heads))


def dit_block_is_fast(device: torch.device) -> bool:
    """Return whether `dit_block` is faster in bf16 than the model's separate ops, which is so if the C++ kernels run on AMX."""
    return device.type == "cpu" and backend_in_use(device) == "cpp" and INSTRUCTION_SETS[cpp.isa()] == "AMX"


def _pack(weight: Tensor) -> Tensor:
    """Return [N,K] in the order in which csrc/tile.h multiplies: [N/32, K/32, 2, 16, 16, 2], the innermost pairs along K."""
    N, K = weight.shape
    tiles = weight.bfloat16().view(N // BLOCK, 2, TILE, K // BLOCK, TILE, 2)
    return tiles.permute(0, 3, 1, 4, 2, 5).contiguous()


class PackedBlockWeights(BlockWeights):
    """The result of `pack_dit_block`, its only maker: matrices in bf16 in the kernel's order, vectors in fp32."""


@torch.no_grad()
def pack_dit_block(weights: BlockWeights) -> PackedBlockWeights:
    """Return a copy of the weights in the layout that `dit_block` takes: each 16 rows of values of `up` beside those of their
    gates.

    Raises ValueError for shapes that do not fit together, and for widths that are no multiples of 32.
    """
    H, hidden = weights.down.shape
    if not dit_block_fits(BLOCK, H, H // BLOCK, hidden):
        raise ValueError(f"dit_block: width {H} and hidden width {hidden} must be multiples of 32")
    shapes = {"qkv": (3 * H, H), "out": (H, H), "up": (2 * hidden, H), "up_bias": (2 * hidden,), "down_bias": (H,)}
    for name, shape in shapes.items():
        check_shape("dit_block", name, getattr(weights, name), shape)
    check_float("dit_block", **weights._asdict())
    beside = lambda t: t.unflatten(0, (2, -1, TILE)).transpose(0, 1).flatten(0, 2)
    vector = lambda t: None if t is None else t.float().contiguous()
    return PackedBlockWeights(
        _pack(weights.qkv), vector(weights.q_weight), vector(weights.k_weight), _pack(weights.out), _pack(beside(weights.up)),
        vector(beside(weights.up_bias)), _pack(weights.down), vector(weights.down_bias),
    )  # fmt: skip


def _check_inputs(
    x: Tensor, y: Tensor, modulation: tuple[Tensor, ...], weights: PackedBlockWeights, tables: tuple[Tensor | None, ...], heads: int
) -> None:
    """Raise the errors of `dit_block`."""
    B, T, H = check_tokens("dit_block", "x", x)
    if not isinstance(weights, PackedBlockWeights):
        raise ValueError("dit_block: weights must come from pack_dit_block")
    hidden = len(weights.up_bias) // 2
    if not dit_block_fits(T, H, heads, hidden):
        sizes = f"{T} tokens, width {H}, {heads} heads, hidden width {hidden}"
        raise ValueError(f"dit_block: {sizes}: tokens, widths and head dim must be multiples of 32, the head dim 128 at most")
    if x.dtype != torch.bfloat16 or y.dtype != torch.bfloat16 or x.device.type != "cpu":
        raise ValueError(f"dit_block: x is {x.dtype} and y {y.dtype} on {x.device}, but both must be bfloat16 on a CPU")
    if (backend := backend_in_use(x.device)) != "cpp":
        raise RuntimeError(
            f"dit_block: kernel backend {backend!r} is in use, but only C++ has this op: use 'cpp' or 'auto', and build it"
        )
    check_shape("dit_block", "y", y, (B, T, H))
    if len(modulation) != 6:
        raise ValueError(f"dit_block: modulation has {len(modulation)} vectors, but 6 are needed")
    for vector in modulation:
        check_shape("dit_block", "modulation", vector, (B, H))
        if vector.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"dit_block: modulation has dtype {vector.dtype}, but it must be bfloat16, float16 or float32")
    check_shape("dit_block", "down_bias", weights.down_bias, (H,))
    for norm in (weights.q_weight, weights.k_weight):
        if norm is not None:
            check_shape("dit_block", "q_weight and k_weight", norm, (H // heads,))
    if (tables[0] is None) != (tables[1] is None):
        raise ValueError("dit_block: cos and sin must both be given, or neither")
    for table in tables:
        if table is not None:
            check_shape("dit_block", "cos and sin", table, (T, H // heads // 2))
            if table.dtype != torch.float32 or not table.is_contiguous():
                raise ValueError(f"dit_block: cos and sin must be contiguous float32 tables, not {table.dtype}")


@torch.no_grad()
def dit_block(
    x: Tensor, y: Tensor, modulation: tuple[Tensor, ...], weights: PackedBlockWeights, cos: Tensor | None, sin: Tensor | None,
    heads: int, qk_eps: float, eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run a block of fastdit's model (DiT, arXiv:2212.09748, section 3.2, with SwiGLU and QK-norm), by the C++ kernels.

    x (residual stream) and y (its modulated norm) bf16 [B,T,H]; modulation: gate, shift, scale, gate, shift, scale, each [B,H], the
    last two for the norm of the next block; weights: from `pack_dit_block`; cos and sin of angles, fp32 [T,D/2], or None. Returns
    the next block's x and y. Sums, norms and softmax are fp32. Without AMX the results are the same but slow, by plain vectors, for
    tests. No gradients, and no torch.compile. Raises ValueError for other dtypes and shapes, and for sizes that `dit_block_fits`
    refuses, RuntimeError if the C++ kernels are not in use.
    """
    _check_inputs(x, y, modulation, weights, (cos, sin), heads)
    r, y_out = (x.new_empty(x.shape) for _ in range(2))
    scratch = x.new_empty((*x.shape[:2], max(x.shape[2], len(weights.up_bias) // 2)))  # attention's output, then SwiGLU's
    qkv, q_weight, k_weight, out, *mlp = weights
    cpp.dit_block_forward(
        x.contiguous(), y.contiguous(), *map(inner_contiguous, modulation), qkv, q_weight, k_weight, cos, sin, out, *mlp,
        heads, eps, qk_eps, scratch, r, y_out,
    )  # fmt: skip
    return r, y_out
