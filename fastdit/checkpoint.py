"""The checkpoint format: complete folders only, the same files for every ZeRO stage and number of ranks.

A checkpoint is a folder <run>/checkpoints/step_NNNNNNNN:
    weights_rank_RRRR.safetensors   the fp32 fragments that a rank owned, as "<kind>/<parameter>@<first element>". Kinds of weights
                                    are raw (the masters), ema, and further averages (ema_0.9999); all other kinds are state of
                                    the optimizer (of AdamW: exp_avg, exp_avg_sq; of Muon's matrices:
                                    momentum_buffer)
    config.json, state.json         the settings of the run, and its RunState
    manifest.json                   names, sizes and SHA-256 of all the above, written last: a folder without it does not count
It is written under a temporary name, flushed to disk and renamed. The newest folder that matches its manifest is loaded; a newer
one that does not is named in a warning, and kept. Every random number and the order of the data follow from seed and step, so there
is no other state.
"""

import argparse
import json
import os
import shutil
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdit.autoencoder_files import moved
from fastdit.config import Config, InputError, from_saved, load_json
from fastdit.files import (
    MANIFEST,
    check_readable,
    damage,
    flush,
    json_object,
    outputs,
    path_argument,
    replacing,
    sha256,
    step_folders,
    write_atomically,
)
from fastdit.model import DiT
from fastdit.progress import warn

FORMAT = 3


@dataclass(frozen=True)
class RunState:
    """The state of a run at a checkpoint besides its weights and settings; the contents of state.json."""

    step: int = 0  # completed steps
    ranks: int = 1  # number of ranks that wrote the weights, one file each
    summed_steps: int = 0  # applied steps since the last log line
    optimizer_steps: int = 0  # applied steps: completed ones without those that were skipped
    ema_updates: int = 0
    global_batch: int = 0  # images per step
    batch_since: Sequence[int] = (0, 0, 0, 0)  # data.order.Since: where in the data the run took on that many images per step
    images_seen: int = 0  # images of all steps
    class_names: list[str] | None = None
    class_counts: list[int] | None = None  # training images of labels 0, 1, …
    data_sha256: str | None = None  # Loader.digest
    autoencoder_sha256: str | None = None  # Codec.sha256()
    autoencoder_scale: dict | None = None  # the other entries of Codec.about()
    autoencoder_path: str | None = None  # the autoencoder's folder, relative to the run's; None: it is no local folder
    wandb_id: str | None = None
    versions: dict[str, str] | None = None  # of the installed packages
    format: int | None = None  # FORMAT at the time of writing; None: the checkpoint cannot be resumed from
    init: dict | None = None  # what the run began from by train.init, and what became of those weights; None: random weights
    origin: str | None = None  # the file that the weights were imported from; None: they were trained by fastdit
    weights: str | None = None  # of an exported file: "ema" | "raw" | "ema_0.9999"

    def to_dict(self) -> dict:
        """Return the fields that are not None."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @property
    def autoencoder(self) -> dict:
        """Entries of Codec.about() that are known of the run's autoencoder."""
        return {"autoencoder_sha256": self.autoencoder_sha256, **(self.autoencoder_scale or {})}

    @classmethod
    def from_dict(cls, values: object) -> "RunState":
        """Return the state of a parsed state.json, without keys of other versions of fastdit. Raises InputError for other types."""
        if not isinstance(values, dict):
            raise InputError("the saved state of the run does not hold keys with values")
        known = {key: value for key, value in values.items() if key in cls.__dataclass_fields__}
        for key, hint in typing.get_type_hints(cls).items():
            kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            if key in known and not isinstance(known[key], tuple(typing.get_origin(kind) or kind for kind in kinds)):
                raise InputError(f"the saved state of the run holds {key}={known[key]!r}")
        return cls(**known)


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def shard_file(rank: int) -> str:
    return f"weights_rank_{rank:04d}.safetensors"


def holds_weights(kind: str) -> bool:
    """Return whether a kind of fragments is a model's weights; any other kind is state of the optimizer."""
    return kind == "raw" or kind == "ema" or kind.startswith("ema_")


def is_complete(folder: Path, by_hash: bool = True) -> bool:
    """Return whether every file in the folder's manifest is as it was written. by_hash=False compares only the sizes."""
    return damage(folder, by_hash) is None


def commit(temporary: Path, final: Path, hashes: dict[str, str]) -> None:
    """Write the manifest of a folder whose files are flushed, and rename it to its final name. hashes: SHA-256 by file name."""
    files = {name: {"bytes": (temporary / name).stat().st_size, "sha256": digest} for name, digest in sorted(hashes.items())}
    write_atomically(temporary / MANIFEST, json.dumps({"files": files}, indent=1))
    if final.exists():  # damaged: the run would have resumed from a complete one
        kept = final.with_name(f"{final.name}.damaged")
        shutil.rmtree(kept, ignore_errors=True)
        final.rename(kept)
    temporary.rename(final)
    flush(final.parent)


def save_weights(folder: Path, weights: dict[str, Tensor], config: Config, step: int, origin: str) -> Path:
    """Write weights that were trained elsewhere as a checkpoint in `folder`, which can be sampled from, but not resumed.

    weights: complete parameters by name. origin: the file that they come from. Returns the checkpoint's folder.
    """
    final = folder / folder_name(step)
    temporary = folder / f".tmp-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(
            {f"ema/{name}@0": tensor.flatten().float().contiguous() for name, tensor in weights.items()}, temporary / shard_file(0)
        )
        (temporary / "config.json").write_text(config.to_json())
        (temporary / "state.json").write_text(json.dumps(RunState(step, origin=origin).to_dict(), indent=1))
        hashes = {}
        for file in temporary.iterdir():
            flush(file)
            hashes[file.name] = sha256(file)
        commit(temporary, final, hashes)
    except BaseException:  # a full disk, Ctrl-C
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


class Shards:
    """The fragments in a checkpoint's files, read on demand."""

    def __init__(self, folder: Path, ranks: int) -> None:
        try:
            self.files = [safe_open(folder / shard_file(rank), framework="pt") for rank in range(ranks)]
        except (OSError, SafetensorError) as error:
            raise InputError(f"the weights in checkpoint {folder} cannot be read: {error}") from error
        self.parts: dict[str, list] = {}  # by "<kind>/<parameter>": (first element, number of elements, file, key), sorted
        for file in self.files:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                name, separator, start = key.rpartition("@")
                if separator:
                    self.parts.setdefault(name, []).append((int(start), file.get_slice(key).get_shape()[0], file, key))
        for parts in self.parts.values():
            parts.sort(key=lambda part: part[0])
        self.kinds = sorted({name.partition("/")[0] for name in self.parts})

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """Return elements start to start + count of a flat parameter, fp32 [count]. Raises ValueError if one is missing."""
        pieces, position = [], start
        for first, length, file, key in self.parts.get(f"{kind}/{name}", ()):
            if first <= position < first + length and position < start + count:
                pieces.append(file.get_slice(key)[position - first : min(length, start + count - first)])
                position += len(pieces[-1])
        if position != start + count:
            raise ValueError(f"the shards of {kind}/{name} leave a hole at element {position}")
        return torch.cat(pieces) if pieces else torch.empty(0)

    def parameters(self, kind: str, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
        """Return the complete parameters of a kind. shapes: of all parameters, by name."""
        return {name: self.read(kind, name, 0, shape.numel()).view(shape) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, or an exported file, verified when it was opened."""

    path: Path
    config: Config
    state: RunState

    @property
    def autoencoder(self) -> str:
        """data.autoencoder, or where its folder is now if it was moved together with the run's."""
        run = self.path.parent if self.path.is_file() else self.path.parent.parent
        return moved(self.config.data.autoencoder, self.state.autoencoder_path, run)

    def sha256(self) -> str:
        """Return the SHA-256 of the manifest, which holds those of all files, or of the exported file."""
        return sha256(self.path if self.path.is_file() else self.path / MANIFEST)

    def shards(self) -> Shards:
        return Shards(self.path, self.state.ranks)

    def kinds(self) -> list[str]:
        """Return the kinds of weights that it holds."""
        if self.path.is_file():
            return [str(self.state.weights)]
        return [kind for kind in self.shards().kinds if holds_weights(kind)]

    def load_model(self, weights: str, device: torch.device) -> DiT:
        """Return the fp32 model in eval mode. weights: "ema" | "raw" | a further average such as "ema_0.9999".

        Raises InputError if the checkpoint does not hold these weights or an exported file is damaged.
        """
        model = DiT(self.config.model)
        if self.path.is_file():
            self._load_exported(model, weights)
        else:
            shards = self.shards()
            kinds = [kind for kind in shards.kinds if holds_weights(kind)]
            if weights not in kinds:
                raise InputError(f"checkpoint {self.path} holds no {weights} weights: use --weights with one of {', '.join(kinds)}")
            model.load_state_dict(shards.parameters(weights, {name: p.shape for name, p in model.named_parameters()}))
        return model.to(device).eval()

    def _load_exported(self, model: DiT, weights: str) -> None:
        if self.state.weights != weights:
            raise InputError(f"{self.path} holds the {self.state.weights} weights: use --weights {self.state.weights}")
        try:
            model.load_state_dict(load_file(self.path))
        except SafetensorError as error:
            raise _not_exported(self.path, error) from error
        except RuntimeError as error:
            difference = str(error).splitlines()[1].strip()
            raise InputError(
                f"{self.path} does not hold the model that {self.path.with_suffix('.json').name} describes: {difference}"
            ) from error


def _not_exported(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} and {path.with_suffix('.json').name} are not what `fastdit export` writes: {error}")


def _open_exported(path: Path) -> Checkpoint:
    try:
        description = json_object(path.with_suffix(".json").read_bytes())
        with safe_open(path, framework="pt"):
            return Checkpoint(path, from_saved(description["config"]), RunState.from_dict(description["state"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, InputError) as error:
        raise _not_exported(path, error) from error


def _open_folder(folder: Path) -> Checkpoint:
    """Open the folder of a whole checkpoint. Raises InputError if it was written by something else."""
    try:
        state = RunState.from_dict(json_object((folder / "state.json").read_bytes()))
        return Checkpoint(folder, load_json(folder / "config.json"), state)
    except (OSError, ValueError, InputError) as error:
        raise InputError(f"checkpoint {folder} is not what fastdit writes: {error}") from error


def find(path: Path) -> Checkpoint | None:
    """Open a checkpoint's folder, or the newest whole checkpoint of a run's folder. Returns None if there is none.

    All files are hashed here, once: pass the result on instead of the path. If newer ones are damaged, rank 0 prints which one is
    opened instead. Raises InputError if all of them are, or if the settings cannot be read.
    """
    is_checkpoint = os.path.exists(path / MANIFEST)  # Path.exists would raise if the folder may not be searched
    damaged = []
    for folder in [path] if is_checkpoint else step_folders(path / "checkpoints"):
        difference = damage(folder)
        if difference is None:
            if damaged and os.environ.get("RANK", "0") == "0":
                warn(f"{'; '.join(damaged)}; {folder} is used instead")
            return _open_folder(folder)
        damaged.append(f"checkpoint {folder} is damaged: {difference}")
    if damaged:
        raise InputError(
            f"{'; '.join(damaged)}: there is no whole one: restore it from a copy, or start a run of another train.name"
        )
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint as `find` does, or a *.safetensors file that `fastdit export` wrote. Raises InputError if there is none."""
    check_readable("checkpoint", path)
    opened = _open_exported(path) if path.suffix == ".safetensors" else find(path)
    if opened is None:
        raise InputError(f"there is no complete checkpoint in {path}: give a run's folder or one of its checkpoints/step_* folders")
    return opened


def export(path: Path, weights: str, out: Path) -> int:
    """Write a model's weights as one safetensors file of complete fp32 parameters by name, and a JSON file with its settings.

    path: as for `open_checkpoint`. weights: "ema" | "raw" | a further average such as "ema_0.9999". Returns the step of the
    checkpoint. Raises InputError if it cannot be read or `out` cannot be written.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out} must end in .safetensors")
    opened = open_checkpoint(path)
    model = opened.load_model(weights, torch.device("cpu"))
    description = {"config": opened.config.to_dict(), "state": replace(opened.state, weights=weights).to_dict()}
    try:
        with outputs((out, out.with_suffix(".json"))):
            with replacing(out) as temporary:
                save_file(dict(model.named_parameters()), temporary)
            write_atomically(out.with_suffix(".json"), json.dumps(description, indent=1))
    except (OSError, SafetensorError) as error:
        raise InputError(f"--out {out} cannot be written: {error}") from error
    return opened.state.step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastdit export`."""
    parser.description = (
        "Write a checkpoint's weights, of any ZeRO stage and number of ranks, to one safetensors file, with its config as JSON "
        "beside it. `fastdit sample --checkpoint FILE` reads it."
    )
    parser.add_argument(
        "checkpoint", type=path_argument, metavar="DIR", help="Folder of a run (its newest checkpoint) or of a checkpoint."
    )
    parser.add_argument("--out", type=path_argument, required=True, metavar="FILE.safetensors", help="File to write.")
    parser.add_argument(
        "--weights", default="ema", metavar="ema|raw|ema_D",
        help="Weights: the average (ema), those of the last step (raw), or a further average of train.ema_more, such as ema_0.9999 "
        "(default: %(default)s).",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> str:
    """Export, and return what was written as text. Raises InputError."""
    out = arguments.out
    step = export(arguments.checkpoint, arguments.weights, out)
    return f"exported: {out} and {out.with_suffix('.json').name} ({arguments.weights} weights of step {step})"
