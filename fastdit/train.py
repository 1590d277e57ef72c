"""The training loop: batches in, one engine step each, EMA, log lines, sample grids, checkpoints.

The loop never waits for the device: losses add up there and are read every log_steps; the one host sync of a step is inside
engine.step, where DeepSpeed reads the gradient norm.
"""

import math
from pathlib import Path

import torch
import torch.distributed as dist

from fastdit import autoencoder, checkpoint, engine, flow, kernels, sample
from fastdit.config import Config, InputError
from fastdit.data import builtin
from fastdit.ema import ShardedEma, gather
from fastdit.model import DiT
from fastdit.telemetry import Log, device_name, versions

GRID_CLASSES, GRID_COLUMNS = 10, 8  # of the sample grids during training


def _run_folder(config: Config) -> Path:
    """Make and probe <out>/<name>. Raises InputError when it cannot be written."""
    run = Path(config.train.out) / config.train.name
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "samples").mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the run's folder {run} cannot be made: {error.strerror}: set train.out to a folder you may write"
        ) from error
    sample.check_writable(run / "config.json")
    return run


def _checkpoint_to_resume(config: Config) -> Path | None:
    """The checkpoint that this run continues from. Raises InputError when the one asked for is not there."""
    run, resume = Path(config.train.out) / config.train.name, config.train.resume
    if resume == "auto":
        return checkpoint.find(run)
    if resume == "never":
        if checkpoint.find(run):
            raise InputError(f"train.resume=never would overwrite the checkpoints in {run}: use another train.name, or delete them")
        return None
    found = checkpoint.find(Path(resume))
    if found is None:
        raise InputError(f"train.resume={resume} holds no whole checkpoint: give 'auto', 'never', a run's folder or a checkpoint's")
    return found


def _say_start(log: Log, config: Config, world: engine.World, model: DiT, start: int) -> None:
    train, found = config.train, versions()
    backend = kernels.backend_in_use(world.device)
    log.say(
        f"fastdit {found['fastdit']}: {model.num_parameters / 1e6:.2f} M parameters ({config.model.preset}), {config.data.source}, "
        f"{train.batch_size} images x {train.accumulation} micro-steps x {world.size} ranks, {train.precision}\n"
        f"on {device_name(world.device)}; torch {found['torch']}, deepspeed {found['deepspeed']} ZeRO-{config.zero.stage}, "
        f"kernels: {backend}; from step {start} to {train.total_steps}"
    )


class Preview:
    """Grids of EMA samples during training, from a model copy of its own."""

    def __init__(self, config: Config, world: engine.World) -> None:
        self.config, self.world = config, world
        self.model = DiT(config.model).to(world.device).requires_grad_(False).eval()
        self.shapes = {name: p.shape for name, p in self.model.named_parameters()}
        classes = config.model.num_classes
        rows = torch.linspace(0, classes - 1, min(classes, GRID_CLASSES)).round().long()
        self.labels = rows.repeat_interleave(GRID_COLUMNS).to(world.device)

    def draw(self, ema: ShardedEma, codec, path: Path) -> None:
        """Write the grid to `path`. All ranks must call it."""
        self.model.load_state_dict(gather(ema, self.shapes, self.world))
        images = sample.generate_on_all_ranks(
            self.model, codec, self.config.sample, self.labels, self.config.train.seed, self.config.model.num_classes, self.world
        )
        if self.world.rank == 0:
            sample.save_picture(sample.grid(images, GRID_COLUMNS), path)


def train(config: Config) -> Path:
    """Train to config.train.total_steps, continuing where an earlier run of the same name stopped. Returns the run's folder.

    Raises InputError for bad input, before anything is written.
    """
    resume_from = _checkpoint_to_resume(config)
    world = engine.start()
    state = checkpoint.check(resume_from, config, world) if resume_from else {"step": 0, "wandb_id": None}
    start = state["step"]
    if start >= config.train.total_steps and world.rank == 0:
        print(f"already trained to step {start} in {resume_from}: nothing to do (raise train.total_steps to go on)")
    if start >= config.train.total_steps:
        return Path(config.train.out) / config.train.name
    loader = builtin.load(config, world)
    codec = autoencoder.load(config.data, config.model, loader.channels, world.device)
    torch.manual_seed(config.train.seed)  # the same start on every rank
    model = DiT(config.model)
    run = _run_folder(config)
    if world.rank == 0:
        checkpoint.write_atomically(run / "config.json", config.to_json())
    deepspeed_engine = engine.initialize(model, config, world)
    ema = ShardedEma(engine.fragments(deepspeed_engine, world), config.train.ema_decay)
    loss_sum = torch.zeros((), device=world.device)
    if resume_from:
        checkpoint.load(resume_from, deepspeed_engine, ema, state, loss_sum, world)
    log = Log(run, config, world, start, state["wandb_id"])
    _say_start(log, config, world, model, start)
    _loop(config, world, loader, codec, deepspeed_engine, ema, loss_sum, log, run, start)
    log.close()
    return run


def _loop(config: Config, world, loader, codec, deepspeed_engine, ema, loss_sum, log: Log, run: Path, start: int) -> None:
    settings = config.train
    preview = Preview(config, world) if settings.sample_steps else None
    latent_shape = (codec.channels, codec.size, codec.size)
    for step in range(start, settings.total_steps):
        for micro in range(settings.accumulation):
            images, labels = loader.batch(step, micro)
            ids = flow.sample_ids(step, loader.first_index(micro), settings.batch_size, world.device)
            noise = kernels.counter_normal(settings.seed, flow.Stream.POSTERIOR, ids, latent_shape) if codec.needs_noise else None
            x0 = codec.encode(images, noise)
            loss = flow.losses(deepspeed_engine, config.flow, config.model.num_classes, x0, labels, settings.seed, ids).mean()
            lr = deepspeed_engine.get_lr()[0]  # of this step: engine.step moves the schedule on
            deepspeed_engine.backward(loss)
            deepspeed_engine.step()
            loss_sum += loss.detach()
        done = step + 1
        if done % settings.ema_every == 0:
            ema.update()
        log.advance()
        last = done == settings.total_steps
        if done % settings.log_steps == 0 or last:
            _write_log_line(config, world, deepspeed_engine, loss_sum, log, done, epoch=done / loader.steps_per_epoch, lr=lr)
        with log.pause():
            if preview and (done % settings.sample_steps == 0 or last):
                picture = run / "samples" / f"{checkpoint.folder_name(done)}.png"
                preview.draw(ema, codec, picture)
                log.picture(done, picture)
            if done % settings.save_steps == 0 or last:
                state = {"step": done, "wandb_id": log.wandb_id, "versions": versions()}
                checkpoint.save(run / "checkpoints", deepspeed_engine, ema, config, state, loss_sum, world)


def _write_log_line(config: Config, world, deepspeed_engine, loss_sum, log: Log, done: int, epoch: float, lr: float) -> None:
    """Read the device's loss sum, write the line, start the next sum. Raises FloatingPointError when the loss is not finite."""
    settings = config.train
    dist.all_reduce(loss_sum)
    steps = done % settings.log_steps or settings.log_steps
    loss = loss_sum.item() / (steps * settings.accumulation * world.size)
    loss_sum.zero_()
    norm = float(deepspeed_engine.get_global_grad_norm())
    log.write(done, epoch=round(epoch, 4), loss=loss, lr=lr, grad_norm=norm)
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the mean loss of steps {done - steps + 1} to {done} is {loss}: the last good checkpoint stays in "
            f"{Path(settings.out) / settings.name}; lower train.lr or raise train.warmup_steps"
        )
