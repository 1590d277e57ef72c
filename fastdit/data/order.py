"""Which images a step takes, and how they are cropped and mirrored: functions of (seed, epoch, image) alone. B batch, n images.

Step s of an epoch takes elements s·G .. (s+1)·G of the epoch's permutation, G the global batch; what is left over at the end is
dropped. Within it, micro-step m of rank r takes the B elements from (m·ranks + r)·B on. So every rank has the same number of
batches, the global batch is the same at 1 or 8 ranks, and a resume needs no state but the step.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastdit import kernels
from fastdit.config import Config, InputError
from fastdit.distributed import World
from fastdit.flow import Stream

# of torchvision's RandomResizedCrop: the crop's share of the area, its ratio width/height, tries
AREA, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10


def check_classes(count: int, config: Config) -> None:
    """Raise InputError unless the model has a class for each of the data's."""
    if count > config.model.num_classes:
        raise InputError(
            f"model.num_classes={config.model.num_classes}, but {config.data.source} has class ids up to {count - 1}: "
            f"set model.num_classes={count}"
        )


class Order:
    """The order in which a run reads a data set of n images."""

    def __init__(self, count: int, config: Config, world: World) -> None:
        """count: n. Raises InputError when the global batch is larger."""
        train = config.train
        self.batch_size, self.ranks, self.rank = train.batch_size, world.size, world.rank
        self.accumulation, self.seed = train.accumulation, train.seed
        self.global_batch = train.batch_size * train.accumulation * world.size
        self.steps_per_epoch = count // self.global_batch
        if self.steps_per_epoch == 0:
            raise InputError(
                f"the global batch of {self.global_batch} images (train.batch_size x train.accumulation x ranks) is larger "
                f"than the {count} images of {config.data.source}: lower train.batch_size"
            )
        # of this epoch and the next: readers run ahead, in threads
        self._permutation = lru_cache(2)(lambda epoch: np.random.default_rng([self.seed, epoch]).permutation(count))
        self._permutation_on = lru_cache(2)(lambda device, epoch: torch.from_numpy(self._permutation(epoch)).to(device))

    def first_index(self, micro: int) -> int:
        """The index in the global batch of this rank's first image in a micro-step."""
        return (micro * self.ranks + self.rank) * self.batch_size

    def images(self, step: int, micro: int) -> tuple[np.ndarray, int]:
        """int64 [B], the images of this rank's micro-step; and the epoch."""
        epoch, place = self._place(step, micro)
        return self._permutation(epoch)[place], epoch

    def images_on(self, device: torch.device, step: int, micro: int) -> tuple[Tensor, int]:
        """`images`, as a slice of a permutation that lies on the device: nothing is copied but once an epoch."""
        epoch, place = self._place(step, micro)
        return self._permutation_on(device, epoch)[place], epoch

    def _place(self, step: int, micro: int) -> tuple[int, slice]:
        """The epoch, and this rank's part of its permutation."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.global_batch + self.first_index(micro)
        return epoch, slice(first, first + self.batch_size)

    def flips(self, images: Tensor, epoch: int) -> Tensor:
        """bool [B]: which of the images int64 [B] are mirrored in an epoch, half of them."""
        return kernels.counter_uniform(self.seed, Stream.FLIP, images + (epoch << 32), ()) < 0.5

    def random_crops(
        self, images: np.ndarray, epoch: int, heights: np.ndarray, widths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(start, end) fp32 [B,2], (row, column) in pixels of the image: by the rules of torchvision's RandomResizedCrop, a central
        crop where no try fits."""
        u = kernels.counter_uniform(self.seed, Stream.CROP, torch.from_numpy(images) + (epoch << 32), (TRIES, 4)).double().numpy()
        h, w = heights.astype(np.float64)[:, None], widths.astype(np.float64)[:, None]
        area = h * w * (AREA[0] + (AREA[1] - AREA[0]) * u[..., 0])
        ratio = np.exp(math.log(RATIO[0]) + math.log(RATIO[1] / RATIO[0]) * u[..., 1])
        cw, ch = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (cw >= 1) & (ch >= 1) & (cw <= w) & (ch <= h)
        first = np.where(fits.any(1), fits.argmax(1), 0)[:, None]
        pick = lambda values: np.take_along_axis(values, first, 1)[:, 0]
        top, left = np.floor(pick(u[..., 2]) * (h[:, 0] - pick(ch) + 1)), np.floor(pick(u[..., 3]) * (w[:, 0] - pick(cw) + 1))
        start, extent = np.stack((top, left), 1), np.stack((pick(ch), pick(cw)), 1)
        # the whole, or as much of its middle as the ratio allows
        middle = np.rint(np.concatenate((np.minimum(h, w / RATIO[0]), np.minimum(w, h * RATIO[1])), 1))
        fitted = fits.any(1)[:, None]
        extent = np.where(fitted, extent, middle)
        start = np.where(fitted, start, np.floor((np.concatenate((h, w), 1) - middle) / 2))
        return start.astype(np.float32), (start + extent).astype(np.float32)


def center_crops(heights: np.ndarray, widths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, end) fp32 [B,2], (row, column) in pixels of the image: what torchvision's Resize(size) and CenterCrop(size) keep,
    by its own integers."""
    pixels = np.stack((heights, widths), 1).astype(np.int64)
    resized = size * pixels // pixels.min(1, keepdims=True)
    start = np.rint((resized - size) / 2)  # rounds half to even, as Python does
    scale = pixels / resized
    return (start * scale).astype(np.float32), ((start + size) * scale).astype(np.float32)
