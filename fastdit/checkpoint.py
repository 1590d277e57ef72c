"""Checkpoints: written whole or not at all, the same files for every ZeRO stage and number of ranks.

A checkpoint is a folder <run>/checkpoints/step_NNNNNNNN:
    weights_rank_RRRR.safetensors   the fp32 fragments that a rank owned, "<kind>/<parameter>@<first element>", of each kind: raw
                                    (the masters), ema, further averages (ema_0.9999), exp_avg and
                                    exp_avg_sq (AdamW's)
    config.json, state.json         the run's settings; step, optimizer and EMA updates, ranks, class names, wandb id
    manifest.json                   names, sizes and SHA-256 of all the above, written last: a folder without it does not count
It is written under a temporary name, flushed to disk and renamed. The newest folder whose manifest holds is the one to load. Every
random number and the order of the data follow from seed and step: there is no other state.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdit.config import Config, InputError, ModelConfig, from_dict, load_json
from fastdit.model import DiT
from fastdit.training.ema import ShardedEma
from fastdit.training.engine import MOMENTS, T, World, continue_from, control_group, moments, steps_taken, together

MANIFEST = "manifest.json"
FORMAT = 3
LOG_SUMS = "log/sums"  # of the losses since the last log line


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


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def is_whole(folder: Path, by_hash: bool = True) -> bool:
    """Whether every file of the folder's manifest is there as it was written; by_hash=False compares the sizes alone."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"].items()
        if any((folder / name).stat().st_size != file["bytes"] for name, file in files):
            return False
        return not by_hash or all(sha256(folder / name) == file["sha256"] for name, file in files)
    except (OSError, json.JSONDecodeError, KeyError):
        return False


def find(path: Path) -> Path | None:
    """The checkpoint at `path`: itself, or the newest whole one of a run's folder; None when there is none."""
    if os.path.exists(path / MANIFEST):  # not Path.exists, which raises where a folder may not be searched
        return path if is_whole(path) else None
    folders = sorted((path / "checkpoints").glob("step_*"), reverse=True)
    return next((folder for folder in folders if is_whole(folder)), None)


def _commit(temporary: Path, final: Path, hashes: dict[str, str]) -> None:
    """Make a written and flushed folder count: manifest, rename."""
    files = {name: {"bytes": (temporary / name).stat().st_size, "sha256": digest} for name, digest in sorted(hashes.items())}
    write_atomically(temporary / MANIFEST, json.dumps({"files": files}, indent=1))
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
    hashes = {}
    for file in temporary.iterdir():
        flush(file)
        hashes[file.name] = sha256(file)
    _commit(temporary, final, hashes)
    return final


def _snapshot(engine, ema: ShardedEma, sums: Tensor) -> dict[str, Tensor]:
    """This rank's part of a checkpoint, copied to the host: training may go on."""
    kinds = {"raw": [f.master for f in ema.fragments], **ema.all, **moments(engine, ema.fragments)}
    shards = {f"{kind}/{f.name}@{f.start}": t for kind, own in kinds.items() for f, t in zip(ema.fragments, own, strict=True)}
    return {key: tensor.detach().to("cpu", copy=True) for key, tensor in (shards | {LOG_SUMS: sums}).items()}


def _write_own(temporary: Path, shards: dict[str, Tensor], config: Config, state: dict, rank: int) -> dict[str, str]:
    """Write and flush this rank's files; their hashes."""
    names = [_shard_file(rank)]
    save_file(shards, temporary / names[0])
    if rank == 0:
        (temporary / "config.json").write_text(config.to_json())
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        names += ["config.json", "state.json"]
    for name in names:
        flush(temporary / name)
    return {name: sha256(temporary / name) for name in names}


def _write(folder: Path, shards: dict[str, Tensor], config: Config, state: dict, world: World) -> None:
    """Write the checkpoint of state["step"] below `folder`. All ranks must call it. Raises InputError on all of them when one
    cannot write; the checkpoints that are there stay."""
    final = folder / folder_name(state["step"])
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

    together(world, lambda: written(begin), everywhere=False)
    own = together(world, lambda: written(lambda: _write_own(temporary, shards, config, state, world.rank)))
    hashes: list = [None] * world.size
    dist.all_gather_object(hashes, own, group=world.control)

    def commit() -> None:
        _commit(temporary, final, {name: digest for of_rank in hashes for name, digest in of_rank.items()})
        others = [old for old in sorted(folder.glob("step_*")) if old != final and is_whole(old, by_hash=False)]
        kept = lambda old: train.keep_every and int(old.name.removeprefix("step_")) % train.keep_every == 0
        passing = [old for old in others if not kept(old)]
        for old in passing[: max(0, len(passing) + 1 - train.keep_checkpoints)]:
            shutil.rmtree(old)

    together(world, lambda: written(commit), everywhere=False)


class Saver:
    """Writes a run's checkpoints in a thread, one at a time, while training goes on."""

    def __init__(self, folder: Path, config: Config, world: World) -> None:
        """folder: <run>/checkpoints. All ranks must make it."""
        self.folder, self.config = folder, config
        self.world = world._replace(control=control_group())  # the thread's own: the loop uses the other meanwhile
        self.thread = self.error = None

    def save(self, engine, ema: ShardedEma, state: dict, sums: Tensor) -> None:
        """Copy the state to the host and begin to write it, when the last checkpoint is written. state: of state.json; sums: of the
        log line that is not written yet. Raises the InputError of the last one. All ranks must call it."""
        self.wait()
        train, ranks = self.config.train, self.world.size
        state = {
            **state, "format": FORMAT, "ema_updates": ema.updates, "optimizer_steps": steps_taken(engine), "ranks": ranks,
            "global_batch": train.batch_size * train.accumulation * ranks,
        }  # fmt: skip
        self.thread = threading.Thread(target=self._run, args=(_snapshot(engine, ema, sums), state))
        self.thread.start()

    def _run(self, shards: dict[str, Tensor], state: dict) -> None:
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


def check(folder: Path, config: Config, world: World) -> dict:
    """The state.json of a checkpoint that this run can continue from. Raises InputError when it cannot."""
    state = json.loads((folder / "state.json").read_text())
    if "origin" in state:
        raise InputError(f"checkpoint {folder} was imported from {state['origin']}: it can be sampled from, not continued")
    if state.get("format") != FORMAT:
        raise InputError(f"checkpoint {folder} was written by another version of fastdit: it can be sampled from, not continued")
    batch = config.train.batch_size * config.train.accumulation * world.size
    if batch != state["global_batch"]:
        raise InputError(
            f"checkpoint {folder} was trained with {state['global_batch']} images a step, but this run has {batch}: change "
            f"train.batch_size or train.accumulation so that times the ranks they make {state['global_batch']}"
        )
    _check_same_run(folder, load_json(folder / "config.json"), config)
    return state


class Shards:
    """The fragments in a checkpoint's files, read as they are asked for."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.files = [safe_open(folder / _shard_file(rank), framework="pt") for rank in range(ranks)]
        self.parts: dict[str, list] = {}  # "<kind>/<parameter>": (first element, elements, file, key) in order
        for file in self.files:
            for key in file.keys():  # noqa: SIM118 (no dict)
                name, at, start = key.rpartition("@")
                if at:
                    self.parts.setdefault(name, []).append((int(start), file.get_slice(key).get_shape()[0], file, key))
        for parts in self.parts.values():
            parts.sort(key=lambda part: part[0])
        self.kinds = sorted({name.partition("/")[0] for name in self.parts})

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """Elements start .. start+count of a parameter, fp32 1-D. Raises ValueError at a hole."""
        pieces, at = [], start
        for first, length, file, key in self.parts.get(f"{kind}/{name}", ()):
            if first <= at < first + length and at < start + count:
                pieces.append(file.get_slice(key)[at - first : min(length, start + count - first)])
                at += len(pieces[-1])
        if at != start + count:
            raise ValueError(f"the shards of {kind}/{name} leave a hole at element {at}")
        return torch.cat(pieces) if pieces else torch.empty(0)

    def whole(self, kind: str, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
        """Whole parameters of a kind."""
        return {name: self.read(kind, name, 0, shape.numel()).view(shape) for name, shape in shapes.items()}


def load(folder: Path, engine, ema: ShardedEma, state: dict, sums: Tensor, config: Config, world: World) -> None:
    """Restore optimizer, schedule, EMA and the log's sums from a checkpoint that `check` accepted, whose raw weights the engine was
    made with. All ranks must call it."""
    shards = Shards(folder, state["ranks"])
    for kind, own in {**ema.all, **moments(engine, ema.fragments)}.items():
        if kind not in shards.kinds and kind != "ema":
            continue  # a decay that is new begins at the weights of now
        for f, tensor in zip(ema.fragments, own, strict=True):
            tensor.copy_(shards.read(kind, f.name, f.start, f.master.numel()))
    ema.updates = state["ema_updates"]
    continue_from(engine, config, state["optimizer_steps"])
    of_ranks = [file.get_tensor(LOG_SUMS) for file in shards.files]
    if state["ranks"] == world.size:
        sums.copy_(of_ranks[world.rank])
    elif world.rank == 0:
        sums.copy_(torch.stack(of_ranks).sum(0))


def export(path: Path, weights: str, out: Path) -> int:
    """Write a model's weights ("ema" | "raw" | "ema_0.9999") as one safetensors file of whole fp32 parameters by their names.

    What sampling needs besides lies beside it as JSON. Returns the step. Raises InputError.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out} must end in .safetensors")
    model, config, state = load_model(path, weights, torch.device("cpu"))
    about = {"config": config.to_dict(), "state": {**state, "weights": weights}}
    try:
        with replacing(out) as temporary:
            save_file(dict(model.named_parameters()), temporary)
        write_atomically(out.with_suffix(".json"), json.dumps(about, indent=1))
    except (OSError, SafetensorError) as error:
        raise InputError(f"--out {out} cannot be written: {error}") from error
    return state["step"]


def _load_exported(path: Path, weights: str) -> tuple[DiT, Config, dict]:
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        config, state, tensors = from_dict(about["config"]), about["state"], load_file(path)
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise InputError(f"{path} and {path.with_suffix('.json').name} are not what `fastdit export` writes: {error}") from error
    if state["weights"] != weights:
        raise InputError(f"{path} holds the {state['weights']} weights: use --weights {state['weights']}")
    model = DiT(config.model)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise InputError(f"{path} does not hold the model that {path.with_suffix('.json').name} describes: {first}") from error
    return model, config, state


def load_model(path: Path, weights: str, device: torch.device) -> tuple[DiT, Config, dict]:
    """The fp32 model of a checkpoint, of a run's newest one or of an exported file, its config and its state.json.

    weights: "ema" | "raw" | a further average such as "ema_0.9999". Raises InputError when there is no whole checkpoint at `path`.
    """
    if path.suffix == ".safetensors":
        model, config, state = _load_exported(path, weights)
        return model.to(device).eval(), config, state
    folder = find(path)
    if folder is None:
        raise InputError(f"there is no whole checkpoint in {path}: give a run's folder or one of its checkpoints/step_* folders")
    config = load_json(folder / "config.json")
    state = json.loads((folder / "state.json").read_text())
    shards, model = Shards(folder, state["ranks"]), DiT(config.model)
    if weights not in shards.kinds or weights in MOMENTS:
        held = ", ".join(kind for kind in shards.kinds if kind not in MOMENTS)
        raise InputError(f"checkpoint {folder} holds no {weights} weights: use --weights with one of {held}")
    model.load_state_dict(shards.whole(weights, {name: p.shape for name, p in model.named_parameters()}))
    return model.to(device).eval(), config, state
