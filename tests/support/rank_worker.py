"""Run on every rank by test_distributed.py: trains a few steps by hand and checks what only a real engine can show.

Arguments: ZeRO stage, precision. Exits non-zero at the first failure.
"""

import sys

import torch

import hot_loop
from fastdit import distributed, flow
from fastdit.config import from_dict
from fastdit.data import builtin
from fastdit.model import DiT
from fastdit.training import engine
from fastdit.training.ema import ShardedEma, gather

STEPS = 5
# host reads in engine.step: of OneRankAdamW, else of deepspeed 0.19.8, by ZeRO stage and precision
READS = {"one rank": 0, (1, "bf16"): 2, (2, "bf16"): 3, (2, "fp32"): 2, (3, "bf16"): 1}


def main(stage: int, precision: str) -> None:
    config = from_dict(
        {
            "model": {"preset": "test/4"},
            "train": {"batch_size": 4, "lr": 1e-3, "warmup_steps": 1, "ema_decay": 0.9, "precision": precision, "accumulation": 2},
            "zero": {"stage": stage, "bucket": 20_000},  # several a backward pass: the model has 150,000 parameters
        }
    )
    world = distributed.start()
    loader = builtin.load(config, world)
    torch.manual_seed(0)
    model = DiT(config.model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    shapes = {name: p.shape for name, p in start.items()}
    ds = engine.initialize(model, config, world)

    # rule 25: parameters follow the precision, tables and masters stay fp32
    wanted = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {p.dtype for p in ds.module.parameters()} == {wanted}
    assert {b.dtype for b in ds.module.buffers()} == {torch.float32}
    owned = engine.fragments(ds, world)
    assert {f.master.dtype for f in owned} == {torch.float32}
    sharded = engine.shards(config, world.size)
    if stage == 2 and sharded:
        assert type(ds.optimizer).__name__ == "DeepSpeedZeroOptimizer" and ds.optimizer.overlap_comm

    ema = ShardedEma(owned, config.train.ema_decay)
    assert all(torch.equal(gather(ema, shapes, world)[name], start[name]) for name in start), "EMA does not start at the weights"

    # rule 3: no timer may synchronise the device
    from deepspeed import get_accelerator

    waits = []
    type(get_accelerator()).synchronize = lambda *a, **k: waits.append(1)

    # rule 5: a bucket is reduced while the backward pass goes on, not after it
    order = []
    for p in ds.module.parameters():
        p.register_post_accumulate_grad_hook(lambda p: order.append("gradient"))
    for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter"):
        collective = getattr(torch.distributed, name)
        recorded = lambda *a, collective=collective, **k: (order.append("collective"), collective(*a, **k))[1]
        setattr(torch.distributed, name, recorded)

    reference = {name: p.clone() for name, p in start.items()}
    micro_syncs, step_syncs = [], []
    for step in range(STEPS):
        for micro in range(config.train.accumulation):
            with hot_loop.HotLoopGuard() as guard:
                images, labels = loader.batch(step, micro)
                ids = flow.sample_ids(step, loader.order.first_index(micro), 4, world.device)
                loss = flow.losses(ds, images, labels, ids, config.flow, seed=0, null=10).total.mean()
                ds.backward(loss)
            micro_syncs.append(guard.syncs)
            gradients = [i for i, what in enumerate(order) if what == "gradient"]
            overlapped = order[: gradients[-1]].count("collective")
            order.clear()
            with hot_loop.HotLoopGuard() as guard:
                ds.step()
            step_syncs.append(guard.syncs)
        ema.update()
        masters = gather(ShardedEma(owned, 0.0), shapes, world)  # a fresh EMA is a copy of the masters
        d = min(0.9, (1 + step) / (10 + step))
        for name, average in reference.items():
            average.lerp_(masters[name], 1 - d)
    whole = gather(ema, shapes, world)
    for name, average in reference.items():
        assert torch.equal(whole[name], average), f"EMA of {name} differs by {(whole[name] - average).abs().max()}"
    assert any((masters[name] != start[name]).any() for name in start)
    for name, p in ds.module.named_parameters():
        if stage < 3:
            assert torch.equal(masters[name].to(p.dtype), p), f"{name} is not its master rounded"

    if stage == 2 and sharded:
        assert overlapped >= 3, "no bucket was reduced before the last gradient was there"
    assert not waits, f"{len(waits)} device synchronisations"
    later = config.train.accumulation  # ZeRO-3 records its trace in the first step
    assert set(micro_syncs[later:]) == {0}, f"host reads in forward and backward: {micro_syncs}"
    # DeepSpeed's ZeRO reads the gradient norm and the overflow flag one after the other: the first waits for the device, and
    # nothing is queued between them
    reads = READS[(stage, precision) if sharded else "one rank"]
    assert step_syncs[later:] == [0, reads] * (STEPS - 1), f"host reads in engine.step: {step_syncs}"
    if world.rank == 0:
        print("all checks passed", flush=True)


main(int(sys.argv[1]), sys.argv[2])
