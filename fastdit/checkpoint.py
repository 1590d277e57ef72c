"""Checkpoints: written whole or not at all, and read back by training (to continue) and by sampling (weights only).

A checkpoint is a folder <run>/checkpoints/step_NNNNNNNN:
    weights_rank_RRRR.safetensors   this rank's fp32 shards, "raw/<parameter>@<first element>" and "ema/…": all that sampling needs
    *_states.pt                     DeepSpeed's own files: bf16 weights, fp32 masters, optimizer, schedule
    config.json, state.json         the run's settings; step, EMA updates, ranks, wandb id
    manifest.json                   names and sizes of all the above, written last: a folder without it does not count
It is written under a temporary name, flushed to disk and renamed. The newest folder whose manifest holds is the one to load.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdit.config import Config, InputError, ModelConfig, load_json
from fastdit.ema import ShardedEma, merge
from fastdit.engine import World
from fastdit.model import DiT

MANIFEST = "manifest.json"
LOG_SUM = "log/loss_sum"  # the running loss between two log lines


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which replaces `path` whole at the end of the block: fsync, rename."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file whole."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def _shard_file(rank: int) -> str:
    return f"weights_rank_{rank:04d}.safetensors"


def is_whole(folder: Path) -> bool:
    """Whether every file of the folder's manifest is there with its size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, json.JSONDecodeError, KeyError):
        return False


def find(path: Path) -> Path | None:
    """The checkpoint at `path`: itself, or the newest whole one of a run's folder; None when there is none."""
    if os.path.exists(path / MANIFEST):  # not Path.exists, which raises where a folder may not be searched
        return path if is_whole(path) else None
    folders = sorted((path / "checkpoints").glob("step_*"), reverse=True)
    return next((folder for folder in folders if is_whole(folder)), None)


def _commit(temporary: Path, final: Path) -> None:
    """Make a written and flushed folder count: manifest, rename."""
    sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
    write_atomically(temporary / MANIFEST, json.dumps({"files": sizes}, indent=1))
    shutil.rmtree(final, ignore_errors=True)  # one of the same step, which was not whole, or this run would have begun from it
    temporary.rename(final)
    flush(final.parent)


def save_weights(folder: Path, weights: dict[str, Tensor], config: Config, step: int, origin: str) -> Path:
    """Write fp32 weights that were trained elsewhere as a checkpoint below `folder`: to sample from, not to continue."""
    final = folder / folder_name(step)
    temporary = folder / f".tmp-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(
        {f"ema/{name}@0": tensor.flatten().float().contiguous() for name, tensor in weights.items()}, temporary / _shard_file(0)
    )
    (temporary / "config.json").write_text(config.to_json())
    (temporary / "state.json").write_text(json.dumps({"step": step, "ranks": 1, "origin": origin}, indent=1))
    for file in temporary.iterdir():
        flush(file)
    _commit(temporary, final)
    return final


def save(folder: Path, engine, ema: ShardedEma, config: Config, state: dict, loss_sum: Tensor, world: World) -> None:
    """Write the checkpoint of state["step"] below `folder` (<run>/checkpoints). All ranks must call it."""
    final = folder / folder_name(state["step"])
    temporary = folder / f".tmp-{final.name}"
    if world.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier(world.control)
    engine.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)
    shards = {f"ema/{key}": average for key, average in ema.state_dict().items()}
    shards |= {f"raw/{f.name}@{f.start}": f.master for f in ema.fragments}
    shards[LOG_SUM] = loss_sum
    save_file({key: tensor.detach().cpu().clone() for key, tensor in shards.items()}, temporary / _shard_file(world.rank))
    if world.rank == 0:
        (temporary / "config.json").write_text(config.to_json())
        (temporary / "state.json").write_text(json.dumps({**state, "ema_updates": ema.updates, "ranks": world.size}, indent=1))
    dist.barrier(world.control)
    for file in temporary.iterdir():  # each node flushes what its ranks wrote
        flush(file)
    dist.barrier(world.control)
    if world.rank == 0:
        _commit(temporary, final)
        whole = [old for old in sorted(folder.glob("step_*")) if old != final and is_whole(old)]
        for old in whole[: len(whole) + 1 - config.train.keep_checkpoints]:
            shutil.rmtree(old)
    dist.barrier(world.control)


def _check_same_run(folder: Path, saved: Config, wanted: Config) -> None:
    """Raise InputError where a setting that a run cannot change on its way differs: the model, the data, and what names the
    random numbers or cuts the optimizer's state."""
    fixed = {
        "model": [f.name for f in dataclasses.fields(ModelConfig) if f.name not in ("preset", "attention")],
        "data": ["source", "image_size", "autoencoder", "flip", "crop"],
        "train": ["seed", "batch_size", "accumulation", "precision"],
        "zero": ["stage"],
    }
    for section, keys in fixed.items():
        for key in keys:
            a, b = getattr(getattr(saved, section), key), getattr(getattr(wanted, section), key)
            if a != b:
                raise InputError(
                    f"checkpoint {folder} was trained with {section}.{key}={a}, but this run asks for {section}.{key}={b}: use the "
                    f"checkpoint's setting, or another train.name"
                )


def check(folder: Path, config: Config, world: World) -> dict:
    """The state.json of a checkpoint that this run can continue from. Raises InputError when it cannot."""
    state = json.loads((folder / "state.json").read_text())
    if "origin" in state:
        raise InputError(f"checkpoint {folder} was imported from {state['origin']}: it can be sampled from, not continued")
    if state["ranks"] != world.size:
        raise InputError(
            f"checkpoint {folder} was written by {state['ranks']} ranks, but this run has {world.size}: start it with "
            f"{state['ranks']}, or use another train.name"
        )
    _check_same_run(folder, load_json(folder / "config.json"), config)
    return state


def load(folder: Path, engine, ema: ShardedEma, state: dict, loss_sum: Tensor, world: World) -> None:
    """Restore engine, EMA and the running loss from a checkpoint that `check` accepted. All ranks must call it."""
    path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise RuntimeError(f"DeepSpeed found nothing to load in {folder}")
    shards = load_file(folder / _shard_file(world.rank), device=str(world.device))
    averages = {key.removeprefix("ema/"): t for key, t in shards.items() if key.startswith("ema/")}
    ema.load_state_dict(averages, state["ema_updates"])
    loss_sum.copy_(shards[LOG_SUM])


def load_model(path: Path, weights: str, device: torch.device) -> tuple[DiT, Config, dict]:
    """The fp32 model of a checkpoint or of a run's newest one, its config and its state.json.

    weights: "ema" | "raw". Raises InputError when there is no whole checkpoint at `path`.
    """
    folder = find(path)
    if folder is None:
        raise InputError(f"there is no whole checkpoint in {path}: give a run's folder or one of its checkpoints/step_* folders")
    config = load_json(folder / "config.json")
    state = json.loads((folder / "state.json").read_text())
    prefix = f"{weights}/"
    shards: dict[str, Tensor] = {}
    for rank in range(state["ranks"]):
        file = load_file(folder / _shard_file(rank))
        shards |= {key.removeprefix(prefix): t for key, t in file.items() if key.startswith(prefix)}
    if not shards:
        raise InputError(
            f"checkpoint {folder} holds no {weights} weights: it was imported with its averaged ones, use --weights ema"
        )
    model = DiT(config.model)
    model.load_state_dict(merge(shards, {name: p.shape for name, p in model.named_parameters()}))
    return model.to(device).eval(), config, state
