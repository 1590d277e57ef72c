"""Data sets: what data.source may be. The built-in digits, an index of images, or cached latents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastdit.config import Config, InputError

if TYPE_CHECKING:  # `fastdit prepare` needs no torch
    from fastdit.distributed import World


def locate(config: Config) -> Path | None:
    """The index or latent set of a run, None for the built-in digits; an archive or a folder of class folders gets an index first.

    Raises InputError for anything else.
    """
    from fastdit.data import index, latents, prepare

    if config.data.source == "mnist5k":
        return None
    source = Path(config.data.source)
    if index.is_index(source) or latents.is_latent_set(source):
        return source
    if not source.exists():
        raise InputError(
            f"data.source={source} is neither 'mnist5k' nor there: give an index of `fastdit prepare`, latents of `fastdit "
            "encode`, an archive or a folder of class folders"
        )
    return prepare.prepare([source])


def load(config: Config, place: Path | None, world: World):
    """The training data at a place that `locate` gave. Raises InputError when they do not fit the config."""
    from fastdit.data import builtin, index, latents, loader

    if place is None:
        return builtin.load(config, world)
    if latents.is_latent_set(place):
        return latents.LatentLoader(place, config, world)
    return loader.ImageLoader(index.open_index(place), config, world)
