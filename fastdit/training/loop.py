"""The training loop: batches in, one engine step each, EMA, log lines, sample grids, checkpoints.

The loop never waits for the device: losses add up there and are read every log_steps. Whether a step was taken is asked before the
optimizer's next one, when the device has long known it; with ZeRO, engine.step reads the gradient's norm and the overflow flag.
"""

import faulthandler
import fcntl
import math
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from fastdit import autoencoder, checkpoint, data, device, distributed, files, flow, kernels
from fastdit.autoencoder import Codec
from fastdit.checkpoint import Checkpoint, RunState
from fastdit.config import Config, InputError, Stopped, TrainConfig
from fastdit.data import Loader
from fastdit.device import DTYPES, native_bf16
from fastdit.graphs import release_recorded
from fastdit.model import DiT
from fastdit.sampling import pictures, sampler
from fastdit.training import engine, saver, telemetry
from fastdit.training.ema import ShardedEma, gather
from fastdit.training.validation import Validation

GRID_CLASSES, GRID_COLUMNS = 10, 8  # of the sample grids during training


def _checkpoint_to_resume(config: Config, world: distributed.World) -> tuple[Checkpoint | None, RunState]:
    """The checkpoint that this run continues from, and its state; a fresh state when there is none.

    The run's own newest one comes first, so that the same command continues a run that began from another's checkpoint.
    Raises InputError when the one asked for is not there or does not fit.
    """
    run, resume = Path(config.train.out) / config.train.name, config.train.resume
    found = checkpoint.find(run)
    if found and resume == "never":
        raise InputError(f"train.resume=never would overwrite the checkpoints in {run}: use another train.name, or delete them")
    if not found and resume not in ("auto", "never"):
        found = checkpoint.find(Path(resume))
        if found is None:
            raise InputError(
                f"train.resume={resume} holds no whole checkpoint: give 'auto', 'never', a run's folder or a checkpoint's"
            )
    if not found:
        return None, RunState()
    saver.check(found, config, world)
    wandb_id = found.state.wandb_id if found.path.is_relative_to(run) else None  # not another run's
    return found, replace(found.state, wandb_id=wandb_id)


def open_data(config: Config, world: distributed.World) -> tuple[Path | None, Loader, Codec]:
    """Where a run's data lie, their loader, and the codec that makes latents of them. Raises InputError on all ranks."""
    place = world.together(lambda: data.locate(config), everywhere=False)
    loader = world.together(lambda: data.load(config, place, world))
    codec = world.together(lambda: autoencoder.load(config.data, config.model, loader.channels, world.device, loader.manifest))
    if world.device.type == "cuda":
        codec = codec.for_encoding(DTYPES[config.train.precision])
    return place, loader, codec


def _lock_run_folder(run: Path) -> TextIO:
    """Make a run's folder and lock it, until the returned file is closed or the process ends, however it ends.

    Raises InputError when it cannot be written or another process trains in it.
    """
    try:
        for folder in (run / "checkpoints", run / "samples"):
            folder.mkdir(parents=True, exist_ok=True)
        lock = (run / ".lock").open("w")
    except OSError as error:
        reason = f"{error.strerror}: set train.out to a folder you may write"
        raise InputError(f"the run's folder {run} cannot be made: {reason}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError(f"another process trains in {run}: wait for it, or use another train.name") from error
    return lock


def train(config: Config) -> Path:
    """Train to config.train.total_steps, continuing where an earlier run of the same name stopped. Returns the run's folder.

    Raises InputError for bad input, on all ranks and before anything is written; FloatingPointError when the loss or the
    weights are not finite any more; Stopped after SIGTERM, when all is saved.
    """
    with engine.deterministic(config.train.deterministic):
        return _train(config)


def _train(config: Config) -> Path:
    faulthandler.register(signal.SIGUSR1, sys.__stderr__)  # kill -USR1 prints where a run hangs
    world = distributed.start(config.train.device)
    config = engine.settle(config, world.device)
    device.check_backend(world.device)
    resume_from, state = world.together(lambda: _checkpoint_to_resume(config, world), everywhere=False)
    if resume_from and state.step >= config.train.total_steps:
        if world.rank == 0:
            print(f"already trained to step {state.step} in {resume_from.path}: nothing to do (raise train.total_steps to go on)")
        return resume_from.path.parent.parent
    world.together(lambda: telemetry.check_wandb(config))
    place, loader, codec = open_data(config, world)
    run = Path(config.train.out) / config.train.name
    validation = Validation(config, place, codec, run, world) if config.validate.steps else None
    lock = world.together(lambda: _lock_run_folder(run) if world.rank == 0 else None)
    Trainer(config, world, loader, codec, run, resume_from, state, validation).loop()
    if world.rank == 0:
        telemetry.plot(run)
    if lock:
        lock.close()
    return run


class Trainer:
    """All that one run holds, and its loop."""

    def __init__(
        self, config: Config, world: distributed.World, loader: Loader, codec: Codec, run: Path,
        resume_from: Checkpoint | None, state: RunState, validation: Validation | None = None,
    ) -> None:  # fmt: skip
        """state: of `resume_from`, the checkpoint to continue from, or a fresh one."""
        self.config, self.world, self.loader, self.codec, self.run = config, world, loader, codec, run
        self.validation = validation
        torch.manual_seed(config.train.seed)  # the same start on every rank
        model = DiT(config.model)
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        if resume_from:
            model.load_state_dict(resume_from.shards().whole("raw", self.shapes))
        self.engine = engine.initialize(model, config, world)
        self.ema = ShardedEma(
            engine.fragments(self.engine, world), config.train.ema_decay, *config.train.ema_more,
            optimizer=engine.one_rank_optimizer(self.engine),
        )  # fmt: skip
        size = 1 + 2 * telemetry.TIME_BINS + len(flow.logged_parts())  # see telemetry.loss_sums
        self.sums = torch.zeros(size, device=world.device)  # of the steps since the last log line
        self.step_sums = torch.zeros(size, device=world.device)  # of this step
        self.start, self.summed_steps = state.step, state.summed_steps
        self.clock, self.saver = telemetry.StepClock(world.device), saver.Saver(run / "checkpoints", config, world)
        self.told_to_stop = self.stop = 0.0  # this rank by a signal; all ranks, as agreed
        self.skipped = self.skipped_in_a_row = 0  # since the last log line; up to now
        self.unsettled: int | None = None  # the last step, while it is not known here whether it was taken
        self.lr = 0.0  # of the last step
        if resume_from:
            saver.load(resume_from, self.engine, self.ema, self.sums, config, world)
        self.log = world.together(lambda: telemetry.Log(run, config, world, self.start, state.wandb_id))
        if world.rank == 0:
            files.write_atomically(run / "config.json", config.to_json())
        self._say_start(model)

    def _say_start(self, model: DiT) -> None:
        train, found = self.config.train, device.versions()
        compiled = engine.COMPILED[engine.compiles(self.config, self.world)]
        backend = kernels.backend_in_use(self.world.device)
        sharding = f"ZeRO-{self.config.zero.stage}" if engine.shards(self.config, self.world.size) else "nothing to shard"
        self.log.say(
            f"fastdit {found['fastdit']}: {model.num_parameters / 1e6:.2f} M parameters ({self.config.model.preset}), "
            f"{self.config.data.source}, {train.batch_size} images x {train.accumulation} micro-steps x {self.world.size} ranks\n"
            f"on {device.device_name(self.world.device)}; torch {found['torch']}, deepspeed {found['deepspeed']}, "
            f"{sharding}, {train.precision}, {compiled}, {backend} kernels; "
            f"from step {self.start} to {train.total_steps}"
        )
        if train.precision == "bf16" and not native_bf16(self.world.device):
            self.log.say("warning: bf16 matmuls are emulated on this device, and far slower than with train.precision=fp32")

    def loop(self) -> None:
        """Train to the end, or to the first log line after SIGTERM (a cluster's preemption), which saves and ends the run."""
        settings = self.config.train
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "told_to_stop", 1.0))
        try:
            with telemetry.profiler(self.config, self.run, self.start, self.world.rank) or nullcontext() as profiler:
                self._loop(settings, profiler)
        finally:
            faulthandler.cancel_dump_traceback_later()
            signal.signal(signal.SIGTERM, before)
            self.log.close()

    def _loop(self, settings: TrainConfig, profiler: torch.profiler.profile | None) -> None:
        for step in range(self.start, settings.total_steps):
            faulthandler.dump_traceback_later(settings.timeout_s, exit=True, file=sys.__stderr__)  # unless it is set again by then
            done, last = step + 1, step + 1 == settings.total_steps
            self.step(step)
            self.log.advance()
            if profiler:
                profiler.step()
            if done % settings.log_steps == 0 or last:
                self._write_log_line(done)
            faulthandler.cancel_dump_traceback_later()
            with self.log.pause():
                if settings.sample_steps and (done % settings.sample_steps == 0 or last):
                    self._draw(done)
                if self.validation:
                    self.validation.step(done, last, self._averaged_model, self.log)
                if done % settings.save_steps == 0 or last or self.stop:
                    self._save(done)
            if self.stop and not last:
                raise Stopped(f"told to stop by SIGTERM: saved step {done}, the same command continues")

    def step(self, step: int) -> None:
        """One optimizer step: `accumulation` micro-steps on this rank's share of the global batch, and the averages.

        Where a loss or a gradient of any rank is not finite, it is taken on none. One rank knows that when it is settled.
        """
        settings, codec = self.config.train, self.codec
        self.step_sums.zero_()
        for micro in range(settings.accumulation):
            with self.clock.phase("data_wait", on_host=True):
                batch, labels = self.loader.batch(step, micro)
            ids = flow.sample_ids(step, self.loader.order.first_index(micro), settings.batch_size, self.world.device)
            noise = None
            if codec.needs_noise:
                shape = (codec.channels, codec.size, codec.size)
                noise = kernels.counter_normal(settings.seed, flow.Stream.POSTERIOR, ids, shape)
            with self.clock.phase("forward_backward"):
                moments = batch if self.loader.manifest else codec.encode(batch)
                x0 = codec.posterior_sample(moments, noise)
                null = self.config.model.num_classes
                losses = flow.losses(self.engine, x0, labels, ids, self.config.flow, seed=settings.seed, null=null)
                self.engine.backward(losses.total.mean())
                with torch.no_grad():
                    self.step_sums += telemetry.loss_sums(losses)
            if micro + 1 == settings.accumulation:
                self._settle()  # the step before, on which this one's number and learning rate depend
                self.lr = self.engine.get_lr()[0]
                if (step + 1) % settings.ema_every == 0:
                    self.ema.announce()
            with self.clock.phase("optimizer"):
                self.engine.step()
        engine.add_if_taken(self.engine, self.sums, self.step_sums)
        self.unsettled = step
        if not engine.one_rank_optimizer(self.engine):
            self._settle()

    def _settle(self) -> None:
        """Count the last step, and average its weights, if it was taken; else log it. Nothing where that was done before."""
        step, self.unsettled = self.unsettled, None
        if step is None:
            return
        if not engine.settle_step(self.engine):
            self._note_skipped(step)
            return
        self.summed_steps += 1
        self.skipped_in_a_row = 0
        if (step + 1) % self.config.train.ema_every == 0:
            with self.clock.phase("ema"):
                self.ema.update()

    def _note_skipped(self, step: int) -> None:
        """Count and log a step that was not taken, with its images; raises FloatingPointError when there were too many in a row."""
        settings = self.config.train
        self.skipped += 1
        self.skipped_in_a_row += 1
        mine = [int(i) for micro in range(settings.accumulation) for i in self.loader.order.images(step, micro)[0]]
        images: list = [None] * self.world.size
        dist.all_gather_object(images, mine, group=self.world.control)
        self.log.event({"step": step + 1, "skipped_in_a_row": self.skipped_in_a_row, "images_of_ranks": images})
        self.log.say(f"step {step + 1}: the loss or a gradient is not finite: skipped, {self.skipped_in_a_row} in a row")
        if self.skipped_in_a_row > settings.max_skipped_steps:
            raise self._diverged(f"{self.skipped_in_a_row} steps in a row, up to step {step + 1}, were not finite")

    def _write_log_line(self, done: int) -> None:
        """Read the device's sums of losses, write the line, start the next sums. Here the ranks agree to stop, too."""
        self._settle()
        sums = torch.cat([self.sums, torch.full_like(self.sums[:1], self.told_to_stop)])
        dist.all_reduce(sums)
        total, *rest, self.stop = sums.tolist()
        bins = telemetry.TIME_BINS
        bin_sums, bin_counts, part_sums = rest[:bins], rest[bins : 2 * bins], rest[2 * bins :]
        samples = self.summed_steps * self.loader.order.global_batch
        loss = total / samples if samples else None  # None: all were skipped
        by_t = [round(s / n, 6) if n else None for s, n in zip(bin_sums, bin_counts, strict=True)]
        parts = zip(flow.logged_parts(), part_sums, strict=True)
        part_losses = {f"loss_{name}": part / samples if samples else None for name, part in parts}
        seconds = self.clock.read()
        slowest = torch.tensor(list(seconds.values()), device=self.world.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        seconds = {f"{phase}_s": round(s, 3) for phase, s in zip(seconds, slowest.tolist(), strict=True)}
        norm = engine.gradient_norm(self.engine) if samples else math.nan
        self.log.write(
            done, epoch=round(done / self.loader.order.steps_per_epoch, 4), loss=loss, lr=self.lr,
            grad_norm=norm if math.isfinite(norm) else None,  # the last step was skipped
            skipped=self.skipped, loss_by_t=by_t, **part_losses, **seconds,
            peak_memory_gb=round(device.peak_memory(self.world.device) / 1e9, 3),
        )  # fmt: skip
        if loss is not None and not math.isfinite(loss):
            raise self._diverged(f"the mean loss of steps {done - self.summed_steps + 1} to {done} is {loss}")
        self.sums.zero_()
        self.summed_steps = self.skipped = 0

    def _diverged(self, what: str) -> FloatingPointError:
        self._finish_save(required=False)
        found = checkpoint.find(self.run)
        kept = f"the last good checkpoint is {found.path}" if found else "there is no checkpoint yet"
        return FloatingPointError(f"{what}: stopped, {kept}; lower train.lr and run the same command again")

    def _save(self, done: int) -> None:
        """Begin to write a checkpoint; the last one of a run is written on return. Raises FloatingPointError rather than replace
        good ones by weights that are not finite."""
        self._settle()
        masters = (f.master.isfinite().all().to(self.world.device) for f in self.ema.fragments)  # with offload they are on the host
        finite = torch.stack([self.sums[0].isfinite(), *masters]).all().int()
        dist.all_reduce(finite, dist.ReduceOp.MIN)
        if not finite.item():
            raise self._diverged(f"the loss or the weights at step {done} are not finite")
        state = RunState(
            done, summed_steps=self.summed_steps, wandb_id=self.log.wandb_id, versions=device.versions(),
            class_names=self.loader.class_names,
        )  # fmt: skip
        self._finish_save(required=False)
        self.saver.save(self.engine, self.ema, state, self.sums)
        if self.stop or done == self.config.train.total_steps:
            self._finish_save(required=True)

    def _finish_save(self, required: bool) -> None:
        """Wait for the checkpoint that is being written. Raises InputError if it could not be and is required; else says so."""
        try:
            self.saver.wait()
        except InputError as error:
            if required:
                raise
            self.log.say(f"warning: {error}; the checkpoints before it stay")

    def _averaged_model(self) -> DiT:
        """A copy of the model with the EMA weights, on CUDA in the run's precision, on a CPU fp32. All ranks must call it."""
        self._settle()
        release_recorded(self.engine.module)  # what uses the copy needs memory as activations do
        model = DiT(self.config.model).to(self.world.device).requires_grad_(False).eval()
        model.load_state_dict(gather(self.ema, self.shapes, self.world))
        return model if self.world.device.type == "cpu" else model.to(DTYPES[self.config.train.precision])

    def _draw(self, done: int) -> None:
        """Write a grid of EMA samples, from a copy of the model that lives as long as the drawing."""
        config, world = self.config, self.world
        model = self._averaged_model()
        classes = config.model.num_classes
        rows = torch.linspace(0, classes - 1, min(classes, GRID_CLASSES)).round().long()
        labels = rows.repeat_interleave(GRID_COLUMNS).to(world.device)
        images = sampler.generate_on_all_ranks(model, self.codec, config.sample, labels, config.train.seed, classes, world)
        if world.rank == 0:
            path = self.run / "samples" / f"{checkpoint.folder_name(done)}.png"
            pictures.save_picture(pictures.grid(images, GRID_COLUMNS), path)
            self.log.picture(done, path)
