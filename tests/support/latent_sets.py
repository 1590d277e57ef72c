"""Latent sets of a few images: `fastdit encode` in a process of its own, and configs and runs that train on them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from commands import environment
from fastdit import cli
from fastdit.config import Config, from_dict

SIZE = 32  # pixels
MODEL = {"preset": "test/4", "in_channels": 4, "input_size": 16}  # fits autoencoders.tiny

# shards of 8 images: 35 images make 5; each call of the encoder first sleeps argv[1] seconds
SCRIPT = """
import sys, time
from fastdit import autoencoder, cli
from fastdit.data import encode
encode.SHARD = 8
encode_images = autoencoder.KL.encode
autoencoder.KL.encode = lambda self, images: (time.sleep(float(sys.argv[1])), encode_images(self, images))[1]
sys.exit(cli.main(sys.argv[2:]))
"""


def encode_command(index: Path, out: Path, vae: str, *more) -> list[str]:
    """The words of `fastdit encode` in batches of 4; more: further words."""
    small = ["--image-size", SIZE, "--batch-size", 4, "--dtype", "fp32", *more]
    return [str(word) for word in ["encode", index, "--out", out, "--autoencoder", vae, *small]]


def start(command: list[str], wait: float = 0.0, ranks: int = 1, script: Path | None = None) -> subprocess.Popen:
    """Start a command in shards of 8 images, each encoder call after `wait` seconds. script: where to write SCRIPT if ranks > 1."""
    python = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    if ranks > 1:
        script.write_text(SCRIPT)
        python = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), str(script)]
    return subprocess.Popen([*python, str(wait), *command], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> str:
    """Wait for a command and return what it printed; it must succeed."""
    printed, problems = process.communicate()
    assert process.returncode == 0, problems.decode()[-3000:]
    return printed.decode()


def moments_of(folder: Path) -> np.ndarray:
    """fp16 [n,2,2,c,s,s]."""
    return np.concatenate([np.load(file) for file in sorted(folder.glob("moments_*.npy"))])


def labels_of(folder: Path) -> list[int]:
    return np.concatenate([np.load(file) for file in sorted(folder.glob("labels_*.npy"))]).tolist()


def config(source: Path, vae: str, data: dict | None = None, **train) -> Config:
    """The config of a run on an index or a latent set; data, train: further settings of these sections."""
    given = {"source": str(source), "image_size": SIZE, "autoencoder": vae, **(data or {})}
    return from_dict({"model": MODEL, "data": given, "train": {"batch_size": 4, **train}})


def train(out: Path, *overrides: str) -> list[float]:
    """Train in <out>/r and return the loss of every step."""
    words = [f"model.{key}={value}" for key, value in MODEL.items()]
    words += [f"data.image_size={SIZE}", "train.batch_size=4", f"train.out={out}", "train.name=r", "train.log_steps=1"]
    words += ["train.warmup_steps=2", "train.schedule=constant", "train.sample_steps=0"]
    assert cli.main(["train", *words, *overrides]) == 0
    lines = (out / "r" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]
