"""Complete train steps of a preset, as users run them: `fastdit train` under each train.compile, and the eager reference.

They serve measurements of the host, which need no real data: x0 and labels are the same in every step. B batch, C/h/w the latent.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.eager_reference import EagerDiT, comparable, train_step
from benchmarks.harness import DEVICE, PRECISION
from fastdit import distributed, graphs
from fastdit.checkpoint import RunState
from fastdit.config import Config, parse
from fastdit.planning.host import BLOCK_GRAPHS
from fastdit.presets import PRESETS
from fastdit.training import engine

IMAGES = 1 << 20  # size of the made-up data set
CLASSES = 1000
# provider -> train.compile, or None for the eager reference. BLOCK_GRAPHS, of several ranks, are measured on one.
PROVIDERS = {
    "eager reference": None, "eager reference compiled": None, "none": "none", "blocks": "blocks", "model": "model",
    "graphs": "graphs", BLOCK_GRAPHS: "graphs",
}  # fmt: skip


class Moments:
    """Loader and codec in one: every batch is the same random posterior of 4x32x32 latents, on the device."""

    class_names = None
    needs_noise = True

    def __init__(self, config: Config, world: distributed.World) -> None:
        from fastdit.data.order import Order

        self.class_counts = [IMAGES // CLASSES] * CLASSES
        self.digest = "random"
        self.manifest = {"images": IMAGES}  # that there is one says that `batch` returns moments
        self.channels = config.model.in_channels
        self.size = config.model.input_size
        self.order = Order(IMAGES, config, world)
        shape = (config.train.batch_size, 2, self.channels, self.size, self.size)
        self.moments = torch.randn(shape, device=world.device)
        self.labels = torch.randint(config.model.num_classes, shape[:1], device=world.device)

    def batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance [B,2,C,h,w], and labels int64 [B]."""
        return self.moments, self.labels

    def posterior_sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Return x0 [B,C,h,w] as fastdit.autoencoder draws it from cached moments [B,2,C,h,w]."""
        mean, logvar = moments.unbind(1)
        return mean + torch.exp(0.5 * logvar) * noise


def config_of(preset: str, compiled: str, batch: int, out: str, *more: str) -> Config:
    """Return the config of a run of one rank on latents. more: settings KEY=VALUE. Raises InputError, for example if train.compile
    has no such value."""
    words = {
        "model.preset": preset, "model.in_channels": 4, "model.num_classes": CLASSES, "train.compile": compiled,
        "train.batch_size": batch, "train.out": out, "train.name": "steps", "train.log_steps": 1 << 30,
    }  # fmt: skip
    return parse(None, [*(f"{key}={value}" for key, value in words.items()), *more])


def trainer_step(preset: str, provider: str, batch: int, *more: str) -> Callable[[], None]:
    """Return Trainer.step under DeepSpeed: all that training does in a step except reading data. more: settings KEY=VALUE."""
    from fastdit.training.loop import Trainer  # here: run_on_gpu.py, which reads PROVIDERS, needs only torch and triton

    folder = tempfile.TemporaryDirectory()
    config = config_of(preset, PROVIDERS[provider], batch, folder.name, *more)
    record = lambda model, per_block: graphs.record_training(model, per_block or provider == BLOCK_GRAPHS)
    world = distributed.start(DEVICE.type)
    config = engine.resolve_precision(config, world.device)
    run = Path(folder.name) / "steps"
    run.mkdir()
    data = Moments(config, world)
    # initialised on the device: on the CPU that takes seconds
    with world.device, patch.object(engine, "record_training", record):
        trainer = Trainer(config, world, data, data, run, None, RunState())
    taken = 0

    def step() -> None:
        nonlocal taken
        trainer.step(taken)
        trainer.clock.spans.clear()  # as a run does when it writes a log line
        taken += 1

    step.keeps = folder  # deleted with the step
    return step


def reference_step(preset: str, compiled: bool, batch: int) -> Callable[[], None]:
    """Return the base script's step: model, loss, AdamW; its EMA on the CPU every 100 steps is left out."""
    p = PRESETS[preset]
    with DEVICE:
        model = EagerDiT(comparable(p["width"], p["depth"], p["heads"], p["hidden"], p.get("class_width")))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    for block in model.blocks if compiled else ():  # one graph for all blocks: Inductor takes minutes for the model
        block.compile(dynamic=False)
    x0, noise = (torch.randn(batch, 4, 32, 32, device=DEVICE) for _ in range(2))
    labels, t = torch.randint(CLASSES, (batch,), device=DEVICE), torch.rand(batch, device=DEVICE)
    return lambda: train_step(model, optimizer, x0, labels, t, noise, PRECISION)


def step_of(preset: str, provider: str, batch: int) -> Callable[[], object]:
    """Return a train step of `batch` images, to be called repeatedly; one such step per process.

    Raises InputError if train.compile has no such value.
    """
    if PROVIDERS[provider] is None:
        return reference_step(preset, provider.endswith("compiled"), batch)
    return trainer_step(preset, provider, batch)
