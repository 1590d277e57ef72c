"""Small runs and models to sample from."""

import json
from pathlib import Path

import torch

from fastdit import checkpoint, files
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


def with_state(run: Path, **state: object) -> Path:
    """Change values of the RunState of a run's only checkpoint, and return the run's folder."""
    (folder,) = (run / "checkpoints").iterdir()
    text = json.dumps(json.loads((folder / "state.json").read_text()) | state)
    (folder / "state.json").write_text(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(text), "sha256": files.sha256(folder / "state.json")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return run


def not_finite_run(folder: Path, **sections: dict) -> Path:
    """Write a run as `make_run` does whose weights are finite, but whose velocities overflow fp32."""
    config = from_dict({"model": {"preset": "test/4", "zero_init_gates": False}, **sections})
    torch.manual_seed(0)
    weights = {name: p.detach() * 2 for name, p in DiT(config.model).named_parameters()}
    weights["output.weight"] = torch.full_like(weights["output.weight"], 3e38)
    checkpoint.save_weights(folder / "checkpoints", weights, config, 3, "a test")
    return folder


def random_model(**model: object) -> tuple[DiT, Config]:
    """Return a small random model in eval mode and the config of its run; model: values of ModelConfig."""
    config = from_dict({"model": {"preset": "test/4", "zero_init_gates": False, **model}})
    torch.manual_seed(0)
    return DiT(config.model).eval().requires_grad_(False), config
