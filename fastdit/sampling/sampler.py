"""From weights to samples: the only way to draw images, of `fastdit sample`, evaluation, validation, previews and Python code.

n samples, B batch size, C/h/w channels, rows and columns of a latent, S height and width of an image.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastdit import attention, autoencoder, checkpoint, files, flow, kernels
from fastdit.autoencoder import Codec
from fastdit.checkpoint import Checkpoint, RunState
from fastdit.config import Config, InputError, SampleConfig
from fastdit.convert import base
from fastdit.data.imagenet import imagenet_names
from fastdit.device import DTYPES, choose_device, native_bf16
from fastdit.distributed import World
from fastdit.flow import Stream
from fastdit.model import DiT
from fastdit.progress import progress_bar, warn
from fastdit.sampling import solvers
from fastdit.sampling.class_names import parse_classes, with_images
from fastdit.sampling.fast import fast_velocity

T = TypeVar("T")
Noise = Callable[[Tensor, int], Tensor]

BATCH = 100  # images per batch; with guidance the model sees twice as many
ONE_PROCESS = World(0, 1, torch.device("cpu"), None)


def batch_size(count: int, world: World) -> int:
    """Return the images per batch of `count` samples: BATCH on one rank; on several at most BATCH, with equal work for all."""
    if world.size == 1:
        return BATCH
    batches_per_rank = -(-count // (world.size * BATCH))
    return -(-count // (world.size * batches_per_rank))


def shares(count: int, world: World, at_once: int) -> Iterator[range]:
    """Yield the batches of samples 0 .. count−1 that this rank computes: batch k, of `at_once` samples, is rank k modulo size's."""
    for first in range(world.rank * at_once, count, world.size * at_once):
        yield range(first, min(first + at_once, count))


def gather(parts: dict[int, T], world: World) -> dict[int, T]:
    """Return on rank 0 the parts of all ranks in the order of their keys, on the others an empty dict. All ranks must call it."""
    everyone: list | None = [parts]
    if world.size > 1:
        everyone = [None] * world.size if world.rank == 0 else None
        dist.gather_object(parts, everyone, group=world.control)
    merged = {key: part for each in everyone or [] for key, part in each.items()}
    return dict(sorted(merged.items()))


def per_sample_noise(seed: int, shape: tuple[int, ...]) -> Noise:
    """Return a function from ids int64 [B] and a number of steps to noise fp32 [1+steps,B,*shape]: of the start, then of each step.

    The noise of a sample depends on (seed, its id, step), not on its batch or rank.
    """

    def draw(ids: Tensor, steps: int) -> Tensor:
        start = kernels.counter_normal(seed, Stream.SAMPLE, ids, shape)
        later = [kernels.counter_normal(seed, Stream.SAMPLE_STEP, ids + (i << 32), shape) for i in range(steps)]
        return torch.stack((start, *later))

    return draw


def one_generator_noise(seed: int, shape: tuple[int, ...]) -> Noise:
    """As `per_sample_noise`, but drawn as the base command does: from one CPU generator, batch after batch, of each batch first the
    start and then each step."""
    generator = torch.Generator().manual_seed(seed)

    def draw(ids: Tensor, steps: int) -> Tensor:
        noise = torch.stack([torch.randn(len(ids), *shape, generator=generator) for _ in range(1 + steps)])
        return noise.pin_memory().to(ids.device, non_blocking=True) if ids.is_cuda else noise

    return draw


class Sampler:
    """A model with its codec and class names, loaded once to draw samples again and again by the fastest path of its device.

    Attributes:
        config: Config of the run.
        model: DiT on `device`; it can be used only for inference.
        dtype: precision of the model, "fp32" or "bf16".
        step: training steps of the weights.
        null: id of the null class, which is the number of classes.
        names: names of the classes, or None.
        counts: training images of classes 0, 1, …, or None if they are unknown.
        source: Checkpoint, or path of the base model's .pkl; None for a model in memory.
        weights: kind of the weights, such as "ema"; None for a model in memory.
        ema_decay: decay of the average; None for raw or imported weights and for a model in memory.
    """

    def __init__(
        self, source: Checkpoint | Path | str, weights: str = "ema", device: torch.device | str = "auto", dtype: str = "auto",
        parameters: Path | None = None, codec: Codec | None = None,
    ) -> None:  # fmt: skip
        """Load the weights of a run, a checkpoint, an exported file or the base model's model_Ns.pkl.

        Args:
            source: opened checkpoint, path as in `checkpoint.open_checkpoint`, or path of a .pkl.
            weights: "ema" | "raw" | a further average of train.ema_more, such as "ema_0.9999".
            device: "auto" (CUDA if there is a GPU) | "cpu" | "cuda", or a torch.device.
            dtype: "fp32" | "bf16" | "auto", the precision of the run if the device has fast matmuls in it (imported weights: fp32).
            parameters: JSON file of a .pkl (default: model_params_Ns.json beside it).
            codec: codec of another sampler of the same run and dtype, which is then not loaded again.

        Raises InputError if the source cannot be read or does not hold these weights.
        """
        if parameters is not None and (isinstance(source, Checkpoint) or not str(source).endswith(".pkl")):
            raise InputError(f"--params {parameters} is for the base model's .pkl: leave it out with another checkpoint")
        device = device if isinstance(device, torch.device) else choose_device(device)
        vae = None
        if not isinstance(source, Checkpoint) and str(source).endswith(".pkl"):
            source = Path(source)
            if weights != "ema":
                raise InputError(f"{source} holds no {weights} weights, only one set of the base model's: leave --weights out")
            config, tensors, step, vae = base.load_run(source, parameters)
            model = DiT(config.model)
            model.load_state_dict(tensors)
            state = RunState(step, origin=source.name)
        else:
            source = source if isinstance(source, Checkpoint) else checkpoint.open_checkpoint(Path(source))
            config = replace(source.config, data=replace(source.config.data, autoencoder=source.autoencoder))
            state = source.state
            model = source.load_model(weights, device)
        if dtype == "auto":
            native = native_bf16(device) and config.train.precision != "fp32" and not state.origin
            dtype = "bf16" if native else "fp32"
        attention.check(config.model, DTYPES[dtype], device, training=False)
        self._hold(model.to(device, DTYPES[dtype]), config)
        self.step = state.step
        self.names = state.class_names or self.names
        self.counts = state.class_counts
        self.source = source
        self.weights = weights
        if not state.origin and weights != "raw":
            self.ema_decay = config.train.ema_decay if weights == "ema" else float(weights.removeprefix("ema_"))
        self._vae = vae
        self._codec = codec

    @classmethod
    def of_model(cls, model: DiT, config: Config, codec: Codec | None) -> "Sampler":
        """Return a sampler of a model in memory, in the model's dtype and on its device.

        model: becomes the sampler's, which may change it in place: it cannot be trained, saved or cast any more.
        codec: decodes as it is set up, because a run that trains also encodes with it; None if only latents are drawn.
        """
        sampler = cls.__new__(cls)
        sampler._hold(model, config)
        sampler._codec = codec
        return sampler

    def _hold(self, model: DiT, config: Config) -> None:
        self.config = config
        self.model = model.eval().requires_grad_(False)
        self.device = model.output.weight.device
        self.dtype = next(name for name, dtype in DTYPES.items() if dtype == model.output.weight.dtype)
        self.null = config.model.num_classes
        self.names = imagenet_names() if self.null == 1000 else None
        self.counts = None
        self.step = 0
        self.source = None
        self.weights = None
        self.ema_decay = None
        self._vae = None
        self._codec = None
        self._fast_velocity = fast_velocity(self.model, self.device)

    @property
    def codec(self) -> Codec:
        """Codec, loaded at the first use. It decodes in `dtype` on CUDA, in fp32 on a CPU.

        Raises InputError if there is no such autoencoder, or if it is not the one that the run was trained with.
        """
        if self._codec is None:
            codec = autoencoder.load(self.config.data, self.config.model, self.config.model.in_channels, self.device, vae=self._vae)
            if isinstance(self.source, Checkpoint):
                autoencoder.check(codec, self.source.state.autoencoder, self.source.path, self.config.data.autoencoder)
            self._codec = codec.for_decoding(DTYPES[self.dtype if self.device.type == "cuda" else "fp32"])
        return self._codec

    @property
    def path(self) -> Path | None:
        """Path of the checkpoint, exported file or .pkl that was opened."""
        return self.source.path if isinstance(self.source, Checkpoint) else self.source

    @functools.cached_property
    def sha256(self) -> str | None:
        """Hash of what was opened: of a checkpoint's manifest, or of the one file."""
        if isinstance(self.source, Checkpoint):
            return self.source.sha256()
        return files.sha256(self.source) if self.source else None

    @property
    def learned(self) -> list[int]:
        """Classes that the model was trained on, as in `class_names.with_images`."""
        return with_images(self.null, self.counts, self.names)

    def settings(self, **overrides) -> SampleConfig:
        """Return the run's sample settings with some replaced. Raises InputError for a bad value."""
        settings = replace(self.config.sample, **overrides)
        if self.config.flow.label_dropout == 0 and (asked := settings.asks_for_guidance()):
            raise InputError(
                f"sample.{asked} needs the null class, which this model does not have: it was trained with flow.label_dropout=0; "
                "leave guidance out"
            )
        settings.check_path_drop(self.config.model)
        return settings

    @torch.no_grad()
    def latents(
        self, labels: Tensor | Sequence[int], seed: int = 0, settings: SampleConfig | None = None, *, per_sample: bool = True,
        at_once: int | None = None, world: World = ONE_PROCESS, skip: Callable[[range], bool] = lambda ids: False,
        watch: Callable[[range, int, Tensor], object] = lambda ids, step, x: None,
    ) -> Iterator[tuple[range, Tensor]]:  # fmt: skip
        """Yield (ids, final latents fp32 [B,C,h,w]) of this rank's batches of samples 0 .. n−1.

        Args:
            labels: classes of the samples, int64 [n].
            seed: seed of the noise.
            settings: sample settings (default: the run's).
            per_sample: noise as in `per_sample_noise`, so that a sample depends on its batch and rank only by rounding; False:
                as in `one_generator_noise`.
            at_once: images per batch (default: `batch_size`).
            world: ranks that share the samples, as in `shares` (default: this process draws all of them).
            skip: function of a batch's ids that is true if the batch need not be computed.
            watch: function called with (ids, 0, start) and (ids, i, x after step i) of each batch.

        Raises FloatingPointError if final latents are not finite, which is read from the device once per batch.
        """
        settings = settings or self.config.sample
        solver = solvers.SOLVERS[settings.solver]
        interval = (settings.guidance_low, settings.guidance_high)
        shape = (self.config.model.in_channels, self.config.model.input_size, self.config.model.input_size)
        noise = (per_sample_noise if per_sample else one_generator_noise)(seed, shape)
        run, prediction = self._fast_velocity or self.model.velocity, self.config.flow.prediction
        predicted = lambda x, t, *classes: flow.velocity(run(x, t, *classes), x, t, prediction)
        at_zero = {} if prediction == "v" else {"at_zero": False}
        labels = torch.as_tensor(labels, device=self.device)
        names = torch.arange(len(labels), device=self.device)
        at_once = at_once or batch_size(len(labels), world)
        mine = set(shares(len(labels), world, at_once))
        for ids in shares(len(labels), ONE_PROCESS, at_once):
            computed = ids in mine and not skip(ids)
            if computed or not per_sample:  # the one generator also draws for batches that others compute
                drawn = noise(names[ids.start : ids.stop], settings.steps if solver.stochastic else 0)
            if not computed:
                continue
            velocity = solvers.guided(
                self.model, labels[ids.start : ids.stop], self.null, settings.guidance, interval, predicted,
                settings.path_drop_guidance,
            )  # fmt: skip
            x = drawn[0]
            watch(ids, 0, x)
            points = solver.solve(velocity, x, settings.steps, settings.time_shift, drawn[1:], **at_zero)
            for i, point in enumerate(points, 1):
                x = point
                watch(ids, i, x)
            if not x.isfinite().all():
                raise self._not_finite(ids, x, labels, settings)
            yield ids, x

    def _not_finite(self, ids: range, x: Tensor, labels: Tensor, settings: SampleConfig) -> FloatingPointError:
        """Return the error of a batch of latents, some of which are not finite."""
        bad = next(i for i, latent in zip(ids, x, strict=True) if not latent.isfinite().all())
        if not all(p.isfinite().all() for p in self.model.parameters()):
            return FloatingPointError("samples are not finite because the weights of the model are not: use an earlier checkpoint")
        fixes = ["less guidance"] * bool(settings.guidance) + ["dtype fp32"] * (self.dtype != "fp32") + ["other weights"]
        return FloatingPointError(
            f"sample {bad} of class {labels[bad]} is not finite after {settings.steps} steps of {settings.solver} with guidance "
            f"{settings.guidance:g} in {self.dtype}: use {' or '.join(fixes)}"
        )

    def decode(self, latents: Tensor) -> np.ndarray:
        """Return the images uint8 [B,S,S,1 or 3] of latents [B,C,h,w]. Raises FloatingPointError if pixels are not finite."""
        pixels = self.codec.decode(latents)
        images = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        if not pixels.isfinite().all():
            bad = [i for i, image in enumerate(pixels) if not image.isfinite().all()]
            raise FloatingPointError(
                f"the autoencoder {self.config.data.autoencoder} decodes image {bad[0]} of a batch of {len(pixels)} to pixels that "
                f"are not finite: use {'dtype fp32' if self.dtype != 'fp32' else 'another autoencoder or less guidance'}"
            )
        return images.cpu().numpy()

    def stream(
        self, labels: Tensor | Sequence[int], seed: int = 0, settings: SampleConfig | None = None, **options
    ) -> Iterator[tuple[range, np.ndarray]]:
        """Yield (ids, images uint8 [B,S,S,1 or 3]) of this rank's batches of samples 0 .. n−1. Arguments as in `latents`."""
        for ids, x in self.latents(labels, seed, settings, **options):
            yield ids, self.decode(x)

    def draw(
        self, labels: Tensor | Sequence[int], seed: int = 0, settings: SampleConfig | None = None, *, world: World = ONE_PROCESS,
        **options,
    ) -> np.ndarray | None:  # fmt: skip
        """Return all images uint8 [n,S,S,1 or 3] on rank 0, None on the others. Arguments as in `latents`.

        All ranks of `world` must call it, and all raise a FloatingPointError of one of them.
        """
        stream = self.stream(labels, seed, settings, world=world, **options)
        batches = gather(world.together(lambda: {ids.start: images for ids, images in stream}), world)
        return np.concatenate(list(batches.values())) if batches else None

    def images(self, classes: str, count: int = 1, seed: int = 0, per_sample: bool = False, **overrides) -> np.ndarray:
        """Return images uint8 [n,S,S,1 or 3], `count` of each class.

        classes: as in `fastdit sample --class`, such as "207,otter"; overrides: values of the run's sample settings. Raises
        InputError for a bad value, FloatingPointError if the images are not finite.
        """
        settings = self.settings(**overrides)
        chosen = parse_classes(classes, self.null, self.names, seed, self.counts, warn)
        labels = [c for c in chosen for _ in range(count)]
        with progress_bar(-(-len(labels) // BATCH) * settings.steps, description=f"{len(labels)} images") as bar:
            advance = lambda ids, step, x: step and bar.update()
            images = self.draw(labels, seed, settings, per_sample=per_sample, watch=advance)
        if images is None:
            raise InputError(f"count {count} must be at least 1")
        return images
