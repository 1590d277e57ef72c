"""`fastdit encode`: the images of an index to a latent set (see fastdit/data/latents.py), by any number of ranks.

Shards of SHARD images are shared out among the ranks and written whole or not at all, so that a killed run resumes with the shards
that are missing. A batch lies within one shard and the last of a shard is padded: a shard's contents do not depend on the ranks.
"""

import argparse
import inspect
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from fastdit import autoencoder, distributed
from fastdit.autoencoder import Codec
from fastdit.config import InputError
from fastdit.data.imagenet import COUNTS
from fastdit.data.index import Index, open_index, save_array
from fastdit.data.latents import MANIFEST, SETTINGS
from fastdit.data.loader import applies_exif, center_crop_decoder
from fastdit.device import DTYPES, precision, versions
from fastdit.distributed import World
from fastdit.files import begin_or_match, resumable, sha256, write_atomically
from fastdit.progress import progress_bar

SHARD = 4096  # images: 128 MiB at 256 pixels


def _begin(out: Path, settings: dict) -> None:
    """Make the folder of a latent set, or check that the existing one was begun with the same settings. Raises InputError."""
    if out.exists() and not (out / SETTINGS).exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and holds no latents: use another --out")
    with resumable(out):
        difference = begin_or_match(out / SETTINGS, settings)
    if difference:
        raise InputError(f"{out} {difference}: use another --out, or delete it")


def encode(
    source: Path, out: Path, autoencoder_id: str, image_size: int = 256, dtype: str = "auto", batch_size: int = 32,
    split: str = "train", max_bad_files: int = 10, device: str = "auto",
) -> dict:  # fmt: skip
    """Encode a split of an index to a latent set and return its manifest. All ranks must call it.

    source: path of the index; out: folder of the latent set; autoencoder_id: folder or hub id of an autoencoder; image_size: side
    of the crops in pixels; dtype: the autoencoder's, "auto" | "bf16" | "fp32"; batch_size: images per batch; max_bad_files:
    undecodable files that are replaced; one more ends the run. Raises InputError, and FloatingPointError if moments are not finite.
    """
    world = distributed.start(device)
    dtype = precision(dtype, world.device)
    index = world.together(lambda: open_index(source))
    rows = world.together(lambda: index.rows(split))
    codec = world.together(lambda: autoencoder.create(autoencoder_id, image_size, 3, world.device))
    if codec.sha256() is None:
        raise InputError(f"--autoencoder {autoencoder_id} has no latents to encode: set data.source={source} to train on the index")
    settings = {
        "index": str(source.resolve()), "split": split, "images": len(rows), "image_size": image_size, "dtype": dtype,
        "autoencoder": autoencoder_id, **codec.about(), "batch_size": batch_size,
        "exif": "applied" if applies_exif("auto", index) else "ignored",
        "decoder": "nvJPEG" if world.device.type == "cuda" else "libjpeg-turbo",
        "dali": versions()["nvidia-dali-cuda130"], "torch": versions()["torch"],
    }  # fmt: skip
    world.together(lambda: _begin(out, settings) if world.rank == 0 else None)
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
        return json.loads((out / MANIFEST).read_text())
    files = {}
    shards = sorted(out.glob("*_*.npy"))
    with progress_bar(len(shards), description="checksums", unit="file") as bar:
        for path in shards:
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
            bar.update()
    manifest = {**settings, "classes": index.classes, "class_names": index.class_names, "files": files}
    with resumable(out):
        write_atomically(out / MANIFEST, json.dumps(manifest, indent=1))
    return manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastdit encode`, named as the parameters of `encode`."""
    parser.description = (
        "Encode every image of an index, as it is and mirrored, to the mean and log-variance of an autoencoder's latents. Runs as "
        "one process or under torchrun. The same command resumes a run that was killed."
    )
    parser.epilog = (
        "example:\n  torchrun --nproc_per_node 8 -m fastdit.cli encode imagenet.index --autoencoder stabilityai/sd-vae-ft-ema "
        "--out latents256"
    )
    add = parser.add_argument
    add("source", type=Path, metavar="INDEX", help="Index that `fastdit prepare` made.")
    add("--out", type=Path, required=True, metavar="DIR", help="Folder for the latents.")
    add("--autoencoder", dest="autoencoder_id", required=True, metavar="ID", help="Folder or hub id of a diffusers AutoencoderKL.")
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
