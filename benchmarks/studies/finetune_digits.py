"""Fine-tuning against training from nothing: other classes and another size than the source has.

    fastdit train train.name=digits
    python -m benchmarks.studies.finetune_digits --init runs/digits [--seeds 2]

Five of the built-in digits, 9, 7, 5, 3 and 1, are written as PNG files in folders of their names ("nine", …) and indexed by
`fastdit prepare`: their classes have other ids than the source's. "classes": 32 pixels, 60 steps with the source's weights and
without. "size": the same digits enlarged to 64 pixels, at 8 images per step, 20 steps with the source's weights and 200 without.
Samples (40 per class, guidance 2, dpm++ with 10 steps) are judged by the digits' classifier. The runs are kept in --out: a second
call resumes them.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import results_csv
from fastdit.config import parse
from fastdit.data import builtin, prepare
from fastdit.evaluation import digit_classifier
from fastdit.sampling.sampler import Sampler
from fastdit.training.loop import train

CSV = "finetune_digits"
KEPT = (9, 7, 5, 3, 1)
SAMPLER = {"steps": 10, "solver": "dpm++", "guidance": 2.0}
SAMPLES = 40  # per class
COMMON = [
    "data.grey=true", f"model.num_classes={len(KEPT)}", "train.log_steps=10", "train.save_steps=1000", "train.sample_steps=0",
    "train.warmup_steps=10", "train.lr=2e-3", "train.ema_decay=0.95", "validate.steps=20",
]  # fmt: skip


def write_digits(folder: Path, size: int) -> Path:
    """Write the kept digits as PNG files of `size` pixels, a folder per split and class, and return the folder of their index."""
    if not (folder / "index").exists():
        for split in ("train", "val"):
            images, labels = builtin.mnist5k(split)
            for digit in KEPT:
                class_folder = folder / split / builtin.DIGITS[digit]
                class_folder.mkdir(parents=True, exist_ok=True)
                for number, image in enumerate(images[labels == digit]):
                    picture = Image.fromarray(image[..., 0]).resize((size, size), Image.Resampling.BICUBIC)
                    picture.save(class_folder / f"{number}.png")
    return prepare.prepare([folder / "train"], folder / "index", folder / "val")


def accuracy(run: Path, size: int) -> float:
    """Return the share of a run's samples that the classifier recognises."""
    sampler = Sampler(run, device="cpu", dtype="fp32")
    assert sampler.names is not None  # those of the index
    digits = torch.tensor([builtin.DIGITS.index(name) for name in sampler.names])
    classes = torch.arange(len(KEPT)).repeat_interleave(SAMPLES)
    images = sampler.draw(classes, settings=sampler.settings(**SAMPLER))
    assert images is not None  # one process
    small = images.reshape(-1, 32, size // 32, 32, size // 32, 1).mean((2, 4)).round().astype(np.uint8)
    return digit_classifier.accuracy(digit_classifier.load(), small, digits[classes].numpy())


def measure(out: Path, case: str, size: int, steps: int, seed: int, init: Path | None) -> dict:
    """Train a run and return its row."""
    name = f"{case}_{'init' if init else 'nothing'}_{seed}"
    words = [
        *COMMON, f"data.source={write_digits(out / f'digits{size}', size)}", f"data.image_size={size}", f"model.input_size={size}",
        f"train.batch_size={32 if size == 32 else 8}", f"train.out={out}", f"train.name={name}", f"train.total_steps={steps}",
        f"train.seed={seed}", *([f"train.init={init}"] if init else []),
    ]  # fmt: skip
    run = train(parse(None, words))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    row = {
        "case": case, "begins": "init" if init else "nothing", "size": size, "seed": seed, "steps": steps,
        "val_loss": round(losses[steps], 5), "recognised": round(accuracy(run, size), 4), "samples": SAMPLES * len(KEPT),
    }  # fmt: skip
    print(results_csv.line(row), flush=True)
    return row


def main(words: list[str] | None = None) -> int:
    parser = results_csv.parser(__doc__, results_csv.path_of(CSV, None))
    parser.add_argument("--init", type=Path, default=Path("runs/digits"), help="run of the digits (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds (default: %(default)s)")
    options = results_csv.parse(parser, words)
    rows = [
        measure(options.out, case, size, steps, seed, init)
        for seed in range(options.seeds)
        for case, size, steps, init in (
            ("classes", 32, 60, options.init),
            ("classes", 32, 60, None),
            ("size", 64, 20, options.init),
            ("size", 64, 200, None),
        )
    ]
    results_csv.write(options.csv, rows, allow_dirty=options.allow_dirty)
    return 0


if __name__ == "__main__":
    sys.exit(main())
