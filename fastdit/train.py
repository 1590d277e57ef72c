"""The training loop: batches in, one engine step each, EMA, log lines, sample grids, checkpoints.

The loop never waits for the device: losses add up there and are read every log_steps. What a step reads on the host is read in
engine.step, where DeepSpeed fetches the gradient norm and the overflow flag one after the other.
"""

import fcntl
import math
import signal
import time
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from fastdit import autoencoder, checkpoint, data, engine, flow, kernels, sample, telemetry
from fastdit.config import Config, InputError, Stopped, TrainConfig
from fastdit.ema import ShardedEma, gather
from fastdit.model import DiT, native_bf16

GRID_CLASSES, GRID_COLUMNS = 10, 8  # of the sample grids during training


def _checkpoint_to_resume(config: Config, world: engine.World) -> tuple[Path | None, dict]:
    """The checkpoint that this run continues from, and its state; a fresh state when there is none.

    The run's own newest one comes first, so that the same command continues a run that began from another's checkpoint.
    Raises InputError when the one asked for is not there or does not fit.
    """
    run, resume = Path(config.train.out) / config.train.name, config.train.resume
    found, state = checkpoint.find(run), {"step": 0, "wandb_id": None, "summed_steps": 0}
    if found and resume == "never":
        raise InputError(f"train.resume=never would overwrite the checkpoints in {run}: use another train.name, or delete them")
    if not found and resume not in ("auto", "never"):
        found = checkpoint.find(Path(resume))
        if found is None:
            raise InputError(
                f"train.resume={resume} holds no whole checkpoint: give 'auto', 'never', a run's folder or a checkpoint's"
            )
    if found:
        state = checkpoint.check(found, config, world)
        if not found.is_relative_to(run):
            state["wandb_id"] = None  # another run's
    return found, state


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
    world = engine.start(config.train.device)
    config = engine.settle(config, world.device)
    telemetry.check_backend(world.device)
    resume_from, state = engine.together(world, lambda: _checkpoint_to_resume(config, world), everywhere=False)
    if state["step"] >= config.train.total_steps:
        if world.rank == 0:
            print(f"already trained to step {state['step']} in {resume_from}: nothing to do (raise train.total_steps to go on)")
        return resume_from.parent.parent
    engine.together(world, lambda: telemetry.check_wandb(config))
    place = engine.together(world, lambda: data.locate(config), everywhere=False)
    loader = engine.together(world, lambda: data.load(config, place, world))
    manifest = getattr(loader, "manifest", None)
    codec = engine.together(world, lambda: autoencoder.load(config.data, config.model, loader.channels, world.device, manifest))
    run = Path(config.train.out) / config.train.name
    lock = engine.together(world, lambda: _lock_run_folder(run) if world.rank == 0 else None)
    Trainer(config, world, loader, codec, run, resume_from, state).loop()
    if world.rank == 0:
        telemetry.plot(run)
    if lock:
        lock.close()
    return run


class Trainer:
    """All that one run holds, and its loop."""

    def __init__(
        self, config: Config, world: engine.World, loader, codec, run: Path, resume_from: Path | None, state: dict
    ) -> None:
        """state: of `resume_from`, the checkpoint to continue from, or a fresh one."""
        self.config, self.world, self.loader, self.codec, self.run = config, world, loader, codec, run
        torch.manual_seed(config.train.seed)  # the same start on every rank
        model = DiT(config.model)
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        if resume_from:
            model.load_state_dict(checkpoint.Shards(resume_from, state["ranks"]).whole("raw", self.shapes))
        self.engine = engine.initialize(model, config, world)
        self.ema = ShardedEma(engine.fragments(self.engine, world), config.train.ema_decay, *config.train.ema_more)
        self.loss_sum, self.step_loss = torch.zeros((), device=world.device), torch.zeros((), device=world.device)
        self.start, self.summed_steps = state["step"], state["summed_steps"]
        self.data_wait = 0.0  # seconds since the last log line that the host spent in getting batches
        self.told_to_stop = self.stop = 0.0  # this rank by a signal; all ranks, as agreed
        self.skipped = self.skipped_in_a_row = 0  # since the last log line; up to now
        if resume_from:
            checkpoint.load(resume_from, self.engine, self.ema, state, self.loss_sum, config, world)
        self.log = engine.together(world, lambda: telemetry.Log(run, config, world, self.start, state["wandb_id"]))
        if world.rank == 0:
            checkpoint.write_atomically(run / "config.json", config.to_json())
        self._say_start(model)

    def _say_start(self, model: DiT) -> None:
        train, found = self.config.train, telemetry.versions()
        blocks = "compiled" if engine.compiles(self.config, self.world) else "eager"
        backend = kernels.backend_in_use(self.world.device)
        self.log.say(
            f"fastdit {found['fastdit']}: {model.num_parameters / 1e6:.2f} M parameters ({self.config.model.preset}), "
            f"{self.config.data.source}, {train.batch_size} images x {train.accumulation} micro-steps x {self.world.size} ranks\n"
            f"on {telemetry.device_name(self.world.device)}; torch {found['torch']}, deepspeed {found['deepspeed']}, "
            f"ZeRO-{self.config.zero.stage}, {train.precision}, {blocks} blocks, {backend} kernels; "
            f"from step {self.start} to {train.total_steps}"
        )
        if train.precision == "bf16" and not native_bf16(self.world.device):
            self.log.say("warning: bf16 matmuls are emulated on this device, and far slower than with train.precision=fp32")

    def loop(self) -> None:
        """Train to the end, or to the first log line after SIGTERM (a cluster's preemption), which saves and ends the run."""
        settings = self.config.train
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "told_to_stop", 1.0))
        try:
            self._loop(settings)
        finally:
            signal.signal(signal.SIGTERM, before)
            self.log.close()

    def _loop(self, settings: TrainConfig) -> None:
        for step in range(self.start, settings.total_steps):
            lr = self.engine.get_lr()[0]  # of this step: engine.step moves the schedule on
            done, last = step + 1, step + 1 == settings.total_steps
            if self._step(step) and done % settings.ema_every == 0:
                self.ema.update()
            self.log.advance()
            if done % settings.log_steps == 0 or last:
                self._write_log_line(done, lr)
            with self.log.pause():
                if settings.sample_steps and (done % settings.sample_steps == 0 or last):
                    self._draw(done)
                if done % settings.save_steps == 0 or last or self.stop:
                    self._save(done)
            if self.stop and not last:
                raise Stopped(f"told to stop by SIGTERM: saved step {done}, the same command continues")

    def _step(self, step: int) -> bool:
        """One optimizer step: `accumulation` micro-steps on this rank's share of the global batch; whether it was taken.

        Where a loss or a gradient of any rank is not finite, DeepSpeed takes it on none.
        """
        settings, codec = self.config.train, self.codec
        self.step_loss.zero_()
        for micro in range(settings.accumulation):
            waits = time.perf_counter()
            images, labels = self.loader.batch(step, micro)
            self.data_wait += time.perf_counter() - waits
            ids = flow.sample_ids(step, self.loader.order.first_index(micro), settings.batch_size, self.world.device)
            noise = None
            if codec.needs_noise:
                shape = (codec.channels, codec.size, codec.size)
                noise = kernels.counter_normal(settings.seed, flow.Stream.POSTERIOR, ids, shape)
            x0 = codec.encode(images, noise)
            loss = flow.losses(self.engine, self.config.flow, self.config.model.num_classes, x0, labels, settings.seed, ids).mean()
            self.engine.backward(loss)
            self.engine.step()
            self.step_loss += loss.detach()
        taken = self.engine.was_step_applied()
        if taken:
            self.loss_sum += self.step_loss
            self.summed_steps += 1
            self.skipped_in_a_row = 0
        else:
            self._note_skipped(step)
        return taken

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

    def _write_log_line(self, done: int, lr: float) -> None:
        """Read the device's loss sum, write the line, start the next sum. Here the ranks agree to stop, too."""
        told = torch.full_like(self.loss_sum, self.told_to_stop)
        sums = torch.stack([self.loss_sum, told])
        dist.all_reduce(sums)
        total, self.stop = sums.tolist()
        steps = self.summed_steps * self.config.train.accumulation * self.world.size
        loss = total / steps if steps else None  # None: all were skipped
        norm = float(self.engine.get_global_grad_norm())
        epoch = round(done / self.loader.order.steps_per_epoch, 4)
        norm = norm if self.summed_steps else None
        self.log.write(
            done, epoch=epoch, loss=loss, lr=lr, grad_norm=norm, skipped=self.skipped, data_wait_s=round(self.data_wait, 3),
            peak_memory_gb=round(telemetry.peak_memory(self.world.device) / 1e9, 3),
        )  # fmt: skip
        if loss is not None and not math.isfinite(loss):
            raise self._diverged(f"the mean loss of steps {done - self.summed_steps + 1} to {done} is {loss}")
        self.loss_sum.zero_()
        self.summed_steps, self.skipped, self.data_wait = 0, 0, 0.0

    def _diverged(self, what: str) -> FloatingPointError:
        found = checkpoint.find(self.run)
        kept = f"the last good checkpoint is {found}" if found else "there is no checkpoint yet"
        return FloatingPointError(f"{what}: stopped, {kept}; lower train.lr and run the same command again")

    def _save(self, done: int) -> None:
        """Write a checkpoint. Raises FloatingPointError rather than replace good ones by weights that are not finite, and
        InputError where the last one of a run cannot be written; an earlier one is tried again at the next save."""
        masters = (f.master.isfinite().all().to(self.world.device) for f in self.ema.fragments)  # with offload they are on the host
        finite = torch.stack([self.loss_sum.isfinite(), *masters]).all().int()
        dist.all_reduce(finite, dist.ReduceOp.MIN)
        if not finite.item():
            raise self._diverged(f"the loss or the weights at step {done} are not finite")
        state = {
            "step": done, "summed_steps": self.summed_steps, "wandb_id": self.log.wandb_id, "versions": telemetry.versions(),
            "class_names": self.loader.class_names,
        }  # fmt: skip
        try:
            checkpoint.save(self.run / "checkpoints", self.engine, self.ema, self.config, state, self.loss_sum, self.world)
        except InputError as error:
            if self.stop or done == self.config.train.total_steps:
                raise
            self.log.say(f"warning: {error}; training goes on, the next save is at step {done + self.config.train.save_steps}")

    def _draw(self, done: int) -> None:
        """Write a grid of EMA samples, from a copy of the model that lives as long as the drawing."""
        config, world = self.config, self.world
        model = DiT(config.model).to(world.device).requires_grad_(False).eval()
        model.load_state_dict(gather(self.ema, self.shapes, world))
        classes = config.model.num_classes
        rows = torch.linspace(0, classes - 1, min(classes, GRID_CLASSES)).round().long()
        labels = rows.repeat_interleave(GRID_COLUMNS).to(world.device)
        images = sample.generate_on_all_ranks(model, self.codec, config.sample, labels, config.train.seed, classes, world)
        if world.rank == 0:
            path = self.run / "samples" / f"{checkpoint.folder_name(done)}.png"
            sample.save_picture(sample.grid(images, GRID_COLUMNS), path)
            self.log.picture(done, path)
