"""Reading images on a CPU: the DALI path against Pillow doing the same, the index scan, and encoding in bf16 against fp32.

    python benchmarks/data_loading.py [--images 400] [--rounds 3] [--threads 2] [--out benchmarks/results/data_loading.csv]

JPEGs of about 500x375, cut from real photographs, quality 90, from the page cache. CPU milliseconds are those of all threads of the
process; providers take turns, figures are medians. The encoder is a random AutoencoderKL of SD-VAE's size at 256 pixels.
"""

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import record
from fastdit import autoencoder, telemetry
from fastdit.data import prepare
from fastdit.data.index import Index, open_index
from fastdit.data.loader import Decoder

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
import photographs

BATCH, RESIZE = 32, 256


def archive(folder: Path, count: int) -> Index:
    images = list(photographs.crops(count))
    classes = {f"n{i:08d}.tar": [] for i in range(10)}
    for i, image in enumerate(images):
        classes[f"n{i % 10:08d}.tar"].append(photographs.encoded(image))
    files = {name: photographs.tar_of({f"{i}.JPEG": data for i, data in enumerate(found)}) for name, found in classes.items()}
    (folder / "images.tar").write_bytes(photographs.tar_of(files))
    return open_index(prepare.prepare([folder / "images.tar"]))


def dali(index: Index, crop: int, threads: int) -> Callable[[int], None]:
    """Reads `count` batches: Resize(256), CenterCrop(crop), mirror, [-1,1]."""
    rows = index.rows("train")
    pixels = np.stack((rows["height"], rows["width"]), 1).astype(np.int64)
    resized = RESIZE * pixels // pixels.min(1, keepdims=True)
    start = np.rint((resized - crop) / 2)
    ends = ((start * pixels / resized).astype(np.float32), ((start + crop) * pixels / resized).astype(np.float32))
    choose = lambda position: ((np.arange(BATCH) + BATCH * position) % len(rows), 0)
    cut = lambda images, _: (ends[0][images], ends[1][images], (images % 2).astype(np.int32))
    decoder = Decoder(index, rows, choose, cut, BATCH, crop, torch.device("cpu"), threads, 0)
    decoder.seek(0)

    def run(count: int) -> None:
        for _ in range(count):
            decoder.next()

    return run


def pillow(index: Index, crop: int, threads: int) -> Callable[[int], None]:
    """The same by Pillow and numpy, in threads (Pillow lets go of the interpreter's lock)."""
    rows, pool = index.rows("train"), ThreadPoolExecutor(threads)

    def one(i: int) -> np.ndarray:
        image = Image.open(io.BytesIO(index.read(rows[i % len(rows)]))).convert("RGB")
        w, h = image.size
        w, h = (RESIZE, int(RESIZE * h / w)) if w < h else (int(RESIZE * w / h), RESIZE)
        left, top = round((w - crop) / 2), round((h - crop) / 2)
        image = image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + crop, top + crop))
        if i % 2:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1

    def run(count: int) -> None:
        for batch in range(count):
            torch.from_numpy(np.stack(list(pool.map(one, range(batch * BATCH, (batch + 1) * BATCH)))))

    return run


def cpu_seconds(run: Callable[[int], None], batches: int) -> tuple[float, float]:
    """(wall, CPU) seconds; what runs ahead has come to rest before and after."""
    time.sleep(0.5)
    wall, cpu = time.perf_counter(), time.process_time()
    run(batches)
    wall = time.perf_counter() - wall
    time.sleep(0.5)
    return wall, time.process_time() - cpu


def decoding(index: Index, rounds: int, threads: int) -> list[dict]:
    batches, rows = len(index.rows("train")) // BATCH, []
    for crop in (224, 256):
        providers = {"DALI": dali(index, crop, threads), "Pillow": pillow(index, crop, threads)}
        times: dict[str, list] = {name: [] for name in providers}
        for run in providers.values():
            run(2)
        for i in range(rounds):
            for name in list(providers)[:: -1 if i % 2 else 1]:
                times[name].append(cpu_seconds(providers[name], batches))
        for name in providers:
            images = batches * BATCH
            ratio = statistics.median(ours[1] / theirs[1] for ours, theirs in zip(times[name], times["Pillow"], strict=True))
            wall, cpu = (statistics.median(t[k] for t in times[name]) for k in (0, 1))
            rows.append({
                "what": f"decode, crop {crop}", "provider": name, "cpu_ms_per_image": f"{cpu / images * 1e3:.2f}",
                "images_per_s": f"{images / wall:.0f}", "ratio": f"{ratio:.2f}",
            })  # fmt: skip
    return rows


def scanning(index: Index, rounds: int, folder: Path) -> dict:
    times = []
    for i in range(rounds):
        start = time.perf_counter()
        prepare.prepare([Path(index.sources[0].path)], folder / f"index{i}")
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    count = len(index.rows("train"))
    return {
        "what": "index scan", "provider": "prepare", "cpu_ms_per_image": f"{seconds / count * 1e3:.3f}",
        "images_per_s": f"{count / seconds:.0f}", "ratio": "",
    }  # fmt: skip


def encoding(rounds: int, folder: Path, batch: int = 4) -> list[dict]:
    """Moments of a batch, as it is and mirrored: images/s count each image once."""
    from diffusers import AutoencoderKL

    types = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    AutoencoderKL(block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4, **types).save_pretrained(folder)
    images = torch.rand(batch, 3, 256, 256) * 2 - 1
    load = lambda dtype: autoencoder.KL(str(folder), 256, torch.device("cpu")).for_encoding(dtype)
    codecs = {"fp32": load(torch.float32), "bf16": load(torch.bfloat16)}
    times: dict[str, list] = {name: [] for name in codecs}
    for i in range(rounds + 1):
        for name in list(codecs)[:: -1 if i % 2 else 1]:
            wall, cpu = time.perf_counter(), time.process_time()
            codecs[name].moments(images)
            codecs[name].moments(images.flip(3))
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    rows = []
    for name, found in times.items():
        wall, cpu = (statistics.median(t[k] for t in found[1:]) for k in (0, 1))
        ratio = statistics.median(ours[0] / theirs[0] for ours, theirs in zip(found[1:], times["fp32"][1:], strict=True))
        rows.append({
            "what": "encode, 256 pixels", "provider": name, "cpu_ms_per_image": f"{cpu / batch * 1e3:.0f}",
            "images_per_s": f"{batch / wall:.2f}", "ratio": f"{ratio:.2f}",
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/data_loading.csv"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        index = archive(folder, options.images)
        rows = decoding(index, options.rounds, options.threads)
        rows.append(scanning(index, options.rounds, folder))
        rows += encoding(options.rounds, folder / "vae")
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    print(f"{options.threads} threads, {telemetry.device_name(torch.device('cpu'))}")
    record.write(options.out, rows)


if __name__ == "__main__":
    main()
