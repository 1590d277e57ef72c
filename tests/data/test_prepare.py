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

import pictures
from benchmarks import photographs
from commands import complains
from fastdit import cli, files
from fastdit.config import InputError
from fastdit.data import archives as archives_module
from fastdit.data import folders, imagenet, prepare
from fastdit.data.folders import DANGLING
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
    assert f"4 bad files were left out: {full_index.folder / 'bad_files.csv'}" in prepare.describe(full_index.folder).splitlines()


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


def test_a_folder_of_many_chunks_is_listed_once(tmp_path, monkeypatch):
    source = pictures.write(tmp_path / "d", *(f"a/{i}.jpg" for i in range(9)), "b/0.jpg")
    whole = prepare.prepare([source], tmp_path / "whole")
    walk, walked = folders.walk, []
    monkeypatch.setattr(folders, "walk", lambda path, *rest, **options: (walked.append(path), walk(path, *rest, **options))[1])
    monkeypatch.setattr(archives_module, "CHUNK", 2)
    chunked = prepare.prepare([source], tmp_path / "chunked")
    assert contents(chunked) == contents(whole)
    assert len(walked) == 4  # each class folder once for its state, and once to scan it


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

    def full(self, text, **options):
        if len(written) == 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        written.append(self)
        return write(self, text, **options)

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


def table(index: Path) -> dict[str, int]:
    """The images of each class, in the order of the ids."""
    found = open_index(index)
    counts = np.bincount(found.rows("train")["label"], minlength=len(found.classes)).tolist()
    return dict(zip(found.classes, counts, strict=True))


@pytest.mark.parametrize(
    ("names", "classes", "note"),
    [
        (["1", "10", "2"], ["1", "2", "10"], "the class numbers are not 0 to 2: ids count the classes that exist, '1' has id 0"),
        (["0", "1", "2"], ["0", "1", "2"], None),
        (["1007", "2044"], ["1007", "2044"], "'1007' has id 0"),
        (["01", "02", "1"], ["01", "1", "02"], "'01' has id 0"),
        (["1000000000", "0"], ["0", "1000000000"], "'1000000000' has id 1"),
        (["٣", "1"], ["1", "٣"], None),  # a digit of another script is a name
        (["²", "10", "9"], ["10", "9", "²"], None),
        (["b", "B", "a10", "a2"], ["B", "a10", "a2", "b"], None),
        (["9" * 200, "10"], ["10", "9" * 200], "has id 0"),
    ],
)
def test_ids_go_to_the_classes_that_exist(tmp_path, capsys, names, classes, note):
    out = prepare.prepare([pictures.write(tmp_path / "d", *(f"{name}/0.jpg" for name in names))])
    assert table(out) == dict.fromkeys(classes, 1)
    said = capsys.readouterr().err
    assert note in said if note else "class numbers" not in said


def test_labels_of_webdataset_with_gaps_are_said(tmp_path, capsys):
    files = {f"{i}.{end}": data for i in (0, 1, 5) for end, data in (("jpg", pictures.encoded(i)), ("cls", str(i).encode()))}
    (tmp_path / "x.tar").write_bytes(photographs.tar_of(files))
    assert table(prepare.prepare([tmp_path / "x.tar"])) == {"0": 1, "1": 1, "5": 1}
    assert "the class numbers are not 0 to 2: ids count the classes that exist, '5' has id 2" in capsys.readouterr().err


def test_the_table_of_classes_is_printed(tmp_path, capsys):
    source = pictures.write(tmp_path / "d", "1/0.jpg", "1/1.jpg", "10/0.jpg", "2/0.jpg", "2/x.txt")
    assert cli.main(["prepare", str(source)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"index: {source}.index (4 train images, 3 classes)", "id  class  images", " 0  1           2", " 1  2           1",
        " 2  10          1",
    ]  # fmt: skip


def test_names_that_are_not_utf8(tmp_path, capsys):
    """Of classes, images, bad files and of the folder itself: in the journal, the index, bad_files.csv and on the terminal."""
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xff"))
    pictures.write(root, b"caf\xe9/\xe9.jpg", "é/0.jpg", b"caf\xe9/new\nline.jpg")
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9/bad\xe9.jpg")).write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(root) + b"/gone\xe9")).symlink_to("nowhere")
    assert cli.main(["prepare", str(root)]) == 0
    out = prepare.default_index(root)
    assert [os.fsencode(name) for name in table(out)] == [b"caf\xe9", "é".encode()]
    found = open_index(out)
    assert [found.read(row) for row in found.rows("train")] == [pictures.encoded(i) for i in (2, 0, 1)]
    bad = list(csv.DictReader((out / "bad_files.csv").open(encoding="utf-8")))
    assert [(row["file"], row["reason"]) for row in bad] == [("gone\\xe9", DANGLING), ("bad\\xe9.jpg", "it is no image")]
    assert "caf\\xe9" in capsys.readouterr().out
    digest = found.digest("train")
    for name in list(out.iterdir()):  # made again from its journal, which a kill has left
        assert name.name != ".parts"
    (out / FILE).unlink()
    assert prepare.prepare([root]) == out and open_index(out).digest("train") == digest


def test_dangling_links_are_bad_files(tmp_path):
    source = pictures.write(tmp_path / "d", "a/0.jpg", "b/0.jpg")
    (source / "a" / "1.jpg").symlink_to("nowhere.jpg")
    (source / "c").symlink_to("nowhere")
    (source / "b" / "2.jpg").write_bytes(pictures.encoded())
    (source / "b" / "2.jpg").chmod(0)
    out = prepare.prepare([source])
    bad = [(row["file"], row["reason"]) for row in csv.DictReader((out / "bad_files.csv").open())]
    denied = [] if os.access(source / "b" / "2.jpg", os.R_OK) else [("2.jpg", "Permission denied")]  # root may read it
    assert bad == [("c", DANGLING), ("1.jpg", DANGLING), *denied]


def test_a_root_of_splits_gives_both_splits(tmp_path, capsys):
    names = ["train/a/0.jpg", "train/a/1.jpg", "train/b/0.jpg", "val/a/0.jpg", "test/a/0.jpg"]
    out = prepare.prepare([pictures.write(tmp_path / "d", *names)])
    assert table(out) == {"a": 2, "b": 1} and len(open_index(out).rows("val")) == 1
    assert f"{tmp_path}/d holds splits: train to train on, val as validation images; left out: test" in capsys.readouterr().err
    pictures.write(tmp_path / "d", "val/zebra/0.jpg")
    with pytest.raises(InputError, match=r"have a class 'zebra' that the training images do not have: give a --val of the same"):
        prepare.prepare([tmp_path / "d"])


def test_an_index_inside_of_the_data_is_no_class(tmp_path):
    source = pictures.write(tmp_path / "d", "a/0.jpg", "b/0.jpg")
    out = prepare.prepare([source], source / "x.index")
    assert prepare.prepare([source / "a"]) == source / "a.index"
    first = contents(out)
    assert prepare.prepare([source], source / "x.index") == out and contents(out) == first
    assert table(out) == {"a": 1, "b": 1}
    (out / FILE).unlink()  # as a killed command leaves it: unfinished
    (out / ".parts").mkdir()
    assert table(prepare.prepare([source], out)) == {"a": 1, "b": 1}
    open_index(out)


@pytest.mark.parametrize("words", [[""], ["d", "--val", ""], ["d", "--out", ""], ["d", "--devkit", ""]])
def test_empty_paths_are_refused(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(pictures.write(tmp_path, "d/a/0.jpg", "d/b/0.jpg"))
    complains(capsys, ["prepare", *words], "a path is ''", "shell variable")
    assert sorted(path.name for path in tmp_path.parent.iterdir() if path.name.endswith(".index")) == []
    monkeypatch.chdir(tmp_path / "d")
    assert cli.main(["prepare", "."]) == 0 and table(tmp_path / "d.index") == {"a": 1, "b": 1}


def test_two_commands_for_one_index(tmp_path, capsys):
    source = pictures.write(tmp_path / "d", "a/0.jpg", "b/0.jpg")
    out = prepare.prepare([source])
    pictures.write(source, "c/0.jpg")
    with files.lock(out / ".lock", ""):
        complains(capsys, ["prepare", source], f"another `fastdit prepare` makes {out}", "wait for it")
    assert cli.main(["prepare", str(source)]) == 0


def test_a_finished_index_is_used_where_nothing_can_be_written(tmp_path, monkeypatch):
    out = prepare.prepare([pictures.write(tmp_path / "d", "a/0.jpg", "b/0.jpg")])
    monkeypatch.setattr(files, "lock", lambda *_: pytest.fail("locked"))
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("written"))
    assert prepare.prepare([tmp_path / "d"]) == out


@pytest.mark.parametrize("content", [b"[]", b"{}", b"\xff", b"{", b'[[["x"]], [], null]'])
def test_a_journal_of_another_form_is_one_sentence(archives, tmp_path, capsys, monkeypatch, content):
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "_write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare([archives[0]], tmp_path / "index")
    parts = sorted((tmp_path / "index" / ".parts").glob("train-*"))
    assert len(parts) == 5
    parts[1].write_bytes(content)
    complains(capsys, ["prepare", archives[0], "--out", tmp_path / "index"], parts[1].name, "was not written by", "delete")
    parts[1].unlink()
    (tmp_path / "index" / ".parts" / "request.json").write_bytes(content)
    prepare.prepare([archives[0]], tmp_path / "index")  # a journal of another request is begun again
    assert contents(tmp_path / "index")["train.npy"] == contents(prepare.prepare([archives[0]], tmp_path / "whole"))["train.npy"]


def test_a_journal_outlives_files_that_are_no_images(tmp_path, monkeypatch):
    source = pictures.write(tmp_path / "d", "a/0.jpg", "b/0.jpg")
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "_write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare([source], source / "a" / "x.index")
    pictures.write(source, "b/Thumbs.db", "b/notes.txt")
    monkeypatch.setattr(archives_module, "scan", lambda *_: pytest.fail("scanned again"))
    assert table(prepare.prepare([source], source / "a" / "x.index")) == {"a": 1, "b": 1}


def test_an_interrupt_leaves_the_journal_whole(archives, full_index, tmp_path, monkeypatch):
    train, val, devkit = archives
    scan, scanned = archives_module.scan, []

    def interrupted(*arguments):
        if len(scanned) == 3:
            raise KeyboardInterrupt
        scanned.append(arguments)
        return scan(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(archives_module, "scan", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare([train], tmp_path / "index", val, devkit)
    parts = {f"train-{i:06d}-{container.start}.json" for i, (_, container, _) in enumerate(scanned)}
    assert {path.name for path in (tmp_path / "index" / ".parts").iterdir()} == {"request.json", *parts} and len(parts) == 3
    assert contents(prepare.prepare([train], tmp_path / "index", val, devkit)) == contents(full_index.folder)


def test_other_counts_than_imagenets_are_said(archives, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(imagenet, "are_imagenet", lambda _: True)
    prepare.prepare([archives[0]], tmp_path / "index")
    assert "1,281,167 images, not 35" in capsys.readouterr().err
