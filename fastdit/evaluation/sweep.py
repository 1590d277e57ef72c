"""`fastdit sweep`: the metrics of one checkpoint over a grid of sampler settings and weights.

It makes a table, a CSV, and a picture of the same seeds under each setting.
"""

import argparse
import csv
import io
import itertools
import typing
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fastdit import distributed, files
from fastdit.config import InputError, SampleConfig, nearest
from fastdit.distributed import World
from fastdit.evaluation import command as evaluate_command
from fastdit.evaluation import features, image_sets, metrics
from fastdit.evaluation.command import EvaluationRequest
from fastdit.evaluation.image_sets import ImageSet
from fastdit.files import path_argument
from fastdit.progress import warn
from fastdit.sampling import pictures
from fastdit.sampling.sampler import Sampler, gather

SHOWN = 10  # samples per setting in the picture
NOT_FINITE = "not finite"  # in place of the metrics of such samples


@dataclass(frozen=True)
class Row:
    """A setting, its metrics by name, and evenly spread samples; without both if the samples are not finite."""

    setting: dict
    metrics: dict
    images: np.ndarray  # uint8 [at most SHOWN,S,S,C]
    reference: dict = field(default_factory=dict)  # `about` of the reference


def parse_axes(words: list[str]) -> dict[str, list]:
    """Return {"guidance": [0.0, 1.5], "weights": ["ema", "raw"]} of "guidance=0,1.5" "weights=ema,raw". Raises InputError."""
    kinds = {**typing.get_type_hints(SampleConfig), "weights": str}
    kinds = {name: kinds[name] for name in [*(f.name for f in fields(SampleConfig)), "weights"]}
    axes: dict[str, list] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if key not in kinds:
            raise InputError(f"{word[:60]!r} must be KEY=VALUE,VALUE: {nearest(key, list(kinds))}")
        if not equals:
            raise InputError(f"{word!r} has no values: give {key}=VALUE,VALUE")
        if key in axes:
            raise InputError(f"{key} is given twice: give all its values at once, {key}=VALUE,VALUE")
        try:
            axes[key] = [kinds[key](value) for value in text.split(",")]
        except ValueError as error:
            raise InputError(f"{word[:60]!r} must hold values of type {kinds[key].__name__}: {str(error)[:100]}") from error
    if not axes:
        raise InputError("nothing to sweep over: give KEY=VALUE,VALUE, such as guidance=0,1,2 steps=8,15 weights=ema,raw")
    return axes


def best(rows: list[Row]) -> int | None:
    """Return the index of the row that is the best by the first metric, None if no row has metrics."""
    return next((i for i in range(len(rows)) if next(iter(metrics.METRICS)) in best_by(rows, i)), None)


def best_by(rows: list[Row], i: int) -> list[str]:
    """Return the metrics by which no row is better than row i."""
    names = []
    for name, value in metrics.scalars(rows[i].metrics).items():
        better = max if metrics.METRICS[name].larger_is_better else min
        if value == better(row.metrics[name] for row in rows if row.metrics):
            names.append(name)
    return names


def _shown(rows: list[Row]) -> list[str]:
    """Return the names of the metrics that are columns."""
    return list(metrics.scalars(next((row.metrics for row in rows if row.metrics), {}))) or [next(iter(metrics.METRICS))]


def as_csv(rows: list[Row]) -> str:
    """Return the rows as CSV: setting, metrics, in `best` the metrics by which no row is better, and the reference."""
    text, names = io.StringIO(), _shown(rows)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*rows[0].setting, *names, "best", "reference_images", "reference_sha256"])
    for i, row in enumerate(rows):
        values = [f"{row.metrics[name]:.6g}" if row.metrics else NOT_FINITE for name in names]
        reference = [row.reference.get("images", ""), row.reference.get("statistics_sha256", "")]
        writer.writerow([*row.setting.values(), *values, " ".join(best_by(rows, i)), *reference])
    return text.getvalue()


def sweep_table(rows: list[Row]) -> str:
    """Return the rows in aligned columns, a * behind the best values of each metric, and the row that is the best by the first one
    behind a *; nothing without rows, as on other ranks than 0."""
    names = _shown(rows)
    lines = [[*rows[0].setting, *(f"{name} " for name in names)]] if rows else []
    for i, row in enumerate(rows):
        marks = {name: "*" for name in best_by(rows, i)}
        values = [f"{row.metrics[name]:.6g}{marks.get(name, ' ')}" if row.metrics else f"{NOT_FINITE} " for name in names]
        lines.append([*map(str, row.setting.values()), *values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(("* " if i and i - 1 == best(rows) else "  ") + text.rstrip() for i, text in enumerate(texts))


def _of_reference(about: dict) -> str:
    """Return one line on the reference: its path, size and hash."""
    images = f"{about['images']:,} images" if "images" in about else "an unknown number of images"
    return f"reference: {about['path']}, {images}, SHA-256 of mean and covariance {about['statistics_sha256'][:16]}…"


def picture(rows: list[Row]) -> Image.Image:
    """Return a picture with one row of images per setting, its values and distance on the left, the best on green."""
    grids = [pictures.grid(row.images, len(row.images)).convert("RGB") for row in rows]
    font = ImageFont.load_default(max(11, min(20, grids[0].height // 4)))
    setting = lambda row: "  ".join(f"{key} {value}" for key, value in row.setting.items())
    value = lambda row: f"distance {row.metrics['fid']:.4g}" if row.metrics else NOT_FINITE
    texts = [f"{setting(row)}\n{value(row)}" for row in rows]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [pen.multiline_textbbox((0, 0), text, font=font) for text in texts]
    left = 16 + max(int(box[2]) for box in boxes)
    height = max(grids[0].height, 8 + max(int(box[3]) for box in boxes))
    sheet = Image.new("RGB", (left + grids[0].width, height * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (grid, text) in enumerate(zip(grids, texts, strict=True)):
        if i == best(rows):
            pen.rectangle((0, i * height, left - 1, (i + 1) * height - 1), fill="#bfe8bf")
        pen.multiline_text((8, i * height + height // 2), text, fill="black", font=font, anchor="lm")
        sheet.paste(grid, (left, i * height))
    return sheet


def sweep(request: EvaluationRequest, axes: dict[str, list], out: Path) -> list[Row]:
    """Evaluate request.source under every combination of the axes. Returns the rows on rank 0, none on the others.

    After each row, on rank 0, the CSV `out` and the PNG beside it are written again. A row whose samples are not finite has no
    metrics. All ranks must call it. Raises InputError.
    """
    world = distributed.world_of_this_process()
    if out.suffix.lower() != ".csv":
        raise InputError(f"--out {out} must end in .csv: the picture is written beside it, as .png")
    with ExitStack() as stack:
        reserved = files.outputs((out, out.with_suffix(".png")))
        world.together(lambda: stack.enter_context(reserved) if world.rank == 0 else None)
        return _sweep(request, axes, out, world)


def _sweep(request: EvaluationRequest, axes: dict[str, list], out: Path, world: World) -> list[Row]:
    if request.source is None or not evaluate_command.is_checkpoint(Path(request.source)):
        raise InputError(f"{request.source} is no checkpoint: a sweep draws its samples anew under each setting")
    network = world.together(lambda: evaluate_command.load_network(request, world.device))
    settings = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    path = Path(request.source)
    samples = world.together(lambda: _samples_of_settings(path, request, settings, world.device))
    world.together(lambda: network.probe(samples[0].shape))
    evaluate_command.say_model(samples[0], world)
    reference = evaluate_command.open_reference(request, network, world)
    world.together(lambda: network.probe(samples[0].shape))
    for warning in evaluate_command.too_few(samples[0].count, network.widths[0], "samples") if world.rank == 0 else []:
        warn(warning)
    rows: list[Row] = []
    for number, (setting, images) in enumerate(zip(settings, samples, strict=True), 1):
        name = f"{number}/{len(settings)} " + " ".join(f"{key}={value}" for key, value in setting.items())
        row = _row(setting, images, network, reference, world, name)
        if world.rank == 0:
            rows.append(row)
            with files.writing(out):
                files.write_atomically(out, as_csv(rows))
                pictures.save_picture(picture(rows), out.with_suffix(".png"))
    return rows


def _row(
    setting: dict, images: ImageSet, network: features.FeatureNetwork, reference: metrics.Summary, world: World, name: str
) -> Row:
    """Return the row of a setting, complete on rank 0. name: text of the progress bar. All ranks must call it."""
    shown: dict[int, np.ndarray] = {}
    wanted = set(np.linspace(0, images.count - 1, min(SHOWN, images.count)).round().astype(int).tolist())
    try:
        summary = evaluate_command.summarize(image_sets.watched(images, wanted, shown), network, world, name)
    except FloatingPointError as error:  # raised on all ranks
        if world.rank == 0:
            warn(str(error))
        return Row(setting, {}, np.full((1, *images.shape), 255, np.uint8), reference.about)
    shown = gather(shown, world)
    if world.rank > 0:
        return Row(setting, {}, np.zeros((0, *images.shape), np.uint8))
    return Row(setting, metrics.compare(summary, reference, world.device), np.stack(list(shown.values())), reference.about)


def _samples_of_settings(path: Path, request: EvaluationRequest, settings: list[dict], device: torch.device) -> list[ImageSet]:
    """Return the samples of the checkpoint at `path` under each setting, nothing drawn yet.

    A bad value raises InputError now, not after an hour. The checkpoint is opened once, and loaded once for each kind of weights.
    """
    samplers: dict[str, Sampler] = {}
    samples = []
    for setting in settings:
        sampler_settings = {key: value for key, value in setting.items() if key != "weights"}
        weights = setting.get("weights", request.weights)
        if weights not in samplers:
            first = next(iter(samplers.values()), None)
            source, codec = (first.source or path, first.codec) if first else (path, None)
            samplers[weights] = Sampler(source, weights, device, request.dtype, codec=codec)
        asked = replace(request, sampler={**request.sampler, **sampler_settings})
        samples.append(evaluate_command.samples_of(samplers[weights], asked))
    return samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastdit sweep`."""
    parser.description = (
        "Evaluate a checkpoint under every combination of sampler settings and weights: a table with the best values marked, a CSV "
        "and a picture of the same seeds under each setting."
    )
    parser.epilog = (
        "example:\n  fastdit sweep runs/digits guidance=0,1,2 steps=8,15 weights=ema,raw --features digits --samples 500"
    )
    parser.add_argument(
        "source", metavar="CHECKPOINT",
        help="Folder of a run (its newest checkpoint) or of a checkpoint, exported file, or the base model's .pkl.",
    )  # fmt: skip
    parser.add_argument(
        "axes", nargs="+", metavar="KEY=VALUE,VALUE",
        help=f"Values to combine; KEY is one of weights, {', '.join(f.name for f in fields(SampleConfig))}.",
    )  # fmt: skip
    evaluate_command.add_request(parser)
    parser.add_argument(
        "--out", type=path_argument, default=Path("sweep.csv"), metavar="CSV",
        help="File for the table; the picture lies beside it (default: %(default)s).",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> str:
    """Sweep, and return the table and the files that were written as text. Raises InputError."""
    out = arguments.out
    rows = sweep(evaluate_command.request_of(arguments), parse_axes(arguments.axes), out)
    if rows and best(rows) is None:
        raise FloatingPointError(f"the samples of no setting are finite, as {out} says: use less guidance or other weights")
    table = f"{sweep_table(rows)}\n{_of_reference(rows[0].reference)}" if rows else ""
    return f"{table}\ntable: {out}; picture: {out.with_suffix('.png')} (the same seeds under each setting)"
