"""`fastdit train`: the settings of a run from a file and the command line."""

import argparse

from fastdit.config import add_settings, file_and_overrides, parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastdit train`."""
    parser.description = (
        "Train a model, or resume a run where it stopped. Runs as one process, under "
        "`deepspeed --module` or under torchrun. "
        "Without arguments it trains a small model on the built-in digits."
    )
    parser.epilog = "example:\n  fastdit train launch/configs/quickstart.yaml train.total_steps=1000 model.depth=8"
    add_settings(parser)
    parser.add_argument(
        "--resume", metavar="auto|never|DIR",
        help="Checkpoint to start from, as train.resume: the newest one of this run if there is one (auto), none (never), or that "
        "of a folder (default: auto).",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="Print the resolved config as YAML, and do not train.")


def run(arguments: argparse.Namespace) -> str:
    """Train and return the closing lines, or return the resolved config for --dry-run. Raises what `loop.train` raises."""
    path, overrides = file_and_overrides(arguments.settings)
    if arguments.resume is not None:
        overrides.append(f"train.resume={arguments.resume}")
    config = parse(path, overrides)
    if arguments.dry_run:
        return config.to_yaml().rstrip()
    from fastdit.training.loop import train  # imports DeepSpeed, which takes seconds

    return f"run: {train(config)} (curves.png, metrics.jsonl, samples/, checkpoints/)"
