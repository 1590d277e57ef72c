"""Whole train steps of a preset, as users run them: `fastdit train` under each train.compile, and the eager reference.

For measurements of the host, which need no real data: x0 and labels are the same in every step. B batch, C/h/w the latent.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from eager_reference import EagerDiT, comparable, train_step
from fastdit import distributed, graphs
from fastdit.config import PRESETS, Config, parse
from fastdit.planning.host import BLOCK_GRAPHS
from fastdit.training import engine
from measure import DEVICE, PRECISION

IMAGES = 1 << 20  # that the made-up data set says it has
CLASSES = 1000
# provider: train.compile, or None for the eager reference. BLOCK_GRAPHS are measured on one rank too.
PROVIDERS = {
    "eager reference": None, "eager reference compiled": None, "none": "none", "blocks": "blocks", "model": "model",
    "graphs": "graphs", BLOCK_GRAPHS: "graphs",
}  # fmt: skip


class Moments:
    """Loader and codec at once: every batch is the same random posterior of 4x32x32 latents, and lies on the device."""

    class_names = None
    needs_noise = True

    def __init__(self, config: Config, world: distributed.World) -> None:
        from fastdit.data.order import Order

        self.channels, self.size = config.model.in_channels, config.model.input_size
        self.order = Order(IMAGES, config, world)
        shape = (config.train.batch_size, 2, self.channels, self.size, self.size)
        self.moments = torch.randn(shape, device=world.device)
        self.labels = torch.randint(config.model.num_classes, shape[:1], device=world.device)

    def batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [B,2,C,h,w]; labels int64 [B]."""
        return self.moments, self.labels

    def encode(self, moments: Tensor, noise: Tensor) -> Tensor:
        """x0 [B,C,h,w] as fastdit.autoencoder draws it from cached moments."""
        mean, logvar = moments.unbind(1)
        return mean + torch.exp(0.5 * logvar) * noise


def config_of(preset: str, compiled: str, batch: int, out: str, *more: str) -> Config:
    """The config of a run of one rank on latents; more: settings. Raises InputError, for example for a train.compile that does not
    exist."""
    words = {
        "model.preset": preset, "model.in_channels": 4, "model.num_classes": CLASSES, "train.compile": compiled,
        "train.batch_size": batch, "train.out": out, "train.name": "steps", "train.log_steps": 1 << 30,
    }  # fmt: skip
    return parse(None, [*(f"{key}={value}" for key, value in words.items()), *more])


def trainer_step(preset: str, provider: str, batch: int, *more: str) -> Callable[[], None]:
    """Trainer.step under DeepSpeed, with everything that training does in a step but reading data. more: settings."""
    from fastdit.training.loop import Trainer  # here: gpu.py, which asks for PROVIDERS, needs torch and triton only

    folder = tempfile.TemporaryDirectory()
    config = config_of(preset, PROVIDERS[provider], batch, folder.name, *more)
    record = lambda model, per_block: graphs.record_training(model, per_block or provider == BLOCK_GRAPHS)
    world = distributed.start(DEVICE.type)
    config = engine.resolve_precision(config, world.device)
    run = Path(folder.name) / "steps"
    run.mkdir()
    data = Moments(config, world)
    # weights are made where they will be: on the CPU that takes seconds
    with world.device, patch.object(engine, "record_training", record):
        trainer = Trainer(config, world, data, data, run, None, {"step": 0, "wandb_id": None, "summed_steps": 0})
    taken = 0

    def step() -> None:
        nonlocal taken
        trainer.step(taken)
        trainer.clock.spans.clear()  # which a run does as it writes a log line
        taken += 1

    step.keeps = folder  # deleted with the step
    return step


def reference_step(preset: str, compiled: bool, batch: int) -> Callable[[], None]:
    """The base script's step: model, loss, AdamW; it has its EMA on the CPU every 100 steps, which is left out."""
    p = PRESETS[preset]
    with DEVICE:
        model = EagerDiT(comparable(p["width"], p["depth"], p["heads"], p["hidden"], p.get("class_width")))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    for block in model.blocks if compiled else ():  # one graph for all: the whole model takes Inductor minutes
        block.compile(dynamic=False)
    x0, noise = (torch.randn(batch, 4, 32, 32, device=DEVICE) for _ in range(2))
    labels, t = torch.randint(CLASSES, (batch,), device=DEVICE), torch.rand(batch, device=DEVICE)
    return lambda: train_step(model, optimizer, x0, labels, t, noise, PRECISION)


def step_of(preset: str, provider: str, batch: int) -> Callable[[], object]:
    """A train step of so many images, to be called again and again; one such step a process.

    Raises InputError where train.compile has no such value.
    """
    if PROVIDERS[provider] is None:
        return reference_step(preset, provider.endswith("compiled"), batch)
    return trainer_step(preset, provider, batch)
