"""Seconds to save and load a training state: fastdit's checkpoints, and torch.save and torch.load of the same tensors.

The state: fp32 weights, EMA and AdamW's two moments, 16 bytes per parameter. Direction "waits": the time that training waits for a
save. "save": the time until the file is complete; fastdit writes in a thread, flushes to disk and hashes, torch.save returns when
the page cache has the file. "load": from the page cache into model, optimizer and EMA; fastdit hashes all files first. Needs
DeepSpeed.
"""

import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import DEVICE, Group, Result, Worker, quantiles, speedup, start, take_turns, timed
from fastdit import distributed
from fastdit.checkpoint import RunState, open_checkpoint
from fastdit.config import Config, ModelConfig, TrainConfig
from fastdit.model import DiT
from fastdit.training import engine, saver
from fastdit.training.ema import ShardedEma

SUITE = "checkpoint"
PRESETS = {"S/2": (384, 12, 6, 1024), "B/2": (768, 12, 12, 2048)}  # width, depth, heads, hidden
DIRECTIONS = ("waits", "save", "load")


def state_of(case: str) -> tuple:
    """Return engine, EMA, config and world of a model that has taken a step."""
    width, depth, heads, hidden = PRESETS[case]
    model = ModelConfig(
        preset=case, width=width, depth=depth, heads=heads, hidden=hidden, in_channels=4, input_size=32, patch_size=2
    )
    world = distributed.start(DEVICE.type)
    config = engine.settle(Config(model=model, train=TrainConfig(batch_size=1)), world.device)
    dit = engine.initialize(DiT(model), config, world)
    x, t, labels = torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    dit.backward(dit(*(each.to(world.device) for each in (x, t, labels))).float().sum())
    dit.step()
    return dit, ShardedEma(engine.fragments(dit, world), 0.99), config, world


def fastdit(folder: Path, case: str) -> Callable[[], dict]:
    dit, ema, config, world = state_of(case)
    sums, state = torch.zeros(1), RunState(1)
    writer = saver.Saver(folder / "run/checkpoints", config, world)
    shapes = {name: p.shape for name, p in dit.module.named_parameters()}

    def load() -> None:
        saved = open_checkpoint(folder / "run")
        saver.check(saved, config, world)
        dit.module.load_state_dict(saved.shards().whole("raw", shapes))
        saver.load(saved, dit, ema, sums, config, world)

    def run() -> dict[str, float]:
        os.sync()  # writes what the other provider left in the page cache
        shutil.rmtree(folder / "run", ignore_errors=True)
        waits = timed(lambda: writer.save(dit, ema, state, sums), wait=False).wall
        return {"waits": waits, "save": waits + timed(writer.wait, wait=False).wall, "load": timed(load, wait=False).wall}

    return run


def torch_save(folder: Path, case: str) -> Callable[[], dict]:
    dit, _, _, world = state_of(case)
    model = dit.module.float()
    averaged = {name: p.detach().clone() for name, p in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()

    def load() -> None:
        state = torch.load(folder / "state.pt", weights_only=True, map_location=world.device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for name, tensor in averaged.items():
            tensor.copy_(state["ema"][name])

    def run() -> dict[str, float]:
        os.sync()
        (folder / "state.pt").unlink(missing_ok=True)
        state = {"model": model.state_dict(), "ema": averaged, "optimizer": optimizer.state_dict()}
        save = timed(lambda: torch.save(state, folder / "state.pt"), wait=False).wall
        return {"waits": save, "save": save, "load": timed(load, wait=False).wall}

    return run


PROVIDERS = {"torch.save": torch_save, "fastdit": fastdit}


def provider(name: str, folder: Path, case: str) -> Callable[[], dict]:
    """In a worker: return what measures the seconds of each direction."""
    (folder / name).mkdir()
    return PROVIDERS[name](folder / name, case)


def measure(case: str, turns: int, say: Callable) -> dict[str, Result]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make = "benchmarks.bench_checkpoint:provider"
        workers, errors = start({name: functools.partial(Worker, make, name, folder, case) for name in PROVIDERS}, say)
        taken, failed = take_turns({name: lambda _, w=w: w() for name, w in workers.items()}, 1 + turns, say)  # the first warms up
        errors |= failed
        for worker in workers.values():
            worker.stop()
        sizes = {n: sum(f.stat().st_size for f in (folder / n).rglob("*") if f.is_file()) for n in PROVIDERS if n not in errors}
    results = {}
    for name in PROVIDERS:
        for direction in DIRECTIONS:
            key, values = {"case": case, "provider": name, "direction": direction, "size": "16 bytes a parameter"}, {}
            ours, theirs = ([turn[direction] for turn in taken.get(n, [])[1:]] for n in (name, "torch.save"))
            if name in sizes:
                values = {
                    **speedup(theirs, ours), "file_mb": f"{sizes[name] / 1e6:.0f}",
                    "gb_per_s": f"{sizes[name] / quantiles(ours)[0] / 1e9:.3g}",
                }  # fmt: skip
            results[f"{name} {direction}"] = Result(key, ours if name in sizes else [], values, errors.get(name, ""))
    return results


def groups(full: bool) -> dict[str, Group]:
    members = tuple(f"{name} {direction}" for name in PROVIDERS for direction in DIRECTIONS)
    cases = list(PRESETS) if full else ["S/2"]
    return {case: Group(members, functools.partial(measure, case, 5 if full else 3)) for case in cases}


def test_checkpoint(replay, group, member) -> None:
    replay(group, member)
