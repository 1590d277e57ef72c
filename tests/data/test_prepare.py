"""fastdit prepare: the index of ImageNet's archives, kills, full disks, requests that are done, checksums."""

import csv
import errno
import hashlib
import io
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

from commands import complains
from fastdit import cli
from fastdit.config import InputError
from fastdit.data import archives as archives_module
from fastdit.data import imagenet, prepare
from fastdit.data.index import FILE, open_index


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_imagenet_archives(full_index, archives):
    rows = full_index.rows("train")
    assert full_index.classes == sorted(full_index.classes) and len(full_index.classes) == 5
    assert np.bincount(rows["label"]).tolist() == [11, 6, 6, 6, 6]  # the second in the archive is the first in order
    for row in rows:
        name = row["name"].decode()
        assert name.startswith(full_index.classes[row["label"]])
        with Image.open(io.BytesIO(full_index.read(row))) as image:
            assert (image.height, image.width) == (row["height"], row["width"])
            image.load()
    val = full_index.rows("val")
    assert [full_index.class_names[label] for label in val["label"]] == [f"thing {i * 3 % 5}, item {i * 3 % 5}" for i in range(8)]
    assert [row["name"].decode() for row in val] == [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(8)]
    assert np.load(io.BytesIO(Path(full_index.folder, "val.npy").read_bytes()))["source"].tolist() == [1] * 8


def test_bad_files_are_listed_with_reasons(full_index):
    table = list(csv.DictReader((full_index.folder / "bad_files.csv").open()))
    assert {row["file"].split("_", 1)[1]: row["reason"] for row in table} == {
        "bad_truncated.JPEG": "image file is truncated (35 bytes not processed)",
        "bad_empty.JPEG": "the file is empty",
        "bad_text.JPEG": "it is no image",
        "bad_end.JPEG": "image file is truncated (8 bytes not processed)",
    }
    assert {row["split"] for row in table} == {"train"}


def test_many_chunks_give_the_index_of_one(archives, tmp_path, monkeypatch):
    train, *_ = archives
    whole = prepare.prepare([train], tmp_path / "a")
    monkeypatch.setattr("fastdit.data.archives.CHUNK", 2)
    assert contents(prepare.prepare([train], tmp_path / "b")) == contents(whole)


SLOWLY = """
import sys, time, scipy.io
from pathlib import Path
from fastdit.data import archives, pixels, prepare
inspect, archives.CHUNK = pixels.inspect, 2
pixels.inspect = lambda data: (time.sleep(0.04), inspect(data))[1]
print("begun", flush=True)
prepare.prepare([Path(sys.argv[1])], Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
"""


def test_a_killed_run_resumes_to_the_same_bytes(archives, full_index, tmp_path, seed):
    train, val, devkit = archives
    command, out = [sys.executable, "-c", SLOWLY, train, tmp_path / "index", val, devkit], tmp_path / "index"
    rng, scanned = random.Random(seed), []
    for _ in range(3):
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process.stdout.readline()
        time.sleep(rng.uniform(0.1, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        scanned.append(len(list(out.glob(".parts/train*"))))
        assert not (out / FILE).exists()
    assert scanned == sorted(scanned) and scanned[-1] > 0, f"seed {seed}"  # chunks are not scanned again
    assert cli.main([str(w) for w in ["prepare", train, "--val", val, "--devkit", devkit, "--out", out]]) == 0
    assert contents(out) == contents(full_index.folder), f"seed {seed}"


def test_a_full_disk_keeps_what_was_done(archives, full_index, tmp_path, capsys, monkeypatch):
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
    scan, scanned = archives_module.scan, []
    monkeypatch.setattr(archives_module, "scan", lambda *a: (scanned.append(a), scan(*a))[1])
    assert cli.main([str(word) for word in words]) == 0
    assert len(scanned) == 6 - 3  # three of five classes and of the validation archive were there
    assert contents(tmp_path / "index") == contents(full_index.folder)


def test_a_file_size_limit_keeps_what_was_done(archives, full_index, tmp_path):
    train, val, devkit = archives
    words = [str(w) for w in ("prepare", train, "--val", val, "--devkit", devkit, "--out", tmp_path / "index")]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1536, 1536))  # a part fits, the index of 35 images does not
    command = [sys.executable, "-m", "fastdit.cli", *words]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 2 and "File too large" in done.stderr and "kept" in done.stderr, done.stderr
    assert len(list((tmp_path / "index" / ".parts").glob("*"))) >= 5
    assert subprocess.run(command, check=False).returncode == 0
    assert contents(tmp_path / "index") == contents(full_index.folder)


def test_an_index_that_is_there_is_not_made_again(archives, tmp_path, monkeypatch, capsys):
    train, *_ = archives
    copy = tmp_path / "copy.tar"
    copy.write_bytes(train.read_bytes())
    out = prepare.prepare([copy])
    before = contents(out)
    with monkeypatch.context() as patched:
        patched.setattr(archives_module, "scan", lambda *_: pytest.fail("scanned again"))
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
