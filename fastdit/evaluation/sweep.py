"""`fastdit sweep`: one checkpoint's metrics over a grid of sampler settings and EMA decays: a table, a CSV, and the same seeds
drawn under each setting."""

import argparse
import csv
import io
import itertools
import typing
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont

from fastdit import distributed, files
from fastdit.config import InputError, SampleConfig, nearest
from fastdit.distributed import World
from fastdit.evaluation import command as evaluate_command
from fastdit.evaluation import features, image_sets, metrics
from fastdit.files import write_atomically
from fastdit.sampling import pictures

SHOWN = 10  # samples of each setting in the picture
METRICS = ("fid", "kid", "inception_score", "precision", "recall", "accuracy")


@dataclass(frozen=True)
class Row:
    """A setting, its metrics, and the first images drawn under it."""

    setting: dict
    found: dict
    images: np.ndarray  # uint8 [at most SHOWN,S,S,C]


def parse_axes(words: list[str]) -> dict[str, list]:
    """ "guidance=0,1.5" "weights=ema,raw" as {"guidance": [0.0, 1.5], "weights": ["ema", "raw"]}. Raises InputError."""
    kinds = {**typing.get_type_hints(SampleConfig), "weights": str}
    kinds = {name: kinds[name] for name in [*(f.name for f in fields(SampleConfig)), "weights"]}
    axes: dict[str, list] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in kinds:
            raise InputError(f"{word!r} must be KEY=VALUE,VALUE: {nearest(key, list(kinds))}")
        try:
            axes[key] = [kinds[key](value) for value in text.split(",")]
        except ValueError as error:
            raise InputError(f"{word!r} must hold values of type {kinds[key].__name__}: {error}") from error
    if not axes:
        raise InputError("nothing to sweep over: give KEY=VALUE,VALUE, such as guidance=0,1,2 steps=8,15 weights=ema,raw")
    return axes


def _watched(source: image_sets.Source, shown: dict[int, np.ndarray]) -> image_sets.Source:
    """The same source, which keeps evenly spread samples in `shown` on their way."""
    wanted = set(np.linspace(0, source.count - 1, min(SHOWN, source.count)).round().astype(int).tolist())

    def batches(world: World):
        for ids, images in source.batches(world):
            shown.update({int(i): image for i, image in zip(ids, images, strict=True) if int(i) in wanted})
            yield ids, images

    return replace(source, batches=batches)


def _gathered(shown: dict[int, np.ndarray], world: World) -> np.ndarray:
    """All ranks' images in the order of their ids, on rank 0."""
    parts: list | None = [shown]
    if world.size > 1:
        parts = [None] * world.size if world.rank == 0 else None
        dist.gather_object(shown, parts, group=world.control)
    whole = {i: image for part in parts or [] for i, image in part.items()}
    return np.stack([whole[i] for i in sorted(whole)]) if whole else np.empty(0)


def best(rows: list[Row]) -> int:
    return min(range(len(rows)), key=lambda i: rows[i].found["fid"])


def as_csv(rows: list[Row]) -> str:
    """The rows, the best of them marked by a 1 in the column `best`."""
    text, first = io.StringIO(), best(rows)
    writer = csv.DictWriter(text, [*rows[0].setting, *(m for m in METRICS if m in rows[0].found), "best"], lineterminator="\n")
    writer.writeheader()
    for i, row in enumerate(rows):
        writer.writerow({**row.setting, **{m: f"{row.found[m]:.6g}" for m in METRICS if m in row.found}, "best": int(i == first)})
    return text.getvalue()


def table(rows: list[Row]) -> str:
    """Aligned columns, the best row behind a *."""
    lines = [line.split(",") for line in as_csv(rows).splitlines()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)][:-1]
    marks = ["*" if line[-1] == "1" else " " for line in lines]
    return "\n".join(
        mark + " " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=False))
        for mark, line in zip(marks, lines, strict=True)
    )


def picture(rows: list[Row]) -> Image.Image:
    """A row of images a setting, its values and distance on the left, the best on green."""
    grids = [pictures.grid(row.images, len(row.images)).convert("RGB") for row in rows]
    font = ImageFont.load_default(max(11, min(20, grids[0].height // 4)))
    setting = lambda row: "  ".join(f"{key} {value}" for key, value in row.setting.items())
    texts = [f"{setting(row)}\ndistance {row.found['fid']:.4g}" for row in rows]
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


def sweep(request: evaluate_command.Request, axes: dict[str, list], out: Path) -> list[Row]:
    """Evaluate request.source under every combination of the axes. After each, on rank 0, the CSV `out` and the PNG beside it are
    written again. All ranks must call it. Raises InputError."""
    world = distributed.world_of_this_process()
    world.together(lambda: files.check_writable(out))
    if not evaluate_command.is_checkpoint(Path(request.source)):
        raise InputError(f"{request.source} is no checkpoint: a sweep draws its samples anew under each setting")
    network = world.together(lambda: features.load(request.features, world.device, request.feature_sha256, request.spatial))
    reference, rows = None, []
    settings = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    asked = [
        replace(
            request, weights=setting.get("weights", request.weights),
            sampler={**request.sampler, **{key: value for key, value in setting.items() if key != "weights"}},
        )
        for setting in settings
    ]  # fmt: skip
    for each in asked:  # all bad values now, not after an hour
        world.together(lambda each=each: evaluate_command.open_source(each, world.device))
    for setting, each in zip(settings, asked, strict=True):
        source, _ = world.together(lambda each=each: evaluate_command.open_source(each, world.device))
        world.together(lambda source=source: network.probe(source.shape))
        if reference is None:
            evaluate_command.say_dtype(source, world)
            reference = evaluate_command.open_reference(request, network, world)
            world.together(lambda source=source: network.probe(source.shape))
            if world.rank == 0:
                evaluate_command.warn(evaluate_command.too_few(source.count, network.widths[0], "samples"))
        shown: dict[int, np.ndarray] = {}
        name = f"{len(rows) + 1}/{len(settings)} " + " ".join(f"{key}={value}" for key, value in setting.items())
        samples = evaluate_command.measure(_watched(source, shown), network, evaluate_command.KEPT, world, name)
        images = _gathered(shown, world)
        found = metrics.compare(samples, reference, world.device) if world.rank == 0 else {"fid": 0.0}
        rows.append(Row(setting, found, images))
        if world.rank == 0:
            write_atomically(out, as_csv(rows))
            pictures.save_picture(picture(rows), out.with_suffix(".png"))
        del source, samples
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastdit sweep`."""
    parser.description = (
        "Evaluate a checkpoint under every combination of sampler settings and weights: a table with the best row marked, a CSV, "
        "and a picture of the same seeds under each setting."
    )
    parser.epilog = (
        "example:\n  fastdit sweep runs/digits guidance=0,1,2 steps=8,15 weights=ema,raw --features digits --samples 500"
    )
    parser.add_argument(
        "source", metavar="CHECKPOINT", help="Folder of a run (its newest checkpoint) or of a checkpoint, or exported file."
    )
    parser.add_argument(
        "axes", nargs="+", metavar="KEY=VALUE,VALUE",
        help=f"Values to combine; KEY is one of weights, {', '.join(f.name for f in fields(SampleConfig))}.",
    )  # fmt: skip
    evaluate_command.add_request(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("sweep.csv"), metavar="CSV",
        help="File for the table; the picture lies beside it (default: %(default)s).",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> str:
    """Sweep, and return the table and the files that were written as text. Raises InputError."""
    out = arguments.out
    rows = sweep(evaluate_command.request_of(arguments), parse_axes(arguments.axes), out)
    return f"{table(rows)}\ntable: {out}; picture: {out.with_suffix('.png')} (the same seeds under each setting)"
