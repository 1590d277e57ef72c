"""Parquet files: the images of tars bit for bit, columns of other names, what is ambiguous or damaged, kills, threads."""

import csv
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import latent_sets
from benchmarks import photographs
from commands import complains
from fastdit.config import InputError
from fastdit.data import archives, parquet, prepare
from fastdit.data.index import FILE, open_index
from fastdit.data.loader import ImageLoader
from fastdit.data.pixels import BadImage
from fastdit.distributed import World

NAMES = ["ant", "bee", "cat"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def pictures():
    """24 photographs, JPEG and PNG, with labels 0 to 2."""
    crops = enumerate(photographs.crops(24))
    images = [photographs.encoded(crop.resize((80, 60)), format="PNG" if i % 5 == 0 else "JPEG") for i, crop in crops]
    return images, [i * 7 % 3 for i in range(24)]


@pytest.fixture(scope="module")
def two_forms(pictures, tmp_path_factory):
    """The pictures in two Parquet files, in row groups of 5, and in two tars, in the same order."""
    folder, (images, labels) = tmp_path_factory.mktemp("two_forms"), pictures
    (folder / "tars").mkdir()
    for i, part in enumerate((slice(0, 13), slice(13, 24))):
        photographs.write_parquet(folder / "hub" / f"train-0000{i}-of-00002.parquet", images[part], labels[part], NAMES, 5)
        files = {}
        for j, (data, label) in enumerate(zip(images[part], labels[part], strict=True)):
            files |= {f"{i}{j:02d}.jpg": data, f"{i}{j:02d}.cls": str(label).encode()}
        (folder / "tars" / f"{i}.tar").write_bytes(photographs.tar_of(files))
    return prepare.prepare([folder / "hub"]), prepare.prepare([folder / "tars"])


def test_images_order_and_pixels_are_those_of_tars(two_forms, pictures):
    by_parquet, by_tar = map(open_index, two_forms)
    assert [source.kind for source in by_parquet.sources] == ["parquet"] * 2
    assert by_parquet.classes == by_tar.classes == ["0", "1", "2"] and by_parquet.class_names == NAMES
    assert by_parquet.digest("train") == by_tar.digest("train")
    assert [by_parquet.read(row) for row in by_parquet.rows("train")] == pictures[0]
    assert by_parquet.rows("train")["label"].tolist() == pictures[1]
    assert by_parquet.name(by_parquet.rows("train")[14]).endswith("hub/train-00001-of-00002.parquet/row 1")
    config = latent_sets.config(by_parquet.folder, "pixels", {"flip": True, "crop": "random"}, batch_size=7)
    loaders = [ImageLoader(index, config, World(0, 1, torch.device("cpu"), None)) for index in (by_parquet, by_tar)]
    assert loaders[0].class_names == NAMES and loaders[0].class_counts == loaders[1].class_counts
    for step in (0, 1, 2, 7, 3):  # 7 and 3 as after a resume
        (images, labels), (wanted, wanted_labels) = (loader.batch(step, 0) for loader in loaders)
        assert torch.equal(images, wanted) and torch.equal(labels, wanted_labels)


def test_threads_decode_a_row_group_once_and_keep_few(two_forms, pictures, monkeypatch):
    index = open_index(two_forms[0])
    rows, decoded, read = index.rows("train"), [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, *a, **b: (decoded.append(a), read(self, *a, **b))[1])

    def work(seed):
        order = np.random.default_rng(seed).permutation(24)
        assert [index.read(rows[i]) for i in order] == [pictures[0][i] for i in order]

    for cache, most in ((parquet.CACHE, 6), (1, 8 * 24)):
        parquet.clear()
        decoded.clear()
        monkeypatch.setattr(parquet, "CACHE", cache)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert 6 <= len(decoded) <= most
    assert sum(group.images is not None for group in parquet._groups.values()) == 1  # the last one stays, however large


def test_files_run_out_of_descriptors_or_go(pictures, tmp_path):
    """More files than may be open are read; without a descriptor left, or a file, none is replaced by another's image."""
    for i in range(40):
        photographs.write_parquet(tmp_path / "many" / f"{i:02d}.parquet", [pictures[0][i % 24]], [0], ["a"], 5)
    index = open_index(prepare.prepare([tmp_path / "many"]))
    rows, (soft, hard) = index.rows("train"), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 12, hard))
    held = []
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(index.read, rows)) == [pictures[0][i % 24] for i in range(40)]
        parquet.clear()
        with pytest.raises(OSError, match="Too many"):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(InputError, match=r"Too many open files\).*ulimit -n"):
            index.read(rows[0])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in held:
            os.close(number)
    assert index.read(rows[0]) == pictures[0][0]
    parquet.clear()
    os.remove(index.sources[1].path)
    with pytest.raises(BadImage, match="No such file"):
        index.read(rows[1])


def write(path: Path, columns: dict, metadata: dict | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata and {"huggingface": json.dumps(metadata)}), path, **options)
    return path


@pytest.fixture
def few(pictures):
    """Six of the pictures as structs."""
    return [{"bytes": data, "path": None} for data in pictures[0][:6]]


def plain(images):
    return [image["bytes"] for image in images]


@pytest.mark.parametrize(
    ("columns", "classes", "counts", "said"),
    [
        (lambda x: {"img": x, "fine_label": [0, 1] * 3, "coarse_label": [0] * 6}, ["0", "1"], [3, 3], "'fine_.*not from 'coarse"),
        (lambda x: {"picture": x, "class": ["cat", "ant", "cat"] * 2}, ["ant", "cat"], [2, 4], None),
        (lambda x: {"jpg": plain(x), "cls": [3, 7, 7] * 2, "__key__": list("abcdef")}, ["3", "7"], [2, 4], None),
        (lambda x: {"x": plain(x)}, ["images"], [6], "no column of labels .*one class$"),
        (lambda x: {"image": x, "text": ["a"] * 6}, ["images"], [6], "one class, its columns text are not used"),
        (lambda x: {"image": x, "mask": x, "label": [0, 1] * 3}, ["0", "1"], [3, 3], "from column 'image'.*not from 'mask'"),
        (lambda x: {"image": x, "labels": pa.array(["b", "a"] * 3).dictionary_encode()}, ["a", "b"], [3, 3], None),
        (lambda x: {"x": pa.array(plain(x), pa.large_binary()), "y": pa.array([0, 1] * 3, pa.uint8())}, ["0", "1"], [3, 3], None),
    ],
)  # fmt: skip
def test_columns_of_other_names_and_types(few, tmp_path, capsys, columns, classes, counts, said):
    path = write(tmp_path / "x.parquet", columns(few))
    index = open_index(prepare.prepare([path], tmp_path / "index"))
    assert index.classes == classes and index.class_names is None
    assert np.bincount(index.rows("train")["label"]).tolist() == counts
    assert [index.read(row) for row in index.rows("train")] == plain(few)
    lines = [line for line in capsys.readouterr().err.splitlines() if str(path) in line]
    assert len(lines) == (said is not None) and (said is None or re.search(said, lines[0])), lines


def test_names_of_classes(few, tmp_path, capsys):
    """In the schema, or else in the card beside the files or above them; a card of several configs that differ is said."""
    labels = [2, 0, 2] * 2
    info = {"info": {"features": {"label": {"_type": "ClassLabel", "names": NAMES}}}}
    feature = {"name": "label", "dtype": {"class_label": {"names": {"0": "no", "1": "1e3", "2": "null"}}}}
    card = f"---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - {json.dumps(feature)}\n---\n# A data set\n"
    names_of = lambda path: open_index(prepare.prepare([path], tmp_path / "index")).class_names
    write(tmp_path / "a" / "data" / "train-0.parquet", {"image": few, "label": labels}, info)
    assert names_of(tmp_path / "a" / "data") == ["ant", "cat"]  # of the labels that there are
    write(tmp_path / "b" / "data" / "train-0.parquet", {"image": few, "label": labels})
    assert names_of(tmp_path / "b" / "data") is None
    (tmp_path / "b" / "README.md").write_text(card)
    parquet._footer.cache_clear()
    (tmp_path / "index" / FILE).unlink()
    assert names_of(tmp_path / "b" / "data") == ["no", "null"]
    (tmp_path / "a" / "README.md").write_text(card)
    parquet._footer.cache_clear()
    assert names_of(tmp_path / "a" / "data") == ["ant", "cat"]  # of the labels that there are
    other = {**feature, "dtype": {"class_label": {"names": ["x", "y", "z"]}}}
    configs = [{"config_name": name, "features": [f]} for name, f in (("one", feature), ("two", other))]
    (tmp_path / "b" / "README.md").write_text(f"---\ndataset_info: {json.dumps(configs)}\n---\n")
    parquet._footer.cache_clear()
    capsys.readouterr()
    (tmp_path / "index" / FILE).unlink()
    assert names_of(tmp_path / "b" / "data") is None
    assert "README.md names the classes of column 'label' in several ways" in capsys.readouterr().err


def test_rows_without_an_image_or_a_class_are_bad_files(few, pictures, tmp_path):
    images = [
        *few,
        None,
        {"bytes": None, "path": "x.jpg"},
        {"bytes": b"", "path": None},
        {"bytes": b"text", "path": None},
        few[0],
        few[0],
    ]
    path = write(tmp_path / "x.parquet", {"image": images, "label": [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, None, -1]}, row_group_size=4)
    index = open_index(prepare.prepare([path], tmp_path / "index"))
    assert [index.read(row) for row in index.rows("train")] == pictures[0][:6]
    bad = csv.DictReader((index.folder / "bad_files.csv").open())
    assert [(line["file"], line["reason"]) for line in bad] == [
        ("row 6", "there are no bytes in it"), ("row 7", "there are no bytes in it"), ("row 8", "the file is empty"),
        ("row 9", "it is no image"), ("row 10", "its label is None, which names no class"),
        ("row 11", "its label is -1, which names no class"),
    ]  # fmt: skip


def test_what_is_damaged_or_ambiguous_is_one_sentence(few, pictures, tmp_path, capsys, monkeypatch):
    def refused(path, *words):
        complains(capsys, ["prepare", path, "--out", tmp_path / "index"], *words)
        assert not (tmp_path / "index" / FILE).exists()

    path = tmp_path / "x.parquet"
    write(path, {"image": few, "label": [0, 1] * 3})
    whole = path.read_bytes()
    for data in (b"", b"PAR1....PAR1", whole[: len(whole) // 2], whole[:-9] + b"\xff" * 9, b"no parquet" * 99):
        path.write_bytes(data)
        refused(path, f"Parquet file {path} is cut off or damaged", "fetch it again")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(path, "is a Git LFS pointer", "git lfs pull")
    page = bytearray(write(path, {"image": few, "label": [0, 1] * 3}, compression="zstd").read_bytes())
    page[10:40] = bytes(30)  # in the header and data of the first page
    path.write_bytes(page)
    refused(path, f"Parquet file {path} is cut off or damaged", "fetch it again")
    for columns, words in [
        ({"label": [0]}, ["no column of encoded images", "label (int64)"]),
        ({"image": [[image] for image in few]}, ["no column of encoded images"]),
        ({"a": few, "b": few}, ["several columns of images, a, b", "rename", "'image'"]),
        ({"image": few, "label": [[0]] * 6}, ["'label'", "list<", "one per image"]),
        ({"image": few, "label": [0.5] * 6}, ["'label'", "double", "whole numbers or text"]),
    ]:
        refused(write(path, columns), str(path), *words)
    two = {"info": {"features": {"kind": {"_type": "ClassLabel", "names": NAMES}, "sort": {"_type": "ClassLabel", "names": NAMES}}}}
    refused(write(path, {"image": few, "kind": [0] * 6, "sort": [1] * 6}, two), "several columns of labels, kind, sort", "'label'")
    write(tmp_path / "two" / "a.parquet", {"image": few, "label": [0, 1] * 3})
    write(tmp_path / "two" / "b.parquet", {"img": few, "label": [0, 1] * 3})
    refused(tmp_path / "two", "images in image.bytes", "images in img.bytes", "give one data set at a time")
    photographs.write_parquet(tmp_path / "two" / "a.parquet", pictures[0][:2], [0, 1], ["x", "y"], 5)
    photographs.write_parquet(tmp_path / "two" / "b.parquet", pictures[0][:2], [0, 1], ["y", "x"], 5)
    refused(tmp_path / "two", "classes named x, y", "classes named y, x")
    photographs.write_parquet(path, pictures[0][:4], [0, 1, 2, 0], ["x", "y"], 2)
    refused(path, f"row 2 of {path} has the label 2", "only 2 classes have names", "README.md")
    photographs.write_parquet(path, [], [], ["x", "y"], 2)
    refused(path, "there are no images")
    photographs.write_parquet(path, [None] * 3, [0, 1, 0], ["x", "y"], 2)
    refused(path, "there are no images", "only 3 bad files, the first of which is row 0 (there are no bytes in it)")
    parquet._footer.cache_clear()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(tmp_path / "two" / "a.parquet", "is a Parquet file, which needs pyarrow: pip install pyarrow")


def test_where_parquet_files_lie(pictures, tmp_path, capsys):
    """As in the Hub's cache, whose files are links to blobs without a suffix; one folder per split; beside other data."""
    make = lambda name: photographs.write_parquet(tmp_path / name, pictures[0][:4], [0, 1] * 2, ["x", "y"], 5)
    for split, blob in (("train", "a1"), ("validation", "b2")):
        make(f"cache/blobs/{blob}")
        link = tmp_path / "cache" / "snapshots" / "main" / "data" / f"{split}-00000-of-00001.parquet"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(tmp_path / "cache" / "blobs" / blob)
        make(f"converted/default/{split}/0000.parquet")
    for source in ("cache/snapshots/main", "cache/snapshots/main/data", "converted"):
        index = open_index(prepare.prepare([tmp_path / source], tmp_path / "index"))
        assert [len(index.rows(split)) for split in ("train", "val")] == [4, 4] and index.class_names == ["x", "y"]
        assert index.read(index.rows("val")[3]) == pictures[0][3]
    make("configs/one/train-0.parquet"), make("configs/two/train-0.parquet")
    words = ["prepare", tmp_path / "configs", "--out", tmp_path / "none"]
    complains(capsys, words, "configs/one", "hold archives and no pictures", "give one of these folders")
    make("both/train-0.parquet")
    (tmp_path / "both" / "train-0.tar").write_bytes(photographs.tar_of({"x/0.jpg": pictures[0][1]}))
    complains(capsys, ["prepare", tmp_path / "both"], ".parquet and .tar archives", "may be the same images")
    make("beside/train-0.parquet"), make("beside/test-0.parquet")
    (tmp_path / "beside" / "x").mkdir()
    (tmp_path / "beside" / "x" / "0.jpg").write_bytes(pictures[0][1])
    assert open_index(prepare.prepare([tmp_path / "beside"])).classes == ["x"]
    assert "left out in" in (said := capsys.readouterr().err) and "archives: 2 (test-0.parquet, train-0.parquet)" in said
    (tmp_path / "beside" / "x" / "0.jpg").unlink()
    assert open_index(prepare.prepare([tmp_path / "beside"], tmp_path / "index")).class_names == ["x", "y"]
    assert "left out: test-0.parquet" in capsys.readouterr().err


SLOWLY = """
import sys, time
from pathlib import Path
from fastdit.data import archives, pixels, prepare
inspect, archives.CHUNK = pixels.inspect, 5
pixels.inspect = lambda data: (time.sleep(0.1), inspect(data))[1]
prepare.prepare([Path(sys.argv[1])], Path(sys.argv[2]))
"""


def test_prepare_that_was_killed_resumes_to_the_same_bytes(two_forms, tmp_path, seed):
    source, out = two_forms[0].with_suffix(""), tmp_path / "index"
    rng, scanned = random.Random(seed), []
    chunks = lambda: len(list(out.glob(".parts/train*")))
    for _ in range(2):
        before = chunks()
        process = subprocess.Popen([sys.executable, "-c", SLOWLY, str(source), str(out)], stderr=subprocess.DEVNULL)
        while chunks() == before:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        scanned.append(chunks())
        assert not (out / FILE).exists(), f"seed {seed}"
    assert 0 < scanned[0] < scanned[1], f"seed {seed}"
    prepare.prepare([source], out)
    assert contents(out) == contents(two_forms[0]), f"seed {seed}"


@pytest.mark.parametrize("chunk", [1, 6])
def test_row_groups_are_scanned_as_chunks_of_images(two_forms, tmp_path, monkeypatch, chunk):
    source = str(two_forms[0].with_suffix("") / "train-00000-of-00002.parquet")  # 13 rows in row groups of 5
    assert [parquet.next_start(source, start, rows) for start, rows in ((0, 1), (0, 5), (0, 6), (5, 1), (5, 6), (10, 1))] == [
        5, 5, 10, 10, None, None,
    ]  # fmt: skip
    scanned, scan = [], archives.scan
    monkeypatch.setattr(archives, "scan", lambda *a: (scanned.append(a[2]), scan(*a))[1])
    monkeypatch.setattr(archives, "CHUNK", chunk)
    assert contents(prepare.prepare([two_forms[0].with_suffix("")], tmp_path / "index")) == contents(two_forms[0])
    assert scanned == ([0, 5, 10, 0, 5, 10] if chunk == 1 else [0, 10, 0, 10])


@pytest.mark.slow
def test_encode_that_was_killed_writes_the_bytes_that_tars_give(two_forms, vae, tmp_path, seed):
    rng = random.Random(seed)
    latent_sets.finish(latent_sets.start(latent_sets.encode_command(two_forms[1], tmp_path / "tars", vae)))
    out = tmp_path / "latents"
    process = latent_sets.start(latent_sets.encode_command(two_forms[0], out, vae), wait=0.1)
    while not (out / "settings.json").exists():
        assert process.poll() is None, process.stderr.read().decode()[-3000:]
        time.sleep(0.01)
    time.sleep(rng.uniform(0.5, 0.9))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "manifest.json").exists(), f"seed {seed}"
    latent_sets.finish(latent_sets.start(latent_sets.encode_command(two_forms[0], out, vae)))
    arrays = lambda folder: {file.name: file.read_bytes() for file in folder.glob("*.npy")}
    assert arrays(out) == arrays(tmp_path / "tars") and len(arrays(out)) == 6, f"seed {seed}"


def test_a_run_on_parquet_has_the_losses_of_tars(two_forms, tmp_path):
    """And after a resume; data.source is the folder of the files."""
    settings = ["model.in_channels=3", "model.input_size=32", "train.save_steps=2", "train.precision=fp32"]
    source = lambda i: f"data.source={two_forms[i].with_suffix('')}"
    wanted = latent_sets.train(tmp_path / "tars", source(1), *settings, "train.total_steps=4")
    assert latent_sets.train(tmp_path / "parquet", source(0), *settings, "train.total_steps=2") == wanted[:2]
    assert latent_sets.train(tmp_path / "parquet", source(0), *settings, "train.total_steps=4") == wanted
