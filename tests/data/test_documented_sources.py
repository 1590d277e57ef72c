"""docs/data.md: every row of its table is typed on such data; and the classes of the same pictures agree in every form."""

import re
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import autoencoders
import inception
from benchmarks import photographs
from commands import settings
from fastdit import checkpoint, cli
from fastdit.config import from_dict
from fastdit.data import encode, imagenet, loader, prepare
from fastdit.data.index import is_index, open_index
from fastdit.distributed import World

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
TABLE = PAGE.read_text().partition("## What you have, what to type\n")[2].partition("\n## ")[0]
ROWS = dict(re.findall(r"^\| (.+?) \| `(.+?)` \| .+ \|$", TABLE, re.M))
NAMES = ["ant", "bee", "cat"]
PAIRS = [(name, i) for i in range(4) for name in NAMES]
HELD_OUT = [(name, i) for i in range(2) for name in NAMES]


@pytest.fixture(scope="module")
def pictures():
    """12 JPEGs by class and number, the first 6 of them the held-out ones too."""
    crops = photographs.crops(len(PAIRS))
    return {pair: photographs.encoded(crop.resize((48, 36))) for pair, crop in zip(PAIRS, crops, strict=True)}


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def folders(root: Path, pictures: dict, pairs: list = PAIRS) -> None:
    for name, i in pairs:
        write(root / name / f"{i}.jpg", pictures[name, i])


def tar(path: Path, pictures: dict) -> None:
    write(path, photographs.tar_of({f"{name}/{i}.jpg": pictures[name, i] for name, i in PAIRS}))


def webdataset(path: Path, pictures: dict, pairs: list) -> None:
    files = {}
    for key, (name, i) in enumerate(pairs):
        files |= {f"{key:04d}.jpg": pictures[name, i], f"{key:04d}.cls": name.encode()}
    write(path, photographs.tar_of(files))


def parquet(path: Path, pictures: dict, pairs: list = PAIRS) -> None:
    labels = [NAMES.index(name) for name, _ in pairs]
    photographs.write_parquet(path, [pictures[pair] for pair in pairs], labels, NAMES, 5)


MADE = {}  # by the first words of a row: what makes its data in a folder, the number of its classes and of its validation images


def row(words: str, classes: int = 3, held_out: int = 0):
    """Register a function of (folder, pictures) that makes a row's data."""

    def register(make):
        MADE[words] = make, classes, held_out
        return make

    return register


@row("nothing", 10)
def nothing(root: Path, pictures: dict) -> None:
    pass


@row("a folder of class folders")
@row("any of these")
def class_folders(root: Path, pictures: dict) -> None:
    folders(root / "photos", pictures)


@row("a folder of pictures", 1)
def flat(root: Path, pictures: dict) -> None:
    for i, data in enumerate(pictures.values()):
        write(root / "photos" / f"{i}.jpg", data)


@row("a tar of pictures", 1)
def flat_tar(root: Path, pictures: dict) -> None:
    write(root / "flat.tar", photographs.tar_of({f"{i}.jpg": data for i, data in enumerate(pictures.values())}))


@row("a folder of `train/CLASS", 3, 6)
def split_root(root: Path, pictures: dict) -> None:
    folders(root / "photos/train", pictures)
    folders(root / "photos/val", pictures, HELD_OUT)


@row("training and validation images", 3, 6)
def two_places(root: Path, pictures: dict) -> None:
    folders(root / "photos", pictures)
    folders(root / "held_out", pictures, HELD_OUT)


@row("links to class folders", 2)
def links(root: Path, pictures: dict) -> None:
    folders(root / "all", pictures)
    (root / "subset").mkdir()
    for name in ("cat", "ant"):
        (root / "subset" / name).symlink_to(root / "all" / name)


@row("a tar of class folders")
def one_tar(root: Path, pictures: dict) -> None:
    tar(root / "photos.tar", pictures)


@row("webdataset shards", 3, 6)
def shards(root: Path, pictures: dict) -> None:
    webdataset(root / "shards/train-0000.tar", pictures, PAIRS)
    webdataset(root / "shards/val-0000.tar", pictures, HELD_OUT)


@row("ImageNet's archives", 3, 8)
def imagenet_archives(root: Path, pictures: dict) -> None:
    for path, name in zip(photographs.imagenet(root / "made", 3, 4), ("train.tar", "val.tar", "devkit"), strict=True):
        path.rename(root / ("ILSVRC2012_devkit_t12.tar.gz" if name == "devkit" else f"ILSVRC2012_img_{name}"))


@row("ImageNet unpacked, its `val/` flat", 3, 8)
def imagenet_unpacked(root: Path, pictures: dict) -> None:
    imagenet_archives(root, pictures)
    with tarfile.open(root / "ILSVRC2012_img_train.tar") as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                inner.extractall(root / "imagenet/train" / member.name.removesuffix(".tar"), filter="data")
    with tarfile.open(root / "ILSVRC2012_img_val.tar") as outer:
        outer.extractall(root / "imagenet/val", filter="data")


@row("ImageNet unpacked, its `val/` sorted", 3, 8)
def imagenet_sorted(root: Path, pictures: dict) -> None:
    imagenet_unpacked(root, pictures)
    wnids = imagenet.read_devkit(root / "ILSVRC2012_devkit_t12.tar.gz").val
    for path in list((root / "imagenet/val").iterdir()):
        write(path.parent / wnids[int(path.name[15:23])] / path.name, path.read_bytes())
        path.unlink()


@row("ImageNet from Kaggle", 3, 6)
def kaggle_unzipped(root: Path, pictures: dict) -> None:
    photographs.kaggle(root / "imagenet-object-localization-challenge")


@row("the same, without the folders above", 3, 6)
def kaggle_inside(root: Path, pictures: dict) -> None:
    photographs.kaggle(root)


@row("a data set of the Hugging Face Hub", 3, 6)
def hub(root: Path, pictures: dict) -> None:
    for split, pairs in (("train", PAIRS), ("validation", HELD_OUT), ("test", HELD_OUT[:1])):
        parquet(root / f"cats-and-dogs/data/{split}-00000-of-00001.parquet", pictures, pairs)


@row("Parquet files of other splits", 3, 6)
def parquet_files(root: Path, pictures: dict) -> None:
    for name, pairs in (("a", PAIRS[:7]), ("b", PAIRS[7:]), ("c", HELD_OUT)):
        parquet(root / f"{name}.parquet", pictures, pairs)


@row("an index and an autoencoder")
@row("an `.npz` of samples")
def index_and_more(root: Path, pictures: dict) -> None:
    class_folders(root, pictures)
    prepare.prepare([root / "photos"])
    autoencoders.tiny(root / "vae")
    np.savez(root / "samples.npz", np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8))
    inception.save(root / "inception.pt")


@row("latents")
def latents(root: Path, pictures: dict) -> None:
    index_and_more(root, pictures)
    encode.encode(root / "photos.index", root / "latents", str(root / "vae"), image_size=32, dtype="fp32", batch_size=4)


def test_every_row_has_made_data():
    assert len(ROWS) == TABLE.count("\n| ") - 1 == len(MADE) and all(any(have.startswith(words) for have in ROWS) for words in MADE)


@pytest.mark.parametrize("words", MADE)
def test_what_a_row_says_works(words, pictures, tmp_path, monkeypatch):
    make, classes, held_out = MADE[words]
    make(tmp_path, pictures)
    monkeypatch.chdir(tmp_path)
    command = next(shlex.split(typed) for have, typed in ROWS.items() if have.startswith(words))[1:]
    if command[0] == "train":
        command += settings(tmp_path / "runs", "train.total_steps=1", f"model.num_classes={classes}")
        if "mnist5k" not in command[1]:
            size = "16" if "latents" in command[1] else "32"
            channels = "4" if "latents" in command[1] else "3"
            command += ["data.image_size=32", f"model.input_size={size}", f"model.in_channels={channels}"]
    if command[0] == "encode":
        command += ["--image-size", "32", "--batch-size", "4", "--dtype", "fp32"]
    assert cli.main(command) == 0
    if command[0] == "prepare":
        (folder,) = (path for path in tmp_path.rglob("*.index") if is_index(path))
        index = open_index(folder)
        assert len(index.classes) == classes
        assert (folder / "val.npy").exists() == (held_out > 0) and (not held_out or len(index.rows("val")) == held_out)
        config = from_dict({"model": {"preset": "test/4"}, "train": {"batch_size": 2}, "data": {"image_size": 32}})
        images, labels = loader.ImageLoader(index, config, World(0, 1, torch.device("cpu"), None)).batch(0, 0)
        assert images.shape == (2, 3, 32, 32) and labels.max() < classes
    elif command[0] == "encode":
        assert (tmp_path / "latents" / "manifest.json").exists()


def kaggle(root: Path, pictures: dict) -> Path:
    data = root / "ILSVRC/Data/CLS-LOC"
    for name, i in PAIRS:
        write(data / "train" / f"n0000000{NAMES.index(name)}" / f"{i}.JPEG", pictures[name, i])
    for i, pair in enumerate(HELD_OUT, 1):
        write(data / "val" / f"ILSVRC2012_val_{i:08d}.JPEG", pictures[pair])
    truth = [f"ILSVRC2012_val_{i:08d},n0000000{NAMES.index(name)} 0 0 9 9 \n" for i, (name, _) in enumerate(HELD_OUT, 1)]
    write(root / "LOC_val_solution.csv", "".join(["ImageId,PredictionString\n", *truth]).encode())
    write(root / "LOC_synset_mapping.txt", "".join(f"n0000000{i} {name}\n" for i, name in enumerate(NAMES)).encode())
    return root


def printed(capsys) -> list[tuple[int, str, int]]:
    """Return id, name and number of images of the lines of a table of classes that a command printed."""
    rows = re.findall(r"^ *(\d+)  (?:\S+ +)?(\S+) +(\d+)$", "\n".join(capsys.readouterr()), re.M)
    return [(int(number), name, int(count)) for number, name, count in rows]


def test_the_classes_of_the_same_pictures_agree_in_every_form(pictures, tmp_path, capsys):
    """Id, name and number of images: in the index, in the loader, in a checkpoint, and as prepare, train and sample print them."""
    folders(tmp_path / "folders", pictures)
    tar(tmp_path / "all.tar", pictures)
    webdataset(tmp_path / "shards" / "0.tar", pictures, PAIRS)
    parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", pictures)
    sources = {name: tmp_path / name for name in ("folders", "all.tar", "shards", "hub")}
    sources["kaggle"] = kaggle(tmp_path / "kaggle", pictures)
    wanted = [(i, name, 4) for i, name in enumerate(NAMES)]
    for form, source in sources.items():
        capsys.readouterr()
        assert cli.main(["prepare", str(source)]) == 0
        assert printed(capsys) == wanted, form
        index = open_index(source.with_name(f"{source.name}.index"))
        counts = np.bincount(index.rows("train")["label"]).tolist()
        assert list(zip(range(3), index.class_names or index.classes, counts, strict=True)) == wanted, form
        tiny = settings(tmp_path / f"runs-{form}", f"data.source={source}", "data.image_size=32", "model.input_size=32")
        assert cli.main(["train", *tiny, "model.in_channels=3", "model.num_classes=3", "train.total_steps=2"]) == 0
        assert printed(capsys) == wanted, form
        run = tmp_path / f"runs-{form}" / "r"
        state = checkpoint.open_checkpoint(run).state
        assert list(zip(range(3), state.class_names, state.class_counts, strict=True)) == wanted, form
        assert (
            cli.main(["sample", "--checkpoint", str(run), "--class", "bee,cat", "--out", str(run / "grid.png"), "--steps", "1"])
            == 0
        )
        assert printed(capsys) == wanted[1:], form
