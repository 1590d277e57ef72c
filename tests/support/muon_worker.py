"""Run on two ranks by training/test_muon.py: Muon under each ZeRO stage against a dense reference, and resumed.

Arguments: output folder, which holds the run parts_fp32_2_1 of one rank. Exits with a non-zero code at the first failure. The
reference is compared in fp32, in which Newton-Schulz runs then.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fastdit import checkpoint, distributed, flow
from fastdit.config import from_dict, parse
from fastdit.data import builtin
from fastdit.model import DiT
from fastdit.training import engine, loop, muon
from fastdit.training.ema import ShardedEma, gather

STEPS = 4
SKIPPED = 1  # the step in which the last rank's loss is NaN
TRAIN = {
    "optimizer": "muon", "lr": 4e-3, "weight_decay": 0.1, "warmup_steps": 0, "clip": 0.5, "precision": "fp32", "accumulation": 2,
    "eps": 1e-5,  # AdamW turns the rounding of gradients below it into whole steps
}  # fmt: skip


class Dense:
    """Clipping, Muon and AdamW on whole parameters in fp64, written without fastdit.training."""

    def __init__(self, model: DiT) -> None:
        self.weights = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        hidden = [name for name, w in self.weights.items() if name.startswith("blocks") and w.ndim == 2]
        self.matrices = {name: 3 if "qkv" in name else 2 if "up" in name else 1 for name in hidden}
        self.momenta = {name: torch.zeros_like(self.weights[name]) for name in hidden}
        rest = [w for name, w in self.weights.items() if name not in self.matrices]
        self.adamw = torch.optim.AdamW(rest, TRAIN["lr"], betas=(0.9, 0.95), eps=TRAIN["eps"], weight_decay=TRAIN["weight_decay"])

    def step(self, gradients: dict[str, torch.Tensor]) -> None:
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        assert norm > TRAIN["clip"], "nothing is clipped"
        gradients = {name: g * (TRAIN["clip"] / norm) for name, g in gradients.items()}
        for name, w in self.weights.items():
            w.grad = gradients[name]
        self.adamw.step()
        for name, count in self.matrices.items():
            self.momenta[name] = 0.95 * self.momenta[name] + gradients[name]
            update = gradients[name] + 0.95 * self.momenta[name]
            for part, w in zip(update.chunk(count), self.weights[name].chunk(count), strict=True):
                x = part / part.norm()
                x = x.T if x.shape[0] > x.shape[1] else x
                for _ in range(5):
                    x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
                x = x if x.shape == w.shape else x.T
                w.mul_(1 - TRAIN["lr"] * TRAIN["weight_decay"]).sub_(x, alpha=TRAIN["lr"] * 0.2 * max(x.shape) ** 0.5)


def whole(tensors: list[tuple[str, int, torch.Tensor]], shapes: dict, world) -> dict[str, torch.Tensor]:
    """Return complete parameters of (name, start, piece) that ranks hold."""
    return gather(ShardedEma([engine.Fragment(*entry) for entry in tensors], 0.0), shapes, world)


def against_dense(stage: int, world) -> float:
    """Return the largest difference of masters and momenta to those of the reference."""
    train = TRAIN | {"batch_size": 8 // world.size // TRAIN["accumulation"]}
    config = from_dict({"model": {"preset": "test/4"}, "train": train, "zero": {"stage": stage, "bucket": 20_000}})
    loader = builtin.load(config, world)
    torch.manual_seed(0)
    model = DiT(config.model)
    with torch.no_grad():  # zeros give no gradient to what is behind them
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    dense, single = Dense(model), DiT(config.model)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    ds = engine.initialize(model, config, world)
    calls, original = [], muon.newton_schulz
    muon.newton_schulz = lambda x: calls.append(len(x)) or original(x)
    for step in range(STEPS):
        whole_batch = []
        for micro in range(TRAIN["accumulation"]):
            images, labels = loader.batch(step, micro)
            ids = flow.sample_ids(step, loader.order.first_index(micro), train["batch_size"], world.device)
            whole_batch.append((images, labels, ids))
            loss = flow.losses(ds, images, labels, ids, config.flow, seed=0, null=10).total.mean()
            bad = step == SKIPPED and world.rank == world.size - 1
            ds.backward(loss * float("nan") if bad else loss)
            ds.step()
        assert engine.finish_step(ds) == (step != SKIPPED)
        if step == SKIPPED:
            continue
        gathered = [None] * world.size
        dist.all_gather_object(gathered, whole_batch, group=world.control)
        images, labels, ids = (
            torch.cat(parts) for parts in zip(*(batch for of_rank in gathered for batch in of_rank), strict=True)
        )
        single.load_state_dict({name: w.float() for name, w in dense.weights.items()})
        single.zero_grad()
        flow.losses(single.train(), images, labels, ids, config.flow, seed=0, null=10).total.mean().backward()
        dense.step({name: p.grad.double() for name, p in single.named_parameters()})
    muon.newton_schulz = original
    made = torch.tensor([sum(calls), min(1, sum(calls))])
    dist.all_reduce(made)
    # 2 blocks of q, k, v, out, value, gate, down; without ZeRO, the skipped step's are made and dropped
    steps = STEPS - 1 + (not engine.shards(config, world.size))
    assert made.tolist() == [2 * 7 * steps, world.size], f"Newton-Schulz ran on {made.tolist()} matrices and ranks"
    owned = engine.fragments(ds, world)
    masters = whole(owned, shapes, world)
    state = [(f.name, f.start, t) for name, f, t in engine.optimizer_state(ds, owned) if name == "momentum_buffer"]
    momenta = whole(state, {name: shapes[name] for name in dense.matrices}, world)
    assert engine.steps_applied(ds) == STEPS - 1
    differences = [masters[name] - w for name, w in dense.weights.items()] + [
        momenta[name] - m for name, m in dense.momenta.items()
    ]
    return max(difference.abs().max().item() for difference in differences)


def run(out: Path, name: str, steps: int, *words: str) -> Path:
    """Train on 8 images per step to a step. Returns the run's folder."""
    batch = 8 // int(os.environ.get("WORLD_SIZE", 1))
    settings = [
        "model.preset=test/4", "train.optimizer=muon", "train.schedule=constant", "train.lr=1e-3",
        "train.log_steps=1", "train.save_steps=3", "train.sample_steps=0", "train.ema_more=[0.9]", f"train.batch_size={batch}",
        f"train.out={out}", f"train.name={name}", f"train.total_steps={steps}",
    ]  # fmt: skip
    return loop.train(parse(None, [*settings, *words]))


def losses(folder: Path) -> list[float]:
    """Return the logged losses of the last three steps of six."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line and line["step"] > 3]


def resumed(out: Path, stage: int, ranks: int, precision: str) -> Path:
    """Check that a run in two parts is the run in one to the last bit. Returns the folder of one of them."""
    words, name = [f"zero.stage={stage}", f"train.precision={precision}"], f"{precision}_{stage}_{ranks}"
    whole_run = run(out, f"whole_{name}", 6, *words)
    run(out, f"parts_{name}", 3, *words)
    parts = run(out, f"parts_{name}", 6, *words)
    assert losses(parts) == losses(whole_run), stage
    assert "momentum_buffer" in checkpoint.open_checkpoint(parts).shards().kinds
    for rank in range(ranks):
        files = [folder / "checkpoints/step_00000006" / checkpoint.shard_file(rank) for folder in (whole_run, parts)]
        assert files[0].read_bytes() == files[1].read_bytes(), (stage, rank)
    return parts


def taken_on(out: Path, before: Path, stage: int) -> None:
    """Check that a run of another stage or number of ranks is taken on at step 3 with the same losses to 1e-5, as for AdamW."""
    name = f"{before.name}_on_{stage}"
    after = run(out, name, 6, f"zero.stage={stage}", "train.precision=fp32", f"train.resume={before / 'checkpoints/step_00000003'}")
    wanted = losses(before)
    assert len(wanted) == 3 and all(abs(a - b) < 1e-5 * b for a, b in zip(losses(after), wanted, strict=True)), (name, stage)


def main(out: Path) -> None:
    world = distributed.start()
    for stage in (1, 2, 3):  # 3 last: it replaces torch.nn.functional.linear
        difference = against_dense(stage, world)
        print(f"rank {world.rank} stage {stage}: {difference:.1e} off", flush=True)
        assert difference < 1e-6, (stage, difference)
        resumed(out, stage, world.size, "bf16")
        taken_on(out, out / "parts_fp32_2_1", stage)
        if stage == 1:
            of_two = resumed(out, stage, world.size, "fp32")
    taken_on(out, of_two, 3)
    if world.rank == 0:
        print("all checks passed", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
