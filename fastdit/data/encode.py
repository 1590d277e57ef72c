"""`fastdit encode`: the images of an index to a latent set (see fastdit/data/latents.py), by any number of ranks.

Shards of SHARD images are shared out among the ranks and written whole or not at all, so that a killed run resumes with the shards
that are missing. A batch lies within one shard and the last of a shard is padded: a shard's contents do not depend on the ranks.
"""

import argparse
import inspect
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from fastdit import autoencoder, distributed, files
from fastdit.autoencoder import Codec
from fastdit.autoencoder_files import absolute
from fastdit.config import InputError
from fastdit.data.imagenet import COUNTS
from fastdit.data.index import Index, open_index, save_array
from fastdit.data.latents import MANIFEST, SETTINGS, read_json, read_manifest
from fastdit.data.loader import applies_exif, center_crop_decoder
from fastdit.device import DTYPES, precision, versions
from fastdit.distributed import World
from fastdit.files import begin_or_match, path_argument, resumable, sha256, write_atomically
from fastdit.progress import progress_bar

SHARD = 4096  # images: 128 MiB at 256 pixels
LOCK = ".lock"


def _begin(out: Path, settings: dict, index: Index) -> TextIO | None:
    """Make the folder of a latent set, or check that the existing one is of the same images and settings.

    Returns the lock on the folder, which closing releases, or None if the set is finished. Raises InputError, also if another
    process encodes into the folder.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give the folder for the latents")
    begun = read_json(out / SETTINGS) if (out / SETTINGS).exists() else None
    if begun is None and out.exists() and any(path.name != LOCK for path in out.iterdir()):
        raise InputError(f"{out} is not empty and holds no latents: use another --out")
    if begun is not None:
        settings = _as_begun(settings, begun)
        if "index_sha256" in settings and begun.get("index_sha256") != settings["index_sha256"]:
            raise InputError(
                f"{out} was begun with other images or classes than index {settings['index']} has now: use another --out, or "
                "delete it"
            )
    lock = None
    with resumable(out):
        if not (out / MANIFEST).exists():
            out.mkdir(parents=True, exist_ok=True)
            lock = files.lock(out / LOCK, f"another process encodes into {out}: wait for it, or use another --out")
        difference = begin_or_match(out / SETTINGS, settings)
    if not difference and (out / MANIFEST).exists():
        manifest = read_manifest(out)
        if (manifest["classes"], manifest["class_names"]) != (index.classes, index.class_names):
            difference = "has other names of classes than the index has now"
    if difference:
        raise InputError(f"{out} {difference}: use another --out, or delete it")
    return lock


def _as_begun(settings: dict, begun: dict) -> dict:
    """Return settings with the paths of a set that was begun, where hashes say that the same is meant."""
    settings = dict(settings)
    for path, digest in (("index", "index_sha256"), ("autoencoder", "autoencoder_sha256")):
        if path in begun and begun.get(digest) == settings[digest]:
            settings[path] = begun[path]
    if "index_sha256" not in begun:  # it is older than this entry: its paths and numbers are compared
        del settings["index_sha256"]
    return settings


def encode(
    source: Path, out: Path, autoencoder_id: str, image_size: int = 256, dtype: str = "auto", batch_size: int = 32,
    split: str = "train", max_bad_files: int = 10, device: str = "auto",
) -> dict:  # fmt: skip
    """Encode a split of an index to a latent set and return its manifest. All ranks must call it.

    source: path of the index; out: folder of the latent set; autoencoder_id: folder or Hub id of an autoencoder; image_size: side
    of the crops in pixels; dtype: the autoencoder's, "auto" | "bf16" | "fp32"; batch_size: images per batch; max_bad_files:
    undecodable files that are replaced; one more ends the run. Raises InputError, and FloatingPointError if moments are not finite.
    """
    world = distributed.start(device)
    dtype = precision(dtype, world.device)
    index = world.together(lambda: open_index(source))
    rows = world.together(lambda: index.rows(split))
    autoencoder.download(autoencoder_id, world)
    codec = world.together(lambda: autoencoder.create(autoencoder_id, image_size, 3, world.device))
    if codec.sha256() is None:
        raise InputError(f"--autoencoder {autoencoder_id} has no latents to encode: set data.source={source} to train on the index")
    settings = {
        "index": str(source.resolve()), "index_sha256": index.digest(split), "split": split, "images": len(rows),
        "image_size": image_size, "dtype": dtype,
        "autoencoder": absolute(autoencoder_id), **codec.about(), "batch_size": batch_size,
        "exif": "applied" if applies_exif("auto", index) else "ignored",
        "decoder": "nvJPEG" if world.device.type == "cuda" else "libjpeg-turbo",
        "dali": versions()["nvidia-dali-cuda130"], "torch": versions()["torch"],
    }  # fmt: skip
    lock = world.together(lambda: _begin(out, settings, index) if world.rank == 0 else None)
    with lock or nullcontext():
        world.together(lambda: _encode_shards(index, rows, out, codec.for_encoding(DTYPES[dtype]), settings, max_bad_files, world))
        return world.together(lambda: _finish(out, settings, index), everywhere=False)


def _encode_shards(
    index: Index, rows: np.ndarray, out: Path, codec: Codec, settings: dict, max_bad_files: int, world: World
) -> None:
    """Write this rank's shards that do not exist yet."""
    mine = [np.arange(first, min(first + SHARD, len(rows))) for first in range(world.rank * SHARD, len(rows), world.size * SHARD)]
    missing = [images for images in mine if not _file(out, "moments", images).exists()]
    if not missing:
        return
    batch_size = settings["batch_size"]
    batches = [images[at : at + batch_size] for images in missing for at in range(0, len(images), batch_size)]
    bar = progress_bar(sum(map(len, mine)), description="encode", unit="image", disable=world.rank > 0)
    with bar, resumable(out):
        bar.update(sum(map(len, mine)) - sum(map(len, missing)))
        decoder = center_crop_decoder(index, rows, batches, batch_size, settings["image_size"], world.device, max_bad_files)
        for images in missing:
            moments, labels = [], np.empty(len(images), np.int32)
            for at in range(0, len(images), batch_size):
                pixels, decoded = decoder.next()
                count = min(batch_size, len(images) - at)
                views = [codec.encode(view)[:count].to(torch.float16).cpu().numpy() for view in (pixels, pixels.flip(3))]
                moments.append(np.stack(views, axis=1))  # [count, 2 (as it is, mirrored), ...]
                labels[at : at + count] = rows["label"][decoded[:count]]
                bar.update(count)
            moments = np.concatenate(moments)
            if not np.isfinite(moments).all():
                raise FloatingPointError(
                    f"the autoencoder gave moments that are not finite in fp16 in images {images[0]} to {images[-1]}"
                )
            save_array(_file(out, "labels", images), labels)
            save_array(_file(out, "moments", images), moments)  # last: it makes the shard count as done


def _file(out: Path, kind: str, images: np.ndarray) -> Path:
    """Return the path of a shard's "labels" or "moments"."""
    return out / f"{kind}_{images[0] // SHARD:05d}.npy"


def _finish(out: Path, settings: dict, index: Index) -> dict:
    """Write and return the manifest of a set whose shards are all there."""
    if (out / MANIFEST).exists():
        return read_manifest(out)
    hashes = {}
    shards = sorted(out.glob("[!.]*_*.npy"))  # not the temporary files of a process that was killed
    with progress_bar(len(shards), description="checksums", unit="file") as bar:
        for path in shards:
            hashes[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
            bar.update()
    manifest = {**settings, "classes": index.classes, "class_names": index.class_names, "files": hashes}
    with resumable(out):
        write_atomically(out / MANIFEST, json.dumps(manifest, indent=1))
    return manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastdit encode`, named as the parameters of `encode`."""
    parser.description = (
        "Encode every image of an index, as it is and mirrored, to an autoencoder's latents or their distribution. Runs as "
        "one process or under torchrun. The same command resumes a run that was killed."
    )
    parser.epilog = (
        "example:\n  torchrun --nproc_per_node 8 -m fastdit.cli encode imagenet.index --autoencoder stabilityai/sd-vae-ft-ema "
        "--out latents256"
    )
    add = parser.add_argument
    add("source", type=path_argument, metavar="INDEX", help="Index that `fastdit prepare` made.")
    add("--out", type=path_argument, required=True, metavar="DIR", help="Folder for the latents.")
    add("--autoencoder", dest="autoencoder_id", required=True, metavar="ID", help="Folder or Hub id of a diffusers autoencoder.")
    add("--image-size", type=int, metavar="N", help="Height and width of the images in pixels (default: %(default)s).")
    add(
        "--dtype", choices=("auto", *DTYPES),
        help="Precision of the autoencoder; auto: bf16 if the device has fast matmuls in it, else fp32 (default: %(default)s).",
    )  # fmt: skip
    add("--batch-size", type=int, metavar="N", help="Images per batch and rank (default: %(default)s).")
    add("--split", choices=tuple(COUNTS), help="Split of the index (default: %(default)s).")
    add(
        "--max-bad-files", type=int, metavar="N",
        help="Undecodable files that each rank replaces; one more ends the run (default: %(default)s).",
    )  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), help="Device; auto: CUDA if there is a GPU (default: %(default)s).")
    parser.set_defaults(**{name: p.default for name, p in _parameters().items() if p.default is not p.empty})


def _parameters() -> Mapping[str, inspect.Parameter]:
    return inspect.signature(encode).parameters


def run(arguments: argparse.Namespace) -> str:
    """Encode, and return what was written as text. Raises what `encode` raises."""
    manifest = encode(**{name: getattr(arguments, name) for name in _parameters()})
    size = sum(file["bytes"] for file in manifest["files"].values())
    return (
        f"latents: {arguments.out} ({manifest['images']:,} images and their mirror images, {size / 2**30:.2f} GiB)\n"
        f"train on them with data.source={arguments.out} data.autoencoder={arguments.autoencoder_id} data.flip=true"
    )
