"""Muon: its matrices, one rank and ZeRO against a dense reference in fp64 (support/muon_worker.py), skipped steps and resumes."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import muon_worker
from commands import complains, environment, settings, trained_run
from fastdit import distributed
from fastdit.config import parse
from fastdit.model import DiT
from fastdit.training import muon
from fastdit.training.ema import ShardedEma
from fastdit.training.engine import Fragment
from fastdit.training.optimizer import OneRankMuon, build, state_bytes

WORKER = Path(muon_worker.__file__)


@pytest.fixture
def linear(monkeypatch):
    """ZeRO 3 replaces it for the whole process."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_the_matrices_are_those_of_the_blocks_linears(mlp):
    config = parse(None, ["model.preset=test/4", "model.positions=absolute", f"model.mlp={mlp}"]).model
    matrices = muon.hidden_matrices(DiT(config), config)
    H, F = config.width, config.hidden
    up = 1 if mlp == "gelu" else 2
    assert [m[1:] for m in matrices if m.name == "blocks.1.attention.qkv.weight"] == [(i * H * H, H, H) for i in range(3)]
    assert [m[1:] for m in matrices if m.name == "blocks.0.mlp.up.weight"] == [(i * F * H, F, H) for i in range(up)]
    assert [m[1:] for m in matrices if m.name == "blocks.0.mlp.down.weight"] == [(0, H, F)]
    assert len(matrices) == config.depth * (5 + up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 48, 128), (1, 128, 48)])
def test_newton_schulz_brings_singular_values_close_to_one(dtype, shape):
    """Also of zeros, which stay zeros. The bounds are those of the iteration for singular values above 1e-2 of the norm."""
    U, _, V = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    values = torch.linspace(1, 0.1, U.shape[-1]).expand(shape[0], -1)
    for size in (1e-3, 1e6):
        result = muon.newton_schulz((size * U * values[:, None] @ V).to(dtype))
        assert result.dtype == dtype and result.shape == shape
        found = torch.linalg.svdvals(result.float())
        assert found.min() > 0.65 and found.max() < 1.25
    assert not muon.newton_schulz(torch.zeros(shape, dtype=dtype)).any()


def test_matrices_are_shared_by_their_flops():
    square, wide = (muon.Matrix("a", 0, 64, cols) for cols in (64, 192))
    assert wide.flops == 5 * (4 * 64 * 64 * 192 + 2 * 64**3) and square.scale == 0.2 * 8
    matrices = [square, square, wide, square, wide]
    owner = muon.owners(matrices, 2)
    loads = [sum(m.flops for m, o in zip(matrices, owner, strict=True) if o == rank) for rank in (0, 1)]
    assert max(loads) - min(loads) <= square.flops
    assert muon.owners(matrices, 1) == [0] * 5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_skipped_step_changes_nothing(precision):
    """Nor do weights, averages, momenta and moments after it differ from those without it."""
    config = parse(None, ["model.preset=test/4", "train.optimizer=muon", f"train.precision={precision}", "train.lr=0.01"])
    results = []
    for bad in ((), (0, 2)):
        torch.manual_seed(0)
        model = DiT(config.model)
        _, optimizer = build(config, model, sharded=False)
        assert isinstance(optimizer, OneRankMuon) and state_bytes(config, model.num_parameters) == sum(
            tensor.numel() * 4 for state in optimizer.state.values() for name, tensor in state.items() if name != "step"
        )
        fragments = [Fragment(str(i), 0, m.detach().view(-1)) for i, m in enumerate(optimizer.masters)]
        ema = ShardedEma(fragments, 0.9, 0.5, optimizer=optimizer)
        if precision == "bf16":
            model.bfloat16()
        good = 0
        for step in range(3 + len(bad)):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(good)).to(p.dtype)
            if step in bad:
                next(model.blocks.parameters()).grad.fill_(math.nan)
            ema.announce()
            optimizer.step()
            assert optimizer.finish_step() == (step not in bad)
            if step not in bad:
                ema.update()
                good += 1
        results.append([p.detach() for p in (*model.parameters(), *optimizer.masters)] + [a for of in ema.all.values() for a in of])
        results[-1] += [tensor for state in optimizer.state.values() for tensor in state.values()]
        for p, master, average in zip(model.parameters(), optimizer.masters, ema.averages, strict=True):
            assert torch.equal(p, master.to(p.dtype)) and not torch.equal(average, master.view(-1))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_one_rank_against_dense():
    assert muon_worker.against_dense(2, distributed.start("cpu")) < 1e-6


def test_what_muon_cannot_do_is_one_sentence(tmp_path, capsys):
    complains(
        capsys, ["train", *settings(tmp_path, "train.optimizer=muon", "zero.offload=true")], "offload=true does not work with"
    )
    trained_run(tmp_path)
    words = settings(tmp_path, "train.total_steps=6", "train.optimizer=muon")
    complains(
        capsys, ["train", *words], "was trained with train.optimizer=adamw, not with train.optimizer=muon", "another train.name"
    )


@pytest.mark.slow
def test_ranks_and_stages(tmp_path, linear):
    """One rank without ZeRO and with ZeRO 3, two ranks with ZeRO 1 to 3: against the reference, resumed to the bit, and their
    runs taken on by each other."""
    of_one = muon_worker.resumed(tmp_path, 2, 1, "fp32")
    muon_worker.resumed(tmp_path, 2, 1, "bf16")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, WORKER, tmp_path]
    command = [str(word) for word in command]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert "all checks passed" in done.stdout, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    muon_worker.taken_on(tmp_path, tmp_path / "parts_fp32_1_2", 2)
    assert muon_worker.against_dense(3, distributed.start("cpu")) < 1e-6
    muon_worker.resumed(tmp_path, 3, 1, "bf16")
    muon_worker.taken_on(tmp_path, of_one, 3)
