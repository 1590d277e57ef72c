"""counter_normal and counter_uniform: published Philox vectors, a Philox of our own in numpy, and independence of the batch."""

import math

import numpy as np
import pytest
import torch

from backends import BACKENDS, DEVICE
from fastdit import kernels
from fastdit.kernels.counter_random import philox

OPS = ["counter_uniform", "counter_normal"]
IDS = torch.tensor([0, 5, 2**32 + 5, 2**40 + 3, 2**63 - 1], device=DEVICE)
SEEDS = [0, 1, 0xDEADBEEF12345678, 2**64 - 1]

# Known answers of Philox-4x32-10 from the authors' library Random123 (kat_vectors): counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def numpy_philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox-4x32-10 of counter uint64 [4,n] from the paper's definition of a round (figure 3 and table 2)."""
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for r in range(10):
        key0, key1 = (np.uint64((k + r * step) % 2**32) for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        product0, product1 = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        left, right = (product1 >> shift) ^ counter[1] ^ key0, (product0 >> shift) ^ counter[3] ^ key1
        counter = np.stack((left, product1 & mask, right, product0 & mask))
    return counter


def numpy_words(seed: int, stream: int, name: int, count: int) -> np.ndarray:
    """The first `count` words of a row."""
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    rest = (np.full_like(blocks, word) for word in (stream, name % 2**32, name // 2**32))
    return numpy_philox(np.stack((blocks, *rest)), (seed % 2**32, seed // 2**32)).T.reshape(-1)[:count]


def draw(op: str, backend: str, *arguments) -> torch.Tensor:
    with kernels.backend(backend):
        return getattr(kernels, op)(*arguments)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_published_words(counter, key, expected):
    """The reference and the numpy version that the kernels are compared with."""
    counter, key = words_of(counter), tuple(words_of(key))
    assert [word.item() for word in philox(tuple(torch.tensor(word) for word in counter), key)] == words_of(expected)
    assert numpy_philox(np.array(counter, np.uint64)[:, None], key)[:, 0].tolist() == words_of(expected)


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_uniform_is_the_top_24_bits_of_the_published_words(backend):
    """Seed, stream and id 0, where the published counter is that of a row's first element."""
    out = draw("counter_uniform", backend, 0, 0, torch.tensor([0], device=DEVICE), (4,))
    expected = torch.tensor([word >> 8 for word in words_of(KNOWN[0][2])], device=DEVICE)
    assert torch.equal((out[0].double() * 2**24).long(), expected)


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(), (7,), (4, 8, 9), (1030,)])
def test_uniform_equals_numpy(backend, seed, shape):
    """Bit for bit, each row on its own, for seeds, streams and ids up to the ends of their ranges."""
    for stream in (0, 2**32 - 5):
        out = draw("counter_uniform", backend, seed, stream, IDS, shape)
        assert out.shape == (len(IDS), *shape) and out.dtype == torch.float32
        for row, name in zip(out, IDS.tolist(), strict=True):
            expected = (numpy_words(seed, stream, name, math.prod(shape)) >> np.uint64(8)).astype(np.float64) * 2.0**-24
            assert torch.equal(row.double().cpu().flatten(), torch.from_numpy(expected))


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("shape", [(1,), (7,), (4, 8, 9), (1030,)])
def test_normal_equals_box_muller_in_fp64(backend, shape):
    """√(−2·ln(u1 + 2^−24))·(cos | sin)(2π·u2). In fp32 the angle, up to 6.3, is rounded by 2.4e-7 and multiplies a radius of up to
    5.77: 1.4e-6, and as much again for the rounding of log, square root, cosine and product."""
    count = math.prod(shape)
    out = draw("counter_normal", backend, 0xDEADBEEF12345678, 3, IDS, shape)
    for row, name in zip(out, IDS.tolist(), strict=True):
        words = numpy_words(0xDEADBEEF12345678, 3, name, count + count % 2)
        u1, u2 = ((words >> np.uint64(8)).astype(np.float64) * 2.0**-24).reshape(-1, 2).T
        radius, angle = np.sqrt(-2 * np.log(u1 + 2.0**-24)), 2 * np.pi * u2
        expected = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1).reshape(-1)[:count]
        torch.testing.assert_close(row.double().cpu().flatten(), torch.from_numpy(expected), rtol=0, atol=2.8e-6)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("op", OPS)
def test_depends_only_on_seed_stream_and_id(op, backend):
    """Not on the batch, the order of the rows, or how long the row is."""
    full = draw(op, backend, 7, 1, IDS, (3, 70))
    order = torch.tensor([3, 1, 4, 0, 2], device=DEVICE)
    assert torch.equal(draw(op, backend, 7, 1, IDS[order], (3, 70)), full[order])
    for i in range(len(IDS)):
        assert torch.equal(draw(op, backend, 7, 1, IDS[i : i + 1], (3, 70)), full[i : i + 1])
    assert torch.equal(draw(op, backend, 7, 1, IDS.repeat_interleave(2)[::2], (3, 70)), full)
    assert torch.equal(draw(op, backend, 7, 1, IDS[:1].expand(3), (3, 70)), full[:1].expand(3, 3, 70))
    assert torch.equal(draw(op, backend, 7, 1, IDS, (33,)), full.flatten(1)[:, :33])


@pytest.mark.usefixtures("values")
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_seed_stream_and_id_all_count(backend):
    base = draw("counter_uniform", backend, 7, 1, torch.tensor([5], device=DEVICE), (64,))
    others = [(8, 1, 5), (7 + 2**32, 1, 5), (7, 2, 5), (7, 1, 6), (7, 1, 5 + 2**32)]
    for seed, stream, name in others:
        other = draw("counter_uniform", backend, seed, stream, torch.tensor([name], device=DEVICE), (64,))
        assert not torch.isin(other, base).any()


@pytest.mark.usefixtures("values")
def test_reference_is_normal():
    """Mean, variance and fourth moment of 2^18 numbers within four standard errors; no value beyond 5.77."""
    z = kernels.counter_normal_reference(3, 0, torch.arange(64, device=DEVICE), (4096,)).double()
    n = z.numel()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs(z.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert z.abs().max() < 5.77
    u = kernels.counter_uniform_reference(3, 1, torch.arange(64, device=DEVICE), (4096,))
    assert u.min() >= 0 and u.max() < 1 and abs(u.double().mean() - 0.5) < 4 / (12 * n) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    assert draw("counter_normal", backend, 1, 1, IDS[:0], (4, 8)).shape == (0, 4, 8)
    assert draw("counter_normal", backend, 1, 1, IDS, (4, 0)).shape == (5, 4, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    op = getattr(torch.ops.fastdit, f"counter_random_forward_{backend}")
    for ids in (IDS, IDS[::2]):
        torch.library.opcheck(op, (ids, 1, 2**32 - 1, 3, [4, 8], True))
    torch.library.opcheck(op, (IDS, 0, 0, 0, [], False))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(backend, compiler):
    """fullgraph, and again with other batch sizes and seeds."""
    torch._dynamo.reset()
    compiled = torch.compile(kernels.counter_normal, fullgraph=True, backend=compiler)
    with kernels.backend(backend):
        for seed, batch in ((7, 2), (8, 3), (9, 5)):
            assert torch.equal(compiled(seed, 1, IDS[:batch], (4, 8)), kernels.counter_normal(seed, 1, IDS[:batch], (4, 8)))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2**64, 0, IDS, (4,)), r"seed 18446744073709551616 must be in \[0, 2\^64\)"),
        ((-1, 0, IDS, (4,)), "seed -1 must be"),
        ((0, 2**32, IDS, (4,)), r"stream 4294967296 in \[0, 2\^32\)"),
        ((0, 0, IDS.int(), (4,)), "ids has dtype torch.int32"),
        ((0, 0, IDS[None], (4,)), r"shape \[1, 5\], but int64 \[batch\]"),
        ((0, 0, IDS, (2**20, 2**15)), r"more than 2\^34 elements"),
    ],
)
def test_bad_input(op, backend, arguments, message):
    with kernels.backend(backend), pytest.raises(ValueError, match=message):
        getattr(kernels, op)(*arguments)
