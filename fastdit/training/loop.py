"""The training loop: read batches, step the engine, update the EMA, write log lines, sample grids and checkpoints.

The loop never waits for the device: losses are summed there and read every log_steps. Whether a step was applied is asked before
the next optimizer step, when the device has known it for long. The only host synchronisation is inside engine.step under ZeRO,
which reads the gradient norm and the overflow flag.
"""

import faulthandler
import math
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

import torch
import torch.distributed as dist

from fastdit import autoencoder, autoencoder_files, checkpoint, data, device, distributed, files, flow, kernels
from fastdit.autoencoder import Codec
from fastdit.checkpoint import Checkpoint, RunState
from fastdit.config import Config, InputError, Interrupted, Stopped, TrainConfig
from fastdit.data import Loader
from fastdit.data.classes import class_table
from fastdit.data.order import Since
from fastdit.device import DTYPES, native_bf16
from fastdit.graphs import release_recorded
from fastdit.model import DiT
from fastdit.sampling import pictures
from fastdit.sampling.class_names import with_images
from fastdit.sampling.sampler import Sampler
from fastdit.training import engine, init, saver, telemetry
from fastdit.training.ema import ShardedEma, gather
from fastdit.training.saver import Saver
from fastdit.training.validation import Validation

if TYPE_CHECKING:  # only engine.py imports deepspeed
    from deepspeed import DeepSpeedEngine

GRID_CLASSES = 10  # rows of a sample grid, at most
GRID_COLUMNS = 8
STDERR = cast(TextIO, sys.__stderr__)  # for faulthandler: it needs a file descriptor, and takes None as well


def _checkpoint_to_resume(config: Config, world: distributed.World) -> tuple[Checkpoint | None, RunState]:
    """Return the checkpoint that this run resumes from and its state, or None and a fresh state.

    The newest checkpoint of the run itself comes before that of train.resume, so that the same command resumes a run that began
    from another run's checkpoint. Raises InputError if train.resume names no checkpoint, or if it does not fit the run.
    """
    run = Path(config.train.out) / config.train.name
    resume = config.train.resume
    saved = checkpoint.find(run)
    if saved and resume == "never":
        raise InputError(f"train.resume=never would overwrite the checkpoints in {run}: use another train.name, or delete them")
    if not saved and resume not in ("auto", "never"):
        saved = checkpoint.find(Path(resume))
        if saved is None:
            raise InputError(
                f"train.resume={resume} holds no complete checkpoint: use 'auto', 'never', the folder of a run or of a checkpoint"
            )
    if not saved:
        return None, RunState()
    saver.check(saved, config, world)
    wandb_id = saved.state.wandb_id if saved.path.is_relative_to(run) else None  # another run keeps its own id
    return saved, replace(saved.state, wandb_id=wandb_id)


def open_data(config: Config, world: distributed.World) -> tuple[Path | None, Loader, Codec]:
    """Return the path of a run's data, their loader, and the codec that makes latents of them. Raises InputError on all ranks."""
    path = world.together(lambda: data.locate(config), everywhere=False)
    loader = world.together(lambda: data.load(config, path, world))
    autoencoder.download(config.data.autoencoder, world)
    codec = world.together(lambda: autoencoder.load(config.data, config.model, loader.channels, world.device, loader.manifest))
    if world.device.type == "cuda":
        codec = codec.for_encoding(DTYPES[config.train.precision])
    return path, loader, codec


def _lock_run_folder(run: Path) -> TextIO:
    """Make and lock the folder of a run. The lock holds until the returned file is closed or the process ends, however it ends.

    Raises InputError if the folder cannot be written or another process trains in it.
    """
    try:
        for folder in (run / "checkpoints", run / "samples"):
            folder.mkdir(parents=True, exist_ok=True)
        return files.lock(run / ".lock", f"another process trains in {run}: wait for it, or use another train.name")
    except OSError as error:
        reason = f"{error.strerror}: set train.out to a folder you may write"
        raise InputError(f"the run's folder {run} cannot be made: {reason}") from error


def train(config: Config) -> Path:
    """Train to config.train.total_steps, resuming an earlier run of the same name. Returns the folder of the run.

    Raises InputError for bad input, on all ranks and before anything is written; FloatingPointError if the loss or the weights are
    no longer finite; Stopped after SIGTERM or Ctrl-C, when a checkpoint is written. A second Ctrl-C is a KeyboardInterrupt.
    """
    with engine.deterministic(config.train.deterministic):
        return _train(config)


def _train(config: Config) -> Path:
    faulthandler.register(signal.SIGUSR1, STDERR)  # kill -USR1 prints where a run hangs
    world = distributed.start(config.train.device, config.train.timeout_s)
    config = engine.resolve_precision(config, world.device)
    config = replace(config, data=replace(config.data, autoencoder=autoencoder_files.absolute(config.data.autoencoder)))
    device.check_backend(world.device)
    world.together(lambda: device.check_memory(config.model))
    engine.import_deepspeed(world.device)  # an unsuitable version is refused before anything is written
    resume_from, state = world.together(lambda: _checkpoint_to_resume(config, world), everywhere=False)
    if resume_from and state.step >= config.train.total_steps:
        if world.rank == 0:
            print(f"already trained to step {state.step} in {resume_from.path}: nothing to do (raise train.total_steps to resume)")
        return resume_from.path.parent.parent
    source = world.together(lambda: init.open_source(config)) if config.train.init and not resume_from else None
    world.together(lambda: telemetry.check_packages(config))
    if resume_from and config.data.autoencoder == resume_from.config.data.autoencoder:
        config = replace(config, data=replace(config.data, autoencoder=resume_from.autoencoder))
    data_path, loader, codec = open_data(config, world)
    if resume_from:
        saver.check_data(resume_from, config, loader)
        asked = config.data.autoencoder
        world.together(lambda: autoencoder.check(codec, state.autoencoder, resume_from.path, asked))
    run = Path(config.train.out) / config.train.name
    learned = with_images(config.model.num_classes, loader.class_counts, loader.class_names)
    validation = Validation(config, data_path, codec, run, world, learned) if config.validate.steps else None
    lock = world.together(lambda: _lock_run_folder(run) if world.rank == 0 else None)
    Trainer(config, world, loader, codec, run, resume_from, state, validation, source).loop()
    if world.rank == 0:
        with telemetry.optional(lambda text: print(f"fastdit: {text}", file=sys.stderr)):
            telemetry.plot(run)
    if lock:
        lock.close()
    return run


def _notes(config: Config, world: distributed.World) -> list[str]:
    """Return what its user may not expect of this run, a sentence each."""
    notes = []
    if config.train.precision == "bf16" and not native_bf16(world.device):
        notes.append("warning: bf16 matmuls are emulated on this device, and far slower than with train.precision=fp32")
    if engine.compiles(config, world) == "model" and world.size > 1:
        notes.append(
            "note: train.compile=model makes one graph of the backward pass: gradients are sent after it, and no communication is "
            "hidden (train.compile=graphs and blocks hide it)"
        )
    if config.flow.label_dropout == 0:
        notes.append("note: flow.label_dropout=0 trains no null class: samples are drawn without guidance")
    return notes


class Trainer:
    """The parts and the state of a run, and its loop."""

    config: Config
    world: distributed.World
    loader: Loader
    codec: Codec
    run: Path  # the folder of the run
    validation: Validation | None
    shapes: dict[str, torch.Size]  # of the model's parameters, by name
    engine: "DeepSpeedEngine"
    ema: ShardedEma
    saver: Saver
    log: telemetry.Log
    clock: telemetry.StepClock
    # state
    began_from: dict | None  # RunState.init
    start: int  # completed steps when this process began
    lr: float  # learning rate of the last step
    step_sums: torch.Tensor  # telemetry.loss_sums of the last step, fp32 on the device
    sums: torch.Tensor  # their sum over the applied steps since the last log line
    summed_steps: int  # number of these steps
    unfinished_step: int | None  # the last step, until it is known whether it was applied
    skipped: telemetry.SkippedSteps
    stop_signal: int  # SIGTERM or SIGINT, which this rank received; 0: none
    stop_time: float  # when, by time.monotonic
    stopping: int  # the signal that a rank received, as all ranks agreed at a log line: this step is the last one; 0: none

    def __init__(
        self, config: Config, world: distributed.World, loader: Loader, codec: Codec, run: Path,
        resume_from: Checkpoint | None, state: RunState, validation: Validation | None = None,
        source: init.Source | None = None,
    ) -> None:  # fmt: skip
        """resume_from: checkpoint to resume from, or None. state: that of the checkpoint, or a fresh one. source: weights to begin
        from if there is no checkpoint."""
        self.config = config
        self.world = world
        self.loader = loader
        self.codec = codec
        self.run = run
        self.validation = validation
        self.start = state.step
        if resume_from:
            loader.order.resume(state.step, Since(*state.batch_since), state.global_batch)
        self.lr = 0.0
        self.step_sums = torch.zeros(telemetry.sums_length(), device=world.device)
        self.sums = torch.zeros(telemetry.sums_length(), device=world.device)
        self.summed_steps = state.summed_steps
        self.unfinished_step = None
        self.stop_signal = 0
        self.stop_time = 0.0
        self.stopping = 0
        torch.manual_seed(config.train.seed)  # the same initial weights on every rank
        model = DiT(config.model)
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        if resume_from:
            model.load_state_dict(resume_from.shards().parameters("raw", self.shapes))
        changes = world.together(lambda: init.adapt(model, source, loader.class_names, config.flow.prediction)) if source else []
        self.began_from = state.init
        if source:
            self.began_from = source.record | {"changes": [change._asdict() for change in changes]}
        self.engine = engine.initialize(model, config, world)
        self.ema = ShardedEma(
            engine.fragments(self.engine, world), config.train.ema_decay, *config.train.ema_more,
            optimizer=engine.one_rank_optimizer(self.engine),
        )  # fmt: skip
        self.clock = telemetry.StepClock(world.device)
        self.saver = Saver(run / "checkpoints", config, world)
        if resume_from:
            saver.load(resume_from, self.engine, self.ema, self.sums, config, world)
        self.log = world.together(lambda: telemetry.Log(run, config, world, self.start, state.wandb_id))
        self.skipped = telemetry.SkippedSteps(loader, config.train.accumulation, world, self.log)
        world.together(lambda: self._write_settings() if world.rank == 0 else None)
        self._print_header(model)
        if source:
            for text in (init.describe(source, changes), *init.notes(source, config, codec.sha256())):
                self.log.print(text)
        if resume_from and state.global_batch != loader.order.global_batch:
            self._note_batch_change(state)
        if resume_from:
            self._note_changes(resume_from)

    def _write_settings(self) -> None:
        path = self.run / "config.json"
        try:
            files.write_atomically(path, self.config.to_json(self.began_from))
        except OSError as error:
            raise InputError(
                f"{path} cannot be written: {error.strerror}: free some space, or set train.out to another folder"
            ) from error

    def _print_header(self, model: DiT) -> None:
        train = self.config.train
        versions = device.versions()
        compiled = engine.COMPILED[engine.compiles(self.config, self.world)]
        backend = kernels.backend_in_use(self.world.device)
        sharding = f"ZeRO-{self.config.zero.stage}" if engine.shards(self.config, self.world.size) else "without ZeRO"
        counts = self.loader.class_counts
        self.log.print(class_table(self.loader.class_names or [str(i) for i in range(len(counts))], None, counts))
        self.log.print(
            f"fastdit {versions['fastdit']}: {model.num_parameters / 1e6:.2f} M parameters ({self.config.model.preset}), "
            f"{self.config.data.source}, {train.batch_size} images x {train.accumulation} micro-steps x {self.world.size} ranks\n"
            f"on {device.device_name(self.world.device)}; torch {versions['torch']}, deepspeed {versions['deepspeed']}, "
            f"{sharding}, {train.precision}, {compiled}, {backend} kernels; "
            f"from step {self.start} to {train.total_steps}"
        )
        for note in _notes(self.config, self.world):
            self.log.print(note)

    def _note_batch_change(self, before: RunState) -> None:
        """Log that a run takes another number of images per step from here on. before: state of the checkpoint."""
        batches = [before.global_batch, self.loader.order.global_batch]
        self.log.event(
            {"step": self.start + 1, "images_per_step": batches, "images_seen": self.loader.order.images_seen(self.start)}
        )
        self.log.print(
            f"from step {self.start + 1} on: {batches[1]} images per step, {batches[0]} before; the same train.lr schedule"
        )

    def _note_changes(self, saved: Checkpoint) -> None:
        """Print and log the settings that differ from those of the checkpoint, and what they make of the learning rate."""
        changed = saver.changes(saved.config, self.config)
        before, now, other = saver.learning_rate_change(saved.config, self.config, saved.state.optimizer_steps)
        rate_changed = before != now or other
        if not rate_changed:
            changed.pop("train.total_steps", None)  # the header says where the run ends
        for key, (old, new) in changed.items():
            self.log.print(f"{key} {old} -> {new} (given now)")
        if rate_changed:
            schedule = "; this is another schedule: by it, the steps before would have had other rates" if other else ""
            self.log.print(f"learning rate of step {self.start + 1}: {before:.4g} -> {now:.4g}{schedule}")
        if changed:
            self.log.event({"step": self.start + 1, "changed": changed, "lr_before": before, "lr": now})

    def _stop(self, number: int, frame: object) -> None:
        """Handle SIGTERM and Ctrl-C: save at the next log line and end. A second Ctrl-C ends at once.

        A launcher that is interrupted passes Ctrl-C on to ranks that had it from the terminal: within a second it is the same one.
        """
        now = time.monotonic()
        if number == signal.SIGINT and self.stop_signal and now - self.stop_time > 1:
            raise KeyboardInterrupt
        if not self.stop_signal:
            self.stop_signal = number
            self.stop_time = now
            self.log.describe("saves at the next log line and ends")

    def loop(self) -> None:
        """Train to the last step, or to the first log line after SIGTERM (a preempted job) or Ctrl-C, where the run is saved and
        ends."""
        handlers_before = [(number, signal.signal(number, self._stop)) for number in (signal.SIGTERM, signal.SIGINT)]
        try:
            with telemetry.profiler(self.config, self.run, self.start, self.world.rank) or nullcontext() as profiler:
                self._loop(self.config.train, profiler)
        finally:
            faulthandler.cancel_dump_traceback_later()
            for number, handler in handlers_before:
                signal.signal(number, handler)
            self.log.close()

    def _loop(self, settings: TrainConfig, profiler: torch.profiler.profile | None) -> None:
        if self.began_from and not self.start and self.validation:  # what it begins from
            with self.log.pause():
                self.validation.step(0, False, self._averaged_model, self.log)
        for step in range(self.start, settings.total_steps):
            # Ends the process if the step hangs: cancelled below, or set again by the next step.
            faulthandler.dump_traceback_later(settings.timeout_s, exit=True, file=STDERR)
            done = step + 1
            last = done == settings.total_steps
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
                if done % settings.save_steps == 0 or last or self.stopping:
                    self._save(done)
            if self.stopping and not last:
                if self.stopping == signal.SIGINT:
                    raise Interrupted(f"interrupted: saved step {done}, the same command continues")
                raise Stopped(f"told to stop by SIGTERM: saved step {done}, the same command continues")

    def step(self, step: int) -> None:
        """Do one optimizer step: `accumulation` micro-steps on this rank's share of the global batch, then the EMA.

        If a loss or a gradient of any rank is not finite, no rank applies the step. A run of one rank finds that out in
        `_finish_step`.
        """
        settings, codec = self.config.train, self.codec
        dense = step >= settings.total_steps - settings.dense_steps
        if dense and step == settings.total_steps - settings.dense_steps:
            release_recorded(cast(DiT, self.engine.module))  # from here on, batches have other shapes
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
                chosen = flow.choose_tokens(self.config.model, settings.seed, ids, dense)
                losses = flow.losses(self.engine, x0, labels, ids, self.config.flow, seed=settings.seed, null=null, chosen=chosen)
                self.engine.backward(losses.total.mean())
                with torch.no_grad():
                    self.step_sums += telemetry.loss_sums(losses)
            if micro + 1 == settings.accumulation:
                self._finish_step()  # the previous step: this one's number and learning rate depend on whether it was applied
                self.lr = self.engine.get_lr()[0]
                if (step + 1) % settings.ema_every == 0:
                    self.ema.announce()
            with self.clock.phase("optimizer"):
                self.engine.step()
        engine.add_if_applied(self.engine, self.sums, self.step_sums)
        self.unfinished_step = step
        if not engine.one_rank_optimizer(self.engine):
            self._finish_step()

    def _finish_step(self) -> None:
        """Count the last step and update the EMA if it was applied; log it if it was skipped. Does nothing the second time.

        Raises FloatingPointError if too many steps in a row were skipped.
        """
        step = self.unfinished_step
        self.unfinished_step = None
        if step is None:
            return
        if not engine.finish_step(self.engine):
            self.skipped.add(step)
            if self.skipped.in_a_row > self.config.train.max_skipped_steps:
                raise self._diverged(f"{self.skipped.in_a_row} steps in a row, up to step {step + 1}, were not finite")
            return
        self.summed_steps += 1
        self.skipped.in_a_row = 0
        if (step + 1) % self.config.train.ema_every == 0:
            with self.clock.phase("ema"):
                self.ema.update()

    def _write_log_line(self, done: int) -> None:
        """Write the means since the last log line, and start new sums. Here the ranks also agree whether to stop."""
        self._finish_step()
        total, bin_sums, bin_counts, part_sums = self._reduce_sums()
        samples = sum(bin_counts)  # whole numbers, each exact in fp32 up to 2^24
        loss = total / samples if samples else None  # None: all steps were skipped
        norm = engine.gradient_norm(self.engine) if samples else math.nan
        self.log.write(
            done, epoch=round(self.loader.order.epochs(done), 4), loss=loss, lr=self.lr,
            grad_norm=norm if math.isfinite(norm) else None,  # None: the last step was skipped
            skipped=self.skipped.since_log_line,
            loss_by_t=[round(s / n, 6) if n else None for s, n in zip(bin_sums, bin_counts, strict=True)],
            **{f"loss_{name}": part / samples if samples else None for name, part in part_sums.items()},
            **self._slowest_phases(), peak_memory_gb=round(device.peak_memory(self.world.device) / 1e9, 3),
        )  # fmt: skip
        if loss is not None and not math.isfinite(loss):
            raise self._diverged(f"the mean loss of steps {done - self.summed_steps + 1} to {done} is {loss}")
        self.sums.zero_()
        self.summed_steps = 0
        self.skipped.since_log_line = 0

    def _reduce_sums(self) -> tuple[float, list[float], list[float], dict[str, float]]:
        """Return sums over all ranks: of losses, of losses and samples by bins of t, and of parts by name. Sets `stopping`."""
        stops = [torch.full_like(self.sums[:1], self.stop_signal == number) for number in (signal.SIGTERM, signal.SIGINT)]
        sums = torch.cat([self.sums, *stops])  # one all-reduce for both
        dist.all_reduce(sums)
        total, *rest, terminated, interrupted = sums.tolist()
        self.stopping = signal.SIGINT if interrupted else signal.SIGTERM if terminated else 0
        bins = telemetry.TIME_BINS
        return total, rest[:bins], rest[bins : 2 * bins], dict(zip(flow.logged_parts(), rest[2 * bins :], strict=True))

    def _slowest_phases(self) -> dict[str, float]:
        """Return the seconds of each phase since the last log line, of the slowest rank in it."""
        seconds = self.clock.read()
        slowest = torch.tensor(list(seconds.values()), device=self.world.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return {f"{phase}_s": round(s, 3) for phase, s in zip(seconds, slowest.tolist(), strict=True)}

    def _diverged(self, reason: str) -> FloatingPointError:
        """Return the error that ends the run, which names its last checkpoint."""
        self._finish_save(required=False)
        whole = [folder for folder in files.step_folders(self.run / "checkpoints") if checkpoint.is_complete(folder, by_hash=False)]
        last = f"the last good checkpoint is {whole[0]}" if whole else "there is no checkpoint yet"
        return FloatingPointError(f"{reason}: stopped, {last}; lower train.lr and run the same command again")

    def _save(self, done: int) -> None:
        """Start to write a checkpoint. The last checkpoint of a run is written on return.

        Raises FloatingPointError if the loss or the weights are not finite: they must not replace good checkpoints.
        """
        self._finish_step()
        masters = (f.master.isfinite().all().to(self.world.device) for f in self.ema.fragments)  # with offload they are on the host
        finite = torch.stack([self.sums[0].isfinite(), *masters]).all().int()
        dist.all_reduce(finite, dist.ReduceOp.MIN)
        if not finite.item():
            raise self._diverged(f"the loss or the weights at step {done} are not finite")
        about = self.codec.about()
        state = RunState(
            done, summed_steps=self.summed_steps, wandb_id=self.log.wandb_id, versions=device.versions(),
            batch_since=self.loader.order.since,
            images_seen=self.loader.order.images_seen(done),
            init=self.began_from,
            class_names=self.loader.class_names,
            class_counts=self.loader.class_counts,
            data_sha256=self.loader.digest,
            autoencoder_sha256=about.pop("autoencoder_sha256"),
            autoencoder_scale=about or None,
            autoencoder_path=autoencoder_files.relative(self.config.data.autoencoder, self.run),
        )  # fmt: skip
        self._finish_save(required=False)
        self.saver.save(self.engine, self.ema, state, self.sums)
        if self.stopping or done == self.config.train.total_steps:
            self._finish_save(required=True)

    def _finish_save(self, required: bool) -> None:
        """Wait for the checkpoint that is being written. If it failed, raise its InputError if it is required, else print it."""
        try:
            self.saver.wait()
        except InputError as error:
            if required:
                raise
            self.log.print(f"warning: {error}; the checkpoints before it stay")

    def _averaged_model(self) -> DiT:
        """Return a copy of the model with the EMA weights, fp32 on a CPU, else in the run's precision. All ranks must call it."""
        self._finish_step()
        release_recorded(cast(DiT, self.engine.module))  # for whatever uses the copy, which needs memory as activations do
        model = DiT(self.config.model).to(self.world.device).requires_grad_(False).eval()
        model.load_state_dict(gather(self.ema, self.shapes, self.world))
        return model if self.world.device.type == "cpu" else model.to(DTYPES[self.config.train.precision])

    def _draw(self, done: int) -> None:
        """Write a grid of samples of the EMA weights, drawn from a copy of the model that lives as long as the drawing."""
        learned = torch.tensor(with_images(self.config.model.num_classes, self.loader.class_counts, self.loader.class_names))
        shown = learned[torch.linspace(0, len(learned) - 1, min(len(learned), GRID_CLASSES)).round().long()]
        sampler = Sampler.of_model(self._averaged_model(), self.config, self.codec)
        images = sampler.draw(shown.repeat_interleave(GRID_COLUMNS), self.config.train.seed, world=self.world)
        if self.world.rank == 0:
            assert images is not None  # `draw` returns them on rank 0
            path = self.run / "samples" / f"{checkpoint.folder_name(done)}.png"
            with telemetry.optional(self.log.print):
                pictures.save_picture(pictures.grid(images, GRID_COLUMNS), path)
                self.log.picture(done, path)
