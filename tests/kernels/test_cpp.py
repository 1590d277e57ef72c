"""The C++ kernels: equal bits on a rerun and on any number of threads, close ones on other instruction sets, sanitizers silent."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdit import kernels
from fastdit.kernels import library

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not library.EXTENSION, reason="the C++ extension is not built")


def everything() -> list[torch.Tensor]:
    """Outputs and gradients of every op on inputs of odd sizes that many units share."""
    generator = torch.Generator().manual_seed(0)
    B, T, N, D = 3, 77, 3, 38
    H = N * D
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    stream = lambda: randn(B, T, H).bfloat16().requires_grad_()
    vector = lambda: randn(B, H).requires_grad_()
    weights = [randn(D).requires_grad_() for _ in range(2)]
    angles = randn(T, D // 2)
    x0, noise, t = randn(B, 4, 9, 9).requires_grad_(), randn(B, 4, 9, 9).requires_grad_(), randn(B).sigmoid()
    ids = torch.tensor([0, 2**40 + 1, 7])
    calls = [
        (kernels.modulate, [stream(), vector(), vector()]),
        (kernels.gated_residual, [stream(), stream(), vector()]),
        (kernels.gated_residual_modulate, [stream(), stream(), vector(), vector(), vector()]),
        (
            lambda x, branch, gate, shift, scale, bias: kernels.gated_residual_modulate(x, branch, gate, shift, scale, bias=bias),
            [stream(), stream(), vector(), vector(), vector(), randn(H).requires_grad_()],
        ),
        (
            lambda qkv, a, b: kernels.qk_norm_rope(qkv, a, b, angles.cos(), angles.sin(), N, 1e-6),
            [randn(B, T, 3 * H).bfloat16().requires_grad_(), *weights],
        ),
        (kernels.swiglu, [randn(B, T, 2 * H).bfloat16().requires_grad_()]),
        (kernels.swiglu, [randn(B, T, 2 * H).bfloat16().requires_grad_(), randn(2 * H).requires_grad_()]),
        (lambda x0, noise: kernels.flow_interpolate(x0, noise, t), [x0, noise]),
        (lambda v: kernels.flow_matching_loss(v, x0.detach(), noise.detach(), t), [randn(B, 4, 9, 9).requires_grad_()]),
    ]
    results = [kernels.counter_normal(5, 1, ids, (3, 67)), kernels.counter_uniform(5, 1, ids, (3, 67))]
    with kernels.backend("cpp"):
        for function, inputs in calls:
            out = function(*inputs)
            out = out if isinstance(out, tuple) else (out,)
            results += [*out, *torch.autograd.grad(out, inputs, [torch.ones_like(o) for o in out])]
    return [f.detach() for f in results]


def test_the_same_bits_at_any_number_of_threads():
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 4):
            torch.set_num_threads(threads)
            results.append(everything())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


if __name__ == "__main__":  # a process of its own, for another instruction set
    torch.save(everything(), sys.argv[1])


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_instruction_sets_agree(tmp_path, isa):
    """The sums have one order; products may be rounded apart from the additions, and exp is another polynomial: a few roundings of
    fp32 in sums of up to 231 terms, which may turn the last bit of a bf16."""
    out = tmp_path / "results.pt"
    subprocess.run([sys.executable, __file__, str(out)], check=True, env={**os.environ, "FASTDIT_ISA": isa})
    for here, there in zip(everything(), torch.load(out), strict=True):
        unit = 2**-7 if here.dtype == torch.bfloat16 else 231**0.5 * 2**-21
        torch.testing.assert_close(here.float(), there.float(), rtol=unit, atol=231**0.5 * 2**-21 * here.abs().max().item())


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
def test_sanitizers_find_nothing():
    """Addresses, undefined behaviour and races; the script says which."""
    environment = {**os.environ, "VENV": str(Path(sys.executable).parents[1])}
    done = subprocess.run([ROOT / "launch/sanitize.sh"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "the same bits" in done.stdout and "passed" in done.stdout
