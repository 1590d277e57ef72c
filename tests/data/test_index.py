"""Indexes: reading images by record, sources that have changed, formats of before and of another version."""

import errno
import json
import os
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image

import latent_sets
from benchmarks import photographs
from fastdit.config import InputError
from fastdit.data import index as index_module
from fastdit.data import prepare
from fastdit.data.index import FILE, open_index, record, save_array
from fastdit.data.loader import ImageLoader
from fastdit.data.pixels import BadImage
from fastdit.distributed import World


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


def test_a_file_that_shrinks_or_goes_is_a_bad_image(prepared):
    (by_folder, by_tar), _ = prepared
    index = open_index(by_tar)
    os.truncate(index.sources[0].path, 2000)
    with pytest.raises(BadImage, match=r"all\.tar ends inside of c/a\.jpg"):
        index.read(index.rows("train")[0])
    index = open_index(by_folder)
    os.remove(by_folder.with_suffix("") / "c" / "a.jpg")
    with pytest.raises(BadImage, match="No such file"):
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


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_an_index_opens_each_archive_once(prepared):
    (_, by_tar), _ = prepared
    index = open_index(by_tar)
    rows = index.rows("train")
    before = open_files()
    for row in [*rows, *rows]:
        index.read(row)
    assert open_files() == before + 1


@pytest.fixture
def shards(tmp_path):
    """The index of 24 tars of one image of one class."""
    (tmp_path / "shards").mkdir()
    for i in range(24):
        image = photographs.encoded(Image.new("RGB", (48, 40), (10 * i, 0, 0)))
        tar = photographs.tar_of({f"{i}.jpg": image, f"{i}.cls": b"0"})
        (tmp_path / "shards" / f"{i:02d}.tar").write_bytes(tar)
    return open_index(prepare.prepare([tmp_path / "shards"]))


def test_threads_read_more_archives_than_may_be_open(shards, monkeypatch):
    """A descriptor that the cache drops is closed after the last read from it, and not later: never another file's bytes."""
    rows = shards.rows("train")
    wanted = [shards.read(row) for row in rows]
    assert len(set(wanted)) == len(rows) == 24
    monkeypatch.setattr(index_module, "_descriptor", lru_cache(3)(index_module.Descriptor))
    before, interval, most = open_files(), sys.getswitchinterval(), []

    def work(seed):
        for image in np.random.default_rng(seed).integers(24, size=1500):
            assert shards.read(rows[image]) == wanted[image]
            if image == seed:
                most.append(open_files())

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert max(most) <= before + 3 + 8 + 8  # the cache, one per reading thread, and the listing of /proc by each
    assert open_files() == before + 3


def test_no_image_is_bad_because_files_run_out(shards, prepared):
    """Neither of an archive nor of a folder."""
    loose = open_index(prepared[0][0])
    rows, loose_rows = shards.rows("train"), loose.rows("train")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (100 + open_files(), hard))
    try:
        with pytest.raises(OSError, match="Too many"):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        for index, row in ((shards, rows[0]), (loose, loose_rows[0])):
            with pytest.raises(InputError, match=r"Too many open files\).*no fault of the image.*ulimit -n"):
                index.read(row)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in held:
            os.close(number)
    assert shards.read(rows[0]) and loose.read(loose_rows[0])


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT])
def test_an_error_of_the_system_ends_the_run_and_replaces_no_image(shards, monkeypatch, capsys, number):
    config = latent_sets.config(shards.folder, "pixels", batch_size=4)
    loader = ImageLoader(shards, config, World(0, 1, torch.device("cpu"), None))
    assert loader.batch(0, 0)[0].shape[0] == 4
    pread, bad = os.pread, shards.rows("train")[int(loader.order.images(5, 0)[0][0])]

    def failing(descriptor, size, offset):
        if (size, offset) == (bad["bytes"], bad["offset"]):
            raise OSError(number, os.strerror(number))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(InputError, match=r"\(" + os.strerror(number)):
        for step in range(1, 6):
            loader.batch(step, 0)
    assert "bad file" not in capsys.readouterr().err
