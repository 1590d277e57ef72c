"""ImageNet-2012: counts, checksums, the names of its 1000 classes, and its development kit."""

import io
import re
import tarfile
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from fastdit.config import InputError

COUNTS = {"train": 1_281_167, "val": 50_000}  # images of each split
MD5 = {  # of the archives, from torchvision.datasets.ImageNet
    "train": "1d675b47d978889d74fa0da5fadfb00e",
    "val": "29b22e2961454d5413ddabcf34fc5622",
    "devkit": "fa75699e90414af021442c21a62c3abf",
}
WNID = re.compile(r"n\d{8}")
FIRST, LAST = "n01440764", "n15075141"  # of the 1000 wnids of ILSVRC 2012, sorted


class Devkit(NamedTuple):
    """The classes of ImageNet and of its validation images."""

    names: dict[str, str]  # class names by wnid
    val: list[str]  # wnids of the validation images, in the order of their numbers


def imagenet_names() -> list[str]:
    """Return the 1000 class names in the order of the sorted wnids: label 0 is "tench, Tinca tinca"."""
    return resources.files("fastdit.data").joinpath("imagenet_classes.txt").read_text().splitlines()


def are_imagenet(classes: list[str]) -> bool:
    """Whether class ids are the 1000 wnids of ILSVRC 2012."""
    return len(classes) == 1000 and (classes[0], classes[-1]) == (FIRST, LAST) and all(map(WNID.fullmatch, classes))


def read_devkit(path: Path) -> Devkit:
    """Read data/meta.mat and data/ILSVRC2012_validation_ground_truth.txt of ILSVRC2012_devkit_t12.tar.gz. Raises InputError if one
    of them is missing or unreadable."""
    import scipy.io

    wanted = {"meta.mat": b"", "ILSVRC2012_validation_ground_truth.txt": b""}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                base = member.name.rpartition("/")[2]
                if base in wanted and member.isreg():
                    wanted[base] = tar.extractfile(member).read()
        if not all(wanted.values()):
            raise ValueError("one of them is missing")
        synsets = scipy.io.loadmat(io.BytesIO(wanted["meta.mat"]), squeeze_me=True)["synsets"]
        leaves = {int(s["ILSVRC2012_ID"]): (str(s["WNID"]), str(s["words"])) for s in synsets if s["num_children"] == 0}
        truth = [leaves[int(line)][0] for line in wanted["ILSVRC2012_validation_ground_truth.txt"].split()]
    except (OSError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--devkit {path} is not ILSVRC2012_devkit_t12.tar.gz with its meta.mat and ground truth: {error}"
        ) from error
    return Devkit(dict(leaves.values()), truth)
