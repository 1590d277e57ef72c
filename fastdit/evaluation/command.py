"""`fastdit evaluate`: FID and its kin of samples against a reference, with every choice behind the numbers written beside them.

Samples go from the sampler straight into the metrics. Known evaluators differ; this one follows the ADM evaluator where they do
(fastdit/evaluation/metrics.py), and its feature network is the file that is given.
"""

import argparse
import json
import shlex
import sys
import time
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

from fastdit import progress
from fastdit.checkpoint import MANIFEST
from fastdit.config import InputError
from fastdit.data.imagenet import COUNTS
from fastdit.device import device_name, versions
from fastdit.distributed import World, world_of_this_process
from fastdit.evaluation import features, image_sets, metrics
from fastdit.files import check_writable, sha256, write_atomically
from fastdit.sampling.command import add_sampler, add_weights, sampler_settings

KEPT, REFERENCE_KEPT = 50_000, 10_000  # features kept for KID, precision and recall: ADM's counts
SAMPLES = 50_000  # as papers do; of digits DIGITS
DIGITS = 500


@dataclass(frozen=True)
class Request:
    """What is evaluated, and how; as the options of `fastdit evaluate`. source None: only the reference is made."""

    features: str
    reference: str
    source: str | None = None
    feature_sha256: str | None = None
    spatial: str | None = None
    split: str = "train"  # of a reference that is an index or mnist5k
    image_size: int | None = None  # that an index' images are cut to
    samples: int | None = None
    labels: str = "balanced"
    seed: int = 0
    weights: str = "ema"
    dtype: str = "auto"
    sampler: dict = field(default_factory=dict)  # values of SampleConfig; the run's where there are none

    def command(self, *more: str) -> str:
        """The line that does it again."""
        words = ["fastdit", "evaluate", *([self.source] if self.source else []), "--features", self.features]
        options = ["reference", "feature_sha256", "spatial", "image_size", "split"]
        if self.samples:  # a checkpoint
            options += ["samples", "labels", "seed", "weights", "dtype"]
        for key, value in [(key, getattr(self, key)) for key in options] + list(self.sampler.items()):
            if value is not None:
                words += ["--" + key.replace("_", "-"), *map(str, value if isinstance(value, list | tuple) else [value])]
        return shlex.join([*words, *more])


def is_checkpoint(path: Path) -> bool:
    return path.suffix == ".safetensors" or (path / MANIFEST).exists() or (path / "checkpoints").is_dir()


def open_source(request: Request, device: torch.device) -> tuple[image_sets.Source, Request]:
    """The images of a request, and the request with every choice that was left open made. Raises InputError."""
    path = Path(request.source)
    if not is_checkpoint(path):
        return image_sets.open_images(request.source, request.image_size, request.split, device), replace(request, samples=None)
    count = request.samples or (DIGITS if request.features == "digits" else SAMPLES)
    if not 0 <= request.seed < 2**63:
        raise InputError(f"--seed {request.seed} must be at least 0 and below 2^63")
    if count < 2:
        raise InputError(f"--samples {count} must be at least 2")
    source = image_sets.of_checkpoint(
        path, count, request.labels, request.sampler, request.seed, request.weights, request.dtype, device
    )
    return source, replace(request, samples=count, sampler=source.about["sampler"], dtype=source.about["dtype"])


def measure(source: image_sets.Source, network: features.FeatureNetwork, keep: int, world: World, what: str) -> metrics.Summary:
    """The statistics of a source's images, by all ranks: complete on rank 0. Raises InputError."""
    if source.count < 2:
        raise InputError(f"{source.about.get('path')} holds {source.count} image: statistics need at least 2")
    statistics = metrics.Statistics(source.count, keep, network.widths, world.device)
    labels = torch.from_numpy(source.labels) if network.knows_classes and source.labels is not None else None
    if labels is not None and not (labels.min() >= 0 and labels.max() < network.widths[1]):
        raise InputError(f"{source.about.get('path')} has labels up to {labels.max()}: {network.name} knows {network.widths[1]}")
    with progress.progress_bar(source.count, description=what, unit="image", disable=world.rank > 0) as bar:

        def work() -> None:
            for ids, images in source.batches(world):
                ids = torch.from_numpy(ids)
                for part, outputs in zip(ids.split(features.BATCH), network(images), strict=True):
                    statistics.update(part, outputs, None if labels is None else labels[part])
                bar.update(min(len(ids) * world.size, source.count - bar.n))

        world.together(work)
    return replace(statistics.summary(world), about={**source.about, "size": list(source.shape)})


def _check_fits(found: metrics.Summary, path: Path, network: features.FeatureNetwork) -> None:
    """Raise InputError where statistics of a file are of another feature network."""
    width = len(found.mu)
    if width != network.widths[0]:
        raise InputError(
            f"{path} holds statistics of features of width {width}, but {network.name} makes {network.widths[0]}: give the "
            "statistics of this network, or the network that they were made with"
        )
    made = found.about.get("features", {}).get("sha256")
    if made and made != network.sha256:
        raise InputError(
            f"{path} was made with another feature network (SHA-256 {made[:12]}…, {network.name} has {network.sha256[:12]}…): make "
            "it again with this one"
        )


def open_reference(request: Request, network: features.FeatureNetwork, world: World) -> metrics.Summary:
    """The statistics of a request's reference, read from an .npz of statistics or taken of images. Raises InputError."""
    path = Path(request.reference)
    found = world.together(lambda: metrics.load(path)) if path.is_file() else None
    about = {"features": network.about(), "path": request.reference}
    if found is None:
        source = world.together(lambda: image_sets.open_images(request.reference, request.image_size, request.split, world.device))
        world.together(lambda: network.probe(source.shape))
        found = measure(source, network, REFERENCE_KEPT, world, "reference")
        return replace(found, about={**found.about, **about})
    world.together(lambda: _check_fits(found, path, network))
    if found.features is None and image_sets.has_images(path):  # ADM's: 10,000 images beside the statistics of all
        source = world.together(lambda: image_sets.of_npz(path))
        world.together(lambda: network.probe(source.shape))
        found = replace(found, features=measure(source, network, REFERENCE_KEPT, world, "reference").features)
    return replace(found, about={"kind": "statistics", **found.about, **about, "sha256": sha256(path)})


def too_few(count: int | None, width: int, of: str) -> list[str]:
    """A warning where a covariance is singular for want of images."""
    if count is None or count > width:
        return []
    return [
        f"{count} {of} for features of width {width}: the covariance is singular and the Fréchet distance far too large; use at "
        f"least {width + 1}, better {10 * width:,}"
    ]


def say_dtype(source: image_sets.Source, world: World) -> None:
    """Print on rank 0 what a checkpoint's samples are computed in."""
    if world.rank == 0 and "dtype" in source.about:
        print(f"model: {source.about['dtype']} on {device_name(world.device)}", flush=True)


def warn(warnings: list[str]) -> None:
    for warning in warnings:
        tqdm.write(f"fastdit: warning: {warning}", file=sys.stderr)


def evaluate(request: Request, out: Path | None = None, save_reference: Path | None = None) -> dict:
    """Evaluate as asked; the result, on rank 0 complete and written to `out` as JSON. save_reference: an .npz to write the
    reference's statistics to. All ranks must call it. Raises InputError."""
    began = time.perf_counter()
    world = world_of_this_process()
    for path in (out, save_reference):
        if path is not None:
            world.together(lambda path=path: check_writable(path))
    network = world.together(lambda: features.load(request.features, world.device, request.feature_sha256, request.spatial))
    source = None
    if request.source is not None:
        source, request = world.together(lambda: open_source(request, world.device))
        say_dtype(source, world)
        world.together(lambda: network.probe(source.shape))
    elif Path(request.reference).is_file() and metrics.load(Path(request.reference)) is not None:
        raise InputError(f"--reference {request.reference} holds statistics already: give a source to evaluate")
    reference = open_reference(request, network, world)
    warnings = too_few(reference.about.get("images"), network.widths[0], "reference images")
    if save_reference is not None and world.rank == 0:
        metrics.save(reference, save_reference)
    result: dict = {"reference": reference.about}
    if source is not None:
        world.together(lambda: network.probe(source.shape))
        warnings += too_few(source.count, network.widths[0], "samples")
        samples = measure(source, network, KEPT, world, "evaluate")
        if world.rank == 0:
            result = {"metrics": metrics.compare(samples, reference, world.device), "samples": samples.about, **result}
    if world.rank == 0:
        result |= {
            "features": network.about(), "sfid": "unverified: not run on the real Inception file" if request.spatial else None,
            "evaluator": "ADM's definitions: unbiased covariance, fp64; KID over all pairs; third neighbours", "warnings": warnings,
            "ranks": world.size, "device": device_name(world.device), "versions": versions(),
            "seconds": round(time.perf_counter() - began, 1), "command": request.command(),
        }  # fmt: skip
        warn(warnings)
        if out is not None and source is not None:
            write_atomically(out, json.dumps(result, indent=1))
    return result


def table(result: dict) -> str:
    """The metrics of a result, a line each."""
    names = {
        "fid": "Fréchet distance", "sfid": "sFID (unverified)", "kid": "KID", "inception_score": "Inception score",
        "precision": "precision", "recall": "recall", "accuracy": "accuracy",
    }  # fmt: skip
    found = result["metrics"]
    lines = [f"{name:18} {found[key]:.6g}" for key, name in names.items() if key in found]
    if "accuracy_by_class" in found:
        lines.append(f"{'by class':18} " + " ".join(f"{share:.1%}" for share in found["accuracy_by_class"]))
    return "\n".join(lines)


def add_request(parser: argparse.ArgumentParser) -> None:
    """Add what `fastdit evaluate` and `fastdit sweep` share, named as the fields of Request: features, reference, samples."""
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
        "--reference", metavar="PATH",
        help="Reference: an .npz of statistics (ADM's: mu, sigma, mu_s, sigma_s) or of images, a folder, an index, or mnist5k "
        "(default with --features digits: mnist5k).",
    )  # fmt: skip
    add("--split", choices=tuple(COUNTS), help="Split of a reference that is an index or mnist5k (default: %(default)s).")
    add("--image-size", type=int, metavar="N", help="Height and width in pixels to which the images of an index are cut.")
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
    parser.set_defaults(**{f.name: f.default for f in fields(Request) if f.default is not MISSING})


def request_of(arguments: argparse.Namespace) -> Request:
    """Return the Request of a command line. Raises InputError without a reference."""
    given = {f.name: getattr(arguments, f.name) for f in fields(Request) if f.name in arguments}
    if given["reference"] is None:
        if given["features"] != "digits":
            raise InputError("--reference is needed: an .npz of statistics or images, a folder, an index or mnist5k")
        given["reference"] = "mnist5k"
    return Request(**given, sampler=sampler_settings(arguments))


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
        help="Folder of a run (its newest checkpoint) or of a checkpoint, exported file; or images: an .npz (arr_0, arr_1), a "
        "folder, an index, mnist5k.",
    )  # fmt: skip
    add_request(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("evaluation.json"), metavar="JSON",
        help="File for the metrics and every choice behind them (default: %(default)s).",
    )  # fmt: skip
    parser.add_argument(
        "--save-reference", type=Path, metavar="NPZ", help="File for the statistics of the reference, which --reference reads."
    )


def run(arguments: argparse.Namespace) -> str:
    """Evaluate, and return the metrics and the files that were written as text. Raises InputError."""
    request = request_of(arguments)
    if request.source is None and arguments.save_reference is None:
        raise InputError("nothing to do: give a source to evaluate, or --save-reference to keep the reference's statistics")
    result = evaluate(request, arguments.out, arguments.save_reference)
    lines = []
    if "metrics" in result:
        lines.append(table(result))
        lines.append(f"result: {arguments.out} (every choice behind these numbers; again: {result['command']})")
    if arguments.save_reference:
        lines.append(f"reference: {arguments.save_reference}")
    return "\n".join(lines)
