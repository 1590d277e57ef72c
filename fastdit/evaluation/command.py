"""`fastdit evaluate`: FID, KID, Inception score, precision and recall of samples against a reference.

Samples go from the sampler straight into the metrics, and every choice behind the numbers is written beside them. Where known
evaluators differ, this one follows the ADM evaluator (fastdit/evaluation/metrics.py). Its feature network is the given file.
"""

import argparse
import json
import math
import os
import shlex
import time
from contextlib import ExitStack
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch

from fastdit import files
from fastdit.checkpoint import MANIFEST
from fastdit.config import InputError
from fastdit.data.imagenet import COUNTS
from fastdit.data.index import is_index
from fastdit.device import device_name, versions
from fastdit.distributed import World, world_of_this_process
from fastdit.evaluation import features, image_sets, metrics, neighbours
from fastdit.evaluation.image_sets import ImageSet
from fastdit.evaluation.kept import Kept
from fastdit.files import check_readable, path_argument, sha256
from fastdit.progress import progress_bar, say, warn
from fastdit.sampling.class_names import some
from fastdit.sampling.command import MAX_IMAGES, add_sampler, add_weights, sampler_settings
from fastdit.sampling.pictures import save_picture
from fastdit.sampling.sampler import Sampler, gather

SAMPLE_FEATURES = 50_000  # features kept for KID, precision and recall, at most: the ADM evaluator's numbers
REFERENCE_FEATURES = 10_000
SAMPLES = 50_000  # samples drawn by default, as in papers
DIGITS = 500  # the same for the built-in digits
MAX_IMAGE_SIZE = 16_384  # pixels
MAX_NEIGHBOURS = 1000  # samples beside their nearest training images


@dataclass(frozen=True)
class EvaluationRequest:
    """The options of `fastdit evaluate`, whose help describes them. source None: only the reference's statistics are taken."""

    features: str
    reference: str
    source: str | None = None
    feature_sha256: str | None = None
    spatial: str | None = None
    preprocess: str | None = None
    split: str = "train"
    image_size: int | None = None
    resize: str | None = None
    samples: int | None = None
    labels: str = "balanced"
    seed: int = 0
    weights: str = "ema"
    dtype: str = "auto"
    neighbours: int | None = None
    sampler: dict = field(default_factory=dict)  # values of SampleConfig that replace the run's

    def __post_init__(self) -> None:
        """Raises InputError."""
        for name, path in (("source", self.source), ("--features", self.features), ("--reference", self.reference)):
            if path is not None:
                check_readable(name, path)
        if self.feature_sha256 == "":
            raise InputError("--feature-sha256 '' is empty: give the hash, or leave it out")
        if self.image_size is not None and not 1 <= self.image_size <= MAX_IMAGE_SIZE:
            raise InputError(f"--image-size {self.image_size} must be between 1 and {MAX_IMAGE_SIZE}")
        if self.neighbours is not None and not 1 <= self.neighbours <= MAX_NEIGHBOURS:
            raise InputError(f"--neighbours {self.neighbours} must be between 1 and {MAX_NEIGHBOURS}")
        if self.resize is not None and not any(path and is_index(Path(path)) for path in (self.source, self.reference)):
            raise InputError(f"--resize {self.resize} is for the images of an index, and none is given: leave it out")

    def of_a_checkpoint(self) -> str | None:
        """Return the flag of the first value that only samples of a checkpoint have, or None."""
        defaults = {f.name: f.default for f in fields(EvaluationRequest)}
        given = [
            key for key in ("samples", "labels", "seed", "weights", "dtype", "neighbours") if getattr(self, key) != defaults[key]
        ]
        return next(("--" + key.replace("_", "-") for key in (*given, *self.sampler)), None)

    def command(self, *more: str) -> str:
        """Return the command line of this request; more: further words."""
        words = ["fastdit", "evaluate", *([self.source] if self.source else []), "--features", self.features]
        options = ["reference", "feature_sha256", "spatial", "preprocess", "image_size", "resize", "split"]
        if self.samples:  # a checkpoint
            options += ["samples", "labels", "seed", "weights", "dtype", "neighbours"]
        for key, value in [(key, getattr(self, key)) for key in options] + list(self.sampler.items()):
            flag = key.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            elif value is not None:
                words += [f"--{flag}", *map(str, value if isinstance(value, list | tuple) else [value])]
        return shlex.join([*words, *more])


def load_network(request: EvaluationRequest, device: torch.device) -> features.FeatureNetwork:
    """Return the feature network of a request. Raises InputError."""
    return features.load(request.features, device, request.feature_sha256, request.spatial, request.preprocess)


def is_checkpoint(path: Path) -> bool:
    """Whether samples can be drawn from what lies at a path: a run, a checkpoint, an exported file or the base model's .pkl."""
    return path.suffix in (".safetensors", ".pkl") or (path / MANIFEST).exists() or (path / "checkpoints").is_dir()


def _refuse_values_of_a_checkpoint(request: EvaluationRequest, subject: str) -> None:
    if flag := request.of_a_checkpoint():
        raise InputError(f"{flag} is for samples of a checkpoint, but {subject}: leave it out")


def samples_of(sampler: Sampler, request: EvaluationRequest) -> ImageSet:
    """Return the samples that a request asks for, nothing drawn yet. Raises InputError for a bad value."""
    count = request.samples or (DIGITS if request.features == "digits" else SAMPLES)
    if not 0 <= request.seed < 2**63:
        raise InputError(f"--seed {request.seed} must be at least 0 and below 2^63")
    if not 2 <= count <= MAX_IMAGES:
        raise InputError(f"--samples {count} must be between 2 and {MAX_IMAGES:,}")
    return image_sets.of_checkpoint(sampler, count, request.labels, request.sampler, request.seed)


def open_source(request: EvaluationRequest, device: torch.device) -> tuple[ImageSet, EvaluationRequest]:
    """Return the images of a request, and the request with every open choice made. Raises InputError."""
    assert request.source is not None  # `evaluate` opens none without
    path = Path(request.source)
    if not is_checkpoint(path):
        _refuse_values_of_a_checkpoint(request, f"{path} is none")
        images = image_sets.open_images(request.source, request.image_size, request.split, device, request.resize)
        return images, replace(request, samples=None)
    samples = samples_of(Sampler(path, request.weights, device, request.dtype), request)
    return samples, replace(request, samples=samples.count, sampler=samples.about["sampler"], dtype=samples.about["dtype"])


def summarize(
    source: ImageSet, network: features.FeatureNetwork, world: World, description: str, keep: int = SAMPLE_FEATURES,
    kept: Kept | None = None,
) -> metrics.Summary:  # fmt: skip
    """Return the statistics of a set of images, computed by all ranks and complete on rank 0.

    description: text of the progress bar; keep: largest number of features to keep; kept: where the outputs of finished batches
    lie. All ranks must call it. Raises InputError.
    """
    if source.count < 2:
        raise InputError(f"{source.about.get('path')} holds {source.count} image: statistics need at least 2")
    statistics = metrics.Statistics(source.count, keep, network.widths, world.device)
    labels = torch.from_numpy(source.labels) if network.knows_classes and source.labels is not None else None
    if labels is not None and not (labels.min() >= 0 and labels.max() < network.widths[1]):
        raise InputError(f"{source.about.get('path')} has labels up to {labels.max()}: {network.name} knows {network.widths[1]}")
    with progress_bar(source.count, description=description, unit="image", disable=world.rank > 0) as bar:

        def work() -> None:
            fresh = ((ids, network(images)) for ids, images in source.batches(world))
            for ids, parts in kept.outputs(source, network, world) if kept else fresh:
                ids = torch.from_numpy(ids)
                for part, outputs in zip(ids.split(features.BATCH), parts, strict=True):
                    statistics.update(part, outputs, None if labels is None else labels[part])
                bar.update(min(len(ids) * world.size, source.count - bar.n))

        world.together(work)
    summary = statistics.summary(world)
    score = summary.inception_score
    if not (summary.mu.isfinite().all() and summary.sigma.isfinite().all() and (score is None or math.isfinite(score))):
        raise InputError(f"feature network {network.name} gives outputs of {source.about.get('path')} that are not finite")
    return replace(summary, about={**source.about, "size": list(source.shape)})


def _check_fits(summary: metrics.Summary, path: Path, network: features.FeatureNetwork) -> None:
    """Raise InputError if the statistics of a file are of another feature network."""
    width = len(summary.mu)
    if width != network.widths[0]:
        raise InputError(
            f"{path} holds statistics of features of width {width}, but {network.name} makes {network.widths[0]}: give the "
            "statistics of this network, or the network that they were made with"
        )
    made_with = summary.about.get("features", {})
    preprocess = made_with.get("preprocess") or features.PREPROCESSES[0]
    if made_with and network.preprocess not in (preprocess, None):
        raise InputError(f"{path} was made with --preprocess {preprocess}: give that, or make it again with {network.preprocess}")
    expected = made_with.get("sha256")
    if expected and expected != network.sha256:
        raise InputError(
            f"{path} was made with another feature network (SHA-256 {expected[:12]}…, {network.name} has {network.sha256[:12]}…): "
            "make it again with this one"
        )


def open_reference(request: EvaluationRequest, network: features.FeatureNetwork, world: World) -> metrics.Summary:
    """Return the statistics of a request's reference, read from an .npz of statistics or taken of images.

    All ranks must call it. Raises InputError.
    """
    path = Path(request.reference)
    if is_checkpoint(path):
        raise InputError(f"--reference {path} is a checkpoint: give an .npz of statistics or images, a folder, an index or mnist5k")
    stored = world.together(lambda: metrics.load(path)) if path.is_file() else None
    about = {"features": network.about(), "path": request.reference}
    if stored is None:
        source = world.together(
            lambda: image_sets.open_images(request.reference, request.image_size, request.split, world.device, request.resize)
        )
        world.together(lambda: network.probe(source.shape))
        summary = summarize(source, network, world, "reference", REFERENCE_FEATURES)
        return replace(summary, about={**summary.about, **about, "statistics_sha256": summary.sha256()})
    world.together(lambda: _check_fits(stored, path, network))
    summary = stored
    if summary.features is None and image_sets.has_images(path):  # ADM's: 10,000 images beside the statistics of all
        source = world.together(lambda: image_sets.of_npz(path))
        world.together(lambda: network.probe(source.shape))
        summary = replace(summary, features=summarize(source, network, world, "reference", REFERENCE_FEATURES).features)
    about |= {"sha256": sha256(path), "statistics_sha256": stored.sha256()}
    return replace(summary, about={"kind": "statistics", **summary.about, **about})


def too_few(count: int | None, width: int, kind: str) -> list[str]:
    """Return a warning if there are too few images for a covariance that is not singular. kind: their name in the warning."""
    if count is None or count > width:
        return []
    return [
        f"{count} {kind} for features of width {width}: the covariance is singular and the Fréchet distance far too large; use at "
        f"least {width + 1}, better {10 * width:,}"
    ]


def say_model(source: ImageSet, world: World) -> None:
    """Print on rank 0 the dtype and the device of the model that draws a checkpoint's samples."""
    if world.rank == 0 and "dtype" in source.about:
        say(f"model: {source.about['dtype']} on {device_name(world.device)}")
        if source.about["left_out"]:
            say(f"classes without images in training are left out: {some(source.about['left_out'])}")


def _reserve(stack: ExitStack, request: EvaluationRequest, out: Path | None, save_reference: Path | None) -> None:
    """Lock the files to write until `stack` is closed. Raises InputError."""
    inputs = [os.path.realpath(path) for path in (request.source, request.reference, request.features) if path]
    inputs += [path.removesuffix(".safetensors") + ".json" for path in inputs if path.endswith(".safetensors")]
    paths = {name: path for name, path in (("--out", out), ("--save-reference", save_reference)) if path is not None}
    for name, path in paths.items():
        if os.path.realpath(path) in inputs:
            raise InputError(f"{name} {path} is read by this command: choose another path")
    if out is not None and save_reference is not None and os.path.realpath(out) == os.path.realpath(save_reference):
        raise InputError(f"--out and --save-reference are both {out}: give two paths")
    pictures = [neighbours_picture(out)] if out is not None and request.neighbours else []
    stack.enter_context(files.outputs([*paths.values(), *pictures]))


def neighbours_picture(out: Path) -> Path:
    """Return the path of the picture of --neighbours beside a result."""
    return out.with_suffix(".neighbours.png")


def evaluate(request: EvaluationRequest, out: Path | None = None, save_reference: Path | None = None) -> dict:
    """Evaluate a request. Returns the result, complete on rank 0, which also writes it to `out` as JSON.

    The outputs of finished batches of samples that are drawn are kept beside `out` until it is written: a call that was killed
    resumes. save_reference: path of an .npz for the reference's statistics. All ranks must call it. Raises InputError, also if a
    file cannot be written, but after the metrics are printed; FloatingPointError if samples are not finite.
    """
    began = time.perf_counter()
    world = world_of_this_process()
    with ExitStack() as stack:
        world.together(lambda: _reserve(stack, request, out, save_reference) if world.rank == 0 else None)
        result, errors = _measure(request, world, save_reference, out)
        if world.rank > 0:
            return result
        result["seconds"] = round(time.perf_counter() - began, 1)
        try:
            if out is not None and "metrics" in result:
                with files.writing(out):
                    files.write_atomically(out, json.dumps(result, indent=1))
                Kept(out).remove()
        except InputError as error:
            errors.append(error)
        if errors:
            say(metrics_table(result))  # it may have taken hours
            raise errors[0]
    return result


def _summarize_samples(
    source: ImageSet, request: EvaluationRequest, network: features.FeatureNetwork, world: World, out: Path | None,
    shown: dict[int, np.ndarray],
) -> metrics.Summary:  # fmt: skip
    """Return `summarize` of the samples of a request, of a checkpoint's resumed from what is kept beside `out`.

    shown: images that are kept too. Raises InputError, and FloatingPointError, after which nothing is kept.
    """
    if out is None or source.drawn is None:
        return summarize(source, network, world, "evaluate")
    kept = Kept(out, shown)
    settings = {key: value for key, value in source.about.items() if key != "path"}
    settings |= {
        "features": network.about(), "spatial": request.spatial, "neighbours": request.neighbours, "ranks": world.size,
        "device": device_name(world.device), "versions": versions(),
    }  # fmt: skip
    world.together(lambda: kept.begin(settings), everywhere=False)
    try:
        return summarize(source, network, world, "evaluate", kept=kept)
    except FloatingPointError:  # raised on all ranks, and again if the command were repeated
        if world.rank == 0:
            kept.remove()
        raise


def _compare_samples(
    source: ImageSet, request: EvaluationRequest, network: features.FeatureNetwork, reference: metrics.Summary, world: World,
    out: Path | None, errors: list[InputError],
) -> dict:  # fmt: skip
    """Return the metrics of samples, their description and their likeness to the training images, on rank 0."""
    shown: dict[int, np.ndarray] = {}
    every = -(-source.count // SAMPLE_FEATURES)  # of the samples whose features are kept
    kept = -(-source.count // every)
    rows = np.linspace(0, kept - 1, min(request.neighbours or 0, kept)).round().astype(int).tolist()
    training = None
    if rows:
        assert source.config is not None  # --neighbours is refused for other images than a checkpoint's
        training = neighbours.training_images(source.config, world)  # before hours of sampling
    source = image_sets.watched(source, {row * every for row in rows}, shown)
    samples = _summarize_samples(source, request, network, world, out, shown)
    result: dict = {}
    if world.rank == 0:
        result = {"metrics": metrics.compare(samples, reference, world.device), "samples": samples.about}
    if training is not None and source.config is not None:
        images = {i // every: image for i, image in gather(shown, world).items()}
        about, picture = neighbours.likeness(samples, rows, images, training, source.config.data.flip, network, world)
        if picture is not None:
            result["neighbours"] = about
            if out is not None:
                try:
                    with files.writing(neighbours_picture(out)):
                        save_picture(picture, neighbours_picture(out))
                except InputError as error:
                    errors.append(error)
    return result


def _measure(
    request: EvaluationRequest, world: World, save_reference: Path | None, out: Path | None
) -> tuple[dict, list[InputError]]:
    """Return the result of a request, complete on rank 0, and the errors of writing the reference's statistics and the picture."""
    network = world.together(lambda: load_network(request, world.device))
    source = None
    if request.source is not None:
        source, request = world.together(lambda: open_source(request, world.device))
        say_model(source, world)
        world.together(lambda: network.probe(source.shape))
    else:
        _refuse_values_of_a_checkpoint(request, "there is no source")
        if Path(request.reference).is_file() and metrics.load(Path(request.reference)) is not None:
            raise InputError(f"--reference {request.reference} contains statistics already: give a source to evaluate")
    reference = open_reference(request, network, world)
    warnings = too_few(reference.about.get("images"), network.widths[0], "reference images")
    errors = []
    if save_reference is not None and world.rank == 0:
        try:
            with files.writing(save_reference):
                metrics.save(reference, save_reference)
        except InputError as error:
            errors.append(error)
    result: dict = {"reference": reference.about}
    if source is not None:
        world.together(lambda: network.probe(source.shape))
        warnings += too_few(source.count, network.widths[0], "samples") + source.warnings
        warnings += image_sets.resized_otherwise(source.about, reference.about)
        result = {**_compare_samples(source, request, network, reference, world, out, errors), **result}
        if result.get("neighbours", {}).get("repeats"):
            warnings.append(f"the run repeats its training images: {neighbours.sentence(result['neighbours'])}")
    if world.rank == 0:
        result |= {
            "features": network.about(), "sfid": "unverified: not run on the real Inception file" if request.spatial else None,
            "evaluator": "ADM's definitions: unbiased covariance, fp64; KID over all pairs; third neighbours", "warnings": warnings,
            "ranks": world.size, "device": device_name(world.device), "versions": versions(), "command": request.command(),
        }  # fmt: skip
        for warning in warnings:
            warn(warning)
    return result, errors


def metrics_table(result: dict) -> str:
    """Return the metrics of a result, one per line."""
    lines = []
    network = Path(result["features"]["network"]).stem
    for name, value in result.get("metrics", {}).items():
        text = " ".join(f"{share:.1%}" for share in value) if isinstance(value, list) else f"{value:.6g}"
        lines.append((metrics.METRICS[name].label.format(network=network), text))
    width = max((len(label) for label, _ in lines), default=0)
    table = "\n".join(f"{label:{width}} {text}" for label, text in lines)
    return f"{table}\n{neighbours.sentence(result['neighbours'])}" if "neighbours" in result else table


def add_request(parser: argparse.ArgumentParser) -> None:
    """Add what `fastdit evaluate` and `fastdit sweep` share, named as the fields of EvaluationRequest."""
    add = parser.add_argument
    add(
        "--features", required=True, metavar="digits|FILE",
        help="Feature network: the built-in classifier of digits, or a TorchScript file such as inception-2015-12-05.pt (nothing "
        "is downloaded).",
    )  # fmt: skip
    add("--feature-sha256", metavar="HASH", help="SHA-256 that the file of --features must have.")
    add(
        "--spatial", metavar="MODULE",
        help="Submodule of the feature network for sFID, from its first 7 channels, such as layers.mixed_6.conv (unverified).",
    )  # fmt: skip
    add(
        "--preprocess", choices=features.PREPROCESSES,
        help="Input of the file of --features: inception, uint8 images of any size, as of inception-2015-12-05.pt; imagenet224, "
        "224 pixels (cubic, antialiased) normalized by ImageNet's mean and standard deviation, as of DINOv2 (default: inception).",
    )  # fmt: skip
    add(
        "--reference", metavar="PATH",
        help="Reference: an .npz of statistics (ADM's: mu, sigma, mu_s, sigma_s) or of images, a folder, an index, or mnist5k "
        "(default with --features digits: mnist5k).",
    )  # fmt: skip
    add("--split", choices=tuple(COUNTS), help="Split of a reference that is an index or mnist5k (default: %(default)s).")
    add("--image-size", type=int, metavar="N", help="Height and width in pixels to which the images of an index are cut.")
    add(
        "--resize", choices=image_sets.RESIZES,
        help="Resize of the images of an index: adm, as of the published ADM references (box halving, then bicubic); dali, as for "
        "training (default: dali).",
    )  # fmt: skip
    add(
        "--samples", type=int, metavar="N",
        help=f"Number of samples to draw from a checkpoint (default: {SAMPLES:,}; with --features digits {DIGITS}).",
    )  # fmt: skip
    add(
        "--labels", choices=("balanced", "random"),
        help="Classes of the samples: each equally often, or drawn at random (default: %(default)s).",
    )  # fmt: skip
    add("--seed", type=int, metavar="N", help="Seed of the noise and of random labels (default: %(default)s).")
    add_weights(parser)
    add_sampler(parser.add_argument_group("sampler", "Defaults: the sample settings of the run."))
    parser.set_defaults(**{f.name: f.default for f in fields(EvaluationRequest) if f.default is not MISSING})


def request_of(arguments: argparse.Namespace) -> EvaluationRequest:
    """Return the request of a command line. Raises InputError without a reference."""
    given = {f.name: getattr(arguments, f.name) for f in fields(EvaluationRequest) if f.name in arguments}
    if given["reference"] is None:
        if given["features"] != "digits":
            raise InputError("--reference is needed: an .npz of statistics or images, a folder, an index or mnist5k")
        given["reference"] = "mnist5k"
    return EvaluationRequest(**given, sampler=sampler_settings(arguments))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastdit evaluate`."""
    parser.description = (
        "Evaluate the samples of a checkpoint, which go straight into the metrics, or existing images. Runs as one process or "
        "under torchrun. Everything that the numbers depend on is written beside them."
    )
    parser.epilog = (
        "examples:\n"
        "  fastdit evaluate runs/digits --features digits\n"
        "  fastdit evaluate runs/xl --features inception-2015-12-05.pt --reference VIRTUAL_imagenet256_labeled.npz\n"
        "  fastdit evaluate --features inception-2015-12-05.pt --reference imagenet.index --image-size 256 "
        "--save-reference imagenet256.npz"
    )
    parser.add_argument(
        "source", nargs="?", metavar="SOURCE",
        help="Folder of a run (its newest checkpoint) or of a checkpoint, exported file, or the base model's .pkl; or images: an "
        ".npz (arr_0, arr_1), a folder, an index, mnist5k.",
    )  # fmt: skip
    add_request(parser)
    parser.add_argument(
        "--out", type=path_argument, default=Path("evaluation.json"), metavar="JSON",
        help="File for the metrics and every choice behind them (default: %(default)s).",
    )  # fmt: skip
    parser.add_argument(
        "--neighbours", type=int, metavar="N",
        help="Number of samples to show beside their nearest training images, in a PNG beside --out; with it the share of samples "
        "that are nearer to a training image than these are to each other.",
    )  # fmt: skip
    parser.add_argument(
        "--save-reference",
        type=path_argument,
        metavar="NPZ",
        help="File for the statistics of the reference, which --reference reads.",
    )


def run(arguments: argparse.Namespace) -> str:
    """Evaluate, and return the metrics and the files that were written as text. Raises InputError."""
    request = request_of(arguments)
    if request.source is None and arguments.save_reference is None:
        raise InputError("nothing to do: give a source to evaluate, or --save-reference to keep the reference's statistics")
    result = evaluate(request, arguments.out, arguments.save_reference)
    lines = []
    if "metrics" in result:
        lines.append(metrics_table(result))
        lines.append(f"result: {arguments.out} (every choice behind these numbers; again: {result['command']})")
    if request.neighbours:
        lines.append(f"nearest training images: {neighbours_picture(arguments.out)}")
    if arguments.save_reference:
        lines.append(f"reference: {arguments.save_reference}")
    return "\n".join(lines)
