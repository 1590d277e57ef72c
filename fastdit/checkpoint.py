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

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdit.config import Config, InputError, from_saved, load_json
from fastdit.files import flush, replacing, sha256, write_atomically
from fastdit.model import DiT

MANIFEST = "manifest.json"
FORMAT = 3
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, as torch calls them


@dataclass(frozen=True)
class RunState:
    """The state of a run at a checkpoint, its state.json: what neither the weights nor the settings say."""

    step: int = 0  # steps done
    ranks: int = 1  # that wrote the weights, a file each
    summed_steps: int = 0  # steps since the last log line
    optimizer_steps: int = 0  # steps done without those that were skipped
    ema_updates: int = 0
    global_batch: int = 0  # images per step
    class_names: list[str] | None = None
    wandb_id: str | None = None
    versions: dict[str, str] | None = None  # installed packages
    format: int | None = None  # FORMAT of a checkpoint that can be continued
    origin: str | None = None  # the file of other weights that were imported: no run to continue
    weights: str | None = None  # of an exported file: "ema" | "raw" | "ema_0.9999"

    def to_dict(self) -> dict:
        """Return what is set."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: dict) -> "RunState":
        """Read a state.json; keys of other versions are left out."""
        return cls(**{key: value for key, value in values.items() if key in cls.__dataclass_fields__})


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def _shard_file(rank: int) -> str:
    return f"weights_rank_{rank:04d}.safetensors"


def is_whole(folder: Path, by_hash: bool = True) -> bool:
    """Whether every file of the folder's manifest is there as it was written; by_hash=False compares the sizes alone."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"].items()
        if any((folder / name).stat().st_size != file["bytes"] for name, file in files):
            return False
        return not by_hash or all(sha256(folder / name) == file["sha256"] for name, file in files)
    except (OSError, json.JSONDecodeError, KeyError):
        return False


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
    (temporary / "state.json").write_text(json.dumps(RunState(step, origin=origin).to_dict(), indent=1))
    hashes = {}
    for file in temporary.iterdir():
        flush(file)
        hashes[file.name] = sha256(file)
    _commit(temporary, final, hashes)
    return final


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


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, or an exported file, that was verified when it was opened."""

    path: Path
    config: Config
    state: RunState

    def sha256(self) -> str:
        """Return the hash that names it: of the manifest, which holds those of all files, or of the exported file."""
        return sha256(self.path if self.path.is_file() else self.path / MANIFEST)

    def shards(self) -> Shards:
        return Shards(self.path, self.state.ranks)

    def load_model(self, weights: str, device: torch.device) -> DiT:
        """Return the fp32 model in eval mode. weights: "ema" | "raw" | a further average such as "ema_0.9999".

        Raises InputError if the checkpoint does not hold these weights, or an exported file is damaged.
        """
        model = DiT(self.config.model)
        if self.path.is_file():
            self._load_exported(model, weights)
        else:
            shards = self.shards()
            if weights not in shards.kinds or weights in MOMENTS:
                held = ", ".join(kind for kind in shards.kinds if kind not in MOMENTS)
                raise InputError(f"checkpoint {self.path} holds no {weights} weights: use --weights with one of {held}")
            model.load_state_dict(shards.whole(weights, {name: p.shape for name, p in model.named_parameters()}))
        return model.to(device).eval()

    def _load_exported(self, model: DiT, weights: str) -> None:
        if self.state.weights != weights:
            raise InputError(f"{self.path} holds the {self.state.weights} weights: use --weights {self.state.weights}")
        try:
            model.load_state_dict(load_file(self.path))
        except SafetensorError as error:
            raise _not_exported(self.path, error) from error
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip()
            raise InputError(
                f"{self.path} does not hold the model that {self.path.with_suffix('.json').name} describes: {first}"
            ) from error


def _not_exported(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} and {path.with_suffix('.json').name} are not what `fastdit export` writes: {error}")


def _open_exported(path: Path) -> Checkpoint:
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        with safe_open(path, framework="pt"):
            return Checkpoint(path, from_saved(about["config"]), RunState.from_dict(about["state"]))
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise _not_exported(path, error) from error


def find(path: Path) -> Checkpoint | None:
    """Open a checkpoint's folder or the newest whole checkpoint of a run's folder; None if there is none.

    The files are hashed here, once: pass the result on instead of the path. Raises InputError if its settings cannot be read.
    """
    itself = os.path.exists(path / MANIFEST)  # not Path.exists, which raises where a folder may not be searched
    for folder in [path] if itself else sorted((path / "checkpoints").glob("step_*"), reverse=True):
        if is_whole(folder):
            state = RunState.from_dict(json.loads((folder / "state.json").read_text()))
            return Checkpoint(folder, load_json(folder / "config.json"), state)
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open what `find` finds, or a file of `fastdit export` (*.safetensors). Raises InputError if nothing whole is there."""
    found = _open_exported(path) if path.suffix == ".safetensors" else find(path)
    if found is None:
        raise InputError(f"there is no whole checkpoint in {path}: give a run's folder or one of its checkpoints/step_* folders")
    return found


def export(path: Path, weights: str, out: Path) -> int:
    """Write a model's weights ("ema" | "raw" | "ema_0.9999") as one safetensors file of whole fp32 parameters by their names.

    What sampling needs besides lies beside it as JSON. Returns the step. Raises InputError.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out} must end in .safetensors")
    opened = open_checkpoint(path)
    model = opened.load_model(weights, torch.device("cpu"))
    about = {"config": opened.config.to_dict(), "state": replace(opened.state, weights=weights).to_dict()}
    try:
        with replacing(out) as temporary:
            save_file(dict(model.named_parameters()), temporary)
        write_atomically(out.with_suffix(".json"), json.dumps(about, indent=1))
    except (OSError, SafetensorError) as error:
        raise InputError(f"--out {out} cannot be written: {error}") from error
    return opened.state.step
