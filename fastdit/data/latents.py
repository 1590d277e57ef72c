"""Latent sets: what `fastdit encode` wrote, read by memory map or kept on the device. B batch size per rank, n images.

A latent set is a folder:
    settings.json             what it is made of: index and autoencoder with their hashes, image size, dtype; written first
    labels_00000.npy          int32 [n] of a shard's images
    moments_00000.npy         fp16 [n, 2 (as it is, mirrored), ...], Codec.encode of a shard's images; ... is 2,c,s,s of an
                              AutoencoderKL, else c,s,s
    manifest.json             settings, classes, counts and SHA-256 of every file; written last
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdit.config import Config, InputError
from fastdit.data.order import Order, check_classes
from fastdit.data.prefetch import Ring
from fastdit.device import free_memory
from fastdit.distributed import World
from fastdit.files import json_object
from fastdit.progress import progress_bar

SETTINGS = "settings.json"
MANIFEST = "manifest.json"
RESIDENT_SHARE = 0.1  # of the free memory, at most, if data.resident=auto


def is_latent_set(path: Path) -> bool:
    """Whether `path` is a latent set, finished or not."""
    return os.path.exists(path / SETTINGS)


def read_json(path: Path) -> dict:
    """Return what a latent set's settings.json or manifest.json holds. Raises InputError if it is no JSON object."""
    try:
        return json_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(path.parent, f"{path.name} cannot be read ({error})") from error


def _damaged(folder: Path, problem: str) -> InputError:
    return InputError(f"latent set {folder} is damaged: {problem}; delete it and run `fastdit encode` again")


def _is_manifest(values: dict) -> bool:
    """Whether the entries of a manifest that are read here have their types."""
    shards, classes, names = values.get("files"), values.get("classes"), values.get("class_names")
    if not isinstance(shards, dict) or not isinstance(classes, list) or not isinstance(names, list | None):
        return False
    texts = [*classes, *(names or []), *shards, values.get("autoencoder"), values.get("autoencoder_sha256")]
    sizes = [values.get("image_size"), values.get("images")]
    for file in shards.values():
        if not isinstance(file, dict):
            return False
        sizes.append(file.get("bytes"))
        texts.append(file.get("sha256"))
    return all(isinstance(text, str) for text in texts) and all(isinstance(size, int) for size in sizes)


def read_manifest(folder: Path) -> dict:
    """Return the manifest of a latent set. Raises InputError if the set is not finished or a file of it is missing or truncated."""
    if not os.path.exists(folder / MANIFEST):
        raise InputError(f"latent set {folder} is not finished: run the same `fastdit encode` command again")
    manifest = read_json(folder / MANIFEST)
    if not _is_manifest(manifest):
        raise _damaged(folder, f"{MANIFEST} is not what `fastdit encode` writes")
    for name, file in manifest["files"].items():
        if not os.path.exists(folder / name) or (folder / name).stat().st_size != file["bytes"]:
            raise _damaged(folder, f"{name} is missing or truncated")
    return manifest


@dataclass(frozen=True)
class LatentSet:
    """A finished latent set of n images, its shards memory-mapped."""

    manifest: dict
    shards: list[np.ndarray]  # fp16 [images of the shard, 2, ...]
    labels: np.ndarray  # int32 [n]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an image's moments."""
        return self.shards[0].shape[2:]

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [shards + 1]: the first image of each shard, and n."""
        return np.cumsum([0, *map(len, self.shards)])

    @property
    def nbytes(self) -> int:
        """Bytes of all moments."""
        return sum(shard.nbytes for shard in self.shards)

    def read(self, images: np.ndarray, mirrored: np.ndarray, out: np.ndarray) -> None:
        """Copy the moments of images int64 [B], mirrored where bool [B] says so, to `out` fp16 [B,...]."""
        shards = np.searchsorted(self.starts, images, side="right") - 1
        for i, (image, shard, flip) in enumerate(zip(images, shards, mirrored, strict=True)):
            out[i] = self.shards[shard][image - self.starts[shard], int(flip)]


def open_latents(folder: Path) -> LatentSet:
    """Open the latent set in `folder`. Raises InputError if it is not finished or damaged."""
    manifest = read_manifest(folder)
    names = sorted(name for name in manifest["files"] if name.startswith("moments"))
    try:
        shards = [np.load(folder / name, mmap_mode="r") for name in names]
        labels = [np.load(folder / name.replace("moments", "labels")) for name in names]
    except (OSError, ValueError) as error:
        raise _damaged(folder, str(error)) from error
    counts = [len(each) for each in labels]
    if not names or counts != [len(shard) for shard in shards] or sum(counts) != manifest["images"]:
        raise _damaged(folder, f"its files do not hold the {manifest['images']} images of {MANIFEST}")
    return LatentSet(manifest, shards, np.concatenate(labels))


class LatentLoader:
    """Training batches of a latent set: moments, of which training draws a new posterior sample at every step."""

    channels = 3
    class_names: list[str] | None
    manifest: dict | None

    def __init__(self, folder: Path, config: Config, world: World) -> None:
        """Raises InputError if the set does not fit the config or, with data.resident=true, the memory."""
        self.latents = open_latents(folder)
        self.manifest = self.latents.manifest
        if self.manifest["image_size"] != config.data.image_size:
            raise InputError(
                f"data.image_size={config.data.image_size}, but the latents of {folder} are of {self.manifest['image_size']}-pixel "
                f"images: set data.image_size={self.manifest['image_size']}"
            )
        if config.data.exif == "ignore" and self.manifest.get("exif") == "applied":
            raise InputError(
                f"data.exif=ignore, but the latents of {folder} are of images with EXIF orientation applied: leave it out, or "
                f"train on the index {self.manifest['index']}"
            )
        classes = self.manifest["classes"]
        check_classes(len(classes), config, world)
        self.class_names = self.manifest["class_names"] or classes
        self.class_counts = np.bincount(self.latents.labels, minlength=len(classes)).tolist()
        files = {name: file["sha256"] for name, file in self.manifest["files"].items()}
        self.digest = hashlib.sha256(json.dumps([files, classes], sort_keys=True).encode()).hexdigest()
        self.order = Order(len(self.latents.labels), config, world)
        self.flip = config.data.flip
        self.device = world.device
        self.labels = torch.from_numpy(self.latents.labels.astype(np.int64)).to(self.device)
        size, free = self.latents.nbytes, free_memory(self.device)
        wanted = config.data.resident
        if wanted == "true" and size > free:
            raise InputError(
                f"data.resident=true, but the latents take {size / 2**30:.1f} GiB and {free / 2**30:.1f} are free: use auto or "
                "false"
            )
        self.resident = None
        if wanted == "true" or (wanted == "auto" and size < RESIDENT_SHARE * free):
            self.resident = self._load_all()
        else:
            batch_shape = (config.train.batch_size, *self.latents.shape)
            self.ring = Ring(self._fill, batch_shape, torch.float16, self.device)

    def _load_all(self) -> Tensor:
        """Return all moments, fp16 [2n,...] on the device: image i as it is at 2i, mirrored at 2i+1."""
        latents = self.latents
        everything = torch.empty((2 * len(latents.labels), *latents.shape), dtype=torch.float16, device=self.device)
        with progress_bar(len(latents.shards), description="load latents", unit="shard") as bar:
            for start, shard in zip(latents.starts, latents.shards, strict=False):
                part = torch.from_numpy(np.array(shard)).flatten(0, 1)
                everything[2 * start : 2 * start + len(part)].copy_(part)
                bar.update()
        return everything

    def _fill(self, position: int, slot: Tensor) -> None:
        """Write the batch at `position`, counted in micro-steps, to a host tensor."""
        images, epoch = self.order.images(*divmod(position, self.order.accumulation))
        mirrored = self.order.flips(torch.from_numpy(images), epoch).numpy() & self.flip
        self.latents.read(images, mirrored, slot.numpy())

    def batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Return moments fp16 [B,...] and labels int64 [B]. If the set is resident, nothing is copied to the device."""
        images, epoch = self.order.images_on(self.device, step, micro)
        labels = self.labels.index_select(0, images)
        if self.resident is None:
            return self.ring.next(step * self.order.accumulation + micro), labels
        rows = 2 * images
        if self.flip:
            rows += self.order.flips(images, epoch)
        return self.resident.index_select(0, rows), labels
