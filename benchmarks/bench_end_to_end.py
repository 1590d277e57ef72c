"""From JPEGs to the optimizer's step at S/2, 256 pixels: the base script's loop, and `fastdit train` on images and cached latents.

eager: Pillow in threads, the fp32 autoencoder in every step, the eager train step, the loss read on the host. fastdit: its own loop
with the EMA, on an index (DALI, the fp32 autoencoder in every step) and on latents of `fastdit encode`. All use the same images,
timesteps, noise and label dropout; `parity` of the losses includes the different resampling of the images and the latents'
precision. One row is the cost of one more image in the cache; its mirror image is encoded with it and not counted.
"""

import functools
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks import eager_reference, fixtures
from benchmarks.bench_train_step import CASES, LR, PARITY, WEIGHT_DECAY, difference, matmul_of
from benchmarks.eager_reference import comparable, eager_model
from benchmarks.harness import DEVICE, PRECISION, THREADS, Group, Result, Worker, quantiles, speedup, start, take_turns, timed
from benchmarks.roofline import shares, train_flops
from fastdit import distributed, flow, kernels
from fastdit.checkpoint import RunState
from fastdit.config import Config, DataConfig, TrainConfig
from fastdit.data.encode import encode
from fastdit.data.index import open_index
from fastdit.data.order import Order
from fastdit.model import DiT
from fastdit.training import engine
from fastdit.training.loop import Trainer, open_data

SUITE = "end_to_end"
PIXELS = 256
SHAPE = CASES["S/2"][0]
CACHE = "make the cache"


def settings(folder: Path, source: Path, batch: int, steps: int) -> Config:
    """Return the config of a run as the base script trains: constant rate, no warm-up, no clipping, no mirror images."""
    train = TrainConfig(
        out=str(folder), name=source.name, batch_size=batch, lr=LR, weight_decay=WEIGHT_DECAY, beta2=0.999, clip=0.0,
        schedule="constant", warmup_steps=0, total_steps=steps, sample_steps=0, log_steps=steps,
    )  # fmt: skip
    return Config(
        model=comparable(*SHAPE), train=train,
        data=DataConfig(source=str(source), image_size=PIXELS, autoencoder=str(folder / "autoencoder")),
    )  # fmt: skip


def eager(folder: Path, batch: int, steps: int) -> Callable[[int], float]:
    """Return the base script's loop as a function of the step to its loss."""
    from diffusers import AutoencoderKL

    config = settings(folder, folder / "images.index", batch, steps)
    index, seed = open_index(Path(config.data.source)), config.train.seed
    rows = index.rows("train")
    order = Order(len(rows), config, distributed.World(0, 1, DEVICE, None))
    torch.manual_seed(seed)  # the weights that Trainer starts from
    model = eager_model(DiT(config.model)).to(DEVICE)
    vae = AutoencoderKL.from_pretrained(config.data.autoencoder).requires_grad_(False).eval().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY)
    null, pool = config.model.num_classes, ThreadPoolExecutor(THREADS)

    def step(step: int) -> float:
        chosen, _ = order.images(step, 0)
        read = lambda i: eager_reference.pixels(index.read(rows[i]), PIXELS, PIXELS)
        pixels = torch.stack(list(pool.map(read, chosen))).to(DEVICE)
        labels = torch.tensor([int(rows[i]["label"]) for i in chosen], device=DEVICE)
        ids = flow.sample_ids(step, 0, batch, DEVICE)
        draw = lambda stream: kernels.counter_normal(seed, stream, ids, (4, 32, 32))
        x0 = eager_reference.encode(vae, pixels, draw(flow.Stream.POSTERIOR))
        t, labels = flow.sample_timesteps(config.flow, seed, ids), flow.drop_labels(config.flow, seed, ids, labels, null)
        return eager_reference.train_step(model, optimizer, x0, labels, t, draw(flow.Stream.NOISE), PRECISION)

    return step


def fastdit(folder: Path, source: str, batch: int, steps: int) -> Callable[[int], torch.Tensor]:
    """Return the loop of `fastdit train` as a function of the step to its loss."""
    world = distributed.start(DEVICE.type)
    config = engine.settle(settings(folder, folder / source, batch, steps), world.device)
    _, loader, codec = open_data(config, world)
    run = folder / "runs" / source
    run.mkdir(parents=True)
    trainer = Trainer(config, world, loader, codec, run, None, RunState())

    def step(step: int) -> torch.Tensor:
        trainer.step(step)
        return trainer.step_sums[0] / batch

    return step


def provider(name: str, folder: Path, batch: int, steps: int) -> Callable[[int, int], tuple]:
    """In a worker: return a function of (first step, number of steps) to their losses and the seconds per step."""
    step = {
        "eager": lambda: eager(folder, batch, steps), "from images": lambda: fastdit(folder, "images.index", batch, steps),
        "from latents": lambda: fastdit(folder, "latents", batch, steps),
    }[name]()  # fmt: skip

    def run(first: int, count: int) -> tuple[list[float], float]:
        losses, wall, _ = timed(lambda: [step(k) for k in range(first, first + count)])
        return [float(loss) for loss in losses], wall / count

    return run


def cache_maker(folder: Path, batch: int) -> Callable[[], float]:
    """In a worker: return a function that makes the latents and returns seconds per image, without the time to start, load and
    compile: the difference to a set of one batch."""

    def encode_all(index: Path, out: str) -> float:
        work = lambda: encode(index, folder / out, str(folder / "autoencoder"), PIXELS, batch_size=batch, device=DEVICE.type)
        return timed(work, wait=False).wall

    def make() -> float:
        few, full = folder / "few/images.index", folder / "images.index"
        first = encode_all(few, "few/latents")
        more = len(open_index(full).rows("train")) - len(open_index(few).rows("train"))
        return (encode_all(full, "latents") - first) / more

    return make


def measure(batch: int, count: int, names: tuple[str, ...], turn: int, turns: int, say: Callable) -> dict[str, Result]:
    """Measure the group. count: images in the data set; turn: steps per turn; turns: timed turns, after one that is not timed."""
    steps = turn * (1 + turns)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        say(f"{count} images")
        fixtures.archive(folder, count)
        (folder / "few").mkdir()
        fixtures.archive(folder / "few", batch)
        fixtures.autoencoder().save_pretrained(folder / "autoencoder")
        make = functools.partial(Worker, "benchmarks.bench_end_to_end:cache_maker", folder, batch)
        maker, errors = start({CACHE: make}, say)
        say(CACHE)
        cache, failed = take_turns({CACHE: lambda _: maker[CACHE]()} if maker else {}, 1, say)
        errors |= failed
        make = functools.partial(Worker, "benchmarks.bench_end_to_end:provider")
        makers = {name: functools.partial(make, name, folder, batch, steps, allocator=name != "eager") for name in names}
        workers, failed = start(makers, say)
        errors |= failed
        calls = {name: lambda k, w=w: w(k * turn, turn) for name, w in workers.items()}
        limits = Worker("benchmarks.roofline:Limits", matmul_of("S/2"))
        taken, failed = take_turns({"limits": lambda _: limits(), **calls}, 1 + turns, say)
        errors |= failed
        peaks = {name: w.peak_memory() for name, w in workers.items() if name not in errors}
        for worker in (limits, *maker.values(), *workers.values()):
            worker.stop()
    results = rows(batch, steps, names, taken, peaks, errors)
    made = cache.get(CACHE, [])
    values = {"images_per_s": f"{1 / made[0]:.4g}"} if made else {}
    return results | {CACHE: Result(key(CACHE, batch), made, values, errors.get(CACHE, ""))}


def key(name: str, batch: int) -> dict[str, str]:
    return {"case": "S/2 and SD-VAE", "provider": name, "size": f"batch {batch}"}


def rows(
    batch: int, steps: int, names: tuple[str, ...], taken: dict[str, list], peaks: dict[str, int], errors: dict[str, str]
) -> dict[str, Result]:
    """Return the results of the providers that train. taken: their turns, the first not timed, and those of the limits."""
    losses = {name: [x for turn in taken[name] for x in turn[0]] for name in peaks}
    parity = {name: difference(mine, losses.get("eager", [])) for name, mine in losses.items()}
    errors = errors | {n: f"parity: the losses differ by {p:.1e}, more than {PARITY}" for n, p in parity.items() if not p <= PARITY}
    samples = {name: [] if name in errors else [turn[1] for turn in taken[name][1:]] for name in names}
    rates = tuple(statistics.median(turn[k] for turn in taken["limits"]) for k in (0, 1))
    model, results = DiT(comparable(*SHAPE)), {}
    for name in names:
        values = {}
        if samples[name]:
            median = quantiles(samples[name])[0]
            mfu, share = shares(model, batch, median, rates)
            values = {
                "images_per_s": f"{batch / median:.4g}", **speedup(samples["eager"], samples[name]),
                "mfu": f"{mfu:.3f}",  # the autoencoder's FLOPs are not the model's
                "bound_share": f"{share:.3f}", "parity": f"{parity[name]:.1e}", "parity_steps": steps,
                "peak_mb": f"{peaks[name] / 1e6:.0f}", "gflop_per_image": f"{train_flops(model.config) / 1e9:.2f}",
                "gemm_gflops": f"{rates[0] / 1e9:.1f}", "copy_gb_s": f"{rates[1] / 1e9:.1f}",
            }  # fmt: skip
        results[name] = Result(key(name, batch), samples[name], values, errors.get(name, ""))
    return results


def groups(full: bool) -> dict[str, Group]:
    cuda = DEVICE.type == "cuda"
    names = ("eager", "from images", "from latents") if full or cuda else ("eager", "from latents")
    batch, count, turn, turns = (32, 512, 4, 9 if full else 4) if cuda else (2, 16, 2, 9) if full else (2, 6, 1, 3)
    return {"S/2": Group((*names, CACHE), functools.partial(measure, batch, count, names, turn, turns))}


def test_end_to_end(replay, group, member) -> None:
    replay(group, member)
