"""What an evaluation that was killed resumes from: the feature network's outputs of its finished batches, beside the result.

They lie in .<name of the result>.parts, a file per rank and batch, written whole or not at all. A rank adds them in the order in
which they were computed, so that every sum is the same to the last bit as without the kill.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdit.config import InputError
from fastdit.distributed import World
from fastdit.evaluation import features
from fastdit.evaluation.image_sets import ImageSet
from fastdit.evaluation.metrics import BAD_NPZ, Outputs
from fastdit.files import begin_or_match, replacing, resumable


class Kept:
    """The finished batches of one evaluation of samples that are drawn."""

    def __init__(self, out: Path, shown: dict[int, np.ndarray] | None = None) -> None:
        """out: path of the result; shown: images of some samples by their ids, as of `image_sets.watched`, which are kept too."""
        self.out = out
        self.shown = {} if shown is None else shown
        self.folder = out.with_name(f".{out.name}.parts")

    def begin(self, settings: dict) -> None:
        """Make the folder, or check that the one that is there was begun with the same settings. Raises InputError."""
        with resumable(self.folder):
            difference = begin_or_match(self.folder / "settings.json", settings)
        if difference:
            raise InputError(f"the unfinished evaluation {self.out} {difference}: give another --out, or delete {self.folder}")

    def outputs(
        self, source: ImageSet, network: features.FeatureNetwork, world: World
    ) -> Iterator[tuple[np.ndarray, list[Outputs]]]:
        """Yield the ids int64 [b] and the Outputs, at most features.BATCH at a time, of this rank's batches of a set of samples:
        first the finished ones, then the others, each of which is kept. Raises InputError."""
        assert source.drawn is not None
        number, finished = 0, set()
        while (path := self.folder / f"{world.rank:04d}_{number:06d}.npz").exists():
            ids, outputs = self._read(path, world.device)
            finished.add(int(ids[0]))
            number += 1
            yield ids, outputs
        for ids, images in source.drawn(world, lambda batch: batch.start in finished):
            outputs = list(network(images))
            self._write(self.folder / f"{world.rank:04d}_{number:06d}.npz", ids, outputs)
            number += 1
            yield ids, outputs

    def _write(self, path: Path, ids: np.ndarray, outputs: list[Outputs]) -> None:
        arrays: dict[str, Any] = {key: torch.cat(parts).cpu().numpy() for key, parts in _columns(outputs).items()}
        if shown := [int(i) for i in ids if int(i) in self.shown]:
            arrays |= {"shown": np.array(shown), "images": np.stack([self.shown[i] for i in shown])}
        with resumable(self.folder), replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, ids=ids, **arrays)

    def _read(self, path: Path, device: torch.device) -> tuple[np.ndarray, list[Outputs]]:
        try:
            with np.load(path) as file:
                arrays = {key: file[key] for key in file.files}
            ids = arrays.pop("ids")
            if "shown" in arrays:
                self.shown.update(zip(arrays.pop("shown").tolist(), arrays.pop("images"), strict=True))
            parts = {key: torch.from_numpy(array).to(device).split(features.BATCH) for key, array in arrays.items()}
            return ids, [Outputs(**dict(zip(parts, each, strict=True))) for each in zip(*parts.values(), strict=True)]
        except (*BAD_NPZ, TypeError) as error:
            raise InputError(f"{path} is damaged: {error}; delete {self.folder} and begin again") from error

    def remove(self) -> None:
        """Delete all that was kept."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _columns(outputs: list[Outputs]) -> dict[str, list[torch.Tensor]]:
    """Return the parts of each output that the network has."""
    columns = {key: [getattr(each, key) for each in outputs] for key in Outputs._fields}
    return {key: parts for key, parts in columns.items() if parts[0] is not None}
