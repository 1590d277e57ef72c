"""Checkpoints of a run: written in a thread while training continues, and restored into the engine."""

import dataclasses
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastdit.autoencoder_files import absolute
from fastdit.checkpoint import FORMAT, Checkpoint, RunState, commit, folder_name, is_complete, shard_file
from fastdit.config import OF_ONE_START, Config, InputError, ModelConfig
from fastdit.data import Loader
from fastdit.distributed import World, control_group
from fastdit.files import flush, sha256, step_folders, step_of
from fastdit.training.ema import ShardedEma
from fastdit.training.engine import Fragment, continue_from, optimizer_state, steps_applied
from fastdit.training.optimizer import learning_rate, learning_rate_factor

LOG_SUMS = "log/sums"  # key of the loss sums since the last log line


def _parts(engine, ema: ShardedEma) -> list[tuple[str, Fragment, Tensor]]:
    """Return the live tensors of this rank's averages and optimizer, each with its kind and fragment."""
    averages = [(kind, f, t) for kind, tensors in ema.all.items() for f, t in zip(ema.fragments, tensors, strict=True)]
    return averages + optimizer_state(engine, ema.fragments)


def _snapshot(engine, ema: ShardedEma, sums: Tensor, rank: int) -> dict[str, Tensor]:
    """Return this rank's part of a checkpoint, copied to the host, so that training can continue."""
    parts = [("raw", f, f.master) for f in ema.fragments] + _parts(engine, ema)
    if ema.optimizer and rank:  # without ZeRO, rank 0 has all of it too
        parts = []
    shards = {f"{kind}/{f.name}@{f.start}": tensor for kind, f, tensor in parts}
    return {key: tensor.detach().to("cpu", copy=True) for key, tensor in (shards | {LOG_SUMS: sums}).items()}


def _write_rank(temporary: Path, shards: dict[str, Tensor], config: Config, state: RunState, rank: int) -> dict[str, str]:
    """Write and flush the files of a rank. Returns their SHA-256 by name."""
    names = [shard_file(rank)]
    save_file(shards, temporary / names[0])
    if rank == 0:
        (temporary / "config.json").write_text(config.to_json(state.init))
        (temporary / "state.json").write_text(json.dumps(state.to_dict(), indent=1))
        names += ["config.json", "state.json"]
    for name in names:
        flush(temporary / name)
    return {name: sha256(temporary / name) for name in names}


@contextmanager
def _explained(temporary: Path, final: Path) -> Iterator[None]:
    """Turn a failure to write into an InputError, and delete what was written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"checkpoint {final} cannot be written: {error}: free some space in {final.parent}") from error


def _write(folder: Path, shards: dict[str, Tensor], config: Config, state: RunState, world: World) -> None:
    """Write the checkpoint of state.step in `folder`, and prune older ones. All ranks must call it.

    Raises InputError on all ranks if one of them cannot write; the existing checkpoints stay then.
    """
    final = folder / folder_name(state.step)
    temporary = folder / f".tmp-{final.name}"
    explained = _explained(temporary, final)

    @explained
    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    @explained
    def write_rank() -> dict[str, str]:
        return _write_rank(temporary, shards, config, state, world.rank)

    @explained
    def finish() -> None:
        commit(temporary, final, {name: digest for of_rank in hashes for name, digest in of_rank.items()})
        prune(final, config.train.keep_checkpoints, config.train.keep_every)

    world.together(begin, everywhere=False)
    hashes_of_rank = world.together(write_rank)
    hashes: list = [None] * world.size
    dist.all_gather_object(hashes, hashes_of_rank, group=world.control)
    world.together(finish, everywhere=False)


def prune(newest: Path, keep: int, keep_every: int) -> None:
    """Delete old checkpoints beside `newest`, the one that was just written.

    Of the complete ones, `newest` and the latest keep - 1 others stay. Those whose step is a multiple of keep_every stay as well
    and do not count (keep_every=0: there are none). Incomplete folders are left alone.
    """
    others = [path for path in step_folders(newest.parent) if path != newest and is_complete(path, by_hash=False)]
    if keep_every:
        others = [path for path in others if step_of(path.name) % keep_every]
    for path in others[keep - 1 :]:
        shutil.rmtree(path)


class Saver:
    """Writes a run's checkpoints in a thread, one at a time, while training continues."""

    def __init__(self, folder: Path, config: Config, world: World) -> None:
        """folder: <run>/checkpoints. All ranks must construct it."""
        self.folder = folder
        self.config = config
        self.world = world._replace(control=control_group())  # for the thread: the loop uses the other group at the same time
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    def save(self, engine, ema: ShardedEma, state: RunState, sums: Tensor) -> None:
        """Wait for the last checkpoint, copy the state to the host and start to write it. All ranks must call it.

        state: step, summed_steps and the like; what the engine knows is added here. sums: loss sums since the last log line. Raises
        the InputError of the last checkpoint.
        """
        self.wait()
        train, ranks = self.config.train, self.world.size
        state = dataclasses.replace(
            state, format=FORMAT, ema_updates=ema.updates, optimizer_steps=steps_applied(engine), ranks=ranks,
            global_batch=train.batch_size * train.accumulation * ranks,
        )  # fmt: skip
        self.thread = threading.Thread(target=self._run, args=(_snapshot(engine, ema, sums, self.world.rank), state))
        self.thread.start()

    def _run(self, shards: dict[str, Tensor], state: RunState) -> None:
        try:
            _write(self.folder, shards, self.config, state, self.world)
        except Exception as error:  # `wait` raises it in the training loop
            self.error = error

    def wait(self) -> None:
        """Wait for the current write. Raises its error: InputError on all ranks if one of them could not write."""
        if self.thread:
            self.thread.join()
        error = self.error
        self.thread = self.error = None
        if error:
            raise error


def _check_same_run(folder: Path, saved: Config, config: Config, same_source: bool) -> None:
    """Raise InputError if a setting differs that a run cannot change: the model, the data, and what determines random numbers.

    same_source: whether data.source must be the same text, as nothing else tells whether it is the same data.
    """
    fixed = {
        "model": [f.name for f in dataclasses.fields(ModelConfig) if f.name not in ("preset", "attention")],
        "data": [*(["source"] if same_source else []), "image_size", "flip", "crop", "grey"],
        "flow": ["prediction"],
        "train": ["seed", "precision", "optimizer"],
    }
    for section, keys in fixed.items():
        for key in keys:
            trained, asked = getattr(getattr(saved, section), key), getattr(getattr(config, section), key)
            if trained != asked:
                raise InputError(
                    f"checkpoint {folder} was trained with {section}.{key}={trained}, not with {section}.{key}={asked}: "
                    "use the checkpoint's setting, or another train.name"
                )


def check(saved: Checkpoint, config: Config, world: World) -> None:
    """Raise InputError if this run cannot resume from a checkpoint."""
    folder, state = saved.path, saved.state
    if state.origin:
        raise InputError(
            f"checkpoint {folder} was imported from {state.origin}: it can be sampled from, not continued; to begin from its "
            "weights use train.init"
        )
    if state.format != FORMAT:
        raise InputError(
            f"checkpoint {folder} was written by another version of fastdit: it can be sampled from, not continued; to begin "
            "from its weights use train.init"
        )
    began_from = state.init["path"] if state.init else "random weights"
    if config.train.init and Path(config.train.init) != Path(began_from):
        raise InputError(
            f"checkpoint {folder} is of a run that began from {began_from}, not from train.init={config.train.init}: leave "
            "train.init out to resume it, or use another train.name"
        )
    batch = config.train.batch_size * config.train.accumulation * world.size
    if batch != state.global_batch and not config.train.allow_batch_change:
        same, impossible = divmod(state.global_batch, world.size)
        keep = "" if impossible else f"change train.batch_size or train.accumulation so that their product is {same} per rank, or "
        raise InputError(
            f"checkpoint {folder} was trained with {state.global_batch} images per step, but this run has {batch}: "
            f"{keep}set train.allow_batch_change=true to continue with {batch}"
        )
    _check_same_run(folder, saved.config, config, same_source=state.data_sha256 is None)
    trained, asked = (absolute(each.data.autoencoder) for each in (saved.config, config))
    if trained != asked and not state.autoencoder_sha256:  # with a hash, `autoencoder.check` compares the weights instead
        raise InputError(
            f"checkpoint {folder} was trained with data.autoencoder={trained}, not with data.autoencoder={asked}: use the "
            "checkpoint's setting, or another train.name"
        )


def check_data(saved: Checkpoint, config: Config, loader: Loader) -> None:
    """Raise InputError if the data are not those that a checkpoint was trained on, wherever they lie now, or the classes differ."""
    fix = "restore them as they were, or begin another run from these weights: another train.name with train.init"
    before, now = saved.state.class_names, loader.class_names
    if saved.state.data_sha256 and before != now:
        ids = range(max(len(before or ()), len(now or ())))
        name = lambda names, i: repr(names[i]) if names and i < len(names) else "none"
        i = next(i for i in ids if name(before, i) != name(now, i))
        raise InputError(
            f"data.source={config.data.source} has other classes than checkpoint {saved.path} was trained on: class {i} was "
            f"{name(before, i)} and is {name(now, i)}: {fix}"
        )
    if saved.state.data_sha256 and saved.state.data_sha256 != loader.digest:
        raise InputError(
            f"data.source={config.data.source} holds other images or labels than checkpoint {saved.path} was trained on, there "
            f"data.source={saved.config.data.source} (SHA-256 {saved.state.data_sha256[:12]}…, now {loader.digest[:12]}…): {fix}"
        )


def changes(saved: Config, config: Config) -> dict[str, tuple]:
    """Return the settings that differ from those of a checkpoint: (before, now) by section.key."""
    before, now = saved.to_dict(), config.to_dict()
    return {
        f"{section}.{key}": (before[section][key], value)
        for section, entries in now.items()
        for key, value in entries.items()
        if before[section][key] != value and not (section == "train" and key in OF_ONE_START) and key != "preset"
    }


def learning_rate_change(saved: Config, config: Config, steps: int) -> tuple[float, float, bool]:
    """Return the learning rate after `steps` applied steps by a checkpoint's settings and by those of now, and whether by those of
    now the steps before would have had another schedule."""
    before, now = (learning_rate(each.train, steps) for each in (saved, config))
    past = range(0, steps, max(1, steps // 1000))
    other = any(learning_rate_factor(saved.train, step) != learning_rate_factor(config.train, step) for step in past)
    return before, now, other


def load(saved: Checkpoint, engine, ema: ShardedEma, sums: Tensor, config: Config, world: World) -> None:
    """Restore optimizer, schedule, EMA and loss sums from a checkpoint that `check` accepted. All ranks must call it.

    engine: made from the checkpoint's raw weights. sums: overwritten by the checkpoint's.
    """
    shards, state = saved.shards(), saved.state
    for kind, f, tensor in _parts(engine, ema):
        if kind.startswith("ema_") and kind not in shards.kinds:
            continue  # a newly added decay starts from the current weights
        tensor.copy_(shards.read(kind, f.name, f.start, f.master.numel()))
    ema.updates = state.ema_updates
    continue_from(engine, config, state.optimizer_steps)
    saved_sums = [file.get_tensor(LOG_SUMS) for file in shards.files]
    if state.ranks == world.size:
        sums.copy_(saved_sums[world.rank])
    elif world.rank == 0:
        sums.copy_(torch.stack(saved_sums).sum(0))
