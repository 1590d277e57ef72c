"""Folders as people have them: hidden files, links, loops, names of any bytes, and whether they have changed."""

import os
from pathlib import Path

import pytest

import pictures
from fastdit.data import folders
from fastdit.data.folders import walk


def test_images_at_any_depth_in_the_order_of_their_bytes(tmp_path):
    pictures.write(tmp_path, "b.jpg", "a/z.PNG", "a/sub/y.jpeg", "a.jpg", "é.webp", b"caf\xe9.jpg")
    assert [os.fsencode(name) for name in walk(str(tmp_path)).images] == [
        b"a.jpg", b"a/sub/y.jpeg", b"a/z.PNG", b"b.jpg", b"caf\xe9.jpg", "é.webp".encode(),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [".ipynb_checkpoints/x.jpg", "__MACOSX/x.jpg", "@eaDir/x.jpg", ".cache/deep/er/x.jpg", "#recycle/x.jpg", "lost+found/x.jpg",
     "$RECYCLE.BIN/x.jpg", "System Volume Information/x.jpg", "sub/.hidden/x.jpg"],
)  # fmt: skip
def test_hidden_and_system_folders_are_counted(tmp_path, name):
    pictures.write(tmp_path, "a.jpg", name)
    (tmp_path / ".empty").mkdir()
    listing = walk(str(tmp_path))
    assert listing.images == ["a.jpg"] and sum(listing.hidden.values()) == 1


def test_hidden_files_are_left_out_and_others_counted(tmp_path):
    pictures.write(tmp_path, "a.jpg", "._a.jpg", ".DS_Store", "Thumbs.db", "b.gif", "c.GIF", "d.tar.gz", "README")
    listing = walk(str(tmp_path))
    assert listing.images == ["a.jpg"] and listing.others == {".gif": 2, ".tar.gz": 1, "": 1}
    assert folders.counted(listing.others) == "1 without a suffix, 2 .gif, 1 .tar.gz"


def test_links_are_followed_and_loops_end(tmp_path):
    pictures.write(tmp_path, "class/a.jpg", "class/sub/b.jpg", "pool/c.jpg", "other/d.jpg")
    at = tmp_path / "class"
    (at / "pool").symlink_to("../pool")
    (at / "pool2").symlink_to("../pool")  # the same folder again
    (at / "sub" / "self").symlink_to(".")
    (at / "sub" / "up").symlink_to("../..")  # to the folder above the class, which holds other classes
    (at / "e.jpg").symlink_to("a.jpg")
    (at / "gone.jpg").symlink_to("nowhere.jpg")
    (at / "gone").symlink_to("nowhere")
    (at / "round.jpg").symlink_to("round.jpg")
    listing = walk(str(at))
    assert listing.images == ["a.jpg", "e.jpg", "pool/c.jpg", "sub/b.jpg"]
    assert listing.again == 3
    assert listing.bad == [(name, folders.DANGLING) for name in ("gone", "gone.jpg", "round.jpg")]


def test_what_is_no_file_is_bad(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    pictures.write(tmp_path, "folder.jpg/a.jpg")
    listing = walk(str(tmp_path))
    assert listing.images == ["folder.jpg/a.jpg"] and listing.bad == [("pipe.jpg", "it is no file")]


def change_nothing(folder: Path) -> None:
    (folder / "notes.txt").write_text("x")
    pictures.write(folder, ".thumbnails/x.jpg")


def replace_in_place(folder: Path) -> None:
    status = (folder / "a.jpg").stat()
    (folder / "a.jpg").write_bytes(bytes(status.st_size))
    os.utime(folder / "a.jpg", ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def resize(folder: Path) -> None:
    status = (folder / "a.jpg").stat()
    (folder / "a.jpg").write_bytes(b"x")
    os.utime(folder / "a.jpg", ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (change_nothing, False),
        (replace_in_place, True),
        (resize, True),
        (lambda folder: pictures.write(folder, "sub/new.jpg"), True),
        (lambda folder: (folder / "sub" / "b.jpg").rename(folder / "sub" / "c.jpg"), True),
        (lambda folder: (folder / "a.jpg").unlink(), True),
    ],
)
def test_the_digest_is_that_of_names_sizes_and_times_of_images(tmp_path, change, differs):
    pictures.write(tmp_path, "a.jpg", "sub/b.jpg")
    before = walk(str(tmp_path))
    assert [name for name, _ in before.folders] == ["", "sub"]
    change(tmp_path)
    assert (walk(str(tmp_path)).digest != before.digest) == differs


@pytest.mark.parametrize(
    ("names", "is_output"),
    [
        (["index.json", "train.npy"], True),
        ([".parts/request.json"], True),
        (["settings.json"], True),
        (["settings.json", "labels_00000.npy"], True),
        (["metrics.jsonl", "checkpoints/x"], True),
        (["index.json", "a.jpg"], False),
        (["settings.json", "a.jpg"], False),
        (["metrics.jsonl"], False),
        (["a.jpg"], False),
    ],
)
def test_what_fastdit_wrote_is_known_by_its_files(tmp_path, names, is_output):
    pictures.write(tmp_path, *(f"x/{name}" for name in names))
    assert folders.is_output(str(tmp_path / "x")) == is_output


def test_reading_gives_bytes_and_time(tmp_path):
    pictures.write(tmp_path, "a.jpg")
    assert folders.read(str(tmp_path / "a.jpg")) == (pictures.encoded(0), (tmp_path / "a.jpg").stat().st_mtime_ns)
