"""dit_block: the C++ block against the reference in fp64. B batch, T tokens, H width, N heads, F hidden."""

import os
import subprocess
import sys

import pytest
import torch

from fastdit import kernels
from fastdit.kernels import library

pytestmark = pytest.mark.skipif(not library.EXTENSION, reason="the C++ extension is not built")
EPS = 1e-6
# Odd counts of blocks, every head dim; base/2's width, where the weights of `up` come in two groups.
SIZES = [
    (1, 32, 32, 1, 32),
    (3, 96, 96, 3, 160),
    (2, 160, 192, 3, 96),
    (1, 64, 96, 1, 64),
    (2, 32, 256, 2, 352),
    (1, 64, 1088, 17, 256),
]


def inputs(size, qk_norm=1.0, rope=True):
    """x, y, modulation, weights, cos and sin in bf16 and fp32; q and k weights about `qk_norm`, or none."""
    B, T, H, N, F = size
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    linear = lambda out, into: randn(out, into).mul(into**-0.5).bfloat16()
    norms = [randn(H // N).mul(0.2).add(1).mul(qk_norm).bfloat16() if qk_norm else None for _ in range(2)]
    weights = kernels.BlockWeights(
        linear(3 * H, H), *norms, linear(H, H), linear(2 * F, H), randn(2 * F).bfloat16(), linear(H, F), randn(H).bfloat16()
    )
    angles = randn(T, H // N // 2) * 3
    tables = (angles.cos(), angles.sin()) if rope else (None, None)
    x, y = randn(B, T, H).mul(2).add(0.7).bfloat16(), randn(B, T, H).bfloat16()
    modulation = randn(B, 6, H).bfloat16().unbind(1)  # strided views
    return x, y, modulation, weights, *tables, N, EPS


def double(value):
    """Tensors in fp64, in tuples too."""
    if isinstance(value, tuple):
        return type(value)(*map(double, value)) if hasattr(value, "_fields") else tuple(map(double, value))
    return value.double() if isinstance(value, torch.Tensor) else value


def run(x, y, modulation, weights, *others):
    return kernels.dit_block(x, y, modulation, kernels.pack_dit_block(weights), *others)


def check(assert_close, given) -> None:
    """Both outputs against fp64, and bitwise equal on a second run."""
    truth, eager = kernels.dit_block_reference(*map(double, given)), kernels.dit_block_reference(*given)
    for actual, again, t, e in zip(run(*given), run(*given), truth, eager, strict=True):
        assert torch.equal(actual, again)
        assert_close(actual, t, e)


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("backend", ["cpp"])
@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": 4.0}, {"qk_norm": None}, {"rope": False}], ids=["plain", "large scores", "no norm", "no rope"]
)
@pytest.mark.parametrize("size", SIZES)
def test_matches_fp64(assert_close, backend, size, options):
    """Scores of a norm of 4 reach 16·√D, where e^score needs the largest one taken from it."""
    check(assert_close, inputs(size, **options))


@pytest.mark.parametrize("backend", ["cpp"])
def test_scores_beyond_the_range_of_exp(assert_close, backend):
    """One key wins by hundreds: attention is its value, not 0/0."""
    check(assert_close, inputs(SIZES[1], qk_norm=16.0))


@pytest.mark.parametrize("backend", ["cpp"])
def test_gates_where_the_sigmoid_is_0_or_1(assert_close, backend):
    """Gates of hundreds, where e^-gate leaves fp32 on both sides."""
    x, y, modulation, weights, *others = inputs(SIZES[1])
    bias = weights.up_bias.clone()
    bias[160:] = torch.tensor([-3e38, -1e4, -300.0, -100.0, -88.0, 88.0, 300.0, 1e4]).repeat(20)  # hidden is 160: the gates
    given = (x, y, modulation, weights._replace(up_bias=bias.bfloat16()), *others)
    assert all(out.isfinite().all() for out in run(*given))
    check(assert_close, given)


@pytest.mark.parametrize("qk_norm", [1.0, 4.0, None])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_cpp_hides_no_nan(value, qk_norm):
    """A token that is not finite makes all of its sample so, by way of its key, and no other sample."""
    x, y, *others = inputs(SIZES[1], qk_norm)
    y[1, 5, 7] = value
    for out in run(x, y, *others):
        assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def everything() -> list[torch.Tensor]:
    return [t for size in SIZES for qk_norm in (1.0, 4.0) for t in run(*inputs(size, qk_norm))]


def test_cpp_the_same_bits_at_any_number_of_threads_and_in_any_batch():
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(everything())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    x, y, modulation, *others = inputs(SIZES[1])
    single = run(x[1:2], y[1:2], tuple(m[1:2] for m in modulation), *others)
    for one, all_three in zip(single, run(x, y, modulation, *others), strict=True):
        assert torch.equal(one[0], all_three[1])


if __name__ == "__main__":  # a process of its own, for another instruction set
    torch.save(everything(), sys.argv[1])


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_instruction_sets_agree(tmp_path, isa):
    """Where they are all there, AMX's tiles against plain vectors: sums in fp32 of another order may turn the last bit of a bf16
    on its way, here and there."""
    out = tmp_path / "results.pt"
    subprocess.run([sys.executable, __file__, str(out)], check=True, env={**os.environ, "FASTDIT_ISA": isa})
    for here, there in zip(everything(), torch.load(out), strict=True):
        away = (here.float() - there.float()).abs()
        assert away.max() <= 2**-6 * here.abs().max()
        assert away.mean() <= 2**-11 * here.abs().mean()


def test_refuses_what_it_cannot_compute():
    x, y, modulation, weights, cos, sin, N, eps = inputs(SIZES[1])
    packed = kernels.pack_dit_block(weights)
    run_with = lambda **other: kernels.dit_block(
        **{"x": x, "y": y, "modulation": modulation, "weights": packed, "cos": cos, "sin": sin, "heads": N, "qk_eps": eps, **other}
    )
    for message, other in {
        "bfloat16": {"x": x.float()},
        "modulation has shape": {"modulation": tuple(m[..., :16] for m in modulation)},
        "modulation has dtype": {"modulation": tuple(m.double() for m in modulation)},
        "5 vectors": {"modulation": modulation[:5]},
        "from pack_dit_block": {"weights": weights},
        "multiples of 32": {"x": x[:, :16], "y": y[:, :16]},
        "-3 heads": {"heads": -3},
        "both be given": {"sin": None},
        "float32 tables": {"cos": cos.double(), "sin": sin.double()},
        "cos and sin has shape": {"cos": cos[:32], "sin": sin[:32]},
        "q_weight and k_weight has shape": {"heads": 1, "cos": None, "sin": None},
    }.items():
        with pytest.raises(ValueError, match=message):
            run_with(**other)
    with kernels.backend("reference"), pytest.raises(RuntimeError, match="'reference' is in use"):
        run_with()
    with pytest.raises(ValueError, match="down_bias has shape"):
        kernels.pack_dit_block(weights._replace(down_bias=weights.down_bias[:4]))
    with pytest.raises(ValueError, match="qkv has shape"):
        kernels.pack_dit_block(weights._replace(qkv=weights.out))


def test_sizes_that_fit():
    assert kernels.dit_block_fits(256, 1088, 17, 4352)
    assert not kernels.dit_block_fits(256, 1088, 16, 4352)  # heads of 68
    assert not kernels.dit_block_fits(16, 384, 6, 1024)
    assert not kernels.dit_block_fits(256, 768, 3, 1024)  # heads of 256
    assert not any(
        kernels.dit_block_fits(256, width, heads, hidden) for width, heads, hidden in [(0, 1, 32), (32, 0, 32), (32, 1, 0)]
    )
