"""Which images a step takes, and how they are cropped and mirrored: functions of (seed, epoch, image) only.

B batch size per rank, n images. Step s of an epoch takes elements s·G .. (s+1)·G of the epoch's permutation, G the global batch; a
remainder at the end of an epoch is dropped. Of these, micro-step m of rank r takes the B elements from (m·ranks + r)·B. So every
rank has the same number of batches, and the global batch is the same at 1 or 8 ranks. A resume needs the step, and the `Since` of
G if the run had another one before.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdit import kernels
from fastdit.config import Config, InputError
from fastdit.distributed import World
from fastdit.flow import Stream
from fastdit.progress import warn

# Of torchvision's RandomResizedCrop
AREA = (0.08, 1.0)  # the crop's share of the area
RATIO = (3 / 4, 4 / 3)  # its width/height
TRIES = 10


def check_classes(count: int, config: Config, world: World | None = None) -> None:
    """Raise InputError unless the model has a class for each of the data's `count` classes.

    world: of the training data, whose first rank says which classes of the model have no images.
    """
    if count > config.model.num_classes:
        raise InputError(
            f"model.num_classes={config.model.num_classes}, but {config.data.source} has class ids up to {count - 1}: "
            f"set model.num_classes={count}"
        )
    if world and world.rank == 0 and count < config.model.num_classes:
        warn(
            f"{config.data.source} has {count} classes, and model.num_classes={config.model.num_classes}: the "
            f"model's classes from {count} on are never trained, set model.num_classes={count} unless other data follow"
        )


class Since(NamedTuple):
    """Where in the data a run took on its global batch."""

    step: int = 0  # completed steps
    epoch: int = 0
    used: int = 0  # images of that epoch that these steps have taken
    images: int = 0  # images that they have taken in all


def before(step: int, since: Since, global_batch: int, count: int) -> tuple[int, int]:
    """Return the epoch that a step reads, counted from 0, and the images of it that earlier steps have taken.

    since: where the run took on `global_batch`, at most `step` steps ago. count: n. The epoch of `since` ends as any other does:
    with the last step for which it has enough images left.
    """
    steps = step - since.step
    steps_left = max(0, count - since.used) // global_batch  # in the epoch of `since`
    if steps < steps_left:
        return since.epoch, since.used + steps * global_batch
    epochs, steps = divmod(steps - steps_left, count // global_batch)
    return since.epoch + 1 + epochs, steps * global_batch


def after(steps: int, since: Since, global_batch: int, count: int) -> tuple[int, int]:
    """Return the epoch of the last of `steps` completed steps, and the images of it that are taken then. Arguments as in `before`.

    A smaller batch may find room in what they leave of that epoch.
    """
    if steps == since.step:
        return since.epoch, since.used
    epoch, used = before(steps - 1, since, global_batch, count)
    return epoch, used + global_batch


@lru_cache(maxsize=2)  # this epoch and the next: readers run ahead, in threads
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the order of an epoch, int64 [n]."""
    return np.random.default_rng([seed, epoch]).permutation(count)


@lru_cache(maxsize=2)
def _permutation_on(device: torch.device, seed: int, epoch: int, count: int) -> Tensor:
    return torch.from_numpy(_permutation(seed, epoch, count)).to(device)


class Order:
    """The order in which a run reads a data set of n images."""

    def __init__(self, count: int, config: Config, world: World) -> None:
        """count: n. Raises InputError if the global batch is larger."""
        train = config.train
        self.count = count
        self.batch_size = train.batch_size
        self.accumulation = train.accumulation
        self.ranks = world.size
        self.rank = world.rank
        self.seed = train.seed
        self.global_batch = train.batch_size * train.accumulation * world.size
        self.since = Since()
        self.steps_per_epoch = count // self.global_batch
        if self.steps_per_epoch == 0:
            raise InputError(
                f"the global batch of {self.global_batch} images (train.batch_size x train.accumulation x ranks) is larger "
                f"than the {count} images of {config.data.source}: lower train.batch_size"
            )

    def first_index(self, micro: int) -> int:
        """Return the index in the global batch of this rank's first image in a micro-step."""
        return (micro * self.ranks + self.rank) * self.batch_size

    def images(self, step: int, micro: int) -> tuple[np.ndarray, int]:
        """Return the images int64 [B] of this rank's micro-step, and the epoch."""
        epoch, share = self._share(step, micro)
        return _permutation(self.seed, epoch, self.count)[share], epoch

    def images_on(self, device: torch.device, step: int, micro: int) -> tuple[Tensor, int]:
        """Return `images` as a slice of a permutation that lies on the device: nothing is copied but once per epoch."""
        epoch, share = self._share(step, micro)
        return _permutation_on(device, self.seed, epoch, self.count)[share], epoch

    def _share(self, step: int, micro: int) -> tuple[int, slice]:
        """Return the epoch, and the slice of its permutation that this rank's micro-step takes."""
        epoch, used = before(step, self.since, self.global_batch, self.count)
        first = used + self.first_index(micro)
        return epoch, slice(first, first + self.batch_size)

    def resume(self, step: int, since: Since, global_batch: int) -> None:
        """Continue after `step` steps of a run that took `global_batch` images per step from `since` on.

        If that is not this order's global batch, its first step begins where the last one ended.
        """
        self.since = since
        if global_batch != self.global_batch:
            images = since.images + (step - since.step) * global_batch
            self.since = Since(step, *after(step, since, global_batch, self.count), images)

    def images_seen(self, steps: int) -> int:
        """Return the number of images that `steps` completed steps have taken."""
        return self.since.images + (steps - self.since.step) * self.global_batch

    def epochs(self, steps: int) -> float:
        """Return the number of epochs that `steps` completed steps have taken."""
        epoch, used = after(steps, self.since, self.global_batch, self.count)
        return epoch + min(1.0, used / (self.steps_per_epoch * self.global_batch))

    def flips(self, images: Tensor, epoch: int) -> Tensor:
        """Return which of the images int64 [B] are mirrored in an epoch, half of them on average: bool [B]."""
        return kernels.counter_uniform(self.seed, Stream.FLIP, images + (epoch << 32), ()) < 0.5

    def random_crops(
        self, images: np.ndarray, epoch: int, heights: np.ndarray, widths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (start, end) fp32 [B,2], (row, column) in pixels of the image, by the rules of torchvision's RandomResizedCrop.

        The first of TRIES random crops that fits is taken, or else a central crop. images int64 [B]; heights and widths [B].
        """
        u = kernels.counter_uniform(self.seed, Stream.CROP, torch.from_numpy(images) + (epoch << 32), (TRIES, 4)).double().numpy()
        h, w = heights.astype(np.float64)[:, None], widths.astype(np.float64)[:, None]
        area = h * w * (AREA[0] + (AREA[1] - AREA[0]) * u[..., 0])
        ratio = np.exp(math.log(RATIO[0]) + math.log(RATIO[1] / RATIO[0]) * u[..., 1])
        crop_w, crop_h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))  # [B,TRIES]
        fits = (crop_w >= 1) & (crop_h >= 1) & (crop_w <= w) & (crop_h <= h)
        fits_any = fits.any(1, keepdims=True)
        first = np.where(fits_any, fits.argmax(1)[:, None], 0)
        crop_h, crop_w, top, left = (np.take_along_axis(a, first, 1) for a in (crop_h, crop_w, u[..., 2], u[..., 3]))  # [B,1]
        extent = np.concatenate((crop_h, crop_w), 1)
        start = np.concatenate((np.floor(top * (h - crop_h + 1)), np.floor(left * (w - crop_w + 1))), 1)
        # without a fit: the whole image, or as much of its middle as the ratio allows
        middle = np.rint(np.concatenate((np.minimum(h, w / RATIO[0]), np.minimum(w, h * RATIO[1])), 1))
        extent = np.where(fits_any, extent, middle)
        start = np.where(fits_any, start, np.floor((np.concatenate((h, w), 1) - middle) / 2))
        return start.astype(np.float32), (start + extent).astype(np.float32)


def center_crops(heights: np.ndarray, widths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (start, end) fp32 [B,2], (row, column) in pixels of the image: what torchvision's Resize(size) and CenterCrop(size)
    keep, in its own integer arithmetic."""
    pixels = np.stack((heights, widths), 1).astype(np.int64)
    resized = size * pixels // pixels.min(1, keepdims=True)
    start = np.rint((resized - size) / 2)  # rounds half to even, as Python does
    scale = pixels / resized
    return (start * scale).astype(np.float32), ((start + size) * scale).astype(np.float32)
