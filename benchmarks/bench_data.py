"""Images per second of what feeds a train step: reading and decoding JPEGs, indexing, encoding images, reading cached latents.

decode: JPEGs of about 500x375 pixels from the page cache to a float crop of 224 or 256 pixels, by DALI, as in fastdit, and by
Pillow in as many threads, as in a plain script. `cpu_ms_per_image`: CPU time of all threads of the process. encode: an autoencoder
of SD-VAE's size at 256 pixels, an image and its mirror image (counted once), in fp32 and, if the device computes in it, in bf16.
latents: one loader on latents by memory map and from the device's memory. `parity`: the largest mean difference of an image's
pixels from Pillow's, in [-1,1].
"""

import functools
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import eager_reference, fixtures
from benchmarks.harness import (
    DEVICE,
    PRECISION,
    THREADS,
    Group,
    Result,
    Worker,
    quantiles,
    speedup,
    start,
    synchronize,
    take_turns,
    timed,
)
from fastdit import autoencoder, distributed
from fastdit.config import Config, DataConfig, ModelConfig, TrainConfig
from fastdit.data import prepare
from fastdit.data.index import open_index
from fastdit.data.latents import MANIFEST, LatentLoader
from fastdit.data.loader import Decoder
from fastdit.device import DTYPES
from fastdit.files import sha256

SUITE = "data"
BATCH, RESIZE, ENCODED = 32, 256, 4
READY = 4  # most batches that a loader prepares ahead of its reader
PARITY = 0.02  # in [-1,1]: DALI's cubic filter is not Pillow's, libjpeg-turbo is the same
LATENTS = (4, 32, 32)
CROPS = (224, 256)


def dali(folder: Path, crop: int) -> Callable[[], Tensor]:
    """Return what reads a batch by DALI: Resize(256), CenterCrop(crop), in [-1,1]."""
    index = open_index(folder / "images.index")
    rows = index.rows("train")
    pixels = np.stack((rows["height"], rows["width"]), 1).astype(np.int64)
    resized = RESIZE * pixels // pixels.min(1, keepdims=True)
    first = np.rint((resized - crop) / 2)
    ends = ((first * pixels / resized).astype(np.float32), ((first + crop) * pixels / resized).astype(np.float32))
    choose = lambda position: ((np.arange(BATCH) + BATCH * position) % len(rows), 0)
    cut = lambda chosen, _: (ends[0][chosen], ends[1][chosen], np.zeros(len(chosen), np.int32))
    decoder = Decoder(index, rows, choose, cut, BATCH, crop, DEVICE, THREADS, 0, exif=False)
    decoder.seek(0)
    return lambda: decoder.next()[0]


def pillow(folder: Path, crop: int) -> Callable[[], Tensor]:
    """Return what reads a batch by Pillow in threads, as `dali`; Pillow releases the interpreter's lock."""
    index, pool, position = open_index(folder / "images.index"), ThreadPoolExecutor(THREADS), 0
    rows = index.rows("train")

    def read() -> Tensor:
        nonlocal position
        chosen = [rows[(position + i) % len(rows)] for i in range(BATCH)]
        position += BATCH
        return torch.stack(list(pool.map(lambda row: eager_reference.pixels(index.read(row), RESIZE, crop), chosen))).to(DEVICE)

    return read


def reading(name: str, folder: Path, crop: int) -> Callable[[int], tuple]:
    """In a worker: return a function of the number of batches to (wall, CPU) seconds per image and the last batch.

    CPU time is that of all batches between two rests of the threads that read ahead; wall time leaves out the first READY batches,
    which are prepared during the first rest.
    """
    read = {"DALI": dali, "Pillow": pillow}[name](folder, crop)

    def run(batches: int) -> tuple[float, float, Tensor]:
        time.sleep(0.3)
        cpu = time.process_time()
        for _ in range(READY):
            read()
        wall = time.perf_counter()
        for _ in range(batches):
            last = read()
        synchronize()
        wall = time.perf_counter() - wall
        time.sleep(0.3)
        return wall / batches / BATCH, (time.process_time() - cpu) / (READY + batches) / BATCH, last.cpu()

    return run


def scan(folder: Path) -> Callable[[int], tuple]:
    """In a worker: return a function that makes the index anew and returns (wall, CPU) seconds per image."""

    def run(turn: int) -> tuple[float, float]:
        index, wall, cpu = timed(lambda: prepare.prepare([folder / "images.tar"], folder / f"scan{turn}"), wait=False)
        count = len(open_index(index).rows("train"))
        return wall / count, cpu / count

    return run


def encoder(precision: str) -> Callable[[int], tuple]:
    """In a worker: return a function that encodes a batch and its mirror images and returns (wall, CPU) seconds per image."""
    codec = autoencoder.KL("SD-VAE", 256, DEVICE, fixtures.autoencoder()).for_encoding(DTYPES[precision])
    batch = torch.rand(ENCODED, 3, 256, 256, device=DEVICE) * 2 - 1

    def run(_: int) -> tuple[float, float]:
        _, wall, cpu = timed(lambda: (codec.encode(batch), codec.encode(batch.flip(3))))
        return wall / ENCODED, cpu / ENCODED

    return run


def write_latents(folder: Path, count: int) -> None:
    """Write a latent set of random numbers."""
    shard = np.random.default_rng(0).standard_normal((count, 2, 2, *LATENTS), np.float32).astype(np.float16)
    folder.mkdir()
    np.save(folder / "moments_00000.npy", shard)
    np.save(folder / "labels_00000.npy", np.zeros(count, np.int32))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in folder.glob("*.npy")}
    manifest = {
        "images": count, "image_size": 256, "autoencoder": "none", "autoencoder_sha256": "none", "classes": ["0"],
        "class_names": None, "files": files,
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest))


def latents(folder: Path, resident: str) -> Callable[[int], tuple]:
    """In a worker: return a function of the number of batches to (wall, CPU) seconds per image."""
    config = Config(
        model=ModelConfig(preset="base/2", num_classes=1000, in_channels=4, input_size=32), train=TrainConfig(batch_size=BATCH),
        data=DataConfig(source=str(folder), image_size=256, resident=resident, flip=True),
    )  # fmt: skip
    loader, step = LatentLoader(folder, config, distributed.World(0, 1, DEVICE, None)), 0

    def read(batches: int) -> None:
        nonlocal step
        for _ in range(batches):
            loader.batch(step, 0)
            step += 1

    def run(batches: int) -> tuple[float, float]:
        read(READY)
        _, wall, cpu = timed(lambda: read(batches))
        return wall / batches / BATCH, cpu / batches / BATCH

    return run


def result(case: str, name: str, size: str, first: list, turns: list, error: str = "") -> Result:
    """Return a result of seconds per image. first: the turns of the provider that it is compared with."""
    if error:
        return Result({"case": case, "provider": name, "size": size}, [], {}, error)
    cpu, wall = quantiles([turn[1] for turn in turns])[0], [turn[0] for turn in turns]
    values = {
        "images_per_s": f"{1 / quantiles(wall)[0]:.4g}", **speedup([turn[0] for turn in first], wall),
        "cpu_ms_per_image": f"{cpu * 1e3:.3g}",
    }  # fmt: skip
    return Result({"case": case, "provider": name, "size": size}, wall, values)


def compete(
    case: str, size: str, makers: dict[str, Callable[[], Worker]], argument: int | None, turns: int, say: Callable
) -> tuple[dict[str, Result], dict[str, list]]:
    """Run workers in turns, the first of which does not count, and compare them with the first worker.

    argument: what each call gets; None: the number of the turn. Returns the results, and what each worker returned in each turn.
    """
    workers, errors = start(makers, say)
    calls = {name: lambda turn, w=w: w(turn if argument is None else argument) for name, w in workers.items()}
    taken, failed = take_turns(calls, 1 + turns, say)
    errors |= failed
    for worker in workers.values():
        worker.stop()
    first = next(iter(makers))
    theirs = [] if first in errors else taken[first][1:]
    counted = {name: taken.get(name, [])[1:] for name in makers}
    return {name: result(case, name, size, theirs, counted[name], error=errors.get(name, "")) for name in makers}, taken


def measure_reading(crop: int, count: int, turns: int, say: Callable) -> dict[str, Result]:
    case, batches = f"decode, crop {crop}", count // BATCH
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fixtures.archive(folder, count)
        make = "benchmarks.bench_data:reading"
        makers = {name: functools.partial(Worker, make, name, folder, crop) for name in ("Pillow", "DALI")}
        results, taken = compete(case, f"batch {BATCH}", makers, batches, turns, say)
    if all(not result.error for result in results.values()):
        ours, theirs = taken["DALI"][-1][2], taken["Pillow"][-1][2]
        parity = (ours - theirs).abs().flatten(1).mean(1).max().item()
        if not parity <= PARITY:
            error = f"parity: an image's pixels differ by {parity:.1e} on average, more than {PARITY}"
            results["DALI"] = result(case, "DALI", f"batch {BATCH}", [], [], error=error)
        else:
            results["DALI"].values["parity"] = f"{parity:.1e}"
    return results


def measure_scan(count: int, turns: int, say: Callable) -> dict[str, Result]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fixtures.archive(folder, count)
        makers = {"prepare": functools.partial(Worker, "benchmarks.bench_data:scan", folder)}
        return compete("index", f"{count} images", makers, None, turns, say)[0]


def measure_encoding(names: tuple[str, ...], turns: int, say: Callable) -> dict[str, Result]:
    makers = {name: functools.partial(Worker, "benchmarks.bench_data:encoder", name) for name in names}
    results, _ = compete("encode, 256 pixels", f"batch {ENCODED}", makers, None, turns, say)
    for name, row in results.items():
        row.values["precision"] = name
    return results


def measure_latents(count: int, turns: int, say: Callable) -> dict[str, Result]:
    names = {"memory map": "false", "resident": "true"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "latents"
        write_latents(folder, count)
        make = "benchmarks.bench_data:latents"
        makers = {name: functools.partial(Worker, make, folder, resident) for name, resident in names.items()}
        return compete("cached latents", f"batch {BATCH}", makers, count // BATCH, turns, say)[0]


def groups(full: bool) -> dict[str, Group]:
    cuda = DEVICE.type == "cuda"
    count, turns = (1024 if cuda else 384, 5) if full else (256, 3)
    precisions = tuple(dict.fromkeys(("fp32", PRECISION)))
    made = {
        f"decode {crop}": Group(("Pillow", "DALI"), functools.partial(measure_reading, crop, count, turns))
        for crop in (CROPS if full else CROPS[1:])
    }  # fmt: skip
    made["index"] = Group(("prepare",), functools.partial(measure_scan, count, turns))
    made["latents"] = Group(("memory map", "resident"), functools.partial(measure_latents, 4096 if full else 1024, turns))
    if full or cuda:
        made["encode"] = Group(precisions, functools.partial(measure_encoding, precisions, turns))
    return made


def test_data(replay, group, member) -> None:
    replay(group, member)
