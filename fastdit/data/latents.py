"""Cached latents: what `fastdit encode` wrote, read by memory map or kept on the device. c/s latent channels and size.

A latent set is a folder:
    settings.json             what it is made of: index, autoencoder and its hash, image size, dtype; written first
    labels_00000.npy          int32 [n] of a shard's images
    moments_00000.npy         fp16 [n, 2 (as it is, mirrored), 2 (mean, log-variance), c, s, s] of a shard's images
    manifest.json             settings, classes, counts and SHA-256 of every file; written last
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdit.config import Config, InputError
from fastdit.data.order import Order, check_classes
from fastdit.data.prefetch import Ring
from fastdit.device import free_memory
from fastdit.distributed import World
from fastdit.progress import progress_bar

MANIFEST = "manifest.json"
RESIDENT_SHARE = 0.1  # of the free memory, at most, when data.resident=auto


def is_latent_set(path: Path) -> bool:
    return os.path.exists(path / "settings.json")


def read_manifest(folder: Path) -> dict:
    """Raises InputError when the set is not finished or a file of it is not there whole."""
    if not os.path.exists(folder / MANIFEST):
        raise InputError(f"latent set {folder} is not finished: run the same `fastdit encode` command again")
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, file in manifest["files"].items():
        if not os.path.exists(folder / name) or (folder / name).stat().st_size != file["bytes"]:
            raise InputError(f"latent set {folder} is damaged: {name} is not there whole; delete it and run `fastdit encode` again")
    return manifest


class LatentLoader:
    """Training batches from a latent set: moments, of which the autoencoder's posterior is drawn afresh in every step."""

    def __init__(self, folder: Path, config: Config, world: World) -> None:
        """Raises InputError when the set does not fit the config."""
        self.manifest = read_manifest(folder)
        if self.manifest["image_size"] != config.data.image_size:
            raise InputError(
                f"data.image_size={config.data.image_size}, but the latents of {folder} are of {self.manifest['image_size']}-pixel "
                f"images: set data.image_size={self.manifest['image_size']}"
            )
        classes = self.manifest["classes"]
        check_classes(len(classes), config)
        self.class_names = self.manifest["class_names"] or classes
        names = sorted(name for name in self.manifest["files"] if name.startswith("moments"))
        self.shards = [np.load(folder / name, mmap_mode="r") for name in names]
        labels = np.concatenate([np.load(folder / name.replace("moments", "labels")) for name in names])
        self.shape = self.shards[0].shape[2:]  # [2,c,s,s]
        self.first = np.cumsum([0, *map(len, self.shards)])
        self.order, self.flip, self.device = Order(len(labels), config, world), config.data.flip, world.device
        self.channels = 3
        self.labels = torch.from_numpy(labels.astype(np.int64)).to(self.device)
        size = sum(shard.nbytes for shard in self.shards)
        free, wanted = free_memory(self.device), config.data.resident
        if wanted == "true" and size > free:
            raise InputError(
                f"data.resident=true, but the latents take {size / 2**30:.1f} GiB and {free / 2**30:.1f} are free: use auto or "
                "false"
            )
        self.resident = None
        if wanted == "true" or (wanted == "auto" and size < RESIDENT_SHARE * free):
            self.resident = self._load_all()
        else:
            batch = (config.train.batch_size, *self.shape)
            self.ring = Ring(self._fill, batch, torch.float16, self.device)

    def _load_all(self) -> Tensor:
        """fp16 [2n, 2,c,s,s] on the device: image i as it is at 2i, mirrored at 2i+1."""
        everything = torch.empty((2 * len(self.labels), *self.shape), dtype=torch.float16, device=self.device)
        with progress_bar(len(self.shards), description="load latents", unit="shard") as bar:
            for first, shard in zip(self.first, self.shards, strict=False):
                part = torch.from_numpy(np.array(shard)).flatten(0, 1)
                everything[2 * first : 2 * first + len(part)].copy_(part)
                bar.update()
        return everything

    def _fill(self, position: int, slot: Tensor) -> None:
        images, epoch = self.order.images(*divmod(position, self.order.accumulation))
        flips = self.order.flips(torch.from_numpy(images), epoch).numpy() & self.flip
        shards = np.searchsorted(self.first, images, side="right") - 1
        batch = slot.numpy()
        for i, (image, shard, flip) in enumerate(zip(images, shards, flips, strict=True)):
            batch[i] = self.shards[shard][image - self.first[shard], int(flip)]

    def batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Moments fp16 [B,2,c,s,s], mean and log-variance, and labels int64 [B]. A resident set copies nothing to the device."""
        images, epoch = self.order.images_on(self.device, step, micro)
        labels = self.labels.index_select(0, images)
        if self.resident is None:
            return self.ring.next(step * self.order.accumulation + micro), labels
        place = 2 * images
        if self.flip:
            place += self.order.flips(images, epoch)
        return self.resident.index_select(0, place), labels
