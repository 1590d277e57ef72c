"""What lies at the paths of a user: class folders, splits, shards, pictures; and what is left out there."""

import os
import time
from pathlib import Path

import pytest

import pictures
from fastdit.config import InputError
from fastdit.data import discovery
from fastdit.data.folders import DANGLING


def laid_out(root: Path, *paths, val=None, named=False):
    """(labels or names of train, of val, notes) of paths below root."""
    layout = discovery.lay_out([root / path for path in paths or [""]], root / val if val else None, named)
    shown = lambda items: [item.label or os.path.relpath(item.path, root) for item in items]
    return shown(layout.splits["train"]), shown(layout.splits["val"]), "\n".join(layout.notes)


def test_class_folders_and_what_lies_beside_them(tmp_path):
    pictures.write(tmp_path, "cat/0.jpg", "dog/0.jpg", "loose.jpg", "all.tar", "all.tar.gz", "all.zip", "README.md")
    pictures.write(tmp_path, "@eaDir/0.jpg", ".ipynb_checkpoints/0.jpg", ".git/config", "__MACOSX/._0.jpg", "x.index/index.json")
    pictures.write(tmp_path, "x.index/train.npy", "latents/settings.json")
    train, val, notes = laid_out(tmp_path)
    assert (train, val) == (["cat", "dog"], [])
    for text in (
        "archives: 1 (all.tar)",
        "loose pictures: 1 (loose.jpg)",
        "1 .tar.gz",
        "1 .zip",
        "1 .md",
        "x.index",
        "made by fastdit",
    ):
        assert text in notes, notes
    assert ".ipynb_checkpoints, @eaDir, __MACOSX (hidden" in notes and ".git" not in notes


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (["train", "val"], "train", "val"),
        (["Train", "Valid"], "Train", "Valid"),
        (["TRAIN", "VALIDATION", "TEST"], "TRAIN", "VALIDATION"),
        (["train", "dev"], "train", "dev"),
        (["training_set", "validation_set"], "training_set", "validation_set"),
        (["train2017", "val2017", "test2017"], "train2017", "val2017"),
        (["Training", "Testing"], "Training", None),
        (["train", "val", "labels"], "train", "val"),
        (["trainval", "val", "test"], "trainval", "val"),
        (["img_train", "img_val", "img_test", "extra"], "img_train", "img_val"),
        (["Train-faces", "Valid-faces"], "Train-faces", "Valid-faces"),
        (["trainA", "valA", "other"], "trainA", "valA"),
    ],
)
def test_a_root_of_splits(tmp_path, names, train, val):
    for name in names:
        pictures.write(tmp_path, f"{name}/a/0.jpg", f"{name}/b/0.jpg")
    layout = discovery.lay_out([tmp_path], None, False)
    paths = {split: [item.path for item in layout.splits[split]] for split in ("train", "val")}
    assert paths["train"] == [str(tmp_path / train / name) for name in "ab"]
    assert paths["val"] == ([str(tmp_path / val / name) for name in "ab"] if val else [])
    left_out = set(names) - {train, val}
    (note,) = layout.notes
    assert f"{train} to train on" in note and (f"{val} as validation images" in note) == bool(val)
    assert all(name in note.partition("left out: ")[2] for name in left_out)
    assert val or f"--val {tmp_path / 'Testing'}" in note


def test_names_of_splits_that_are_classes(tmp_path):
    pictures.write(tmp_path, "a/train/0.jpg", "a/car/0.jpg", "a/plane/0.jpg")
    assert laid_out(tmp_path, "a")[0] == ["car", "plane", "train"]
    pictures.write(tmp_path, "b/train/0.jpg", "b/test tube/0.jpg", "b/training shoe/0.jpg")
    assert laid_out(tmp_path, "b")[0] == ["test tube", "train", "training shoe"]


def test_several_folders_of_a_split_are_refused(tmp_path):
    pictures.write(tmp_path, *(f"{split}{domain}/0.jpg" for split in ("train", "test") for domain in "AB"))
    with pytest.raises(InputError, match="holds trainA, trainB, each of which could be its train images"):
        laid_out(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["val/a/0.jpg", "test/a/0.jpg"], "holds test, val and nothing to train on"),
        (["train/a/0.jpg", "Train/a/0.jpg", "val/a/0.jpg"], "holds Train, train, each of which could be its train images"),
        (["val-0.tar", "test-0.tar"], "holds test-0.tar, val-0.tar and nothing to train on"),
        (
            ["x.tar.gz", "y.zip"],
            r"neither class folders nor .tar, .parquet archives nor pictures \(there are 1 .tar.gz, 1 .zip files\)",
        ),
        ([".hidden/0.jpg"], "neither class folders nor .tar, .parquet archives nor pictures"),
    ],
)
def test_what_cannot_be_told_is_one_sentence(tmp_path, names, message):
    pictures.write(tmp_path, *names)
    with pytest.raises(InputError, match=message):
        discovery.lay_out([tmp_path], None, False)


@pytest.mark.parametrize(
    ("names", "train", "val", "note"),
    [
        (["train-0.tar", "train-1.tar", "val-0.tar", "test-0.tar"], ["train-0.tar", "train-1.tar"], ["val-0.tar"], "test-0.tar"),
        (["imagenet_train_0.tar", "imagenet_validation_0.tar"], ["imagenet_train_0.tar"], ["imagenet_validation_0.tar"], ""),
        (["00.tar", "01.tar", "val.tar"], ["00.tar", "01.tar"], ["val.tar"], ""),
        (["train-0.tar", "train-1.tar"], ["train-0.tar", "train-1.tar"], [], None),
        (["a.tar", "b.tar", "latest.tar"], ["a.tar", "b.tar", "latest.tar"], [], None),
        (["test-0.tar", "test-1.tar"], ["test-0.tar", "test-1.tar"], [], None),
        (["train.tar", "other.tar"], ["other.tar", "train.tar"], [], None),
        (["train-0.tar", "extra.tar", "val-0.tar"], ["train-0.tar"], ["val-0.tar"], "left out: extra.tar"),
    ],
)
def test_shards_of_several_splits(tmp_path, names, train, val, note):
    pictures.write(tmp_path, *names)
    found_train, found_val, notes = laid_out(tmp_path)
    assert (found_train, found_val) == (train, val)
    assert (notes == "") if note is None else note in notes


def test_shards_beside_a_folder_without_data(tmp_path):
    pictures.write(tmp_path, "0.tar", "meta/info.json")
    train, _, notes = laid_out(tmp_path)
    assert train == ["0.tar"] and "folders: 1 (meta)" in notes


def test_a_folder_above_the_wanted_one_is_read_as_that(tmp_path):
    pictures.write(tmp_path, "up/Data/CLS/train/a/0.jpg", "up/Data/CLS/train/b/0.jpg", "up/Data/CLS/val/a/0.jpg")
    pictures.write(tmp_path, "up/Annotations/a.xml", "up/README")
    train, val, notes = laid_out(tmp_path, "up")
    assert (train, val) == (["a", "b"], ["a"])
    assert f"{tmp_path}/up/Data is read: no other folder in {tmp_path}/up holds images" in notes
    pictures.write(tmp_path, "one/cat/0.jpg", "one/cat/sub/1.jpg", "one/empty/x.txt")
    assert laid_out(tmp_path, "one")[0] == ["cat", "empty"]  # pictures lie in cat itself: it is a class
    pictures.write(tmp_path, "links/a/0.jpg")
    (tmp_path / "links" / "Data").mkdir()
    for name in "xy":
        (tmp_path / "links" / "Data" / name).symlink_to(tmp_path / "one" / "cat")
    assert laid_out(tmp_path, "links/Data")[0] == ["x", "y"]


def test_flat_folders_are_one_class(tmp_path):
    pictures.write(tmp_path, "flat/0.jpg", "flat/1.jpg", "flat/captions/0.txt")
    assert laid_out(tmp_path, "flat")[0] == ["flat"]
    assert "has no class folders: all its images are of one class, flat" in discovery.find([tmp_path / "flat"]).layout.notes[-1]
    (tmp_path / "link").symlink_to("flat")
    assert laid_out(tmp_path, "link")[0] == ["link"]
    assert laid_out(tmp_path, "flat", "link")[0] == ["flat", "link"]
    pictures.write(tmp_path, "faces/train/0.jpg", "faces/val/0.jpg")
    assert laid_out(tmp_path, "faces")[:2] == (["faces"], ["faces"])
    assert laid_out(tmp_path, "faces/train", val="flat")[:2] == (["train"], ["train"])


def test_validation_images_without_classes_are_left_out_unless_their_names_tell(tmp_path):
    pictures.write(tmp_path, "d/train/a/0.jpg", "d/train/b/0.jpg", "d/val/ILSVRC2012_val_00000001.JPEG")
    train, val, notes = laid_out(tmp_path, "d")
    assert (train, val) == (["a", "b"], []) and "d/val is left out: its pictures lie in no class folders" in notes
    assert laid_out(tmp_path, "d", named=True)[1] == ["d/val"]
    assert laid_out(tmp_path, "d/train", val="d/val")[1] == ["d/val"]  # it was asked for: its images are refused by name


def test_val_that_is_given_wins(tmp_path):
    pictures.write(tmp_path, "d/train/a/0.jpg", "d/train/b/0.jpg", "d/val/a/0.jpg", "d/test/b/0.jpg")
    layout = discovery.lay_out([tmp_path / "d"], tmp_path / "d" / "test", False)
    assert [item.path for item in layout.splits["val"]] == [str(tmp_path / "d/test/b")]
    layout = discovery.lay_out([tmp_path / "d" / "train"], tmp_path / "d", False)  # a root of splits: its own val
    assert [item.path for item in layout.splits["val"]] == [str(tmp_path / "d/val/a")]


def test_linked_class_folders(tmp_path):
    pictures.write(tmp_path, "pool/x1/0.jpg", "pool/x2/0.jpg", "s/real/0.jpg")
    for link, target in (
        ("cat", "../pool/x2"),
        ("kitten", "../pool/x2"),
        ("dog", "../pool/x1"),
        ("gone", "nowhere"),
        ("round", "round"),
        ("up", ".."),
    ):
        (tmp_path / "s" / link).symlink_to(target)
    found = discovery.find([tmp_path / "s"])
    assert [source.label for source in found.sources["train"]] == ["cat", "dog", "kitten", "real"]
    assert found.layout.bad == [(str(tmp_path / "s"), name, DANGLING) for name in ("gone", "round")]
    notes = "\n".join(found.layout.notes)
    assert "cat, kitten are links to the same folder" in notes and "up (a link back)" in notes


def test_what_class_folders_hold_besides_images_is_said(tmp_path):
    pictures.write(tmp_path, "a/0.jpg", "a/1.gif", "b/0.jpg", "b/1.gif", "b/2.avif", "b/.cache/0.jpg", "b/deep/er/3.jpg")
    pictures.write(tmp_path, "b/run/metrics.jsonl", "b/run/checkpoints/x", "b/run/samples/0.png")
    pictures.write(tmp_path, "runs/r/metrics.jsonl", "runs/r/checkpoints/x", "runs/r/samples/0.png")
    found = discovery.find([tmp_path])
    assert [source.label for source in found.sources["train"]] == ["a", "b"]
    notes = "\n".join(found.layout.notes)
    (tmp_path / "empty").mkdir()
    assert "class folders without images: 1 (empty)" in discovery.find([tmp_path]).layout.notes
    for text in ("1 .avif, 2 .gif files; only .bmp, .jfif", ".cache (1)", "b/run, ", "runs/r, made by fastdit", "b/deep/er/3.jpg"):
        assert text in notes, notes


def test_an_interrupt_does_not_wait_for_the_folders_that_are_left(tmp_path, monkeypatch):
    pictures.write(tmp_path, *(f"{i}/0.jpg" for i in range(200)))
    walked = []

    def interrupted(path):
        walked.append(path)
        time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(discovery, "THREADS", 1)
    monkeypatch.setattr(discovery.folders, "walk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        discovery.find([tmp_path])
    assert len(walked) < 20


def test_unreadable_paths_are_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.tar cannot be read: No such file"):
        discovery.find([tmp_path / "nowhere.tar"])
