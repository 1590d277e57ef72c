"""`fastdit train`: the settings of a run from its newest checkpoint, a file and the command line."""

import argparse
import os
import sys
from pathlib import Path

from fastdit import files
from fastdit.config import (
    OF_ONE_START,
    UNGUIDED,
    Config,
    TrainConfig,
    add_settings,
    checked,
    file_and_overrides,
    from_dict,
    load_json,
    read_settings,
)
from fastdit.presets import PRESETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastdit train`."""
    parser.description = (
        "Train a model, or resume a run where it stopped. A resumed run keeps the settings of its checkpoint; those that are given "
        "again with other values are named. Runs as one process, under `deepspeed --module` or under torchrun. Without arguments "
        "it trains a small model on the built-in digits."
    )
    parser.epilog = "example:\n  fastdit train launch/configs/quickstart.yaml train.total_steps=1000 model.depth=8"
    add_settings(parser)
    parser.add_argument(
        "--resume", metavar="auto|never|DIR",
        help="Checkpoint to start from, as train.resume: the newest one of this run if there is one (auto), none (never), or that "
        "of a folder (default: auto).",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="Print the resolved config as YAML, and do not train.")


def _newest_settings(path: Path) -> tuple[Path, Config] | None:
    """Return the newest checkpoint of a run's folder, or the one at `path`, and its settings; None if there is none.

    Of the weights only the sizes are checked: `checkpoint.find` reads them later, once, and imports torch.
    """
    is_checkpoint = os.path.exists(path / files.MANIFEST)
    for folder in [path] if is_checkpoint else files.step_folders(path / "checkpoints"):
        if files.damage(folder, by_hash="config.json") is None:
            return folder, load_json(folder / "config.json")
    return None


def settings_of(values: dict) -> tuple[Config, str | None]:
    """Return the config of the settings that are given, on top of those of the checkpoint that the run resumes from, if any.

    values: as `config.read_settings` returns them. The text names what the checkpoint holds and differs from the default, None if
    that is nothing. Raises InputError.
    """
    given = checked(values)
    train = given.get("train", {})
    saved = _newest_settings(Path(train.get("out", TrainConfig.out)) / train.get("name", TrainConfig.name))
    resume = train.get("resume", TrainConfig.resume)
    if saved is None and resume not in ("auto", "never"):
        saved = _newest_settings(Path(resume))
    if saved is None:
        return from_dict(values), None
    folder, config = saved
    if preset := given.get("model", {}).get("preset"):
        given["model"] = {**PRESETS[preset], **given["model"]}
    before = config.to_dict()
    before["train"] = {key: value for key, value in before["train"].items() if key not in OF_ONE_START}
    if given.get("flow", {}).get("label_dropout") == 0:
        before["sample"] |= UNGUIDED  # nobody asked for guidance now
    default = Config().to_dict()
    kept = [
        f"{section}.{key}={value}"
        for section, entries in before.items()
        for key, value in entries.items()
        if key not in given.get(section, {}) and value != default[section][key] and key != "precision"  # auto was resolved
    ]
    resumed = from_dict({section: {**entries, **given.get(section, {})} for section, entries in before.items()})
    return resumed, f"not given, and kept from {folder}: {', '.join(kept)}" if kept else None


def run(arguments: argparse.Namespace) -> str:
    """Train and return the closing lines, or return the resolved config for --dry-run. Raises what `loop.train` raises."""
    path, overrides = file_and_overrides(arguments.settings)
    if arguments.resume is not None:
        overrides.append(f"train.resume={arguments.resume}")
    config, kept = settings_of(read_settings(path, overrides))
    if kept and os.environ.get("RANK", "0") == "0":
        print(f"fastdit: {kept}", file=sys.stderr)
    if arguments.dry_run:
        return config.to_yaml().rstrip()
    from fastdit.training.loop import train  # imports DeepSpeed, which takes seconds

    return f"run: {train(config)} (curves.png, metrics.jsonl, samples/, checkpoints/)"
