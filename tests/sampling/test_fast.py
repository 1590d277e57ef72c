"""The fast paths of a model that is only sampled from: CUDA graphs and packed blocks compute what the model does."""

import pytest
import torch

import cuda_graphs
from fastdit import kernels
from fastdit.config import from_dict
from fastdit.device import native_bf16
from fastdit.model import DiT
from fastdit.sampling.fast import PackedBlock, fast_velocity
from fastdit.sampling.sampler import Sampler
from runs import random_model

CPU = torch.device("cpu")


@pytest.mark.skipif(not kernels.library.EXTENSION, reason="the C++ extension is not built")
@pytest.mark.skipif(not native_bf16(CPU), reason="oneDNN has no bf16 for this CPU")
@pytest.mark.parametrize("time_embedding", ["sinusoidal", "base"])
@torch.no_grad()
def test_packed_blocks_sample_as_the_model_does(monkeypatch, time_embedding):
    """Where AMX is, and without it with plain vectors in its place: no further from fp32 than the model's own bf16."""
    sizes = {"preset": "test/4", "zero_init_gates": False, "input_size": 16, "patch_size": 2}
    config = from_dict({"model": {**sizes, "time_embedding": time_embedding}})

    def final(dtype, fast):
        torch.manual_seed(0)
        model = DiT(config.model).to(dtype).eval().requires_grad_(False)
        monkeypatch.setattr(kernels, "dit_block_is_fast", lambda device: fast)
        sampler = Sampler.of_model(model, config, None)
        assert isinstance(model.blocks[0], PackedBlock) == (fast and dtype == torch.bfloat16)
        if fast and dtype == torch.bfloat16:
            assert fast_velocity(model, CPU) is None  # again: nothing to do
            with pytest.raises(RuntimeError, match="load it again"):
                model.state_dict()
        return next(sampler.latents([1, 5, 1], 3))[1]

    truth, plain, packed = final(torch.float32, True), final(torch.bfloat16, False), final(torch.bfloat16, True)
    error, plain_error = ((x - truth).abs().max().item() for x in (packed, plain))
    assert 0 < error <= 2 * plain_error


@pytest.mark.skipif(not kernels.library.EXTENSION, reason="the C++ extension is not built")
@pytest.mark.skipif(not native_bf16(CPU), reason="oneDNN has no bf16 for this CPU")
@pytest.mark.parametrize(
    "switch",
    [{"mlp": "gelu"}, {"linear_bias": True}, {"norm_eps": 0.5}, {"positions": "sincos"}, {"depth": 4, "dense_blocks": (1, 1)}],
    ids=str,
)
@torch.no_grad()
def test_packed_blocks_compute_the_switches_or_are_not_used(monkeypatch, switch):
    monkeypatch.setattr(kernels, "dit_block_is_fast", lambda device: True)
    model, _ = random_model(input_size=16, patch_size=2, **switch)
    x, t = torch.randn(3, 1, 16, 16), torch.tensor(0.7)
    deep = (2,) if "dense_blocks" in switch else ()  # the last sample skips the blocks between
    velocity = lambda: model.velocity(x, t, *model.embed_classes(torch.tensor([1, 5, 1])), *deep)
    truth = velocity()
    model.bfloat16()
    plain = velocity()
    assert fast_velocity(model, CPU) is None
    assert isinstance(model.blocks[0], PackedBlock) == (not switch.keys() & {"mlp", "linear_bias"})
    fast = velocity()
    assert (fast - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-6


@torch.no_grad()
def test_graphs_are_one_a_batch_size_in_one_pool(monkeypatch):
    """Six batch sizes, guided and not, each with few classes and then with many: what the model gives, few graphs kept."""
    captures = cuda_graphs.install(monkeypatch)
    model, _ = random_model()
    graphs = fast_velocity(model, torch.device("cuda"))
    assert all(block._compiled_call_impl is None for block in model.blocks)
    for batch in (1, 2, 3, 4, 5, 6):
        for rows in (batch, 2 * batch):
            before = len(captures)
            for labels in (torch.full((rows,), 3), torch.arange(rows) % 10, torch.arange(rows) // 2):
                x, t = torch.randn(rows, 1, 32, 32), torch.rand(())
                inputs = (x, t, *model.embed_classes(labels))
                torch.testing.assert_close(graphs(*inputs), model.velocity(*inputs), rtol=0, atol=1e-5)
            assert len(captures) - before <= 1
    assert {mode for _, mode in captures} == {"thread_local"} and len({id(pool) for pool, _ in captures}) == 1
    assert list(graphs.captured) == [(rows, None) for rows in (5, 10, 6, 12)]  # the last used
    again = len(captures)
    for rows in (6, 12, 6, 12):
        graphs(torch.randn(rows, 1, 32, 32), torch.rand(()), *model.embed_classes(torch.arange(rows) % 10))
    assert len(captures) == again
