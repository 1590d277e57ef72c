"""Indexes: reading images by record, sources that have changed, formats of before and of another version."""

import errno
import io
import json
import os
import resource
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image

import latent_sets
import pictures
from benchmarks import photographs
from commands import complains
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


def touch(path, nanoseconds=1):
    """Move a file's modification time by some nanoseconds."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + nanoseconds))


def replace(path):
    path.write_bytes(pictures.encoded(77, (400, 200)))


def replace_by_a_picture_of_the_same_length(path):
    path.write_bytes(path.read_bytes())
    touch(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: replace(d / "a" / "0.jpg"), r"older than .*/a/0.jpg, which has changed"),
        (lambda d: replace_by_a_picture_of_the_same_length(d / "a" / "sub" / "1.jpg"), r"sub/1.jpg, which has changed"),
        (lambda d: pictures.write(d, "a/sub/2.jpg"), r"/a, in which images were added, removed or replaced"),
        (lambda d: pictures.write(d, "a/new/2.jpg"), r"/a, in which images were added, removed or replaced"),
        (lambda d: (d / "a" / "0.jpg").unlink(), r"/a, in which images were added, removed or replaced"),
        (lambda d: (d / "a").rename(d / "z"), r"needs .*/a, which cannot be read"),
        (lambda d: pictures.write(d, "c/0.jpg"), r"/c, which is new"),
    ],
)
def test_changes_of_folders_are_noticed(tmp_path, change, message):
    """By a run that opens the index, and by `fastdit prepare`."""
    source = pictures.write(tmp_path / "d", "a/0.jpg", "a/sub/1.jpg", "b/0.jpg")
    out = prepare.prepare([source])
    before = open_index(out).digest("train")
    change(source)
    with pytest.raises(InputError, match=rf"{message}.*`fastdit prepare` again"):
        open_index(out)
    prepare.prepare([source])
    again = open_index(out)
    changed = again.digest("train") != before
    assert changed == ("1.jpg, which" not in message)  # there the bytes stayed the same
    for row in again.rows("train"):
        with Image.open(io.BytesIO(again.read(row))) as image:
            assert (image.height, image.width) == (row["height"], row["width"])


def test_what_is_no_data_does_not_make_an_index_old(tmp_path, monkeypatch):
    """Files that systems and programs leave in class folders, and runs beside them."""
    source = pictures.write(tmp_path / "d", "a/0.jpg", "b/0.jpg")
    out = prepare.prepare([source])
    pictures.write(source, "a/.DS_Store", "a/Thumbs.db", "a/notes.txt", "@eaDir/0.jpg", "r/metrics.jsonl", "r/checkpoints/x")
    open_index(out)
    monkeypatch.setattr(prepare, "_scan_split", lambda *_: pytest.fail("scanned again"))
    assert prepare.prepare([source]) == out


def test_shards_that_are_new_or_gone_are_noticed(tmp_path):
    data = photographs.tar_of({"a/0.jpg": pictures.encoded()})
    (tmp_path / "s").mkdir()
    for name in "xy":
        (tmp_path / "s" / f"{name}.tar").write_bytes(data)
    out = prepare.prepare([tmp_path / "s"])
    (tmp_path / "s" / "z.tar").write_bytes(data)
    with pytest.raises(InputError, match=r"older than .*s/z.tar, which is new"):
        open_index(out)


def test_a_large_set_is_looked_at_in_part_and_read_with_its_length(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "SAMPLE", 2)  # the first and the last
    source = pictures.write(tmp_path / "d", *(f"a/{i}.jpg" for i in range(5)))
    index = open_index(prepare.prepare([source]))
    replace(source / "a" / "2.jpg")
    index = open_index(index.folder)
    with pytest.raises(BadImage, match="the file has changed since the index was made: run `fastdit prepare` again"):
        index.read(index.rows("train")[2])
    replace(source / "a" / "4.jpg")
    with pytest.raises(InputError, match=r"4.jpg, which has changed"):
        open_index(index.folder)


def test_data_that_moved_have_the_same_digest(tmp_path):
    source = pictures.write(tmp_path / "here" / "d", "a/0.jpg", "b/0.jpg", b"b/caf\xe9.jpg")
    out = prepare.prepare([source], tmp_path / "index")
    digest = open_index(out).digest("train")
    shutil.copytree(source, tmp_path / "there" / "e")
    shutil.rmtree(source)
    with pytest.raises(InputError, match=r"which cannot be read .*put it back, or run `fastdit prepare` again with its new path"):
        open_index(out)
    assert prepare.prepare([tmp_path / "there" / "e"], out) == out
    assert open_index(out).digest("train") == digest


@pytest.mark.parametrize(
    "content",
    [b"[]", b"{}", b"null", b'"x"', b'{"format": 2}', b'{"format": 1}', b"\xff\xfe", b"{", b'{"format": 2, "request": 1}'],
)
def test_an_index_json_of_another_form_is_one_sentence(prepared, content, capsys):
    (folder, _), _ = prepared
    (folder / FILE).write_bytes(content)
    with pytest.raises(InputError, match="is not an index: make one"):
        open_index(folder)
    complains(capsys, ["prepare", folder.with_suffix("")], FILE, "is not of an index", "delete it, or use another --out")
    assert (folder / FILE).read_bytes() == content


def test_rows_of_another_form_are_one_sentence(prepared):
    (folder, _), _ = prepared
    for content, message in ((b"x", "is damaged"), (b"", "is damaged")):
        (folder / "train.npy").write_bytes(content)
        with pytest.raises(InputError, match=rf"train.npy {message}"):
            open_index(folder)
    np.save(folder / "train.npy", np.zeros(3))
    with pytest.raises(InputError, match=r"train.npy is not the file of an index"):
        open_index(folder)


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
    with pytest.raises(InputError, match="is not of format 2, which this fastdit reads: run `fastdit prepare` again"):
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
