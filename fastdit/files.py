"""Files and folders that are written whole or not at all, resumable jobs, hashes. Imports no large package."""

import errno
import fcntl
import functools
import glob
import hashlib
import json
import os
import platform
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from fastdit.config import InputError
from fastdit.progress import warn

MANIFEST = "manifest.json"  # of a folder: names, sizes and SHA-256 of its files, written last


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@functools.cache  # once per folder: a journal has thousands of files
def _delete_stale(folder: Path) -> None:
    """Delete the temporary files in a folder that processes of this machine left which do not run any more."""
    start = f".tmp-{platform.node()}-"
    for temporary in folder.glob(f"{glob.escape(start)}*"):
        try:
            os.kill(int(temporary.name.removeprefix(start).partition("-")[0]), 0)  # sends nothing
        except ProcessLookupError:
            temporary.unlink(missing_ok=True)
        except (PermissionError, OverflowError, ValueError):  # it runs, as somebody else; not a name of `replacing`
            continue


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and replace `path` by it at the end of the block: fsync, then rename.

    The temporary path is of this thread only: of two commands that write one file, the last one wins.
    """
    _delete_stale(path.parent)
    temporary = path.with_name(f".tmp-{platform.node()}-{os.getpid()}-{threading.get_native_id()}-{path.name}")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_object(data: bytes) -> dict:
    """Return the JSON object in the contents of a file. Raises ValueError if they are anything else."""
    try:
        values = json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    return values


def begin_or_match(path: Path, settings: dict) -> str | None:
    """Begin a resumable job, whose settings lie in the JSON file `path` beside its partial results, or match the one begun there.

    Returns None if the job is new, and `path` is written with its folder, or if it was begun with the same settings. Otherwise
    returns the first difference, as the predicate of a sentence: "was begun with size=32, this command has 64".
    """
    text = json.dumps(settings, indent=1)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
        return None
    given = json.loads(text)
    try:
        begun = json_object(path.read_bytes())
    except ValueError:
        return f"was begun by something else than fastdit: {path.name} in it is damaged"
    for key in given:
        if begun.get(key) != given[key]:
            return f"was begun with {key}={begun.get(key)}, this command has {given[key]}"
    return None


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Turn an OSError, such as a full disk, into an InputError that says that the partial results in `folder` are kept."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or folder}: {error.strerror or error}; what was done so far is kept: the same command resumes once "
            "that is fixed, or use another --out"
        ) from error


def lock(path: Path, taken: str) -> TextIO:
    """Make and lock the file at `path`. The lock holds until the returned file is closed or the process ends, however it ends.

    taken: the sentence of the InputError if another process holds the lock. A file system without locks is a warning. Raises
    OSError if the file cannot be made.
    """
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise InputError(taken) from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        warn(f"the file system of {path} has no locks ({error.strerror}): nothing keeps a second process out")
    return file


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError, such as a full disk, into an InputError that says that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}: make room, or choose another path") from error


@contextmanager
def outputs(paths: Iterable[Path]) -> Iterator[None]:
    """Check that files can be written at `paths`, and keep every other command from writing them during the block.

    The locks are files beside them, which are removed at the end. Raises InputError.
    """
    with ExitStack() as stack:
        for path in paths:
            check_writable(path)
            with writing(path):
                lock_file = path.with_name(f".{path.name}.lock")
                taken = f"another command writes {path}: wait for it, or choose another path"
                stack.enter_context(lock(lock_file, taken))
            stack.callback(lock_file.unlink, missing_ok=True)
        yield


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's contents, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def damage(folder: Path, by_hash: bool | str = True) -> str | None:
    """Return the first difference between a folder and its manifest, such as "a.bin has 3 bytes, not 4", or None if it is whole.

    by_hash=False compares only the sizes; the name of a file: its hash, and the sizes of the others.
    """
    try:
        files = json_object((folder / MANIFEST).read_bytes())["files"]
        expected = {name: (int(file["bytes"]), str(file["sha256"])) for name, file in files.items()}
        if not expected:
            raise ValueError("a manifest of no files")
    except OSError as error:
        return f"{MANIFEST}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not what was written"
    for name, (size, _) in expected.items():
        if "/" in name or not os.path.isfile(folder / name):
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size} bytes, not {size}"
    for name, (_, digest) in expected.items() if by_hash else ():
        if by_hash not in (True, name):
            continue
        try:
            if sha256(folder / name) != digest:
                return f"{name} has other contents than were written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def step_folders(folder: Path) -> list[Path]:
    """Return the folders named step_NNNNNNNN in a folder, the last step first; other names and files are left out.

    Raises InputError if it cannot be read.
    """
    try:
        names = [
            entry.name for entry in os.scandir(folder) if re.fullmatch(r"step_\d{8,}", entry.name, re.ASCII) and entry.is_dir()
        ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error
    return [folder / name for name in sorted(names, key=step_of, reverse=True)]


def step_of(name: str) -> int:
    """Return the step in the name of a folder that `step_folders` lists."""
    return int(name.removeprefix("step_"))


def check_writable(path: Path) -> None:
    """Raise InputError unless a file can be written at `path`."""
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder: give the name of a file in it")
        if path.exists() and not path.is_file():  # the rename would replace a device such as /dev/null
            raise InputError(f"{path} is no regular file: choose another path")
        if len(os.fsencode(path.name)) > 180:  # of 255, because temporary files and locks have longer names
            raise InputError(f"{path.name[:20]}… is longer than 180 bytes: choose a shorter name")
        tempfile.TemporaryFile(dir=path.parent).close()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(path)[:200]} cannot be written: {reason}: choose another path") from error


def check_readable(name: str, path: str | Path) -> None:
    """Raise InputError if no path can be `path`, given as the option or argument `name`. It need not exist."""
    try:
        if not str(path):
            raise ValueError("it is empty")
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return  # whoever reads it says what it should be
    except (OSError, ValueError) as error:  # too long, a loop of links, no permission; ValueError: a NUL
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name} {str(path)[:50]!r} cannot be read: {reason}") from error


def path_argument(text: str) -> Path:
    """Return a path of a command line. Raises InputError for '', which is not the current folder."""
    if not text:
        raise InputError("a path is '', as of a shell variable that is not set: give one, or write . for the current folder")
    return Path(text)
