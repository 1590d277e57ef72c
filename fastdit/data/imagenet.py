"""ImageNet-2012: counts, checksums, the names of its 1000 classes, its development kit, and the lists beside Kaggle's copy.

Kaggle's copy is ILSVRC/Data/CLS-LOC with train/<wnid>/, a flat val/ and test/, and beside ILSVRC/ the files of LISTS.
"""

import csv
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


VAL_NAME = re.compile(r"(?:^|/)ILSVRC2012_val_(\d{8})(?=[._])")  # of a validation image, with its number
SOLUTION = "LOC_val_solution.csv"  # of Kaggle's copy: the classes of the validation images
SYNSETS = "LOC_synset_mapping.txt"  # the names of the classes
LISTS = (SOLUTION, SYNSETS)
LEVELS = 4  # folders above val/ that are searched for them: CLS-LOC, Data, ILSVRC, and the one that holds it
HOW_TO_LABEL = f"put Kaggle's {SOLUTION} beside its folder, or give --devkit ILSVRC2012_devkit_t12.tar.gz"


class Devkit(NamedTuple):
    """The classes of ImageNet and of its validation images."""

    names: dict[str, str]  # class names by wnid
    val: dict[int, str]  # wnids of the validation images by their number

    def label_of(self, name: str) -> str | None:
        """Return the wnid of a validation image by its name, None if it is not known."""
        number = VAL_NAME.search(name)
        return self.val.get(int(number[1])) if number else None


def imagenet_names() -> list[str]:
    """Return the 1000 class names in the order of the sorted wnids: label 0 is "tench, Tinca tinca"."""
    return resources.files("fastdit.data").joinpath("imagenet_classes.txt").read_text().splitlines()


def are_imagenet(classes: list[str]) -> bool:
    """Whether class ids are the 1000 wnids of ILSVRC 2012."""
    return len(classes) == 1000 and (classes[0], classes[-1]) == (FIRST, LAST) and all(map(WNID.fullmatch, classes))


def data_folder(path: Path) -> Path:
    """Return the folder of the images in an unzipped archive of Kaggle's, or else `path` itself."""
    return next((data for inside in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC") if (data := path / inside).is_dir()), path)


def label_val(lists: list[Path]) -> bool:
    """Whether a development kit or one of LISTS tells the classes of the validation images."""
    return any(file.name != SYNSETS for file in lists)


def find_lists(paths: list[Path]) -> list[Path]:
    """Return the LISTS that lie in or above some folders of images, the nearest of each name."""
    folders = [folder for path in paths for folder in (path, *list(path.absolute().parents)[:LEVELS])]
    found = (next((file for folder in folders if (file := folder / name).is_file()), None) for name in LISTS)
    return [file for file in found if file]


def read_lists(files: list[Path]) -> Devkit:
    """Read the development kit, or what there is of LISTS. Raises InputError if a file is not what its name says."""
    kit = Devkit({}, {})
    for file in files:
        if file.name not in LISTS:
            return read_devkit(file)
        try:
            if file.name == SOLUTION:
                with file.open(newline="") as lines:
                    for row in csv.DictReader(lines):
                        number, wnid = VAL_NAME.search(f"{row['ImageId']}."), row["PredictionString"].split()[0]
                        if not number or not WNID.fullmatch(wnid):
                            raise ValueError(f"{row['ImageId']} has no number or class")
                        kit.val[int(number[1])] = wnid
            else:
                for line in file.read_text().splitlines():
                    wnid, name = line.split(maxsplit=1)
                    if not WNID.fullmatch(wnid):
                        raise ValueError(f"{wnid} is no wnid")
                    kit.names[wnid] = name.strip()
        except (OSError, ValueError, KeyError, AttributeError, IndexError, TypeError, csv.Error) as error:
            reason = f"it has no column {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{file} is not as Kaggle ships it ({reason}): fetch it again, or rename it") from error
    return kit


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
                    file = tar.extractfile(member)
                    assert file is not None  # as for every regular file
                    wanted[base] = file.read()
        if not all(wanted.values()):
            raise ValueError("one of them is missing")
        synsets = scipy.io.loadmat(io.BytesIO(wanted["meta.mat"]), squeeze_me=True)["synsets"]
        leaves = {int(s["ILSVRC2012_ID"]): (str(s["WNID"]), str(s["words"])) for s in synsets if s["num_children"] == 0}
        truth = [leaves[int(line)][0] for line in wanted["ILSVRC2012_validation_ground_truth.txt"].split()]
    except (OSError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--devkit {path} is not ILSVRC2012_devkit_t12.tar.gz with its meta.mat and ground truth: {error}"
        ) from error
    return Devkit(dict(leaves.values()), dict(enumerate(truth, 1)))
