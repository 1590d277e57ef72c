"""Small runs and models to sample from."""

from pathlib import Path

import torch

from fastdit import checkpoint
from fastdit.config import Config, from_dict
from fastdit.model import DiT

# Overrides of a training run of four steps, a second each on two cores.
TINY_RUN = [
    "model.preset=test/4", "train.batch_size=8", "train.warmup_steps=1", "train.lr=1e-3", "train.log_steps=2",
    "train.save_steps=2", "train.sample_steps=0", "sample.steps=2", "sample.solver=euler", "train.total_steps=4",
]  # fmt: skip


def make_run(folder: Path, **sections: dict) -> Path:
    """Write a run of a small random model to `folder`, as an import leaves it, and return the folder."""
    config = from_dict({"model": {"preset": "test/4", "zero_init_gates": False, **sections.pop("model", {})}, **sections})
    torch.manual_seed(0)
    weights = {name: p.detach() * 2 for name, p in DiT(config.model).named_parameters()}
    checkpoint.save_weights(folder / "checkpoints", weights, config, 3, "a test")
    return folder


def random_model(**model: object) -> tuple[DiT, Config]:
    """Return a small random model in eval mode and the config of its run; model: values of ModelConfig."""
    config = from_dict({"model": {"preset": "test/4", "zero_init_gates": False, **model}})
    torch.manual_seed(0)
    return DiT(config.model).eval().requires_grad_(False), config
