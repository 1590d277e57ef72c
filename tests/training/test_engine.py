"""What the engine decides before DeepSpeed starts. Its runs are in test_distributed.py."""

import os

import pytest
import torch

from fastdit import distributed
from fastdit.config import Config, InputError, parse
from fastdit.device import precision
from fastdit.training import engine


@pytest.mark.parametrize(
    ("words", "ranks", "sharded"),
    [([], 1, False), (["zero.stage=1"], 1, False), (["zero.stage=3"], 1, True), (["zero.offload=true"], 1, True), ([], 2, True)],
)
def test_zero_is_in_use_where_there_is_something_to_shard(words, ranks, sharded):
    config = parse(None, ["train.precision=bf16", *words])
    assert engine.shards(config, ranks) == sharded
    made = engine.deepspeed_config(config, ranks)
    assert made["zero_optimization"]["stage"] == (config.zero.stage if sharded else 0)
    assert made["bf16"]["enabled"] == sharded and (made["gradient_clipping"] > 0) == sharded


@pytest.mark.parametrize(("native", "auto"), [(True, "bf16"), (False, "fp32")])
def test_precision_auto_is_bf16_where_matmuls_are_native(monkeypatch, native, auto):
    monkeypatch.setattr("fastdit.device.native_bf16", lambda device: native)
    cpu = torch.device("cpu")
    asked = []
    monkeypatch.setattr(engine.attention, "check", lambda *of, training: asked.append((*of, training)))
    assert engine.settle(Config(), cpu).train.precision == auto
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


def test_weight_gradients_are_summed_in_fp32_on_cuda(monkeypatch):
    """A start on CUDA, without one: what it sets before DeepSpeed."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(distributed, "control_group", lambda: None)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    try:
        matmul.allow_bf16_reduced_precision_reduction = True
        assert distributed.start("cuda").device == torch.device("cuda", 0)
        assert not matmul.allow_bf16_reduced_precision_reduction
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def test_an_old_deepspeed_is_refused(monkeypatch):
    import deepspeed

    monkeypatch.setattr(deepspeed, "__version__", "0.18.9")
    with pytest.raises(InputError, match=r"deepspeed 0\.18\.9 is installed.* pip install 'deepspeed>=0\.19\.8'"):
        engine.import_deepspeed(torch.device("cpu"))
