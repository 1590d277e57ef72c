"""fastdit prepare: indexes of archives and folders, bad files and bad archives, kills and full disks."""

import csv
import errno
import hashlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import photographs
from commands import complains
from fastdit import cli
from fastdit.config import InputError
from fastdit.data import imagenet, prepare
from fastdit.data.archives import jpeg_size, scan_tar
from fastdit.data.index import FILE, open_index
from fastdit.sampling import class_names


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    return photographs.imagenet(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(scope="module")
def index(archives, tmp_path_factory):
    train, val, devkit = archives
    out = tmp_path_factory.mktemp("made") / "index"
    assert cli.main(["prepare", str(train), "--val", str(val), "--devkit", str(devkit), "--out", str(out)]) == 0
    return open_index(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_imagenet_archives(index, archives):
    rows = index.rows("train")
    assert index.classes == sorted(index.classes) and len(index.classes) == 5
    assert np.bincount(rows["label"]).tolist() == [11, 6, 6, 6, 6]  # the second in the archive is the first in order
    for row in rows:
        name = row["name"].decode()
        assert name.startswith(index.classes[row["label"]])
        with Image.open(io.BytesIO(index.read(row))) as image:
            assert (image.height, image.width) == (row["height"], row["width"])
            image.load()
    val = index.rows("val")
    assert [index.class_names[label] for label in val["label"]] == [f"thing {i * 3 % 5}, item {i * 3 % 5}" for i in range(8)]
    assert [row["name"].decode() for row in val] == [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(8)]
    assert np.load(io.BytesIO(Path(index.folder, "val.npy").read_bytes()))["source"].tolist() == [1] * 8


def test_bad_files_are_listed_with_reasons(index):
    table = list(csv.DictReader((index.folder / "bad_files.csv").open()))
    assert {row["file"].split("_", 1)[1]: row["reason"] for row in table} == {
        "bad_truncated.JPEG": "image file is truncated (35 bytes not processed)",
        "bad_empty.JPEG": "the file is empty",
        "bad_text.JPEG": "it is no image",
        "bad_end.JPEG": "image file is truncated (8 bytes not processed)",
    }
    assert {row["split"] for row in table} == {"train"}


def test_folders_and_tars_give_the_same_images(index, tmp_path):
    """As class folders, as one tar of them, and as webdataset tars with .cls and .json files."""
    rows = index.rows("train")
    loose, flat, shards = {}, {}, [{}, {}]
    for i, row in enumerate(rows):
        name, label, data = row["name"].decode(), int(row["label"]), index.read(row)
        (tmp_path / "folders" / index.classes[label]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folders" / index.classes[label] / name).write_bytes(data)
        loose[index.classes[label], name] = flat[f"./train/{index.classes[label]}/{name}"] = data
        beside = {".cls": str(label)} if i % 2 else {".json": json.dumps({"width": 1, "label": label})}
        key = f"{i:04d}"
        items = [(f"{key}.jpg", data), *((key + end, text.encode()) for end, text in beside.items())]
        shards[i % 2] |= dict(items if i % 3 else reversed(items))  # the label may come before the image
    (tmp_path / "flat.tar").write_bytes(photographs.tar_of(flat))
    (tmp_path / "shards").mkdir()
    for i, files in enumerate(shards):
        (tmp_path / "shards" / f"{i}.tar").write_bytes(photographs.tar_of(files))
    wanted = sorted((index.classes[int(row["label"])], index.read(row)) for row in rows)
    for source in ("folders", "flat.tar", "shards"):
        found = open_index(prepare.prepare([tmp_path / source]))
        names = [str(i) for i in range(5)] if source == "shards" else index.classes
        assert found.classes == names and found.class_names is None
        assert found.folder == tmp_path / f"{source}.index"
        assert sorted((index.classes[int(row["label"])], found.read(row)) for row in found.rows("train")) == wanted
        for row in found.rows("train"):
            assert Image.open(io.BytesIO(found.read(row))).size == (row["width"], row["height"])


def test_many_parts_give_the_index_of_one(archives, tmp_path, monkeypatch):
    train, *_ = archives
    whole = prepare.prepare([train], tmp_path / "a")
    monkeypatch.setattr("fastdit.data.archives.PART", 2)
    assert contents(prepare.prepare([train], tmp_path / "b")) == contents(whole)


def test_long_names(tmp_path):
    """pax and GNU headers: names beyond the 100 letters of a tar header."""
    name, data = "n" * 120 + "/" + "é" * 90 + ".jpg", photographs.encoded(next(photographs.crops(1)))
    (tmp_path / "long.tar").write_bytes(photographs.tar_of({name: data, "short/a.jpg": data}))
    found = open_index(prepare.prepare([tmp_path / "long.tar"]))
    assert found.classes == ["n" * 120, "short"] and found.rows("train")["name"][0].decode() == name
    assert all(found.read(row) == data for row in found.rows("train"))


SLOWLY = """
import sys, time, scipy.io
from pathlib import Path
from fastdit.data import archives, prepare
measure, archives.PART = archives.measure, 2
archives.measure = lambda data: (time.sleep(0.04), measure(data))[1]
print("begun", flush=True)
prepare.prepare([Path(sys.argv[1])], Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
"""


def test_a_run_that_is_killed_goes_on_to_the_same_bytes(archives, index, tmp_path):
    train, val, devkit = archives
    command, out = [sys.executable, "-c", SLOWLY, train, tmp_path / "index", val, devkit], tmp_path / "index"
    seed = random.randrange(1000)
    print("seed", seed)
    rng, kept = random.Random(seed), []
    for _ in range(3):
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process.stdout.readline()
        time.sleep(rng.uniform(0.1, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept.append(len(list(out.glob(".parts/train*"))))
        assert not (out / FILE).exists()
    assert kept == sorted(kept) and kept[-1] > 0  # what was scanned is not scanned again
    assert cli.main([str(w) for w in ["prepare", train, "--val", val, "--devkit", devkit, "--out", out]]) == 0
    assert contents(out) == contents(index.folder)


def test_a_full_disk_keeps_what_was_done(archives, index, tmp_path, capsys, monkeypatch):
    train, val, devkit = archives
    words = ["prepare", train, "--val", val, "--devkit", devkit, "--out", tmp_path / "index"]
    write, written = Path.write_text, []

    def full(self, text, *rest):
        if len(written) == 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        written.append(self)
        return write(self, text, *rest)

    monkeypatch.setattr(Path, "write_text", full)
    complains(capsys, words, "No space left on device", "kept")
    monkeypatch.undo()
    scan, scanned = scan_tar, []
    monkeypatch.setattr(prepare, "scan_tar", lambda *a: (scanned.append(a), scan(*a))[1])
    assert cli.main([str(word) for word in words]) == 0
    assert len(scanned) == 6 - 3  # three of five classes and of the validation archive were there
    assert contents(tmp_path / "index") == contents(index.folder)


def test_a_file_size_limit_keeps_what_was_done(archives, index, tmp_path):
    train, val, devkit = archives
    words = [str(w) for w in ("prepare", train, "--val", val, "--devkit", devkit, "--out", tmp_path / "index")]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))  # a part fits, the index of 35 images does not
    command = [sys.executable, "-m", "fastdit.cli", *words]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 2 and "File too large" in done.stderr and "kept" in done.stderr, done.stderr
    assert len(list((tmp_path / "index" / ".parts").glob("*"))) >= 5
    assert subprocess.run(command, check=False).returncode == 0
    assert contents(tmp_path / "index") == contents(index.folder)


def test_bad_archives_are_one_sentence(archives, tmp_path, capsys):
    train, val, devkit = archives
    data = train.read_bytes()
    (tmp_path / "half.tar").write_bytes(data[: len(data) // 2])
    complains(capsys, ["prepare", tmp_path / "half.tar"], "half.tar", "cut off or damaged", "fetch it again")
    at = data.rfind(b"_3.JPEG")  # in a header: its checksum is wrong then
    (tmp_path / "header.tar").write_bytes(data[:at] + b"_9" + data[at + 2 :])
    complains(capsys, ["prepare", tmp_path / "header.tar"], "header.tar", "cut off or damaged", "at byte")
    (tmp_path / "text.tar").write_text("no archive" * 1000)
    complains(capsys, ["prepare", tmp_path / "text.tar"], "text.tar is not a tar archive")
    complains(capsys, ["prepare", devkit], "uncompressed .tar")
    complains(capsys, ["prepare", tmp_path / "nowhere.tar"], "nowhere.tar", "cannot be read", "No such file")
    (tmp_path / "empty").mkdir()
    complains(capsys, ["prepare", tmp_path / "empty"], "neither class folders nor .tar archives")
    (tmp_path / "folder" / "a").mkdir(parents=True)
    complains(capsys, ["prepare", tmp_path / "folder"], "there are no images")
    complains(capsys, ["prepare", train, "--val", val, "--out", tmp_path / "i"], "has no class", "--devkit")
    complains(capsys, ["prepare", train, "--devkit", train, "--out", tmp_path / "i"], "is not ILSVRC2012_devkit_t12.tar.gz")
    assert not list(tmp_path.glob(f"*/{FILE}"))


def test_an_index_that_is_there_is_not_made_again(archives, tmp_path, monkeypatch, capsys):
    train, *_ = archives
    copy = tmp_path / "copy.tar"
    copy.write_bytes(train.read_bytes())
    out = prepare.prepare([copy])
    before = contents(out)
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "scan_tar", lambda *_: pytest.fail("scanned again"))
        assert prepare.prepare([copy]) == out and contents(out) == before
    os.utime(copy, (1, 1))
    with pytest.raises(InputError, match=r"is older than .*copy.tar.*run `fastdit prepare` again"):
        open_index(out)
    prepare.prepare([copy])
    assert open_index(out).rows("train").tolist() == np.load(io.BytesIO(before["train.npy"])).tolist()
    copy.unlink()
    with pytest.raises(InputError, match=r"copy.tar, which cannot be read \(No such file"):
        open_index(out)


def test_md5_sums(archives, tmp_path, capsys, monkeypatch):
    train, val, devkit = archives
    words = ["prepare", train, "--val", val, "--devkit", devkit, "--verify", "--out", tmp_path / "index"]
    sums = {role: hashlib.md5(p.read_bytes()).hexdigest() for role, p in zip(("train", "val", "devkit"), archives, strict=True)}
    monkeypatch.setattr(imagenet, "MD5", {**sums, "val": "0" * 32})
    complains(capsys, words, str(val), sums["val"], "0" * 32, "fetch it again")
    assert not (tmp_path / "index").exists()
    monkeypatch.setattr(imagenet, "MD5", sums)
    assert cli.main([str(word) for word in words]) == 0


def test_other_counts_than_imagenets_are_said(archives, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(imagenet, "are_imagenet", lambda _: True)
    prepare.prepare([archives[0]], tmp_path / "index")
    assert "1,281,167 images, not 35" in capsys.readouterr().err


def test_shipped_names_are_those_of_imagenet():
    names = imagenet.imagenet_names()
    assert len(names) == 1000 and names[0].startswith("tench") and names[207] == "golden retriever"
    wnids = [imagenet.FIRST, *(f"n02{i:06d}" for i in range(998)), imagenet.LAST]
    assert imagenet.are_imagenet(wnids) and not imagenet.are_imagenet(wnids[:-1])


def test_class_names_are_accepted():
    names = imagenet.imagenet_names()
    assert class_names.parse_classes("golden retriever, Otter,0,tinca tinca", 1000, names) == [207, 360, 0, 0]
    for text, message in [
        ("crane", r"names classes 134 and 517: give the id"),
        ("golden retreiver", r"did you mean 'golden retriever'"),
        ("1000", r"out of range"),
    ]:
        with pytest.raises(InputError, match=message):
            class_names.parse_classes(text, 1000, names)
    with pytest.raises(InputError, match=r"must be 'all' or class ids"):
        class_names.parse_classes("otter", 10)


@pytest.mark.parametrize("quality", [50, 95])
def test_sizes_from_headers_are_pillows(quality):
    for image in photographs.crops(8):
        data = photographs.encoded(image, quality=quality, exif=b"Exif\0\0" + bytes(300))
        assert jpeg_size(data) == (image.height, image.width)
    assert jpeg_size(b"\xff\xd8\xff") is None and jpeg_size(b"\x89PNG") is None
