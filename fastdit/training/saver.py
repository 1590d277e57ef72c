"""A run's own checkpoints: written in a thread while training continues, and restored into the engine."""

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastdit.checkpoint import FORMAT, Checkpoint, RunState, _commit, _shard_file, folder_name, is_whole
from fastdit.config import Config, InputError, ModelConfig
from fastdit.distributed import T, World, control_group
from fastdit.files import flush, sha256
from fastdit.training.ema import ShardedEma
from fastdit.training.engine import continue_from, moments, steps_taken

LOG_SUMS = "log/sums"  # of the losses since the last log line


def _snapshot(engine, ema: ShardedEma, sums: Tensor) -> dict[str, Tensor]:
    """This rank's part of a checkpoint, copied to the host: training may go on."""
    kinds = {"raw": [f.master for f in ema.fragments], **ema.all, **moments(engine, ema.fragments)}
    shards = {f"{kind}/{f.name}@{f.start}": t for kind, own in kinds.items() for f, t in zip(ema.fragments, own, strict=True)}
    return {key: tensor.detach().to("cpu", copy=True) for key, tensor in (shards | {LOG_SUMS: sums}).items()}


def _write_own(temporary: Path, shards: dict[str, Tensor], config: Config, state: RunState, rank: int) -> dict[str, str]:
    """Write and flush this rank's files; their hashes."""
    names = [_shard_file(rank)]
    save_file(shards, temporary / names[0])
    if rank == 0:
        (temporary / "config.json").write_text(config.to_json())
        (temporary / "state.json").write_text(json.dumps(state.to_dict(), indent=1))
        names += ["config.json", "state.json"]
    for name in names:
        flush(temporary / name)
    return {name: sha256(temporary / name) for name in names}


def _write(folder: Path, shards: dict[str, Tensor], config: Config, state: RunState, world: World) -> None:
    """Write the checkpoint of state.step below `folder`. All ranks must call it. Raises InputError on all of them when one
    cannot write; the checkpoints that are there stay."""
    final = folder / folder_name(state.step)
    temporary = folder / f".tmp-{final.name}"
    train = config.train

    def written(work: Callable[[], T]) -> T:
        try:
            return work()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise InputError(f"checkpoint {final} cannot be written: {error}: free some space in {folder}") from error

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    world.together(lambda: written(begin), everywhere=False)
    own = world.together(lambda: written(lambda: _write_own(temporary, shards, config, state, world.rank)))
    hashes: list = [None] * world.size
    dist.all_gather_object(hashes, own, group=world.control)

    def commit() -> None:
        _commit(temporary, final, {name: digest for of_rank in hashes for name, digest in of_rank.items()})
        others = [old for old in sorted(folder.glob("step_*")) if old != final and is_whole(old, by_hash=False)]
        kept = lambda old: train.keep_every and int(old.name.removeprefix("step_")) % train.keep_every == 0
        passing = [old for old in others if not kept(old)]
        for old in passing[: max(0, len(passing) + 1 - train.keep_checkpoints)]:
            shutil.rmtree(old)

    world.together(lambda: written(commit), everywhere=False)


class Saver:
    """Writes a run's checkpoints in a thread, one at a time, while training goes on."""

    def __init__(self, folder: Path, config: Config, world: World) -> None:
        """folder: <run>/checkpoints. All ranks must make it."""
        self.folder, self.config = folder, config
        self.world = world._replace(control=control_group())  # the thread's own: the loop uses the other meanwhile
        self.thread = self.error = None

    def save(self, engine, ema: ShardedEma, state: RunState, sums: Tensor) -> None:
        """Copy the state to the host and begin to write it, when the last checkpoint is written. state: of state.json; sums: of the
        log line that is not written yet. Raises the InputError of the last one. All ranks must call it."""
        self.wait()
        train, ranks = self.config.train, self.world.size
        state = dataclasses.replace(
            state, format=FORMAT, ema_updates=ema.updates, optimizer_steps=steps_taken(engine), ranks=ranks,
            global_batch=train.batch_size * train.accumulation * ranks,
        )  # fmt: skip
        self.thread = threading.Thread(target=self._run, args=(_snapshot(engine, ema, sums), state))
        self.thread.start()

    def _run(self, shards: dict[str, Tensor], state: RunState) -> None:
        try:
            _write(self.folder, shards, self.config, state, self.world)
        except Exception as error:  # raised again where the loop waits
            self.error = error

    def wait(self) -> None:
        """Until nothing is being written. Raises what went wrong: InputError on all ranks when one of them could not write."""
        if self.thread:
            self.thread.join()
        error, self.thread, self.error = self.error, None, None
        if error:
            raise error


def _check_same_run(folder: Path, saved: Config, wanted: Config) -> None:
    """Raise InputError where a setting that a run cannot change on its way differs: the model, the data, and what names the
    random numbers."""
    fixed = {
        "model": [f.name for f in dataclasses.fields(ModelConfig) if f.name not in ("preset", "attention")],
        "data": ["source", "image_size", "autoencoder", "flip", "crop"],
        "train": ["seed", "precision"],
    }
    for section, keys in fixed.items():
        for key in keys:
            a, b = getattr(getattr(saved, section), key), getattr(getattr(wanted, section), key)
            if a != b:
                raise InputError(
                    f"checkpoint {folder} was trained with {section}.{key}={a}, but this run asks for {section}.{key}={b}: use the "
                    f"checkpoint's setting, or another train.name"
                )


def check(saved: Checkpoint, config: Config, world: World) -> None:
    """Raise InputError if this run cannot continue from a checkpoint."""
    folder, state = saved.path, saved.state
    if state.origin:
        raise InputError(f"checkpoint {folder} was imported from {state.origin}: it can be sampled from, not continued")
    if state.format != FORMAT:
        raise InputError(f"checkpoint {folder} was written by another version of fastdit: it can be sampled from, not continued")
    batch = config.train.batch_size * config.train.accumulation * world.size
    if batch != state.global_batch:
        raise InputError(
            f"checkpoint {folder} was trained with {state.global_batch} images a step, but this run has {batch}: change "
            f"train.batch_size or train.accumulation so that times the ranks they make {state.global_batch}"
        )
    _check_same_run(folder, saved.config, config)


def load(saved: Checkpoint, engine, ema: ShardedEma, sums: Tensor, config: Config, world: World) -> None:
    """Restore optimizer, schedule, EMA and the log's sums from a checkpoint that `check` accepted, whose raw weights the engine was
    made with. All ranks must call it."""
    shards, state = saved.shards(), saved.state
    for kind, own in {**ema.all, **moments(engine, ema.fragments)}.items():
        if kind not in shards.kinds and kind != "ema":
            continue  # a decay that is new begins at the weights of now
        for f, tensor in zip(ema.fragments, own, strict=True):
            tensor.copy_(shards.read(kind, f.name, f.start, f.master.numel()))
    ema.updates = state.ema_updates
    continue_from(engine, config, state.optimizer_steps)
    of_ranks = [file.get_tensor(LOG_SUMS) for file in shards.files]
    if state.ranks == world.size:
        sums.copy_(of_ranks[world.rank])
    elif world.rank == 0:
        sums.copy_(torch.stack(of_ranks).sum(0))
