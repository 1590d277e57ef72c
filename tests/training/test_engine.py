"""What the engine decides before DeepSpeed starts, and runs on one rank. Runs on two ranks are in test_ranks.py."""

import os
from types import SimpleNamespace

import pytest
import torch

from commands import lines_of, settings
from fastdit.config import Config, InputError, parse
from fastdit.device import precision
from fastdit.distributed import World
from fastdit.training import engine
from fastdit.training.loop import train


@pytest.mark.parametrize(
    ("words", "ranks", "sharded"),
    [
        ([], 1, False),
        (["zero.stage=1"], 1, False),
        (["zero.stage=3"], 1, True),
        (["zero.offload=true"], 1, True),
        ([], 2, True),
        (["zero.stage=0"], 2, False),
    ],
)
def test_zero_is_in_use_if_there_is_something_to_shard(words, ranks, sharded):
    config = parse(None, ["train.precision=bf16", *words])
    assert engine.shards(config, ranks) == sharded
    options = engine.deepspeed_config(config, ranks)
    assert options["zero_optimization"]["stage"] == (config.zero.stage if sharded else 0)
    assert options["bf16"]["enabled"] == sharded and (options["gradient_clipping"] > 0) == sharded


@pytest.mark.parametrize(("native", "auto"), [(True, "bf16"), (False, "fp32")])
def test_precision_auto_is_bf16_if_matmuls_are_native(monkeypatch, native, auto):
    monkeypatch.setattr("fastdit.device.native_bf16", lambda device: native)
    cpu = torch.device("cpu")
    asked = []
    monkeypatch.setattr(engine.attention, "check", lambda *of, training: asked.append((*of, training)))
    assert engine.resolve_precision(Config(), cpu).train.precision == auto
    assert asked == [(Config().model, {"bf16": torch.bfloat16, "fp32": torch.float32}[auto], cpu, True)]
    assert [precision(wanted, cpu) for wanted in ("bf16", "fp32")] == ["bf16", "fp32"]


def test_deterministic_sets_what_cuda_needs_and_puts_it_back(monkeypatch):
    variables = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple"}
    for name in variables:
        monkeypatch.delenv(name, raising=False)
    with engine.deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled() and "NCCL_ALGO" not in os.environ
    with engine.deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert {name: os.environ[name] for name in variables} == variables
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory
    for name in variables:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.18.9", "races with compiled blocks"), ("0.20.0", "reads the private layout of 0.19"), ("1.0", "private layout")],
)
def test_other_deepspeeds_are_refused(monkeypatch, version, expected):
    import deepspeed

    monkeypatch.setattr(deepspeed, "__version__", version)
    fix = r"pip install 'deepspeed>=0\.19\.8,<0\.20'"
    with pytest.raises(InputError, match=rf"deepspeed {version} is installed.*{expected}.*: {fix}"):
        engine.import_deepspeed(torch.device("cpu"))


def test_another_layout_of_deepspeed_is_one_sentence():
    class ZeroOptimizer:
        partitions = ()

    with pytest.raises(InputError, match=r"another layout \(ZeroOptimizer has no masters or fp32_.*\); this fastdit knows 0\.19"):
        engine._states(SimpleNamespace(optimizer=ZeroOptimizer()))
    with pytest.raises(InputError, match=r"another layout \(Parameter has no _hp_mapping\)"):
        module = torch.nn.Linear(2, 2)
        engine.fragments(SimpleNamespace(module=module, optimizer=ZeroOptimizer()), World(0, 2, torch.device("cpu"), None))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_offload_trains_resumes_and_has_the_same_losses(tmp_path, stage, monkeypatch):
    """bf16, 8 steps: within 1e-3, because sums are in another order. On a CPU the masters do not move."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)  # ZeRO 3 replaces it for the whole process
    words = ["train.log_steps=1", "train.sample_steps=0", "train.schedule=constant", f"zero.stage={stage}"]
    plain = train(parse(None, settings(tmp_path, "train.total_steps=8", "train.name=plain", *words)))
    for total in (4, 8):
        run = train(parse(None, settings(tmp_path, f"train.total_steps={total}", "zero.offload=true", *words)))
    ours, wanted = lines_of(run), lines_of(plain)
    assert all(ours[step]["loss"] == pytest.approx(wanted[step]["loss"], rel=1e-3) for step in range(1, 9))


@pytest.mark.parametrize("stage", [2, 3])
def test_recomputing_activations_has_the_same_losses(tmp_path, stage, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)  # ZeRO 3 replaces it for the whole process
    losses = []
    for recompute in ("none", "light", "full"):
        words = ["train.total_steps=3", "train.log_steps=1", "train.sample_steps=0", f"zero.stage={stage}"]
        run = train(parse(None, settings(tmp_path, *words, f"train.recompute={recompute}", f"train.name={recompute}")))
        losses.append([line["loss"] for line in lines_of(run).values()])
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) == 3
