"""Files that are written whole or not at all, and jobs that are begun once."""

import errno
import hashlib
import platform
import subprocess
import sys

import pytest

from fastdit import autoencoder, files
from fastdit.config import InputError
from fastdit.convert import base
from fastdit.data import index, latents


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "file"
    files.write_atomically(path, "old")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as temporary:
        temporary.write_text("half")
        assert 1 / 0
    assert path.read_text() == "old"
    with files.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_two_processes_that_write_one_file_share_no_temporary_one(tmp_path):
    """The second begins while the first writes: both end, and the file is whole."""
    path, code = (
        tmp_path / "file",
        "import sys, pathlib; from fastdit import files; files.write_atomically(pathlib.Path(sys.argv[1]), 'second')",
    )
    with files.replacing(path) as temporary:
        temporary.write_text("fir")
        subprocess.run([sys.executable, "-c", code, path], check=True)
        assert path.read_text() == "second"
        with temporary.open("a") as file:
            file.write("st")
    assert path.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_temporary_files_of_processes_that_are_gone_are_deleted(tmp_path):
    path, kill = tmp_path / "a", "temporary.write_text('half'); os.kill(os.getpid(), 9)"
    code = (
        f"import os, sys, pathlib; from fastdit import files\nwith files.replacing(pathlib.Path(sys.argv[1])) as temporary: {kill}"
    )
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == -9
    assert len(list(tmp_path.glob(".tmp-*-a"))) == 1
    kept = [f".tmp-{platform.node()}-1-1-a", ".tmp-elsewhere-1-1-a", f".tmp-{platform.node()}-x-a"]  # process 1 runs
    for name in kept:
        (tmp_path / name).touch()
    files.write_atomically(path, "whole")
    assert {p.name for p in tmp_path.iterdir()} == {"a", *kept}


@pytest.mark.parametrize("data", [b"[]", b"{", b"\xff", b'"text"', b"[" * 100_000])
def test_a_job_of_something_else_is_not_matched(tmp_path, data):
    (tmp_path / "settings.json").write_bytes(data)
    assert "something else than fastdit" in files.begin_or_match(tmp_path / "settings.json", {"size": 32})


def test_a_job_is_begun_once_with_the_same_settings(tmp_path):
    path, settings = tmp_path / "job" / "settings.json", {"size": 32, "range": (0, 1), "name": None}
    assert files.begin_or_match(path, settings) is None
    written = path.read_bytes(), path.stat().st_mtime_ns
    assert files.begin_or_match(path, dict(settings)) is None  # a tuple is a list in JSON: no difference
    assert files.begin_or_match(path, {**settings, "size": 64}) == "was begun with size=32, this command has 64"
    assert files.begin_or_match(path, {**settings, "new": 1}) == "was begun with new=None, this command has 1"
    assert (path.read_bytes(), path.stat().st_mtime_ns) == written


def test_a_full_disk_of_a_resumable_job_is_one_sentence(tmp_path):
    message = r"shard\.npy: No space left on device; what was done so far is kept: the same command resumes .* or use another --out"
    with pytest.raises(InputError, match=message), files.resumable(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "shard.npy"))
    with pytest.raises(InputError, match=f"^{tmp_path}: "), files.resumable(tmp_path):
        raise OSError(errno.EIO, "Input/output error")


def test_hashes_are_of_the_whole_file(tmp_path):
    data = bytes(range(256)) * 20_000  # more than one block
    (tmp_path / "file").write_bytes(data)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_paths_that_cannot_be_written_are_one_sentence(tmp_path):
    files.check_writable(tmp_path / "new.png")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="is a folder: give the name of a file in it"):
        files.check_writable(tmp_path)
    with pytest.raises(InputError, match="No such file or directory: choose another path"):
        files.check_writable(tmp_path / "nowhere" / "new.png")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b"null", b"\xff", b"[" * 100_000, b'{"a":' * 100_000])
def test_only_an_object_is_json_of_ours(data, tmp_path):
    """What is nested too deeply is no other error than the rest: readers say which file is damaged."""
    with pytest.raises(ValueError):
        files.json_object(data)
    assert files.json_object(b'{"a": 1}') == {"a": 1}
    for name in ("index.json", "settings.json", "manifest.json", "config.json", "model_params_Ns.json"):
        (tmp_path / name).write_bytes(data)
    for read in (
        lambda: index.open_index(tmp_path),
        lambda: latents.read_manifest(tmp_path),
        lambda: autoencoder._class_name(tmp_path, "vae"),
        lambda: base.load(tmp_path / "model_Ns.pkl", tmp_path / "model_params_Ns.json"),
    ):
        with pytest.raises(InputError, match=str(tmp_path)):
            read()
