"""Sets of images to take statistics of: samples drawn from a checkpoint, an .npz, a folder, an index, the built-in digits.

n images, S size, C channels.
"""

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastdit import files, kernels
from fastdit.autoencoder import Codec
from fastdit.config import InputError, SampleConfig
from fastdit.data.builtin import mnist5k
from fastdit.data.index import is_index, open_index
from fastdit.distributed import World
from fastdit.evaluation.metrics import BAD_NPZ
from fastdit.flow import Stream
from fastdit.sampling.sampler import Sampler, stream

BATCH = 100  # images read at a time
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class Source:
    """A set of images: batches(world) yields a rank's share, ids int64 [b] with images uint8 [b,S,S,C]."""

    count: int
    shape: tuple[int, int, int]  # S, S, C
    batches: Callable[[World], Iterator[tuple[np.ndarray, np.ndarray]]]
    about: dict
    labels: np.ndarray | None = None  # int64 [n]: the classes asked for


def of_array(images: np.ndarray, labels: np.ndarray | None, about: dict) -> Source:
    """images uint8 [n,S,S,C]."""

    def batches(world: World) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for ids in _shares(len(images), world):
            yield ids, images[ids]

    return Source(len(images), images.shape[1:], batches, {**about, "images": len(images)}, labels)


def _shares(count: int, world: World) -> Iterator[np.ndarray]:
    """This rank's ids, BATCH at most at a time."""
    for first in range(world.rank * BATCH, count, world.size * BATCH):
        yield np.arange(first, min(first + BATCH, count))


def evaluation_labels(how: str, count: int, num_classes: int, seed: int) -> torch.Tensor:
    """int64 [n]: "balanced", each class equally often and one after the other, as `fastdit sample --per-class` draws; or "random",
    named by the seed. Raises InputError when they cannot be balanced."""
    if how == "random":
        u = kernels.counter_uniform(seed, Stream.EVALUATION_LABEL, torch.arange(count), ())
        return (u * num_classes).long().clamp(max=num_classes - 1)
    if count % num_classes:
        down = count // num_classes * num_classes
        raise InputError(
            f"--samples {count} is no multiple of the {num_classes} classes: use {down or num_classes}, or --labels random"
        )
    return torch.arange(count) // (count // num_classes)


def of_model(
    model: nn.Module, codec: Codec, config: SampleConfig, labels: torch.Tensor, seed: int, shape: tuple[int, int, int], about: dict
) -> Source:
    """Samples of a model, of classes int64 [n], drawn as they are asked for: the same on any number of ranks, to rounding."""
    device = next(model.parameters()).device

    def batches(world: World) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        ids, first = torch.arange(world.rank, len(labels), world.size), 0
        if len(ids) == 0:
            return
        mine = labels[ids].to(device), ids.to(device)
        for images in stream(model, codec, config, *mine, seed, model.config.num_classes):
            yield ids[first : first + len(images)].numpy(), images
            first += len(images)

    return Source(len(labels), shape, batches, about, labels.numpy())


def of_checkpoint(
    path: Path, count: int, how: str, overrides: dict, seed: int, weights: str, dtype: str, device: torch.device
) -> Source:
    """`of_model` of a checkpoint. overrides: of SampleConfig; dtype: as of sample.Sampler. Raises InputError."""
    sampler = Sampler(path, weights, device, dtype)
    config, codec, sampling = sampler.config, sampler.codec, sampler.settings(**overrides)
    labels = evaluation_labels(how, count, config.model.num_classes, seed)
    decay = config.train.ema_decay if weights == "ema" else float(weights[4:]) if weights.startswith("ema_") else None
    about = {
        "kind": "checkpoint", "path": str(sampler.checkpoint.path), "step": sampler.step,
        "sha256": sampler.checkpoint.sha256(),
        "weights": weights, "ema_decay": decay, "sampler": asdict(sampling), "guidance_scale": 1 + sampling.guidance,
        "guided_channels": "all", "labels": how, "seed": seed, "images": count, "classes": config.model.num_classes,
        "dtype": sampler.dtype, "autoencoder": config.data.autoencoder,
        "autoencoder_sha256": codec.sha256(),
        "autoencoder_dtype": str(codec.dtype).removeprefix("torch.") if codec.dtype else None,
    }  # fmt: skip
    shape = (config.data.image_size, config.data.image_size, codec.image_channels)
    return of_model(sampler.model, codec, sampling, labels, seed, shape, about)


def _header(file) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an open .npy."""
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read[np.lib.format.read_magic(file)[0]](file)
    if fortran:
        raise ValueError("its arrays are in Fortran order")
    return shape, dtype


def has_images(path: Path) -> bool:
    """Whether an .npz holds images too."""
    with zipfile.ZipFile(path) as archive:
        return "arr_0.npy" in archive.namelist()


def of_npz(path: Path) -> Source:
    """An .npz of the ADM evaluator's format: arr_0 uint8 [n,S,S,C], perhaps arr_1 labels [n]; read batch after batch. Raises
    InputError when it is corrupt."""
    corrupt = lambda error: InputError(f"{path} cannot be read as an .npz of images: {error}: fetch or make it again")
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            shape, dtype = _header(file)
        if dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] not in (1, 3):
            raise ValueError(f"arr_0 is {dtype} {list(shape)}, not uint8 [n,S,S,1 or 3]")
        with np.load(path) as arrays:
            labels = arrays["arr_1"].astype(np.int64) if "arr_1" in arrays else None
        if labels is not None and labels.shape != shape[:1]:
            raise ValueError(f"arr_1 holds {list(labels.shape)} labels of {shape[0]} images")
    except BAD_NPZ as error:
        raise corrupt(error) from error

    def batches(world: World) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        size = int(np.prod(shape[1:]))
        try:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
                _header(file)
                start = file.tell()
                for ids in _shares(shape[0], world):
                    file.seek(start + int(ids[0]) * size)
                    yield ids, np.frombuffer(bytearray(file.read(len(ids) * size)), np.uint8).reshape(len(ids), *shape[1:])
        except BAD_NPZ as error:
            raise corrupt(error) from error

    about = {"kind": "npz", "path": str(path), "sha256": files.sha256(path), "images": shape[0]}
    return Source(shape[0], shape[1:], batches, about, labels)


def _pixels(path: Path, mode: str) -> np.ndarray:
    """uint8 [S,S,C] of an image file in a mode, "L" or "RGB". Raises InputError when it cannot be decoded."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert(mode))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path} cannot be decoded: {error}: take it out, or write it again") from error
    return pixels[..., None] if mode == "L" else pixels


def of_folder(folder: Path) -> Source:
    """The image files below a folder, all of one size; grey if the first is. Raises InputError when there are none."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    if not paths:
        raise InputError(f"{folder} holds no checkpoint and no images ({', '.join(IMAGES)}): give a folder that does")
    with Image.open(paths[0]) as first:
        mode = "L" if first.mode in ("1", "L") else "RGB"
    shape = _pixels(paths[0], mode).shape
    if shape[0] != shape[1]:
        raise InputError(f"{paths[0]} is {shape[1]}x{shape[0]}: images must be square, crop them first")

    def batches(world: World) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for ids in _shares(len(paths), world):
            images = [_pixels(paths[i], mode) for i in ids]
            for i, image in zip(ids, images, strict=True):
                if image.shape != shape:
                    raise InputError(
                        f"{paths[i]} is {image.shape[1]}x{image.shape[0]}, {paths[0]} is {shape[1]}x{shape[0]}: images must be "
                        "of one size"
                    )
            yield ids, np.stack(images)

    return Source(len(paths), shape, batches, {"kind": "folder", "path": str(folder), "images": len(paths)})


def of_index(folder: Path, size: int, split: str, device: torch.device, at_most: int | None = None) -> Source:
    """A split of an index, or `at_most` evenly spread images of it, resized (antialiased, cubic) and cut to size x size as for
    training. Raises InputError."""
    from fastdit.data.loader import center_crop_decoder

    index = open_index(folder)
    rows = index.rows(split)
    rows = rows[:: -(-len(rows) // (at_most or len(rows)))]

    def batches(world: World) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        shares = list(_shares(len(rows), world))
        if shares:
            decoder = center_crop_decoder(index, rows, shares, BATCH, size, device, max_bad_files=10)
        for ids in shares:
            images = ((decoder.next()[0][: len(ids)] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            yield ids, images.permute(0, 2, 3, 1).cpu().numpy()

    about = {"kind": "index", "path": str(folder), "split": split, "image_size": size, "images": len(rows)}
    return Source(len(rows), (size, size, 3), batches, about, np.asarray(rows["label"], np.int64))


def open_images(path: str, size: int | None, split: str, device: torch.device) -> Source:
    """The images of "mnist5k", an index (in `size` pixels), an .npz or a folder. Raises InputError for anything else."""
    place = Path(path)
    if path == "mnist5k":
        return of_array(*mnist5k(split), {"kind": "builtin", "path": path, "split": split})
    if is_index(place):
        if size is None:
            raise InputError(f"{path} is an index, whose images have many sizes: say which to cut them to with --image-size")
        return of_index(place, size, split, device)
    if place.is_dir():
        return of_folder(place)
    if place.is_file():
        return of_npz(place)
    raise InputError(f"{path} is not there: give an .npz, a folder of images, an index of `fastdit prepare` or mnist5k")
