"""counter_normal, counter_uniform: random numbers that depend only on their key and counter, not on batch, rank, order or device.

Philox-4x32-10 (Salmon et al., SC 2011, doi:10.1145/2063384.2063405) with key = the 64 bits of `seed` and counter =
(block, stream, low and high half of the row's id). A block of four words serves the elements 4·block .. 4·block + 3 of the row.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import backend_in_use
from .library import cdiv, cpp, find, launch, register

BYTES = (4, 0)  # per number: they are fp32, and depend on no tensor that has a gradient
BLOCK = 256  # counters per program, four elements each: 2 per thread on 4 warps, stored as 128 bits
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a·m for 0 <= a, m < 2^32 in int64, by 16-bit halves of m so that nothing overflows."""
    low, high = a * (m & 0xFFFF), a * (m >> 16)
    middle = high + (low >> 16)  # < 2^49
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox-4x32. counter: four int64 tensors, key: two ints, all in [0, 2^32). Returns four words, int64 too."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _words(seed: int, stream: int, ids: Tensor, numel: int) -> Tensor:
    """Return the random words of each row in order: int64 [B, 4·ceil(numel/4)] in [0, 2^32)."""
    block = torch.arange((numel + 3) // 4, device=ids.device)
    counter = torch.broadcast_tensors(block, block.new_full((), stream), (ids & _MASK)[:, None], ((ids >> 32) & _MASK)[:, None])
    return torch.stack(philox(counter, (seed & _MASK, (seed >> 32) & _MASK)), dim=-1).flatten(1)


def _unit(words: Tensor) -> Tensor:
    """Return the top 24 bits of each word as fp32 in [0, 1): every value is exact."""
    return (words >> 8).float() * 2.0**-24


def counter_uniform_reference(seed: int, stream: int, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`counter_uniform` in plain PyTorch."""
    numel = math.prod(shape)
    return _unit(_words(seed, stream, ids, numel))[:, :numel].reshape(-1, *shape)


def counter_normal_reference(seed: int, stream: int, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`counter_normal` in plain PyTorch."""
    numel = math.prod(shape)
    u1, u2 = _unit(_words(seed, stream, ids, numel)).unflatten(-1, (-1, 2)).unbind(-1)
    radius = (-2 * (u1 + 2.0**-24).log()).sqrt()  # u1 + 2^-24 is in (0, 1], exact: the log is finite
    angle = (2 * math.pi) * u2
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return pairs.flatten(1)[:, :numel].reshape(-1, *shape)


@triton.jit
def _cos_sin(u):
    """Return cos and sin of 2π·u for u in [0, 1), a multiple of 2^-24, within 1e-7 (all 2^24 of them).

    In quarter turns: u = (k + r)/4 with |r| <= 1/2, which is exact, and the Taylor series of cos and sin of π/2·r to r^8 and r^9.
    The library's functions take any argument, and their slow path for large ones costs 32 bytes of stack per thread.
    """
    k = (4 * u + 0.5).to(tl.int32)
    r = 4 * u - k.to(tl.float32)
    s = r * r
    cos = 1 + s * (-1.2337005501361697 + s * (0.2536695079010480 + s * (-0.02086348076335296 + s * 0.00091926027483942658)))
    sin = 0.00016044118478735982 * s - 0.0046817541353186881
    sin = r * (1.5707963267948966 + s * (-0.64596409750624625 + s * (0.079692626246167046 + s * sin)))
    odd = (k & 1) == 1
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where(((k + 1) & 2) == 0, cos, -cos), tl.where((k & 2) == 0, sin, -sin)


@triton.jit(do_not_specialize=["key0", "key1", "stream"])
def counter_random_forward_kernel(
    ids_ptr, out_ptr, ids_stride_b, key0, key1, stream, WIDTH: tl.constexpr, NORMAL: tl.constexpr, BLOCK: tl.constexpr
):
    """Elements of BLOCK consecutive counters of one row; rows and blocks share grid axis 0, because axis 1 ends at 65535.

    The words are those of `philox`, bit for bit. key0, key1 and stream are 32 bits each, passed as signed ints.
    """
    blocks = tl.cdiv(WIDTH, 4 * BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // blocks
    start = (pid % blocks) * BLOCK
    counter = (start + tl.arange(0, BLOCK)).to(tl.uint32)
    zero = tl.zeros([BLOCK], tl.uint32)
    name = tl.load(ids_ptr + row * ids_stride_b)
    w0, w1, w2, w3 = tl.philox_impl(
        counter,
        zero + stream.to(tl.uint32, bitcast=True),
        zero + (name & 0xFFFFFFFF).to(tl.uint32),
        zero + ((name >> 32) & 0xFFFFFFFF).to(tl.uint32),
        key0.to(tl.uint32, bitcast=True),
        key1.to(tl.uint32, bitcast=True),
        10,
    )
    u0, u1 = (w0 >> 8).to(tl.float32) * 2.0**-24, (w1 >> 8).to(tl.float32) * 2.0**-24
    u2, u3 = (w2 >> 8).to(tl.float32) * 2.0**-24, (w3 >> 8).to(tl.float32) * 2.0**-24
    if NORMAL:
        radius0, radius1 = tl.sqrt_rn(-2 * tl.log(u0 + 2.0**-24)), tl.sqrt_rn(-2 * tl.log(u2 + 2.0**-24))
        cos0, sin0 = _cos_sin(u1)
        cos1, sin1 = _cos_sin(u3)
        u0, u1, u2, u3 = radius0 * cos0, radius0 * sin0, radius1 * cos1, radius1 * sin1
    out = tl.interleave(tl.interleave(u0, u2), tl.interleave(u1, u3))  # u0 u1 u2 u3 of the first counter, then the next
    element = 4 * start + tl.arange(0, 4 * BLOCK)
    tl.store(out_ptr + row * WIDTH + element, out, mask=element < WIDTH)


def _signed(word: int) -> int:
    """Return the same 32 bits as a signed int: Triton then gives every word one type, and compiles one kernel."""
    return word - 2**32 if word >= 2**31 else word


def _forward_fake(ids: Tensor, key0: int, key1: int, stream: int, shape: list[int], normal: bool) -> Tensor:
    return ids.new_empty((len(ids), *shape), dtype=torch.float32)


@register(
    "counter_random_forward_triton(Tensor ids, SymInt key0, SymInt key1, SymInt stream, SymInt[] shape, bool normal) -> Tensor",
    _forward_fake,
)
def _forward_triton(ids: Tensor, key0: int, key1: int, stream: int, shape: list[int], normal: bool) -> Tensor:
    out = _forward_fake(ids, key0, key1, stream, shape, normal)
    if out.numel():
        W = out.numel() // len(ids)
        grid = (len(ids) * cdiv(W, 4 * BLOCK),)
        words = _signed(key0), _signed(key1), _signed(stream)
        launch(counter_random_forward_kernel, grid, ids, ids, out, ids.stride(0), *words, W, normal, BLOCK, num_warps=4)
    return out


@register(
    "counter_random_forward_cpp(Tensor ids, SymInt key0, SymInt key1, SymInt stream, SymInt[] shape, bool normal) -> Tensor",
    _forward_fake,
)
def _forward_cpp(ids: Tensor, key0: int, key1: int, stream: int, shape: list[int], normal: bool) -> Tensor:
    out = _forward_fake(ids, key0, key1, stream, shape, normal)
    if out.numel():
        cpp.counter_random_forward(ids, key0, key1, stream, normal, out.view(len(ids), -1))
    return out


def _draw(op: str, seed: int, stream: int, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Check the arguments, choose the backend and run it."""
    if not 0 <= seed < 2**64 or not 0 <= stream < 2**32:
        raise ValueError(f"{op}: seed {seed} must be in [0, 2^64) and stream {stream} in [0, 2^32)")
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise ValueError(f"{op}: ids has dtype {ids.dtype} and shape {list(ids.shape)}, but int64 [batch] is needed")
    if math.prod(shape) > 2**34:
        raise ValueError(f"{op}: a row of shape {list(shape)} has more than 2^34 elements, where the counter would wrap")
    normal = op == "counter_normal"
    backend = backend_in_use(ids.device)
    if backend == "reference":
        reference = counter_normal_reference if normal else counter_uniform_reference
        return reference(seed, stream, ids, shape)
    return find("counter_random_forward", backend)(ids, seed & _MASK, seed >> 32, stream, list(shape), normal)


def counter_uniform(seed: int, stream: int, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return uniform numbers in [0, 1), 24 bits each: fp32 [B, *shape] on the device of ids.

    seed in [0, 2^64); stream in [0, 2^32), one per purpose; ids int64 [B]. Element e of row i depends only on
    (seed, stream, ids[i], e). Raises ValueError for values outside these ranges.
    """
    return _draw("counter_uniform", seed, stream, ids, shape)


def counter_normal(seed: int, stream: int, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return standard normal numbers by Box-Muller (at most 5.77 in magnitude): fp32 [B, *shape] on the device of ids.

    Words 2j and 2j+1 of a row give its elements 2j (cosine) and 2j+1 (sine). Arguments, dependence and errors are those of
    `counter_uniform`; the words are equal on every device, the values to rounding of log, sqrt, cos and sin.
    """
    return _draw("counter_normal", seed, stream, ids, shape)
