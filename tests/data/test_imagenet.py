"""ImageNet's class names, counts and development kit."""

import pytest

from benchmarks import photographs
from fastdit.config import InputError
from fastdit.data import imagenet


def test_shipped_names_are_those_of_imagenet():
    names = imagenet.imagenet_names()
    assert len(names) == 1000 and names[0].startswith("tench") and names[207] == "golden retriever"
    wnids = [imagenet.FIRST, *(f"n02{i:06d}" for i in range(998)), imagenet.LAST]
    assert imagenet.are_imagenet(wnids) and not imagenet.are_imagenet(wnids[:-1])


def test_a_devkit_is_read(archives):
    devkit = imagenet.read_devkit(archives[2])
    assert len(devkit.names) == 5 and set(devkit.names.values()) == {f"thing {i}, item {i}" for i in range(5)}
    assert [devkit.names[wnid] for wnid in devkit.val] == [f"thing {i * 3 % 5}, item {i * 3 % 5}" for i in range(8)]


def test_what_is_no_devkit_is_one_sentence(tmp_path):
    (tmp_path / "other.tar").write_bytes(photographs.tar_of({"data/meta.mat": b"half of it"}))
    with pytest.raises(InputError, match=r"other\.tar is not ILSVRC2012_devkit_t12\.tar\.gz .*: one of them is missing"):
        imagenet.read_devkit(tmp_path / "other.tar")
    with pytest.raises(InputError, match="No such file"):
        imagenet.read_devkit(tmp_path / "nowhere.tar.gz")


def test_counts_and_checksums_are_of_the_same_archives():
    assert set(imagenet.MD5) == {*imagenet.COUNTS, "devkit"} and sum(imagenet.COUNTS.values()) == 1_331_167
