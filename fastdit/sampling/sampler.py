"""From a model to pictures: samples of given classes, on one rank or shared by all, and the grid they are shown in."""

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from fastdit import attention, autoencoder, checkpoint, kernels
from fastdit.config import InputError, SampleConfig, nearest
from fastdit.convert import base
from fastdit.data.imagenet import imagenet_names
from fastdit.flow import Stream
from fastdit.graphs import Recorded, graph_pool, warm_up
from fastdit.model import DTYPES, QK_EPS, Block, DiT, native_bf16
from fastdit.sampling import solvers
from fastdit.training.engine import World
from fastdit.training.telemetry import progress_bar

BATCH = 100  # images a batch; twice that with guidance
GRAPHS = 4  # CUDA graphs kept: with and without guidance, of a full and of the last batch

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


class Graphs:
    """model.velocity as CUDA graphs, one per batch size: a replay costs one launch instead of hundreds.

    All graphs allocate from one memory pool. That is safe because replays follow each other on one stream and each output is
    copied before the next replay.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.pool = graph_pool(torch.device("cuda"))
        self.captured: dict[int, tuple] = {}  # by batch size, the least recently used first

    def __call__(self, x: Tensor, t: Tensor, classes: Tensor, rows: Tensor) -> Tensor:
        """DiT.velocity: x fp32 [B,C,h,w], t fp32 [], classes [U,H] with U <= B, rows int64 [B]. Returns [B,C,h,w]."""
        batch = len(x)
        if batch not in self.captured:
            if len(self.captured) == GRAPHS:
                del self.captured[next(iter(self.captured))]
            # U differs from batch to batch where classes are random: the buffer has room for B, and rows never points past U
            self.captured[batch] = self._capture(x.clone(), t.clone(), classes.new_zeros(batch, classes.shape[1]), rows.clone())
        recorded, static = self.captured[batch] = self.captured.pop(batch)
        for buffer, tensor in zip(static, (x, t, classes, rows), strict=True):
            (buffer[: len(tensor)] if tensor.ndim else buffer).copy_(tensor)
        recorded.replay()
        return recorded.results[0].clone()

    def _capture(self, *static: Tensor) -> tuple[Recorded, tuple[Tensor, ...]]:
        work = lambda: [self.model.velocity(*static)]
        warm_up(work)
        return Recorded(work, self.pool), static


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


def grid(images: np.ndarray, columns: int, gap: int = 2) -> Image.Image:
    """Images uint8 [n,S,S,1 or 3] as one picture, `columns` a row, on white with `gap` pixels between."""
    n, size, _, channels = images.shape
    rows = -(-n // columns)
    step = size + gap
    sheet = np.full((rows * step + gap, columns * step + gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + i // columns * step, gap + i % columns * step
        sheet[y : y + size, x : x + size] = image
    return Image.fromarray(sheet if channels == 3 else sheet[..., 0])


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all."""
    with checkpoint.replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def save_animation(frames: list[Image.Image], path: Path, fps: float) -> None:
    """Write a GIF or WebP, by the suffix, that shows the last frame for a second and begins again."""
    durations = [1000 / fps] * (len(frames) - 1) + [max(1000, 1000 / fps)]
    with checkpoint.replacing(path) as temporary:
        frames[0].save(
            temporary, format=path.suffix[1:], save_all=True, append_images=frames[1:], duration=[round(d) for d in durations],
            loop=0, lossless=True,
        )  # fmt: skip


def _class_of_name(name: str, names: list[str]) -> int:
    """The class one of whose names (ImageNet's have several, "tench, Tinca tinca") is `name`. Raises InputError."""
    ids: dict[str, list[int]] = {}
    for i, synonyms in enumerate(names):
        for synonym in synonyms.lower().split(", "):
            ids.setdefault(synonym, []).append(i)
    found = ids.get(name.lower(), [])
    if len(found) != 1:
        fix = f"it names classes {' and '.join(map(str, found))}: give the id" if found else nearest(name.lower(), list(ids))
        raise InputError(f"--class {name!r} is not one class of this model: {fix}")
    return found[0]


def parse_classes(text: str, num_classes: int, names: list[str] | None = None, seed: int = 0) -> list[int]:
    """ "3", "207,360", "golden retriever,otter", "all" or "-1" (a random class, drawn from the seed) as class ids.

    names: of the classes, where they are known. Raises InputError for anything else or an id out of range.
    """
    if text == "all":
        return list(range(num_classes))
    classes = []
    for i, part in enumerate(map(str.strip, text.split(","))):
        if part == "-1":
            u = kernels.counter_uniform(seed, Stream.SAMPLE_CLASS, torch.tensor([i]), ()).item()
            classes.append(int(u * num_classes))
        elif part.lstrip("-").isdecimal():
            if not 0 <= int(part) < num_classes:
                raise InputError(
                    f"--class {part} is out of range: this model's classes are 0 to {num_classes - 1}, and -1 a random one"
                )
            classes.append(int(part))
        elif names:
            classes.append(_class_of_name(part, names))
        else:
            raise InputError(f"--class {text!r} must be 'all' or class ids such as 3 or 207,360")
    return classes


def check_writable(path: Path) -> None:
    """Raise InputError unless a file can be written at `path`."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the name of a file in it")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}: choose another place") from error


def choose_device(name: str) -> torch.device:
    """auto (CUDA when there is one) | cpu | cuda, or the base command's gpu. Raises InputError when there is none."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(f"--device {name}: PyTorch sees no GPU here: use --device cpu")
    return torch.device("cuda")


class PackedBlock(nn.Module):
    """A Block that is only sampled from, by `kernels.dit_block` and with weights packed for it."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        attention, mlp = block.attention, block.mlp
        self.heads = attention.heads
        self.weights = kernels.pack_dit_block(
            kernels.BlockWeights(
                attention.qkv.weight, attention.q_weight, attention.k_weight, attention.out.weight,
                mlp.up.weight, mlp.up.bias, mlp.down.weight, mlp.down.bias,
            )
        )  # fmt: skip

    def forward(
        self, x: Tensor, y: Tensor, modulation: tuple[Tensor, ...], cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return kernels.dit_block(x, y, modulation, self.weights, cos, sin, self.heads, QK_EPS)


class PackedLinear(nn.Module):
    """A Linear that is only sampled from, on a CPU: weights in oneDNN's own order, faster where they are large and rows are few."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight, 8), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def _refuse_state(*_) -> None:
    raise RuntimeError("a model that fast_velocity has packed holds no weights to save: load it again")


@torch.no_grad()
def fast_velocity(model: DiT, device: torch.device) -> Callable | None:
    """Makes a model, that is to be sampled from alone, fast, and returns what samplers.guided may call in place of model.velocity.

    On CUDA: CUDA graphs. Blocks are not compiled: Inductor finds nothing to fuse in their forward pass, which is matmuls, attention
    and library ops, and each batch size would be compiled anew. On a CPU with AMX, in bf16: packed blocks, and nothing to call; the
    model can then not be saved, copied, cast or trained.
    """
    if device.type == "cuda":
        return Graphs(model)
    config, bf16 = model.config, model.output.weight.dtype == torch.bfloat16
    fits = kernels.dit_block_fits((config.input_size // config.patch_size) ** 2, config.width, config.heads, config.hidden)
    plain = config.qk_norm != "full_width" and config.attention == "auto" and not isinstance(model.blocks[0], PackedBlock)
    if bf16 and fits and plain and native_bf16(device) and kernels.dit_block_is_fast(device):
        model.register_state_dict_pre_hook(_refuse_state)
        for i, block in enumerate(model.blocks):
            model.blocks[i] = PackedBlock(block)
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    setattr(parent, name, PackedLinear(child))
    return None


class Sampler:
    """A model with its codec and class names, loaded once to be sampled from again and again."""

    def __init__(
        self, path: Path | str, weights: str = "ema", device: torch.device | str = "auto", dtype: str = "auto",
        parameters: Path | None = None,
    ) -> None:  # fmt: skip
        """path: what checkpoint.load_model reads, or the base model's .pkl with its parameters (default: beside it).

        dtype: "fp32" | "bf16" | "auto", what it was trained in where that is fast here (imports: fp32). Raises InputError.
        """
        path = Path(path)
        self.device = device if isinstance(device, torch.device) else choose_device(device)
        self.vae = None
        if path.suffix == ".pkl":
            self.config, tensors, step, self.vae = base.load_run(path, parameters)
            model, state = DiT(self.config.model), {"step": step}
            model.load_state_dict(tensors)
        else:
            model, self.config, state = checkpoint.load_model(path, weights, self.device)
        if dtype == "auto":
            native = native_bf16(self.device) and self.config.train.precision != "fp32" and "origin" not in state
            dtype = "bf16" if native else "fp32"
        attention.check(self.config.model, DTYPES[dtype], self.device, training=False)
        self.dtype, self.step, self.null = dtype, state["step"], self.config.model.num_classes
        self.names = state.get("class_names") or (imagenet_names() if self.null == 1000 else None)
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
