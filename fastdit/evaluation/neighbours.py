"""Likeness of samples to the training set: distances to the nearest training images in the space of the features, and a picture.

n training images, m samples, d feature width. A model that repeats its training images draws samples nearer to one of them than
they are to each other. Of samples as different from the training images as these from each other, a share of QUANTILE is that near.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdit import data
from fastdit.config import Config, InputError
from fastdit.data.builtin import mnist5k
from fastdit.data.latents import is_latent_set, read_manifest
from fastdit.data.loader import grey
from fastdit.distributed import World
from fastdit.evaluation import features, image_sets, metrics
from fastdit.evaluation.image_sets import ImageSet
from fastdit.progress import progress_bar
from fastdit.sampling import pictures
from fastdit.sampling.sampler import gather

QUANTILE = 0.05  # of the distances of training images to the nearest other one
REPEATED = 5 * QUANTILE  # share of samples that near from which on a run is said to repeat its training images
NEAREST = 8  # training images per sample in the picture
MOST = 50_000  # training images that are compared, evenly spread


class _Near(NamedTuple):
    """A training image beside a sample: the square of its distance, its number, and uint8 [S,S,C]."""

    square: float
    id: int
    image: np.ndarray


def _as_grey(source: ImageSet) -> ImageSet:
    """Return a set of color images as grey ones, as training reads them with data.grey."""

    def batches(world: World) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for ids, images in source.batches(world):
            levels = grey(torch.from_numpy(images).permute(0, 3, 1, 2).float()).round().to(torch.uint8)
            yield ids, levels.permute(0, 2, 3, 1).numpy()

    return replace(source, shape=(*source.shape[:2], 1), batches=batches)


def training_images(config: Config, world: World) -> ImageSet:
    """Return the images that a run was trained on, at most MOST of them, center-cropped. All ranks must call it.

    Raises InputError if they are gone, or are fewer than two.
    """
    path = world.together(lambda: data.locate(config), everywhere=False)  # which may make an index
    training = world.together(lambda: _open(config, path, world.device))
    if training.count < 2:
        raise InputError(f"--neighbours compares training images with each other, but there is {training.count}: leave it out")
    return training


def _open(config: Config, path: Path | None, device: torch.device) -> ImageSet:
    if path is None:
        return image_sets.of_array(*mnist5k("train"), {"kind": "builtin", "path": "mnist5k", "split": "train"})
    size, split = config.data.image_size, "train"
    if is_latent_set(path):
        manifest = read_manifest(path)
        path, size, split = Path(str(manifest.get("index"))), manifest["image_size"], manifest.get("split", split)
    if not path.exists():
        raise InputError(f"--neighbours needs the training images, but index {path} does not exist: put it back, or leave it out")
    images = image_sets.of_index(path, size, split, device, MOST, config.data.exif)
    return _as_grey(images) if config.data.grey else images


def _merge(near: list[list[_Near]], shown: Tensor, ids: np.ndarray, views: list[np.ndarray], vectors: list[Tensor]) -> None:
    """Put a batch of training images into the NEAREST of each shown sample.

    near: of each sample; shown: features [r,d]; ids: int64 [b]; views: images [b,S,S,C] as they are and mirrored; vectors: their
    features [b,d].
    """
    squares, view = torch.stack([torch.cdist(shown, part.double()).square() for part in vectors]).min(0)  # [r,b]
    for row, nearest in enumerate(near):
        first = squares[row].argsort()[:NEAREST].tolist()
        found = [_Near(squares[row, i].item(), int(ids[i]), views[int(view[row, i])][i].copy()) for i in first]
        nearest[:] = sorted([*nearest, *found], key=lambda each: each[:2])[:NEAREST]


def _read(
    training: ImageSet, network: features.FeatureNetwork, shown: Tensor, flip: bool, world: World
) -> tuple[dict[int, Tensor], list[list[_Near]]]:
    """Return, complete on rank 0, the features [1 or 2,b,d] of training images, as they are and mirrored if `flip`, by the first
    id of their batch; and the NEAREST of each shown sample. All ranks must call it. Raises InputError."""
    parts: dict[int, Tensor] = {}
    near: list[list[_Near]] = [[] for _ in shown]
    with progress_bar(training.count, description="training images", unit="image", disable=world.rank > 0) as bar:

        def work() -> None:
            for ids, images in training.batches(world):
                views = [images, images[:, :, ::-1]][: 1 + flip]
                vectors = [torch.cat([each.features.float().cpu() for each in network(view)]) for view in views]
                parts[int(ids[0])] = torch.stack(vectors)
                _merge(near, shown, ids, views, vectors)
                bar.update(min(len(ids) * world.size, training.count - bar.n))

        world.together(work)
    of_ranks = gather({world.rank: near}, world).values()
    merged = [
        sorted((each for nearest in of_ranks for each in nearest[row]), key=lambda each: each[:2])[:NEAREST]
        for row in range(len(shown))
    ]
    return gather(parts, world), merged


def likeness(
    samples: metrics.Summary, ids: list[int], images: dict[int, np.ndarray], training: ImageSet, flip: bool,
    network: features.FeatureNetwork, world: World,
) -> tuple[dict, Image.Image | None]:  # fmt: skip
    """Return what a result says of the likeness of samples to the training images of their run, and the picture; on rank 0.

    samples: statistics, of rank 0; ids: rows of samples.features to show; images: uint8 [S,S,C] of these rows, on rank 0;
    training: of `training_images`; flip: whether mirrored ones count, data.flip. All ranks must call it. Raises InputError.
    """
    world.together(lambda: network.probe(training.shape))
    shown = world.together(lambda: None if samples.features is None else samples.features[ids].double(), everywhere=False)
    assert shown is not None  # features are complete on rank 0
    parts, near = _read(training, network, shown, flip, world)
    if world.rank > 0:
        return {}, None
    assert samples.features is not None
    views = torch.cat([*parts.values()], 1).to(world.device)  # [1 or 2,n,d]
    fake = samples.features.to(world.device)
    distances = lambda rows, others: torch.stack([metrics.nearest_distances(rows, view, others) for view in views]).amin(0)
    threshold = distances(views[0], True).quantile(QUANTILE).item()
    share = (distances(fake, False) < threshold).double().mean().item()
    about = {
        "nearer": share, "quantile": QUANTILE, "distance": threshold, "repeats": share >= REPEATED, "shown": len(ids),
        "training": training.about, "mirrored": flip,
    }  # fmt: skip
    return about, picture([images[i] for i in ids], [[each.image for each in row] for row in near])


def sentence(about: dict) -> str:
    """Return one line on the likeness of a result."""
    return (
        f"{about['nearer']:.1%} of the samples are nearer to a training image than all but {about['quantile']:.0%} of the training "
        "images are to another one"
    )


def picture(samples: list[np.ndarray], nearest: list[list[np.ndarray]]) -> Image.Image:
    """Return a picture with a row per sample: the sample, then its nearest training images, the nearest first."""
    left = pictures.grid(np.stack(samples), 1).convert("RGB")
    right = pictures.grid(np.stack([image for row in nearest for image in row]), len(nearest[0])).convert("RGB")
    gap = max(4, samples[0].shape[0] // 4)
    sheet = Image.new("RGB", (left.width + gap + right.width, left.height), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + gap, 0))
    return sheet
