"""Samples for evaluators: an npz of arr_0 (uint8 [n,S,S,C]) and arr_1 (class ids int64 [n]), as ADM's evaluation suite reads it.

Any number of ranks write batches as they are made into a folder beside the file. At the end they are joined without being in memory
together. A command that was killed resumes with the missing batches, and the file is the same to the byte.
"""

import shutil
import zipfile
from pathlib import Path

import numpy as np

from fastdit.config import InputError
from fastdit.files import begin_or_match, replacing, resumable, writing


class Parts:
    """The batches of an unfinished file, in .<name>.parts beside it."""

    def __init__(self, path: Path, images: int, at_once: int) -> None:
        """path: path of the npz; images: images in it; at_once: images per batch."""
        self.path = path
        self.images = images
        self.at_once = at_once
        self.batches = -(-images // at_once)
        self.folder = path.with_name(f".{path.name}.parts")

    def begin(self, settings: dict) -> None:
        """Make the folder, or check that the one that is there was begun with the same settings. Raises InputError."""
        with writing(self.path):
            difference = begin_or_match(self.folder / "settings.json", settings)
        if difference:
            raise InputError(f"{self.path} {difference}: give another name, or delete {self.folder}")

    def _file(self, k: int) -> Path:
        return self.folder / f"{k:06d}.npy"

    def has(self, k: int) -> bool:
        """Whether batch k has been written."""
        return self._file(k).exists()

    def write(self, k: int, images: np.ndarray) -> None:
        """Write the images uint8 [B,S,S,C] of batch k, completely or not at all."""
        with resumable(self.folder), replacing(self._file(k)) as temporary, temporary.open("wb") as file:
            np.save(file, images)

    def _read(self, k: int) -> np.ndarray:
        """Return the images of batch k. Raises InputError if its file is damaged."""
        try:
            images = np.load(self._file(k))
            if images.dtype == np.uint8 and len(images) == min(self.at_once, self.images - k * self.at_once):
                return images
            reason = f"it holds {images.dtype} {list(images.shape)}"
        except (ValueError, EOFError) as error:
            reason = str(error)
        raise InputError(f"{self._file(k)} is damaged: {reason}; delete it, and the same command draws it again")

    def join(self, labels: np.ndarray) -> None:
        """Write the npz from all batches and the labels int64 [n], and remove the batches. Raises InputError."""
        with resumable(self.folder), replacing(self.path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            header = {"descr": "|u1", "fortran_order": False, "shape": (self.images, *self._read(0).shape[1:])}
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:  # opened by name it is dated 1980
                np.lib.format.write_array_header_1_0(file, header)
                for k in range(self.batches):
                    file.write(self._read(k).tobytes())
            with archive.open("arr_1.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, labels)
        shutil.rmtree(self.folder)
