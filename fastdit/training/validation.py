"""Validation during training: the loss of the EMA weights on held-out images, and their FID.

n images, c and s latent channels and size. The loss is taken at 8 fixed timesteps, the middles of eight equal bins, each image with
the same noise at all of them: between runs, steps and numbers of ranks only the weights differ (and rounding).
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdit import flow, kernels
from fastdit.autoencoder import Codec, difference
from fastdit.config import Config, InputError
from fastdit.data.builtin import mnist5k
from fastdit.data.index import is_index
from fastdit.data.latents import is_latent_set, open_latents
from fastdit.data.loader import grey
from fastdit.data.order import check_classes
from fastdit.distributed import World
from fastdit.evaluation import command as evaluate_command
from fastdit.evaluation import features, image_sets, metrics
from fastdit.files import replacing
from fastdit.model import DiT
from fastdit.sampling.sampler import Sampler
from fastdit.training.telemetry import Log, optional

TIMESTEPS = tuple((k + 0.5) / 8 for k in range(8))
SEED = 0  # seed of the noise in every run


def _latents(folder: Path, codec: Codec, wanted: int, world: World) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """This rank's ids int64 [n], moments fp16 [n,2,c,s,s] and labels [n] of a latent set."""
    latents = open_latents(folder)
    if problem := difference(codec, latents.manifest):
        raise InputError(
            f"validate.source={folder} was made with another autoencoder than the run's ({problem}): encode the val split again"
        )
    rows = image_sets.evenly_spread(len(latents.labels), wanted)
    ids = np.arange(world.rank, len(rows), world.size)
    moments = np.empty((len(ids), *latents.shape), np.float16)
    latents.read(rows[ids], np.zeros(len(ids), bool), moments)
    return ids, moments, latents.labels[rows[ids]]


def _images(config: Config, index: Path | None, world: World) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return this rank's ids int64 [n], images uint8 [n,S,S,C] and labels [n] of an index' val split, or of the digits (None)."""
    if index is None:
        images, labels = mnist5k("val")
        rows = image_sets.evenly_spread(len(images), config.validate.images)
        image_set = image_sets.of_array(images[rows], labels[rows], {})
    else:
        image_set = image_sets.of_index(
            index, config.data.image_size, "val", world.device, config.validate.images, config.data.exif
        )
    parts = [(np.empty(0, np.int64), np.empty((0, *image_set.shape), np.uint8)), *image_set.batches(world)]
    ids, images = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    assert image_set.labels is not None  # the digits and an index have them
    return ids, images, image_set.labels[ids]


def _held_out(config: Config, path: Path | None, codec: Codec, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's held-out images on its device: ids int64 [n], latents fp32 [n,c,s,s], labels int64 [n]. Raises InputError."""
    source, batch = config.validate.source, config.train.batch_size
    if source == "auto" and path is not None and is_latent_set(path):
        raise InputError(
            f"validate.steps={config.validate.steps} needs held-out images, and data.source={config.data.source} holds latents of "
            "one split: set validate.source to those of `fastdit encode --split val`"
        )
    path = path if source == "auto" else Path(source)
    if path is not None and is_latent_set(path):
        ids, inputs, labels = _latents(path, codec, config.validate.images, world)
        encoded = True
    elif path is None or is_index(path):
        ids, inputs, labels = _images(config, path, world)
        inputs = inputs.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        encoded = False
        channels = 1 if config.data.grey else inputs.shape[1]
        if channels not in (1, codec.image_channels):  # 1: the built-in digits, which the run trains on, and grey images
            raise InputError(f"validate.source={source} has {channels} channels, the run's images have {codec.image_channels}")
    else:
        raise InputError(f"validate.source={source} must be 'auto', an index with a val split or latents of one")
    check_classes(int(labels.max(initial=0)) + 1, config)
    ids, shape = torch.from_numpy(ids).to(world.device), (codec.channels, codec.size, codec.size)
    latents = [torch.empty(0, *shape, device=world.device)]
    for first in range(0, len(ids), batch):
        noise = kernels.counter_normal(SEED, flow.Stream.POSTERIOR, ids[first : first + batch], shape)
        part = torch.from_numpy(inputs[first : first + batch]).to(world.device)
        if not encoded:
            part = codec.encode(grey(part) if config.data.grey and part.shape[1] == 3 else part)
        latents.append(codec.posterior_sample(part, noise))
    return ids, torch.cat(latents), torch.from_numpy(labels.astype(np.int64)).to(world.device)


class Validation:
    """The held-out images of this rank, encoded, and the reference of the FID."""

    def __init__(
        self, config: Config, path: Path | None, codec: Codec, run: Path, world: World, learned: list[int] | None = None
    ) -> None:
        """path: what data.locate returned; run: folder of the run; learned: classes with training images (default: all).

        All ranks must call it. Raises InputError.
        """
        self.config = config
        self.learned = learned or list(range(config.model.num_classes))
        self.codec = codec
        self.run = run
        self.world = world
        self.ids, self.x0, self.labels = world.together(lambda: _held_out(config, path, codec, world))
        self.network: features.FeatureNetwork | None = None
        self.reference: metrics.Summary | None = None
        if config.validate.features != "none":
            self._open_reference()

    def _open_reference(self) -> None:
        settings = self.config.validate
        reference = settings.reference or ("mnist5k" if settings.features == "digits" else None)
        if reference is None:
            raise InputError("validate.features needs validate.reference: statistics or images, as in `fastdit evaluate`")
        network = self.world.together(lambda: features.load(settings.features, self.world.device))
        shape = (self.config.data.image_size, self.config.data.image_size, self.codec.image_channels)
        request = evaluate_command.EvaluationRequest(settings.features, reference, image_size=self.config.data.image_size)
        places = image_sets.evaluation_labels("balanced", settings.samples, len(self.learned), SEED)
        self.labels_drawn = torch.tensor(self.learned)[places]
        self.world.together(lambda: network.probe(shape))
        self.network = network
        self.reference = evaluate_command.open_reference(request, network, self.world)

    @torch.no_grad()
    def losses(self, model: nn.Module) -> dict:
        """Return means over all ranks' images by their keys in the log: "val_losses", the loss at each of TIMESTEPS; "val_loss",
        their mean; and "val_loss_<name>" of each of flow.logged_parts()."""
        names = flow.logged_parts()
        sums = torch.zeros(len(TIMESTEPS) + len(names) + 1, dtype=torch.float64, device=self.world.device)
        sums[-1] = len(self.ids)
        for first in range(0, len(self.ids), self.config.train.batch_size):
            x0, labels, ids = (t[first : first + self.config.train.batch_size] for t in (self.x0, self.labels, self.ids))
            noise = kernels.counter_normal(SEED, flow.Stream.VALIDATION, ids, tuple(x0.shape[1:]))
            for k, timestep in enumerate(TIMESTEPS):
                t = torch.full((len(x0),), timestep, device=x0.device)
                losses = flow.losses_at(model, x0, noise, t, labels, self.config.flow.prediction)
                sums[k] += losses.total.double().sum()
                for i, name in enumerate(names, len(TIMESTEPS)):
                    sums[i] += losses.parts[name].double().sum()
        dist.all_reduce(sums)
        means = (sums[:-1] / sums[-1]).tolist()
        by_timestep, parts = means[: len(TIMESTEPS)], means[len(TIMESTEPS) :]
        named = {f"val_loss_{name}": part / len(TIMESTEPS) for name, part in zip(names, parts, strict=True)}
        return {"val_loss": sum(by_timestep) / len(TIMESTEPS), "val_losses": by_timestep, **named}

    def _distances(self, model: DiT, network: features.FeatureNetwork, reference: metrics.Summary) -> dict:
        """Return the metrics of samples of the model on rank 0, nothing on the others. The model cannot be used afterwards."""
        config = self.config
        sampler = Sampler.of_model(model, config, self.codec)
        drawn = image_sets.of_sampler(sampler, config.sample, self.labels_drawn, SEED, {})
        samples = evaluate_command.summarize(drawn, network, self.world, "FID")
        return metrics.scalars(metrics.compare(samples, reference, self.world.device)) if self.world.rank == 0 else {}

    def step(self, done: int, last: bool, averaged: Callable[[], DiT], log: Log) -> None:
        """After step `done`, if it is time: validate the model that `averaged` makes, log, draw. All ranks must call it."""
        if done % self.config.validate.steps and not last:
            return
        model = averaged()
        line = self.losses(model)
        if self.network and self.reference:
            line |= self._distances(model, self.network, self.reference)
        log.write_validation(done, TIMESTEPS, line)
        if self.world.rank == 0:
            with optional(log.print):
                plot_validation(self.run)


def plot_validation(run: Path) -> None:
    """Draw validation.png of a run's metrics.jsonl: loss over steps, loss by timestep, and FID if it was taken."""
    from matplotlib.figure import Figure

    lines = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "val_loss" in line]
    with_fid = [line for line in lines if "fid" in line]
    figure = Figure(figsize=(4.5 * (2 + bool(with_fid)), 4), layout="constrained")
    axes = figure.subplots(1, 2 + bool(with_fid))
    axes[0].plot([line["step"] for line in lines], [line["val_loss"] for line in lines], marker=".")
    axes[0].set(xlabel="step", ylabel="loss on held-out images")
    for k in sorted({0, len(lines) // 2, len(lines) - 1}):
        axes[1].plot(TIMESTEPS, lines[k]["val_losses"], marker=".", label=f"step {lines[k]['step']}")
    axes[1].set(xlabel="timestep (1: noise)", ylabel="loss on held-out images")
    axes[1].legend()
    if with_fid:
        axes[2].plot([line["step"] for line in with_fid], [line["fid"] for line in with_fid], marker=".", color="C2")
        axes[2].set(xlabel="step", ylabel="Fréchet distance", yscale="log")
    for each in axes:
        each.grid(alpha=0.3)
    figure.suptitle(run.name)
    with replacing(run / "validation.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
