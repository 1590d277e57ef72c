"""A run that begins from existing weights: which of them it takes, which it adapts, and which start anew.

Only weights are taken: step, optimizer, schedule and data begin as in any run, and the EMA starts at these weights.
H width, s side of the grid of tokens.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit import checkpoint, files, hub
from fastdit.checkpoint import Checkpoint
from fastdit.config import Config, InputError, ModelConfig
from fastdit.convert import base
from fastdit.data.imagenet import imagenet_names
from fastdit.model import DiT

# Settings of the model that may differ from the source's. Of modulation_groups, only the sizes count; zero_init_gates, class_std
# and attention are no property of weights, nor are the tokens that training keeps.
MAY_DIFFER = {
    "preset", "input_size", "patch_size", "in_channels", "num_classes", "modulation_groups", "zero_init_gates", "attention",
    "class_std", "keep_tokens", "path_drop",
}  # fmt: skip
OUTPUT = ("output.weight", "output.bias")
PATCHES = ("patch_embedding.weight", "patch_embedding.bias", *OUTPUT)  # of a patch size and channel count
CLASSES = "class_embedding.table.weight"
POSITIONS = "positions"
HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?")  # owner/name[@revision]
SHOWN_NAMES = 5  # of new classes, at most


class Source(NamedTuple):
    """Weights to begin from, verified but not read."""

    opened: Checkpoint | Path  # Path: of the base model's .pkl
    config: Config
    class_names: list[str] | None
    autoencoder_sha256: str | None
    record: dict  # path, sha256, step, weights: what state.json and config.json tell of the source

    def load(self) -> dict[str, Tensor]:
        """Return the complete fp32 parameters by name."""
        if isinstance(self.opened, Path):
            return base.load_run(self.opened, None)[1]
        model = self.opened.load_model(self.record["weights"], torch.device("cpu"))
        return {name: p.detach() for name, p in model.named_parameters()}


class Change(NamedTuple):
    """What became of some parameters."""

    kind: str  # taken | adapted | new
    name: str  # of the parameter
    text: str


def _from_hub(repository: str, revision: str | None) -> Path:
    """Return the folder of a Hub repository's safetensors and JSON files, downloaded if the cache lacks them and the Hub answers.

    Raises InputError.
    """
    from huggingface_hub import snapshot_download

    request = {"repo_id": repository, "revision": revision, "allow_patterns": ["*.safetensors", "*.json"]}
    try:
        return Path(snapshot_download(**request, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or no name of a repository
        pass
    try:
        hub.model_info(repository, revision)  # first: snapshot_download would try for minutes
        return Path(snapshot_download(**request, etag_timeout=hub.TIMEOUT_S))
    except Exception as error:  # of two HTTP libraries, by version of huggingface_hub; OSError if the disk is full
        at = f" --revision {revision}" if revision else ""
        raise InputError(
            f"train.init={repository} is no path, not in the cache of the Hugging Face Hub, and cannot be fetched "
            f"({hub.first_line(error)}): run `hf download {repository}{at}` on a machine that reaches the Hub and shares HF_HOME"
        ) from error


def _open(text: str) -> Checkpoint:
    """Open what train.init names, other than a .pkl. Raises InputError."""
    path = Path(text)
    hub_id = HUB_ID.fullmatch(text)
    if not path.exists() and hub_id and not Path(path.parts[0]).exists():  # runs/typo is no question to the Hub
        path = _from_hub(*hub_id.groups())
    if path.is_file():
        return checkpoint.open_checkpoint(path)
    exported = [file for file in sorted(path.glob("*.safetensors")) if file.with_suffix(".json").exists()]
    opened = checkpoint.find(path) or (checkpoint.open_checkpoint(exported[0]) if len(exported) == 1 else None)
    if opened is None:
        raise InputError(
            f"train.init={text} holds no complete checkpoint of fastdit: give the folder of a run or of a checkpoint, a file of "
            "`fastdit export`, a base model's model_Ns.pkl, a Hub id owner/name[@revision], or import it first (`fastdit --help`)"
        )
    return opened


def open_source(config: Config) -> Source:
    """Open what train.init names. Raises InputError if there is nothing, or if its model does not fit the run's."""
    text, weights = str(config.train.init), config.train.init_weights
    if text.endswith(".pkl"):
        path = Path(text)
        theirs, _, step, _ = base.load_run(path, None)
        kinds, names, opened, sha256, autoencoder = ["ema"], None, path, files.sha256(path), None
    else:
        opened = _open(text)
        theirs, step, names, kinds = opened.config, opened.state.step, opened.state.class_names, opened.kinds()
        sha256, autoencoder = opened.sha256(), opened.state.autoencoder_sha256
    if weights not in kinds:
        raise InputError(
            f"train.init={text} holds no {weights} weights, only {', '.join(kinds)}: set train.init_weights={kinds[0]}"
        )
    check(theirs.model, config.model, text)
    names = names or (imagenet_names() if theirs.model.num_classes == 1000 else None)
    return Source(opened, theirs, names, autoencoder, {"path": text, "sha256": sha256, "step": step, "weights": weights})


def check(theirs: ModelConfig, ours: ModelConfig, text: str) -> None:
    """Raise InputError, which names every setting to change, if a model cannot begin with the weights of another one."""
    keys = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in MAY_DIFFER]
    differ = [key for key in keys if getattr(theirs, key) != getattr(ours, key)]
    if not differ and theirs.group_sizes != ours.group_sizes:
        differ = ["modulation_groups"]
    text_of = lambda value: "null" if value is None else str(list(value) if isinstance(value, tuple) else value).lower()
    setting = lambda model, key: f"model.{key}={text_of(getattr(model, key)).replace(', ', ',')}"
    if differ:
        asked = " ".join(setting(ours, key) for key in differ)
        raise InputError(
            f"train.init={text} does not fit {asked}: set {' '.join(setting(theirs, key) for key in differ)}, as the source has it"
        )


def _normal(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def match_classes(theirs: list[str], ours: list[str]) -> list[int | None]:
    """Return, for each of our class names, the id of the source's class of that name; None if none or several have it.

    A name may be a list of synonyms, "tench, Tinca tinca" (ImageNet's are), of which one has to match if the whole does not. Case
    does not count, and an underscore is a space. Of several classes of a name, the one of the same id is taken.
    """
    ids: dict[str, list[int]] = {}
    for i, name in enumerate(theirs):
        for key in {_normal(name), *map(_normal, name.split(", "))}:
            ids.setdefault(key, []).append(i)
    matches: list[int | None] = []
    for i, name in enumerate(ours):
        whole = ids.get(_normal(name), [])
        found = whole or sorted({j for part in name.split(", ") for j in ids.get(_normal(part), [])})
        matches.append(found[0] if len(found) == 1 else i if i in found else None)
    return matches


def _class_table(old: Tensor, fresh: Tensor, source: Source, names: list[str] | None) -> tuple[Tensor, str]:
    """Return the table of classes, [classes + 1, ...], and how it was made.

    old, fresh: the source's and the newly initialised one; the last row is the null class's. names: of the run's classes.
    """
    count, old_count = len(fresh) - 1, len(old) - 1
    rows: list[int | None] = [None] * count
    if source.class_names and names:
        rows[: len(names)] = match_classes(source.class_names, names)
        by = "by class name"
    elif count == old_count:
        rows[:] = range(count)
        by = f"by id ({'this run' if source.class_names else 'the source'} has no class names)"
    else:
        by = f"(classes cannot be told apart: {old_count} there, {count} here, and not both with names)"
    table = old[:-1].mean(0) + fresh  # new rows: the mean of the old ones, and the initial spread
    for row, taken in enumerate(rows):
        if taken is not None:
            table[row] = old[taken]
    table[-1] = old[-1]
    new = [row for row, taken in enumerate(rows) if taken is None]
    text = f"{count - len(new)} of {count} rows {by}, and the null row"
    if new:
        shown = [names[row] if names and row < len(names) else str(row) for row in new[:SHOWN_NAMES]]
        text += f"; new, near the mean of the old rows: {', '.join(shown)}" + (" …" if len(new) > SHOWN_NAMES else "")
    return table, text


def _resampled(positions: Tensor, side: int) -> Tensor:
    """Return learned positions [s²,H] on another grid, [side²,H]: bicubic, antialiased if there are fewer tokens."""
    old_side = math.isqrt(len(positions))
    grid = positions.T.reshape(1, -1, old_side, old_side)
    return F.interpolate(grid, size=(side, side), mode="bicubic", antialias=side < old_side).flatten(2)[0].T.contiguous()


def _side(model: ModelConfig) -> int:
    return model.input_size // model.patch_size


@torch.no_grad()
def adapt(model: DiT, source: Source, names: list[str] | None, prediction: str) -> list[Change]:
    """Set a newly initialised model to the source's weights, and return what became of them.

    names: of the run's classes, None if the data have none; prediction: the run's flow.prediction. The model must have passed
    `check`.
    """
    theirs, ours = source.config.model, model.config
    weights, parameters = source.load(), dict(model.named_parameters())
    changes = []
    table, text = _class_table(weights[CLASSES], parameters[CLASSES], source, names)
    changes.append(Change("taken" if torch.equal(table, weights[CLASSES]) else "adapted", CLASSES, text))
    weights[CLASSES] = table
    if _side(theirs) != _side(ours):
        grids = f"{_side(theirs)}x{_side(theirs)} to {_side(ours)}x{_side(ours)} tokens"
        if POSITIONS in weights:
            weights[POSITIONS] = _resampled(weights[POSITIONS], _side(ours))
            changes.append(Change("adapted", POSITIONS, f"{grids}, bicubic"))
        else:
            changes.append(Change("adapted", f"{ours.positions} table", f"{grids}, computed"))
    if (theirs.patch_size, theirs.in_channels) != (ours.patch_size, ours.in_channels):
        shape = lambda m: f"patches of {m.patch_size}x{m.patch_size} with {m.in_channels} channels"
        for name in PATCHES:
            weights[name] = parameters[name].clone()
            changes.append(Change("new", name, f"{shape(theirs)} there, {shape(ours)} here"))
    elif prediction != source.config.flow.prediction:
        for name in OUTPUT:
            weights[name] = parameters[name].clone()
            changes.append(Change("new", name, f"it predicts {source.config.flow.prediction} there, {prediction} here"))
    model.load_state_dict(weights)
    others = [name for name in weights if name not in {change.name for change in changes}]
    count = sum(weights[name].numel() for name in others)
    return [Change("taken", f"{len(others)} tensors", f"{count / 1e6:.2f} M parameters, as they are"), *changes]


def describe(source: Source, changes: list[Change]) -> str:
    """Return the source, and what became of its weights, one line per change."""
    record, width = source.record, max(len(change.name) for change in changes)
    lines = [
        f"begins from {record['path']}: {record['weights']} weights of step {record['step']}, SHA-256 {record['sha256'][:12]}…"
    ]
    return "\n".join([*lines, *(f"  {kind:8} {name:{width}}  {text}" for kind, name, text in changes)])


def notes(source: Source, config: Config, autoencoder_sha256: str | None) -> list[str]:
    """Return what a run should know that begins from a source, a sentence each. autoencoder_sha256: of the run's codec."""
    elements = lambda model: model.in_channels * model.input_size**2
    notes = []
    if elements(config.model) > elements(source.config.model):
        shift = source.config.flow.time_shift * math.sqrt(elements(config.model) / elements(source.config.model))
        if not math.isclose(shift, config.flow.time_shift, rel_tol=0.01):
            notes.append(
                f"note: the latents have {elements(config.model):,} elements, the source's {elements(source.config.model):,}: "
                f"flow.time_shift={shift:.4g} would keep the signal-to-noise ratios (by the square root of their ratio, "
                f"arXiv:2403.03206, equation 23); this run has {config.flow.time_shift:g}"
            )
    theirs, ours = source.config.data.autoencoder, config.data.autoencoder
    same = autoencoder_sha256 == source.autoencoder_sha256 if autoencoder_sha256 and source.autoencoder_sha256 else theirs == ours
    if not same:
        notes.append(f"note: the source was trained on latents of {theirs}, this run trains on those of {ours}")
    return notes
