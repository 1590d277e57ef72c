"""Folders at any depth: the images in them, what else is there, and whether they have changed.

Links are followed and named by themselves, not by their targets; each folder is read once, so that loops end. Hidden files and
folders, those of systems (pixels.SYSTEM_NAMES) and what fastdit wrote are no data.
"""

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from fastdit.data.pixels import IMAGE_SUFFIXES, is_hidden

# Errors of one file. Any other, such as too many open files or a stale handle of a file server, may hit every file.
FAULTS_OF_A_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}
PACKED = (".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")  # suffixes of two parts
DANGLING = "it is a link to a file that is not there"
JOURNAL = ".parts"  # of an index that is being made


@dataclass
class Listing:
    """The content of a folder, links included. Paths are relative to it."""

    images: list[str] = field(default_factory=list)  # in the order of their bytes
    bad: list[tuple[str, str]] = field(default_factory=list)  # images and links that cannot be read, and the reason
    others: Counter[str] = field(default_factory=Counter)  # number of other files by suffix
    hidden: Counter[str] = field(default_factory=Counter)  # number of hidden folders with images in them, by name
    outputs: list[str] = field(default_factory=list)  # folders that fastdit wrote
    again: int = 0  # links to folders that had been read before, or that the folder lies in
    folders: list[tuple[str, int]] = field(default_factory=list)  # and their modification times, ns
    digest: str = ""  # of the names, sizes and modification times of the images
    identity: tuple[int, int] = (0, 0)  # device and inode


def suffix(name: str) -> str:
    """Return the suffix of a file's name in lower case, "" without one; that of a compressed tar has two parts."""
    lower = name.lower()
    return next((end for end in PACKED if lower.endswith(end)), os.path.splitext(lower)[1])


def counted(others: Counter[str]) -> str:
    """Return numbers of files by suffix as text: "12 .gif, 3 without a suffix"."""
    return ", ".join(f"{count:,} {key or 'without a suffix'}" for key, count in sorted(others.items()))


def is_output(path: str) -> bool:
    """Whether a folder was written by fastdit: an index or a latent set, finished or not, or a run. Raises OSError."""
    has = lambda name: os.path.lexists(os.path.join(path, name))
    return are_outputs(has) or (has("settings.json") and len(os.listdir(path)) == 1)  # a latent set that has just begun


def are_outputs(has: Callable[[str], bool]) -> bool:
    """Whether a folder was written by fastdit. has: whether it has a file of a name."""
    index = has(JOURNAL) or (has("index.json") and has("train.npy"))
    latents = has("settings.json") and (has("manifest.json") or has("labels_00000.npy"))
    return index or latents or (has("metrics.jsonl") and has("checkpoints"))


def holds_images(path: str) -> bool:
    """Whether an image lies in a folder at any depth, hidden or not; links are not followed."""
    return any(suffix(name) in IMAGE_SUFFIXES for _, _, names in os.walk(path) for name in names)


def _ancestors(path: str) -> set[tuple[int, int]]:
    """Return device and inode of the folders that `path` lies in."""
    found = set()
    path = os.path.realpath(path)
    while (parent := os.path.dirname(path)) != path:
        status = os.stat(parent)
        found.add((status.st_dev, status.st_ino))
        path = parent
    return found


def walk(root: str, with_state: bool = True) -> Listing:
    """List a folder. with_state: also read the sizes and modification times of its images, for the digest. Raises OSError."""
    listing = Listing()
    seen = _ancestors(root)
    states: list[tuple[str, int, int]] = []
    pending = [""]
    while pending:
        at = pending.pop()
        path = os.path.join(root, at) if at else root
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        if at:
            if identity in seen:
                listing.again += 1
                continue
        else:
            listing.identity = identity
        seen.add(identity)
        with os.scandir(path) as entries:
            entries = list(entries)
        if at and are_outputs({entry.name for entry in entries}.__contains__):
            listing.outputs.append(at)
            continue
        listing.folders.append((at, status.st_mtime_ns))
        pending += sorted(_list_one(entries, f"{at}/" if at else "", listing, states if with_state else None), reverse=True)
    listing.images.sort(key=os.fsencode)
    listing.bad.sort()
    if with_state:
        states.sort(key=lambda state: os.fsencode(state[0]))
        listing.digest = hashlib.sha256(os.fsencode("".join(f"{name}\0{n}\0{t}\0" for name, n, t in states))).hexdigest()
    return listing


def _list_one(entries: list[os.DirEntry], prefix: str, listing: Listing, states: list[tuple[str, int, int]] | None) -> list[str]:
    """Add the files of one folder to a listing, and return its subfolders. prefix: of their names."""
    subfolders = []
    for entry in entries:
        name = entry.name
        if is_hidden(name):
            if entry.is_dir(follow_symlinks=False) and holds_images(entry.path):
                listing.hidden[name] += 1
            continue
        if entry.is_symlink() and not os.path.exists(entry.path):
            listing.bad.append((prefix + name, DANGLING))
            continue
        is_image = os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        if is_image and entry.is_file():
            listing.images.append(prefix + name)
            if states is not None:
                status = entry.stat()
                states.append((prefix + name, status.st_size, status.st_mtime_ns))
        elif entry.is_dir():
            subfolders.append(prefix + name)
        elif is_image:
            listing.bad.append((prefix + name, "it is no file"))
        else:
            listing.others[suffix(name)] += 1
    return subfolders


def read(path: str) -> tuple[bytes, int]:
    """Return the bytes of a file and its modification time in ns. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        status = os.fstat(descriptor)
        return os.read(descriptor, status.st_size), status.st_mtime_ns
    finally:
        os.close(descriptor)
