"""ImageNet's class names, counts and development kit, and its copy as Kaggle ships it."""

import os

import pytest

from benchmarks import photographs
from commands import complains
from fastdit.config import InputError
from fastdit.data import imagenet, prepare
from fastdit.data.index import open_index


def test_shipped_names_are_those_of_imagenet():
    names = imagenet.imagenet_names()
    assert len(names) == 1000 and names[0].startswith("tench") and names[207] == "golden retriever"
    wnids = [imagenet.FIRST, *(f"n02{i:06d}" for i in range(998)), imagenet.LAST]
    assert imagenet.are_imagenet(wnids) and not imagenet.are_imagenet(wnids[:-1])


def test_a_devkit_is_read(archives):
    devkit = imagenet.read_devkit(archives[2])
    assert len(devkit.names) == 5 and set(devkit.names.values()) == {f"thing {i}, item {i}" for i in range(5)}
    assert [devkit.names[devkit.val[number]] for number in range(1, 9)] == [
        f"thing {i * 3 % 5}, item {i * 3 % 5}" for i in range(8)
    ]


def test_what_is_no_devkit_is_one_sentence(tmp_path):
    (tmp_path / "other.tar").write_bytes(photographs.tar_of({"data/meta.mat": b"half of it"}))
    with pytest.raises(InputError, match=r"other\.tar is not ILSVRC2012_devkit_t12\.tar\.gz .*: one of them is missing"):
        imagenet.read_devkit(tmp_path / "other.tar")
    with pytest.raises(InputError, match="No such file"):
        imagenet.read_devkit(tmp_path / "nowhere.tar.gz")


def test_counts_and_checksums_are_of_the_same_archives():
    assert set(imagenet.MD5) == {*imagenet.COUNTS, "devkit"} and sum(imagenet.COUNTS.values()) == 1_331_167


def labels_by_name(index, split):
    rows = index.rows(split)
    return {os.fsdecode(row["name"]).rpartition("/")[2]: index.classes[row["label"]] for row in rows}


VAL = {f"ILSVRC2012_val_{i:08d}.JPEG": i % 3 for i in range(1, 7)}  # class by name, of photographs.kaggle


@pytest.mark.parametrize("given", [".", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_copy_needs_no_more_than_its_folder(tmp_path, capsys, given):
    photographs.kaggle(tmp_path / "kaggle")
    index = open_index(prepare.prepare([tmp_path / "kaggle" / given], tmp_path / "index"))
    classes = sorted(os.listdir(tmp_path / "kaggle/ILSVRC/Data/CLS-LOC/train"))
    assert index.classes == classes and len(classes) == 3
    names = {f"n{i * 7 % 10:02d}{i:06d}": f"thing {i}, item {i}" for i in range(3)}
    assert index.class_names == [names[wnid] for wnid in classes]
    wnids = list(names)
    assert labels_by_name(index, "val") == {name: wnids[i] for name, i in VAL.items()}
    assert all(name.startswith(wnid) for name, wnid in labels_by_name(index, "train").items())
    assert len(index.rows("train")) == 6
    assert "left out: test" in capsys.readouterr().err


def test_a_flat_val_takes_its_classes_from_either_list(tmp_path, capsys):
    """From Kaggle's list beside it, up to four folders above it, or from --devkit."""
    data = photographs.kaggle(tmp_path / "kaggle")
    train, val, devkit = data / "train", data / "val", photographs.imagenet(tmp_path / "archives", val=6)[2]
    by_list = open_index(prepare.prepare([train], tmp_path / "a", val))
    solution = tmp_path / "kaggle" / imagenet.SOLUTION
    (tmp_path / "elsewhere.csv").write_bytes(solution.read_bytes())
    solution.unlink()
    complains(capsys, ["prepare", train, "--val", val, "--out", tmp_path / "b"], "00000001.JPEG", imagenet.SOLUTION, "--devkit")
    assert not (prepare.prepare([data], tmp_path / "b") / "val.npy").exists()
    said = [line for line in capsys.readouterr().err.splitlines() if f"{val} is left out" in line]
    assert len(said) == 1 and imagenet.SOLUTION in said[0] and "--devkit" in said[0]
    solution = data / imagenet.SOLUTION
    solution.write_bytes((tmp_path / "elsewhere.csv").read_bytes())
    beside = open_index(prepare.prepare([train], tmp_path / "c", val))
    assert labels_by_name(beside, "val") == labels_by_name(by_list, "val")
    solution.write_text(solution.read_text().splitlines()[0] + "\nILSVRC2012_val_00000001,n00000000 1 2 3 4\n")
    complains(capsys, ["prepare", train, "--val", val, "--out", tmp_path / "d"], "00000002.JPEG has no class", imagenet.SOLUTION)
    solution.unlink()
    kit = imagenet.read_devkit(devkit)
    for i, wnid in enumerate(sorted(kit.names)):  # the devkit's classes are others than those of the copy
        sorted(train.iterdir())[min(i, 2)].rename(train / wnid) if i < 3 else (train / wnid).mkdir()
    by_kit = open_index(prepare.prepare([train], tmp_path / "e", val, devkit))
    assert labels_by_name(by_kit, "val") == {name: kit.val[int(name[15:23])] for name in VAL}


def test_a_sorted_val_needs_no_list_and_keeps_its_folders(tmp_path):
    """Also if the class folders have other names than the list beside them."""
    data = photographs.kaggle(tmp_path / "kaggle")
    wnids = [f"n{i * 7 % 10:02d}{i:06d}" for i in range(3)]
    for name, i in VAL.items():
        (data / "val" / f"class {i}").mkdir(exist_ok=True)
        (data / "val" / name).rename(data / "val" / f"class {i}" / name)
    for i, wnid in enumerate(wnids):
        (data / "train" / wnid).rename(data / "train" / f"class {i}")
    index = open_index(prepare.prepare([data], tmp_path / "index"))
    assert index.classes == ["class 0", "class 1", "class 2"] and index.class_names is None
    assert labels_by_name(index, "val") == {name: f"class {i}" for name, i in VAL.items()}


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        (imagenet.SOLUTION, "a,b\n1,2\n", "no column 'ImageId'"),
        (imagenet.SOLUTION, "ImageId,PredictionString\nILSVRC2012_val_00000001,\n", "list index out of range"),
        (imagenet.SOLUTION, "ImageId,PredictionString\nILSVRC2012_val_00000001,cat 1 2 3 4\n", "has no number or class"),
        (imagenet.SOLUTION, "ImageId,PredictionString\nILSVRC2012_train_1,n00000000 1\n", "has no number or class"),
        (imagenet.SOLUTION, b"ImageId,PredictionString\n\xff\xfe\n", "utf-8"),
        (imagenet.SYNSETS, "tench\n", "not enough values"),
        (imagenet.SYNSETS, "tench fish\n", "tench is no wnid"),
    ],
)
def test_a_damaged_list_is_one_sentence(tmp_path, capsys, name, text, reason):
    data = photographs.kaggle(tmp_path / "kaggle")
    (tmp_path / "kaggle" / name).write_bytes(text.encode() if isinstance(text, str) else text)
    complains(capsys, ["prepare", data, "--out", tmp_path / "index"], name, "is not as Kaggle ships it", reason, "fetch it again")


def test_a_changed_list_makes_the_index_again(tmp_path):
    data = photographs.kaggle(tmp_path / "kaggle")
    out = prepare.prepare([data], tmp_path / "index")
    mapping = tmp_path / "kaggle" / imagenet.SYNSETS
    mapping.write_text(mapping.read_text().replace("thing 1", "other 1"))
    assert "other 1, item 1" in open_index(prepare.prepare([data], out)).class_names
