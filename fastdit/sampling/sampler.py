"""From a model to pictures: samples of given classes, on one rank or shared by all, and the grid they are shown in."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdit import attention, autoencoder, checkpoint, kernels
from fastdit.checkpoint import Checkpoint
from fastdit.config import SampleConfig
from fastdit.convert import base
from fastdit.data.imagenet import imagenet_names
from fastdit.device import DTYPES, choose_device, native_bf16
from fastdit.distributed import World
from fastdit.flow import Stream
from fastdit.model import DiT
from fastdit.progress import progress_bar
from fastdit.sampling import solvers
from fastdit.sampling.class_names import parse_classes
from fastdit.sampling.fast import fast_velocity

BATCH = 100  # images a batch; twice that with guidance

Noise = Callable[[Tensor, int], Tensor]


def per_sample_noise(seed: int, shape: tuple[int, ...]) -> Noise:
    """Noise of the samples ids int64 [B], fp32 [1+steps,B,*shape]: the start, then each step's. A sample's depends on (seed, its
    id, step) and not on its batch or rank."""

    def draw(ids: Tensor, steps: int) -> Tensor:
        start = kernels.counter_normal(seed, Stream.SAMPLE, ids, shape)
        later = [kernels.counter_normal(seed, Stream.SAMPLE_STEP, ids + (i << 32), shape) for i in range(steps)]
        return torch.stack((start, *later))

    return draw


def one_generator_noise(seed: int, shape: tuple[int, ...]) -> Noise:
    """The same shape, as the base command draws it: from one CPU generator, batch after batch in their order, of each batch first
    its start and then each step's."""
    generator = torch.Generator().manual_seed(seed)

    def draw(ids: Tensor, steps: int) -> Tensor:
        noise = torch.stack([torch.randn(len(ids), *shape, generator=generator) for _ in range(1 + steps)])
        return noise.pin_memory().to(ids.device, non_blocking=True) if ids.is_cuda else noise

    return draw


@torch.no_grad()
def latents(
    model: nn.Module, config: SampleConfig, labels: Tensor, ids: Tensor, noise: Noise, null: int, at_once: int = BATCH,
    skip: Callable[[int], bool] = lambda k: False, watch: Callable[[int, int, Tensor], object] = lambda k, i, x: None,
    run: Callable | None = None,
) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """(k, final latents fp32 [b,C,h,w]) of batch k of `at_once` samples, of the classes labels int64 [n], in their order.

    ids int64 [n] name the samples. The noise of every batch is drawn, but those that `skip` names are not computed. `watch` is
    given (k, 0, start) and (k, i, x after step i). run: as of samplers.guided.
    """
    solver = solvers.SOLVERS[config.solver]
    steps_with_noise = config.steps if config.solver in solvers.STOCHASTIC else 0
    interval = (config.guidance_low, config.guidance_high)
    for k, (batch_labels, batch_ids) in enumerate(zip(labels.split(at_once), ids.split(at_once), strict=True)):
        drawn = noise(batch_ids, steps_with_noise)
        if skip(k):
            continue
        velocity = solvers.guided(model, batch_labels, null, config.guidance, interval, run)
        x = drawn[0]
        watch(k, 0, x)
        for i, point in enumerate(solver(velocity, x, config.steps, config.time_shift, drawn[1:]), 1):
            x = point
            watch(k, i, x)
        yield k, x


def to_images(codec, x: Tensor) -> np.ndarray:
    """Latents [b,C,h,w] as pixels, uint8 [b,S,S,1 or 3]."""
    pixels = ((codec.decode(x) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def latent_shape(model: nn.Module) -> tuple[int, int, int]:
    return (model.config.in_channels, model.config.input_size, model.config.input_size)


def stream(
    model: nn.Module, codec, config: SampleConfig, labels: Tensor, ids: Tensor, seed: int, null: int,
    advance: Callable[[], object] = lambda: None,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Images uint8 [b,S,S,C] of the classes labels int64 [n], batch after batch in their order.

    ids int64 [n] name the noise: image i depends on (seed, ids[i], labels[i]) and not on its batch or rank. `advance`
    is called after each solver step of each batch. The model is made fast for it, as `fast_velocity` does.
    """
    noise, run = per_sample_noise(seed, latent_shape(model)), fast_velocity(model, ids.device)
    watch = lambda k, i, x: i and advance()
    for _, x in latents(model, config, labels, ids, noise, null, BATCH, watch=watch, run=run):
        yield to_images(codec, x)


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


class Sampler:
    """A model with its codec and class names, loaded once to be sampled from again and again."""

    def __init__(
        self, source: Checkpoint | Path | str, weights: str = "ema", device: torch.device | str = "auto", dtype: str = "auto",
        parameters: Path | None = None,
    ) -> None:  # fmt: skip
        """source: a checkpoint, a path that `open_checkpoint` reads, or the base model's .pkl with its parameters (default: the
        JSON beside it).

        dtype: "fp32" | "bf16" | "auto", what it was trained in where that is fast here (imports: fp32). Raises InputError.
        """
        self.device = device if isinstance(device, torch.device) else choose_device(device)
        self.vae = None
        if str(source).endswith(".pkl"):
            self.checkpoint = None
            self.config, tensors, step, self.vae = base.load_run(Path(source), parameters)
            model, state = DiT(self.config.model), checkpoint.RunState(step)
            model.load_state_dict(tensors)
        else:
            opened = source if isinstance(source, Checkpoint) else checkpoint.open_checkpoint(Path(source))
            self.checkpoint, self.config, state = opened, opened.config, opened.state
            model = opened.load_model(weights, self.device)
        if dtype == "auto":
            native = native_bf16(self.device) and self.config.train.precision != "fp32" and not state.origin
            dtype = "bf16" if native else "fp32"
        attention.check(self.config.model, DTYPES[dtype], self.device, training=False)
        self.dtype, self.step, self.null = dtype, state.step, self.config.model.num_classes
        self.names = state.class_names or (imagenet_names() if self.null == 1000 else None)
        self.model = model.to(self.device, DTYPES[dtype]).eval().requires_grad_(False)
        self.run = fast_velocity(self.model, self.device)

    @functools.cached_property
    def codec(self):
        """Loaded when it is first asked for. On a CPU it decodes in fp32."""
        codec = autoencoder.load(self.config.data, self.config.model, self.config.model.in_channels, self.device, vae=self.vae)
        on_gpu = self.device.type == "cuda"
        return codec.for_decoding(DTYPES[self.dtype if on_gpu else "fp32"])

    def settings(self, **overrides) -> SampleConfig:
        """The run's settings with some replaced. Raises InputError."""
        return SampleConfig(**{**self.config.to_dict()["sample"], **overrides})

    def latents(
        self, config: SampleConfig, labels: list[int], seed: int = 0, per_sample: bool = False, **options
    ) -> Iterator[tuple[int, Tensor]]:
        """`latents` of samples 0 .. n−1 with the noise of a seed."""
        draw = (per_sample_noise if per_sample else one_generator_noise)(seed, latent_shape(self.model))
        places = torch.tensor(labels, device=self.device)
        ids = torch.arange(len(labels), device=self.device)
        return latents(self.model, config, places, ids, draw, self.null, run=self.run, **options)

    def images(self, classes: str, count: int = 1, seed: int = 0, per_sample: bool = False, **overrides) -> np.ndarray:
        """uint8 [n,S,S,1 or 3], `count` of each of the classes ("207,otter"); overrides: of the run's sample settings."""
        config = self.settings(**overrides)
        chosen = parse_classes(classes, self.null, self.names, seed)
        labels = [c for c in chosen for _ in range(count)]
        with progress_bar(-(-len(labels) // BATCH) * config.steps, description=f"{len(labels)} images") as bar:
            advance = lambda k, i, x: i and bar.update()
            batches = self.latents(config, labels, seed, per_sample, watch=advance)
            return np.concatenate([to_images(self.codec, x) for _, x in batches])
