"""Sets of images to take statistics of: samples drawn from a model, an .npz, a folder, an index, the built-in digits.

n images, b batch size, S height and width, C channels.
"""

import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdit import files, kernels
from fastdit.checkpoint import Checkpoint
from fastdit.config import Config, InputError, SampleConfig
from fastdit.data import folders, pixels
from fastdit.data.builtin import mnist5k
from fastdit.data.index import Index, is_index, open_index
from fastdit.distributed import World
from fastdit.evaluation.metrics import BAD_NPZ
from fastdit.flow import Stream
from fastdit.sampling.sampler import Sampler, shares

BATCH = 100  # images read at a time
RESIZES = ("adm", "dali")  # how the images of an index are cut to one size: `adm_crop`, or as for training


@dataclass(frozen=True)
class ImageSet:
    """A set of images that are read or drawn as they are needed. A new kind of set is one more function that returns one.

    count: number of images.
    shape: (S, S, C) of each.
    batches: function that yields the share of this rank of a World, as ids int64 [b] with images uint8 [b,S,S,C]; each id of 0 ..
        count−1 comes once on one of the ranks.
    about: where the images are from, as JSON types; measured results contain it.
    labels: classes of the images, int64 [n], or None.
    warnings: what should be known before metrics of these samples are compared.
    drawn: `batches` of samples of a model, without the batches that a function of their ids says to skip; None for other images.
    config: of the run whose checkpoint draws the samples.
    """

    count: int
    shape: tuple[int, int, int]
    batches: Callable[[World], Iterator[tuple[np.ndarray, np.ndarray]]]
    about: dict
    labels: np.ndarray | None = None
    warnings: list[str] = field(default_factory=list)
    drawn: Callable[[World, Callable[[range], bool]], Iterator[tuple[np.ndarray, np.ndarray]]] | None = None
    config: Config | None = None


def watched(source: ImageSet, wanted: set[int], shown: dict[int, np.ndarray]) -> ImageSet:
    """Return the same set; images of the ids `wanted` are also put into `shown` when they are read or drawn."""

    def watch(batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for ids, images in batches:
            shown.update({int(i): image for i, image in zip(ids, images, strict=True) if int(i) in wanted})
            yield ids, images

    drawn = source.drawn
    return replace(
        source,
        batches=lambda world: watch(source.batches(world)),
        drawn=None if drawn is None else lambda world, skip: watch(drawn(world, skip)),
    )


def of_array(images: np.ndarray, labels: np.ndarray | None, about: dict) -> ImageSet:
    """Return the set of images uint8 [n,S,S,C] with labels int64 [n] or None."""

    def batches(world: World) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for ids in _shares(len(images), world):
            yield ids, images[ids]

    return ImageSet(len(images), images.shape[1:], batches, {**about, "images": len(images)}, labels)


def evenly_spread(count: int, at_most: int) -> np.ndarray:
    """Return the indices int64 of at most `at_most` of `count` images, evenly spread."""
    return np.arange(0, count, -(-count // min(at_most, count)))


def _shares(count: int, world: World) -> Iterator[np.ndarray]:
    """Yield the ids int64 [b] of this rank, at most BATCH at a time."""
    for ids in shares(count, world, BATCH):
        yield np.arange(ids.start, ids.stop)


def evaluation_labels(balance: str, count: int, num_classes: int, seed: int) -> Tensor:
    """Return the classes of `count` samples, int64 [n].

    balance: "balanced", each class equally often and one after the other, as in `fastdit sample --per-class`; or "random", drawn
    from the seed. Raises InputError if they cannot be balanced.
    """
    if balance == "random":
        u = kernels.counter_uniform(seed, Stream.EVALUATION_LABEL, torch.arange(count), ())
        return (u * num_classes).long().clamp(max=num_classes - 1)
    if count % num_classes:
        down = count // num_classes * num_classes
        raise InputError(
            f"--samples {count} is no multiple of the {num_classes} classes: use {down or num_classes}, or --labels random"
        )
    return torch.arange(count) // (count // num_classes)


def of_sampler(sampler: Sampler, settings: SampleConfig, labels: Tensor, seed: int, about: dict) -> ImageSet:
    """Return the samples of classes int64 [n], drawn as they are read: the same on any number of ranks, to rounding."""

    def drawn(world: World, skip: Callable[[range], bool]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for ids, images in sampler.stream(labels, seed, settings, world=world, skip=skip):
            yield np.arange(ids.start, ids.stop), images

    shape = (sampler.config.data.image_size, sampler.config.data.image_size, sampler.codec.image_channels)
    all_of_them = lambda world: drawn(world, lambda ids: False)
    return ImageSet(len(labels), shape, all_of_them, about, labels.numpy(), drawn=drawn)


def _resize_of_training(sampler: Sampler) -> str | None:
    """Return how the images that a checkpoint was trained on were resized, None if it is unknown or they were not."""
    imported = not isinstance(sampler.source, Checkpoint) or bool(sampler.source.state.origin)
    return None if imported or sampler.config.data.source == "mnist5k" else "dali"


def of_checkpoint(sampler: Sampler, count: int, balance: str, overrides: dict, seed: int) -> ImageSet:
    """Return `of_sampler` of a checkpoint, with all that the samples depend on in its `about`.

    balance: as in `evaluation_labels`; overrides: values of SampleConfig that replace the run's. Raises InputError.
    """
    config, codec, settings = sampler.config, sampler.codec, sampler.settings(**overrides)
    learned = sampler.learned
    labels = torch.tensor(learned)[evaluation_labels(balance, count, len(learned), seed)]
    about = {
        "kind": "checkpoint", "path": str(sampler.path), "step": sampler.step, "sha256": sampler.sha256,
        "weights": sampler.weights, "ema_decay": sampler.ema_decay, "sampler": asdict(settings),
        "guidance_scale": 1 + settings.guidance, "guided_channels": "all", "labels": balance, "seed": seed, "images": count,
        "classes": len(learned), "left_out": sorted({*range(sampler.null)}.difference(learned)), "dtype": sampler.dtype,
        "resize": _resize_of_training(sampler),
        "autoencoder": config.data.autoencoder,
        "autoencoder_sha256": codec.sha256(),
        "autoencoder_dtype": str(codec.dtype).removeprefix("torch.") if codec.dtype else None,
    }  # fmt: skip
    return replace(of_sampler(sampler, settings, labels, seed, about), config=config)


def _npy_header(file) -> tuple[tuple[int, ...], np.dtype]:
    """Return shape and dtype of an open .npy. Raises ValueError for Fortran order."""
    readers = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    read = readers.get(np.lib.format.read_magic(file)[0])
    if read is None:
        raise ValueError("arr_0 has named fields")  # version 3 of the format is for their names
    shape, fortran, dtype = read(file)
    if fortran:
        raise ValueError("its arrays are in Fortran order")
    return shape, dtype


def has_images(path: Path) -> bool:
    """Whether an .npz contains images."""
    with zipfile.ZipFile(path) as archive:
        return "arr_0.npy" in archive.namelist()


def of_npz(path: Path) -> ImageSet:
    """Return the images of an .npz in the ADM evaluator's format: arr_0 uint8 [n,S,S,C] and, optionally, labels arr_1 [n].

    It is read batch after batch. Raises InputError if it is corrupt.
    """
    corrupt = lambda error: InputError(f"{path} cannot be read as an .npz of images: {error}: fetch or make it again")
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            shape, dtype = _npy_header(file)
        if dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] not in (1, 3) or 0 in shape:
            raise ValueError(f"arr_0 is {dtype} {list(shape)}, not uint8 [n,S,S,1 or 3]")
        with np.load(path) as arrays:
            labels = arrays.get("arr_1")
        if labels is not None and (labels.shape != shape[:1] or labels.dtype.kind not in "iu"):
            raise ValueError(f"arr_1 is {labels.dtype} {list(labels.shape)}, not whole numbers [{shape[0]}], a class per image")
    except BAD_NPZ as error:
        raise corrupt(error) from error

    def batches(world: World) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        size = int(np.prod(shape[1:]))
        try:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
                _npy_header(file)
                start = file.tell()
                for ids in _shares(shape[0], world):
                    file.seek(start + int(ids[0]) * size)
                    yield ids, np.frombuffer(bytearray(file.read(len(ids) * size)), np.uint8).reshape(len(ids), *shape[1:])
        except BAD_NPZ as error:
            raise corrupt(error) from error

    about = {"kind": "npz", "path": str(path), "sha256": files.sha256(path), "images": shape[0]}
    return ImageSet(shape[0], shape[1:], batches, about, None if labels is None else labels.astype(np.int64))


class _Header(NamedTuple):
    """What evaluation must know of an image file before it reads the pixels."""

    size: tuple[int, int]  # width and height in pixels
    form: str  # Pillow's name of the format
    lossy: bool  # whether the format's compression changes pixels
    grey: bool


def _is_lossy_webp(data: bytes) -> bool:
    """Whether the first frame of a WebP is coded with loss (RFC 9649, section 2): its chunk is "VP8 ", not "VP8L"."""
    at = 12
    while at + 8 <= len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name in (b"VP8 ", b"VP8L"):
            return name == b"VP8 "
        at += 24 if name == b"ANMF" else 8 + size + size % 2  # a frame's own chunks follow on its 16 bytes
    return False


def _header(path: Path) -> _Header:
    """Read the header of an image file. Raises InputError."""
    try:
        with pixels.reading(), Image.open(path) as image:
            form = image.format or ""
            lossy = form in ("JPEG", "MPO") or image.info.get("compression") in ("jpeg", "webp")  # the last of a TIFF
            if form == "WEBP":
                lossy = _is_lossy_webp(path.read_bytes())
            grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
            return _Header(image.size, "JPEG" if form == "MPO" else form, lossy, grey)
    except pixels.BadImage as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path | str, reason: object) -> InputError:
    return InputError(f"{path} cannot be read: {reason}: remove it, or write it again")


def _read(path: Path, mode: str) -> np.ndarray:
    """Return an image file as uint8 [S,S,C] in a mode, "L" or "RGB". Raises InputError if it cannot be decoded."""
    try:
        image = pixels.load(path.read_bytes(), exif=True)
    except (OSError, pixels.BadImage) as error:
        raise _unreadable(path, getattr(error, "strerror", None) or error) from error
    values = np.asarray(image.convert(mode))
    return values[..., None] if mode == "L" else values


def _counted(values: Iterable[object]) -> str:
    """Return how often each value occurs, the most frequent first: "38 PNG, 2 JPEG"."""
    return ", ".join(f"{count:,} {value}" for value, count in Counter(values).most_common())


def _folder_warnings(headers: list[_Header], others: Counter[str]) -> list[str]:
    """Return what should be known of a folder's images before their metrics are compared. others: other files by suffix."""
    warnings, lossy = [], [header.form for header in headers if header.lossy]
    if lossy:
        warnings.append(
            f"{_counted(lossy)} of {len(headers):,} images with lossy compression, which changes the metrics: write samples as PNG"
        )
    if len({header.form for header in headers}) > 1:
        warnings.append(
            f"images of several formats ({_counted(header.form for header in headers)}): they may be of several origins"
        )
    grey = sum(header.grey for header in headers)
    if 0 < grey < len(headers):
        warnings.append(f"{grey:,} of {len(headers):,} images are grey, the others not: all are evaluated in color")
    if others:
        warnings.append(f"files that are left out, since they are no images of a known format: {folders.counted(others)}")
    return warnings


def of_folder(folder: Path) -> ImageSet:
    """Return the image files below a folder, all square and of one size, by pixels.load; grey if all are. Raises InputError.

    Hidden files and folders are left out.
    """
    try:
        listing = folders.walk(str(folder), with_state=False)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    if listing.bad:
        name, reason = listing.bad[0]
        raise _unreadable(folder / name, reason)
    if not listing.images:
        suffixes = ", ".join(sorted(pixels.IMAGE_SUFFIXES))
        raise InputError(f"{folder} holds no checkpoint and no images ({suffixes}): give a folder that does")
    paths = [folder / name for name in listing.images]
    headers = [_header(path) for path in paths]
    width, height = headers[0].size
    if other := next((i for i, header in enumerate(headers) if header.size != (width, height)), None):
        wide, high = headers[other].size
        raise InputError(f"{paths[other]} is {wide}x{high}, {paths[0]} is {width}x{height}: images must be of one size")
    if width != height:
        raise InputError(f"{paths[0]} is {width}x{height}: images must be square, crop them first")
    mode = "L" if all(header.grey for header in headers) else "RGB"

    def batches(world: World) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for ids in _shares(len(paths), world):
            yield ids, np.stack([_read(paths[i], mode) for i in ids])

    about = {
        "kind": "folder", "path": str(folder), "images": len(paths), "exif": "applied",
        "formats": dict(Counter(header.form for header in headers)), "lossy": sum(header.lossy for header in headers),
        "left_out": dict(listing.others),
    }  # fmt: skip
    shape = (height, width, 1 if mode == "L" else 3)
    warnings = [f"{folder}: {warning}" for warning in _folder_warnings(headers, listing.others)]
    return ImageSet(len(paths), shape, batches, about, warnings=warnings)


def _columns_first(image: Image.Image, width: int, height: int, filter: Image.Resampling) -> Image.Image:
    """Return an image resampled first along its rows, then along its columns, with 8 bits in between, as Pillow did when the
    published references were made. Pillow 13 takes the columns of tall images first."""
    return image.resize((width, image.height), filter).resize((width, height), filter)


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the middle size x size pixels of an image, resized as for the published ADM references (guided-diffusion,
    image_datasets.py): halved by a box filter while the short side has at least 2·size pixels, then bicubic to `size`."""
    while min(image.size) >= 2 * size:
        image = _columns_first(image, image.width // 2, image.height // 2, Image.Resampling.BOX)
    scale = size / min(image.size)
    image = _columns_first(image, round(image.width * scale), round(image.height * scale), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _adm_crops(index: Index, rows: np.ndarray, size: int, exif: bool, world: World) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield this rank's share of the images of an index by `adm_crop`, read in threads one batch ahead. Raises InputError."""

    def read(i: int) -> np.ndarray:
        try:
            return np.asarray(adm_crop(pixels.load(index.read(rows[i]), exif).convert("RGB"), size))
        except pixels.BadImage as error:
            raise _unreadable(index.name(rows[i]), error) from error

    with ThreadPoolExecutor() as pool:
        begun = ((ids, pool.map(read, ids)) for ids in _shares(len(rows), world))
        following = next(begun, None)
        while following:
            (ids, images), following = following, next(begun, None)
            yield ids, np.stack(list(images))


def of_index(
    folder: Path, size: int, split: str, device: torch.device, at_most: int | None = None, exif: str = "auto", resize: str = "dali"
) -> ImageSet:
    """Return a split of an index, or at most `at_most` evenly spread images of it, cut to size x size pixels.

    resize: one of RESIZES, "adm" or "dali" (antialiased, cubic, as for training); exif: data.exif. Raises InputError.
    """
    from fastdit.data.loader import applies_exif, center_crop_decoder

    index = open_index(folder)
    rows = index.rows(split)
    if at_most:
        rows = rows[evenly_spread(len(rows), at_most)]
    upright = applies_exif(exif, index)

    def batches(world: World) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if resize == "adm":
            yield from _adm_crops(index, rows, size, upright, world)
            return
        shares = list(_shares(len(rows), world))
        if shares:
            decoder = center_crop_decoder(index, rows, shares, BATCH, size, device, max_bad_files=10, exif=exif)
        for ids in shares:
            images = ((decoder.next()[0][: len(ids)] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            yield ids, images.permute(0, 2, 3, 1).cpu().numpy()

    about = {"kind": "index", "path": str(folder), "split": split, "image_size": size, "resize": resize, "images": len(rows)}
    about["exif"] = "applied" if upright else "ignored"
    return ImageSet(len(rows), (size, size, 3), batches, about, np.asarray(rows["label"], np.int64))


def resized_otherwise(samples: dict, reference: dict) -> list[str]:
    """Return a warning if samples and reference, described by their `about`, come from images that were resized differently."""
    resizes = [about.get("resize") or ("dali" if about.get("kind") == "index" else None) for about in (samples, reference)]
    if None in resizes or resizes[0] == resizes[1]:
        return []
    subject = "the model was trained on images" if samples.get("kind") == "checkpoint" else "the samples are images"
    return [f"{subject} resized by {resizes[0]}, the reference by {resizes[1]}: the distances contain that difference"]


def open_images(path: str, size: int | None, split: str, device: torch.device, resize: str | None = None) -> ImageSet:
    """Return the images of "mnist5k", an index (in `size` pixels), an .npz or a folder. Raises InputError for anything else.

    resize: one of RESIZES, for an index (default: "dali").
    """
    location = Path(path)
    if path == "mnist5k":
        return of_array(*mnist5k(split), {"kind": "builtin", "path": path, "split": split})
    if is_index(location):
        if size is None:
            raise InputError(f"{path} is an index, whose images have many sizes: say which to cut them to with --image-size")
        return of_index(location, size, split, device, resize=resize or "dali")
    if location.is_dir():
        return of_folder(location)
    if location.is_file():
        return of_npz(location)
    raise InputError(f"{path} does not exist: give an .npz, a folder of images, an index of `fastdit prepare` or mnist5k")
