"""The metrics of samples of known quality: a run's checkpoints, early to late, EMA and raw; late samples blurred and noisy.

    fastdit train launch/configs/quickstart.yaml train.save_steps=200 train.keep_every=200 train.name=quality
    python -m benchmarks.studies.quality --run runs/quality [--steps 200,600,1800] [--samples 2000] [--seeds 3]

Fréchet distance, KID, precision, recall and accuracy on the features of the digits' classifier, against the 4,500 training digits.
The held-out digits, "real", show how low the distance can get. The last checkpoint is sampled with several seeds. Samples are drawn
without guidance (Heun, 10 steps) and saved in the run's folder, so that a second call resumes; 1,000 samples take 90 CPU seconds.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageFilter

from benchmarks import results_csv
from fastdit import distributed
from fastdit.checkpoint import folder_name
from fastdit.data.builtin import mnist5k
from fastdit.evaluation import command as evaluate_command
from fastdit.evaluation import features, image_sets, metrics
from fastdit.files import replacing
from fastdit.progress import progress_bar
from fastdit.sampling.sampler import Sampler

CSV = "quality"
SAMPLER = {"steps": 10, "solver": "heun", "guidance": 0.0}
BLURS = (0.5, 1.0, 1.5)  # standard deviation in pixels
NOISES = (8, 16, 32)  # standard deviation of 255 levels


def samples(run: Path, step: int, weights: str, count: int, seed: int = 0) -> image_sets.ImageSet:
    """Return samples of a checkpoint: read if an earlier call saved them, else drawn."""
    path = run / "quality" / f"{step}_{weights}_{count}_{seed}.npz"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        checkpoint = run / "checkpoints" / folder_name(step)
        source = image_sets.of_checkpoint(Sampler(checkpoint, weights, "cpu", "fp32"), count, "balanced", SAMPLER, seed)
        world, parts = distributed.world_of_this_process(), []
        with progress_bar(count, description=f"step {step}, {weights}", unit="image") as bar:
            for _, images in source.batches(world):
                parts.append(images)
                bar.update(len(images))
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, arr_0=np.concatenate(parts), arr_1=source.labels)
    return image_sets.of_npz(path)


def blurred(images: np.ndarray, amount: float) -> np.ndarray:
    blur = ImageFilter.GaussianBlur(amount)
    return np.stack([np.asarray(Image.fromarray(image[..., 0]).filter(blur))[..., None] for image in images])


def noisy(images: np.ndarray, amount: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, amount, images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def plot(rows: list[dict], path: Path) -> None:
    """Plot the distance over steps for EMA and raw weights, and over blur and noise, for the first seed."""
    rows = [row for row in rows if not row["seed"]]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    over_steps, over_blur, over_noise = figure.subplots(1, 3)
    real = next(row["fid"] for row in rows if row["weights"] == "real")
    for weights in ("ema", "raw"):
        curve = [row for row in rows if row["weights"] == weights and row["change"] == "none"]
        over_steps.plot([row["step"] for row in curve], [row["fid"] for row in curve], marker="o", label=weights)
    over_steps.axhline(real, color="grey", linestyle=":", label="held-out digits")
    over_steps.set(xlabel="step", ylabel="Fréchet distance (digits' features)", yscale="log")
    over_steps.legend()
    late = max(row["step"] for row in rows)
    for axes, change, label in ((over_blur, "blur", "blur, pixels"), (over_noise, "noise", "noise, of 255")):
        curve = [row for row in rows if row["step"] == late and row["weights"] == "ema" and row["change"] in ("none", change)]
        axes.plot([row["amount"] for row in curve], [row["fid"] for row in curve], marker="o", color="C2")
        axes.set(xlabel=label, yscale="log")
    for axes in (over_steps, over_blur, over_noise):
        axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def main(words: list[str] | None = None) -> int:
    parser = results_csv.parser(__doc__, results_csv.path_of(CSV, None))
    parser.add_argument("--run", type=Path, default=Path("runs/quality"), help="run folder (default: %(default)s)")
    parser.add_argument("--steps", default="200,600,1800", help="steps of checkpoints, early to late (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=2000, help="samples per checkpoint (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds for the last checkpoint (default: %(default)s)")
    options = results_csv.parse(parser, words)
    steps = [int(step) for step in options.steps.split(",")]
    world = distributed.world_of_this_process()
    network = features.load("digits", world.device)
    network.probe((32, 32, 1))
    summary = lambda source: evaluate_command.summarize(source, network, world, "features")
    reference = summary(image_sets.of_array(*mnist5k("train"), {}))
    rows = []

    def note(
        source: image_sets.ImageSet, step: int, weights: str, change: str = "none", amount: float = 0, seed: int = 0
    ) -> None:  # fmt: skip
        values = metrics.scalars(metrics.compare(summary(source), reference, world.device))
        row = {"step": step, "weights": weights, "change": change, "amount": amount, "seed": seed, "images": source.count}
        rows.append(row | {key: float(f"{value:.5g}") for key, value in values.items()})
        print(results_csv.line(rows[-1]), flush=True)

    note(image_sets.of_array(*mnist5k("val"), {}), 0, "real")
    for step in steps:
        for weights in ("ema", "raw"):
            note(samples(options.run, step, weights, options.samples), step, weights)
    for seed in range(1, options.seeds):
        for weights in ("ema", "raw"):
            note(samples(options.run, steps[-1], weights, options.samples, seed), steps[-1], weights, seed=seed)
    last = samples(options.run, steps[-1], "ema", options.samples)
    images = np.concatenate([images for _, images in last.batches(world)])
    for change, spoil, amounts in (("blur", blurred, BLURS), ("noise", noisy, NOISES)):
        for amount in amounts:
            note(image_sets.of_array(spoil(images, amount), last.labels, {}), steps[-1], "ema", change, amount)
    results_csv.write(options.csv, rows, allow_dirty=options.allow_dirty)
    plot(rows, options.csv.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
