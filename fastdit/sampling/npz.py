"""Samples for evaluators: an npz of arr_0 (uint8 [n,S,S,C]) and arr_1 (class ids int64 [n]), as ADM's evaluation suite reads it.

Batches are written as they are made, by any number of ranks, into a folder beside the file, and joined at the end without ever
being held together: a command that was killed goes on with the batches that are missing, and the file is the same to the byte.
"""

import shutil
import zipfile
from pathlib import Path

import numpy as np

from fastdit.config import InputError
from fastdit.files import begin_or_match, replacing


class Parts:
    """The batches of a file that is being made, in .<name>.parts beside it."""

    def __init__(self, path: Path, images: int, at_once: int) -> None:
        """images: of the whole file; at_once: of a batch."""
        self.path, self.images, self.batches = path, images, -(-images // at_once)
        self.folder = path.with_name(f".{path.name}.parts")

    def begin(self, settings: dict) -> None:
        """Make the folder, or check that the one that is there was begun with the same settings. Raises InputError."""
        if difference := begin_or_match(self.folder / "settings.json", settings):
            raise InputError(f"{self.path} {difference}: give another name, or delete {self.folder}")

    def _file(self, k: int) -> Path:
        return self.folder / f"{k:06d}.npy"

    def has(self, k: int) -> bool:
        return self._file(k).exists()

    def write(self, k: int, images: np.ndarray) -> None:
        """Batch k, whole or not at all."""
        with replacing(self._file(k)) as temporary, temporary.open("wb") as file:
            np.save(file, images)

    def join(self, labels: np.ndarray) -> None:
        """Write the npz out of all batches and remove them."""
        shape = (self.images, *np.load(self._file(0), mmap_mode="r").shape[1:])
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with replacing(self.path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:  # opened by name it is dated 1980
                np.lib.format.write_array_header_1_0(file, header)
                for k in range(self.batches):
                    file.write(np.load(self._file(k)).tobytes())
            with archive.open("arr_1.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, labels)
        shutil.rmtree(self.folder)
