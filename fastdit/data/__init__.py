"""Data sets: what data.source may name. The built-in digits, an index of images, or cached latents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fastdit.config import Config, InputError

if TYPE_CHECKING:  # `fastdit prepare` needs no torch
    from torch import Tensor

    from fastdit.data.order import Order
    from fastdit.distributed import World


class Loader(Protocol):
    """Training batches of this rank, a function of the step only: a resume needs no other state.

    B batch size per rank, C channels, S image size in pixels.
    """

    channels: int  # of the images, also of those that moments were encoded from
    class_names: list[str] | None  # of labels 0, 1, …, None if the data set has none
    class_counts: list[int]  # images of labels 0, 1, …
    digest: str  # SHA-256 of the images and labels, wherever they lie
    order: Order
    manifest: dict | None  # of a latent set: `batch` returns moments. None: `batch` returns images

    def batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Return (x, labels) of a micro-step, both on the device.

        x: images fp32 [B,C,S,S] in [-1,1], or moments [B,...] that Codec.posterior_sample takes; labels int64 [B].
        """
        ...


def locate(config: Config) -> Path | None:
    """Return the path of a run's index or latent set, None for the built-in digits.

    Makes an index first if data.source is an archive or a folder of images. Raises InputError for anything else.
    """
    from fastdit.data import index, latents, prepare

    if config.data.source == "mnist5k":
        return None
    source = Path(config.data.source)
    if index.is_index(source) or latents.is_latent_set(source):
        return source
    if not source.exists():
        raise InputError(
            f"data.source={source} is neither 'mnist5k' nor an existing path: give an index of `fastdit prepare`, latents of "
            "`fastdit encode`, an archive or a folder of class folders"
        )
    return prepare.prepare([source])


def load(config: Config, path: Path | None, world: World) -> Loader:
    """Return the loader of the training data at a path from `locate`. Raises InputError if they do not fit the config."""
    from fastdit.data import builtin, index, latents, loader

    if config.data.grey and (path is None or latents.is_latent_set(path)):
        raise InputError(f"data.grey=true is for the images of an index: leave it out for data.source={config.data.source}")
    if path is None:
        return builtin.load(config, world)
    if latents.is_latent_set(path):
        return latents.LatentLoader(path, config, world)
    return loader.ImageLoader(index.open_index(path), config, world)
