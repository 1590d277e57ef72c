"""From a model to pictures: samples of given classes, on one rank or shared by all, and the grid they are shown in."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from fastdit import autoencoder, checkpoint, kernels, samplers
from fastdit.config import Config, InputError, SampleConfig, nearest
from fastdit.data.classes import imagenet_names
from fastdit.engine import World
from fastdit.flow import Stream
from fastdit.telemetry import progress_bar

BATCH = 100  # images a batch; twice that with guidance
SHOWN = 10  # images a class in the grid of `fastdit sample`, at most


@torch.no_grad()
def stream(
    model: nn.Module, codec, config: SampleConfig, labels: Tensor, ids: Tensor, seed: int, null: int,
    advance: Callable[[], object] = lambda: None,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Images uint8 [b,S,S,C] of the classes labels int64 [n], batch after batch in their order.

    ids int64 [n] name the starting noise: image i depends on (seed, ids[i], labels[i]) and not on its batch or rank. `advance`
    is called after each solver step of each batch.
    """
    model_config = model.config
    shape = (model_config.in_channels, model_config.input_size, model_config.input_size)
    for batch_labels, batch_ids in zip(labels.split(BATCH), ids.split(BATCH), strict=True):
        x = kernels.counter_normal(seed, Stream.SAMPLE, batch_ids, shape)
        velocity = samplers.guided(model, batch_labels, null, config.guidance)
        for point in samplers.SOLVERS[config.solver](velocity, x, config.steps):
            x = point
            advance()
        pixels = ((codec.decode(x) + 1) * 127.5).round().to(torch.uint8)
        yield pixels.permute(0, 2, 3, 1).cpu().numpy()


def generate(*arguments) -> np.ndarray:
    """All images of `stream`, uint8 [n,S,S,C]."""
    return np.concatenate(list(stream(*arguments)))


def generate_on_all_ranks(
    model: nn.Module, codec, config: SampleConfig, labels: Tensor, seed: int, null: int, world: World
) -> np.ndarray:
    """`generate` with ids 0 .. n−1, every rank doing its share; all ranks get all images and must call it."""
    ids = torch.arange(len(labels), device=labels.device)
    mine = ids[world.rank :: world.size]
    images = generate(model, codec, config, labels[mine], mine, seed, null) if len(mine) else None
    shares: list = [None] * world.size
    dist.all_gather_object(shares, images, group=world.control)
    whole = np.empty((len(labels), *shares[0].shape[1:]), np.uint8)
    for rank, share in enumerate(shares):
        if share is not None:
            whole[rank :: world.size] = share
    return whole


def grid(images: np.ndarray, columns: int, gap: int = 2) -> Image.Image:
    """Images uint8 [n,S,S,1 or 3] as one picture, `columns` a row, on white with `gap` pixels between."""
    n, size, _, channels = images.shape
    rows = -(-n // columns)
    step = size + gap
    sheet = np.full((rows * step + gap, columns * step + gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + i // columns * step, gap + i % columns * step
        sheet[y : y + size, x : x + size] = image
    return Image.fromarray(sheet if channels == 3 else sheet[..., 0])


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all."""
    with checkpoint.replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def _class_of_name(name: str, names: list[str]) -> int:
    """The class one of whose names (ImageNet's have several, "tench, Tinca tinca") is `name`. Raises InputError."""
    ids: dict[str, list[int]] = {}
    for i, synonyms in enumerate(names):
        for synonym in synonyms.lower().split(", "):
            ids.setdefault(synonym, []).append(i)
    found = ids.get(name.lower(), [])
    if len(found) != 1:
        fix = f"it names classes {' and '.join(map(str, found))}: give the id" if found else nearest(name.lower(), list(ids))
        raise InputError(f"--class {name!r} is not one class of this model: {fix}")
    return found[0]


def parse_classes(text: str, num_classes: int, names: list[str] | None = None) -> list[int]:
    """ "3", "207,360", "golden retriever,otter" or "all" as class ids. names: of the classes, where they are known.

    Raises InputError for anything else or an id out of range.
    """
    if text == "all":
        return list(range(num_classes))
    classes = []
    for part in map(str.strip, text.split(",")):
        if part.lstrip("-").isdecimal():
            if not 0 <= int(part) < num_classes:
                raise InputError(f"--class {part} is out of range: this model's classes are 0 to {num_classes - 1}")
            classes.append(int(part))
        elif names:
            classes.append(_class_of_name(part, names))
        else:
            raise InputError(f"--class {text!r} must be 'all' or class ids such as 3 or 207,360")
    return classes


def check_writable(path: Path) -> None:
    """Raise InputError unless a file can be written at `path`."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the name of a file in it")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}: choose another place") from error


def run(
    path: Path,
    classes: str,
    per_class: int,
    overrides: dict,
    seed: int,
    weights: str,
    dtype: torch.dtype,
    out: Path,
    npz: Path | None,
) -> Config:
    """What `fastdit sample` does: a grid PNG with one row a class (its first SHOWN images), and optionally an npz (arr_0 images
    uint8 NHWC, arr_1 labels int64). overrides: SampleConfig values given by the user. Raises InputError for bad input, before
    any work."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if per_class < 1:
        raise InputError(f"--per-class {per_class} must be at least 1")
    if not 0 <= seed < 2**64:
        raise InputError(f"--seed {seed} must be at least 0 and below 2^64")
    model, config, state = checkpoint.load_model(path, weights, device)
    names = state.get("class_names") or (imagenet_names() if config.model.num_classes == 1000 else None)
    sampling = SampleConfig(**{**config.to_dict()["sample"], **overrides})
    chosen = parse_classes(classes, config.model.num_classes, names)
    for target in (out, npz):
        if target is not None:
            check_writable(target)
    codec = autoencoder.load(config.data, config.model, config.model.in_channels, device)
    labels = torch.tensor(chosen, device=device).repeat_interleave(per_class)
    batches = -(-len(labels) // BATCH)
    with progress_bar(batches * sampling.steps, description=f"{len(labels)} images") as bar:
        images = generate(
            model.to(dtype),
            codec,
            sampling,
            labels,
            torch.arange(len(labels), device=device),
            seed,
            config.model.num_classes,
            bar.update,
        )
    shown = min(per_class, SHOWN)
    save_picture(
        grid(images.reshape(len(chosen), per_class, *images.shape[1:])[:, :shown].reshape(-1, *images.shape[1:]), shown), out
    )
    if npz is not None:
        with checkpoint.replacing(npz) as temporary, temporary.open("wb") as file:
            np.savez(file, arr_0=images, arr_1=labels.cpu().numpy())
    if names:
        known = ", ".join(f"{i} ({names[i].split(', ')[0]})" for i in chosen[:SHOWN] if i < len(names))
        print(f"classes: {known}{', …' * (len(chosen) > SHOWN)}")
    return config
