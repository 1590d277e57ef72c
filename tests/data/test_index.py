"""Indexes: reading images by record, sources that have changed, formats of before and of another version."""

import json
import os

import numpy as np
import pytest

from benchmarks import photographs
from fastdit.config import InputError
from fastdit.data import prepare
from fastdit.data.index import FILE, open_index, record, save_array


@pytest.fixture
def prepared(tmp_path):
    """The index of two class folders of one image, and the index of the same images in a tar."""
    images = {f"{name}/a.jpg": photographs.encoded(image) for name, image in zip("cd", photographs.crops(2), strict=True)}
    for name, data in images.items():
        (tmp_path / "folders" / name).parent.mkdir(parents=True)
        (tmp_path / "folders" / name).write_bytes(data)
    (tmp_path / "all.tar").write_bytes(photographs.tar_of(images))
    return [prepare.prepare([tmp_path / name]) for name in ("folders", "all.tar")], list(images.values())


def test_images_are_read_from_folders_and_archives(prepared):
    folders, images = prepared
    for folder, kinds in zip(folders, (["folder", "folder"], ["tar"]), strict=True):
        index = open_index(folder)
        assert [source.kind for source in index.sources] == kinds and index.classes == ["c", "d"]
        assert [index.read(row) for row in index.rows("train")] == images
        assert index.name(index.rows("train")[1]).endswith("d/a.jpg")
        with pytest.raises(InputError, match="has no images for 'val'"):
            index.rows("val")


def test_an_index_of_before_kinds_were_recorded_is_read_and_kept(prepared, monkeypatch):
    folders, images = prepared
    for folder in folders:
        content = json.loads((folder / FILE).read_text())
        for source in content["request"]["train"]:
            assert source.pop("kind") in ("folder", "tar")
        (folder / FILE).write_text(json.dumps(content))
        index = open_index(folder)
        assert [index.read(row) for row in index.rows("train")] == images
        monkeypatch.setattr(prepare, "_scan_split", lambda *_: pytest.fail("scanned again"))
        assert prepare.prepare([folder.with_suffix("")]) == folder
        assert json.loads((folder / FILE).read_text()) == content


def test_a_file_that_shrinks_or_goes_is_an_oserror(prepared):
    (by_folder, by_tar), _ = prepared
    index = open_index(by_tar)
    os.truncate(index.sources[0].path, 2000)
    with pytest.raises(OSError, match=r"all\.tar ends inside of c/a\.jpg"):
        index.read(index.rows("train")[0])
    index = open_index(by_folder)
    os.remove(by_folder.with_suffix("") / "c" / "a.jpg")
    with pytest.raises(FileNotFoundError):
        index.read(index.rows("train")[0])


def test_what_is_no_index_of_this_version_is_one_sentence(prepared, tmp_path):
    (folder, _), _ = prepared
    with pytest.raises(InputError, match="is not an index: make one with `fastdit prepare SOURCE"):
        open_index(tmp_path)
    content = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(InputError, match="has format 99, this fastdit reads 2: run `fastdit prepare` again"):
        open_index(folder)
    (folder / FILE).write_text('{"format": 1}')
    with pytest.raises(InputError, match="is not an index"):
        open_index(folder)


def test_arrays_are_those_of_numpy(tmp_path):
    rows = np.zeros(3, record(5))
    rows["name"] = [b"a", b"bc", b"defgh"]
    for array in (rows, np.arange(6, dtype=np.float16).reshape(2, 3).T):
        save_array(tmp_path / "array.npy", array)
        assert np.array_equal(np.load(tmp_path / "array.npy"), array)


def test_an_index_opens_each_archive_once(prepared):
    (_, by_tar), _ = prepared
    index = open_index(by_tar)
    rows = index.rows("train")
    before = len(os.listdir("/proc/self/fd"))
    for row in [*rows, *rows]:
        index.read(row)
    assert len(os.listdir("/proc/self/fd")) == before + 1
