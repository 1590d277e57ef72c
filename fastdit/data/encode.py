"""`fastdit encode`: the images of an index -> cached latents (fastdit/data/latents.py), by any number of ranks.

Shards of SHARD images are shared out among the ranks and written whole or not at all, so that a run that was killed goes on from
there. Batches never cross a shard and the last is filled up: what a shard holds does not depend on the ranks.
"""

import argparse
import inspect
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from fastdit import autoencoder, distributed
from fastdit.config import InputError
from fastdit.data.imagenet import COUNTS
from fastdit.data.index import Index, open_index, save_array
from fastdit.data.latents import MANIFEST
from fastdit.data.loader import Decoder
from fastdit.data.order import center_crops
from fastdit.data.prepare import mending
from fastdit.device import DTYPES, precision, versions
from fastdit.files import sha256, write_atomically
from fastdit.progress import progress_bar

SHARD = 4096  # images: 128 MiB at 256 pixels


def _begin(out: Path, settings: dict) -> None:
    """Make the folder of a latent set, or check that the one that is there was begun with the same settings."""
    begun = out / "settings.json"
    if begun.exists():
        found = json.loads(begun.read_text())
        for key in settings:
            if found.get(key) != settings[key]:
                raise InputError(
                    f"{out} was begun with {key}={found.get(key)}, this command has {settings[key]}: use another --out, or "
                    "delete it"
                )
        return
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and holds no latents: use another --out")
    with mending(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(begun, json.dumps(settings, indent=1))


def encode(
    source: Path, out: Path, autoencoder_id: str, image_size: int = 256, dtype: str = "auto", batch_size: int = 32,
    split: str = "train", max_bad_files: int = 10, device: str = "auto",
) -> dict:  # fmt: skip
    """Encode a split of an index with a diffusers AutoencoderKL; returns the manifest. All ranks must call it. Raises InputError,
    and FloatingPointError for moments that are not finite."""
    world = distributed.start(device)
    dtype = precision(dtype, world.device)
    index = world.together(lambda: open_index(source))
    rows = world.together(lambda: index.rows(split))
    codec = world.together(lambda: autoencoder.KL(autoencoder_id, image_size, world.device))
    settings = {
        "index": str(source.resolve()), "split": split, "images": len(rows), "image_size": image_size, "dtype": dtype,
        "autoencoder": autoencoder_id, "autoencoder_sha256": codec.sha256(), "scaling_factor": codec.scale, "shift": codec.shift,
        "batch_size": batch_size, "decoder": "nvJPEG" if world.device.type == "cuda" else "libjpeg-turbo",
        "dali": versions()["nvidia-dali-cuda130"], "torch": versions()["torch"],
    }  # fmt: skip
    world.together(lambda: _begin(out, settings) if world.rank == 0 else None)
    world.together(lambda: _encode_shards(index, rows, out, codec.for_encoding(DTYPES[dtype]), settings, max_bad_files, world))
    return world.together(lambda: _finish(out, settings, index), everywhere=False)


def _encode_shards(index: Index, rows: np.ndarray, out: Path, codec, settings: dict, max_bad_files: int, world) -> None:
    """This rank's shards that are not there yet."""
    size, batch_size = settings["image_size"], settings["batch_size"]
    mine = range(world.rank * SHARD, len(rows), world.size * SHARD)
    todo = [first for first in mine if not (out / f"moments_{first // SHARD:05d}.npy").exists()]
    batches = [(first, at) for first in todo for at in range(first, min(first + SHARD, len(rows)), batch_size)]

    def choose(position: int) -> tuple[np.ndarray, int]:
        first, at = batches[min(position, len(batches) - 1)]
        return np.minimum(np.arange(at, at + batch_size), min(first + SHARD, len(rows)) - 1), 0

    def cut(images: np.ndarray, _: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return *center_crops(rows["height"][images], rows["width"][images], size), np.zeros(len(images), np.int32)

    if not todo:
        return
    decoder = Decoder(index, rows, choose, cut, batch_size, size, world.device, None, max_bad_files)
    total = sum(min(SHARD, len(rows) - first) for first in mine)
    bar = progress_bar(total, description="encode", unit="image", disable=world.rank > 0)
    with bar, mending(out):
        bar.update(total - sum(min(SHARD, len(rows) - first) for first in todo))
        decoder.seek(0)
        for first in todo:
            count = min(SHARD, len(rows) - first)
            moments = np.empty((count, 2, 2, codec.channels, codec.size, codec.size), np.float16)
            labels = np.empty(count, np.int32)
            for at in range(0, count, batch_size):
                images, chosen = decoder.next()
                kept = min(batch_size, count - at)
                for mirrored, view in enumerate((images, images.flip(3))):
                    moments[at : at + kept, mirrored] = codec.moments(view)[:kept].to(torch.float16).cpu().numpy()
                labels[at : at + kept] = rows["label"][chosen[:kept]]
                bar.update(kept)
            if not np.isfinite(moments).all():
                raise FloatingPointError(
                    f"the autoencoder gave moments that are not finite in fp16 in images {first} to {first + count - 1}"
                )
            for name, array in (("labels", labels), ("moments", moments)):  # moments last: they make the shard count
                save_array(out / f"{name}_{first // SHARD:05d}.npy", array)


def _finish(out: Path, settings: dict, index: Index) -> dict:
    """Write the manifest of a set whose shards are all there."""
    if (out / MANIFEST).exists():
        return json.loads((out / MANIFEST).read_text())
    files = {}
    shards = sorted(out.glob("*_*.npy"))
    with progress_bar(len(shards), description="checksums", unit="file") as bar:
        for path in shards:
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
            bar.update()
    manifest = {**settings, "classes": index.classes, "class_names": index.class_names, "files": files}
    with mending(out):
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
