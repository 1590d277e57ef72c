"""The logs of a run: progress bar, metrics.jsonl, wandb, TensorBoard, the clock of a step's phases, profiles. Rank 0 writes."""

import inspect
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastdit.config import Config, InputError
from fastdit.data import Loader
from fastdit.device import device_name
from fastdit.distributed import World
from fastdit.files import flush, replacing
from fastdit.flops import walk
from fastdit.flow import Losses, logged_parts
from fastdit.planning import cards
from fastdit.progress import STDERR, progress_bar

TIME_BINS = 8  # equal bins of the timestep t
PHASES = ("data_wait", "forward_backward", "optimizer", "ema")


def sums_length() -> int:
    """Return the number of elements of `loss_sums`."""
    return 1 + 2 * TIME_BINS + len(logged_parts())


def loss_sums(losses: Losses) -> Tensor:
    """Return fp32 [sums_length()]: the sum of losses.total; its sums and the numbers of samples in bins of t; and the sums of the
    flow.logged_parts().

    Uses a matmul: index_add on CUDA sums in nondeterministic order.
    """
    bins = (losses.t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
    one_hot = (bins[:, None] == torch.arange(TIME_BINS, device=losses.t.device)).float()
    parts = [losses.parts[name].sum()[None] for name in logged_parts()]
    return torch.cat((losses.total.sum()[None], losses.total @ one_hot, one_hot.sum(0), *parts))


class StepClock:
    """Measures the phases of the steps: on a GPU by events in its stream, on a CPU by the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []  # (phase, start, end) on the device
        self.host_seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)  # of phases by the host's clock

    @contextmanager
    def phase(self, name: str, on_host: bool = False) -> Iterator[None]:
        """Time the block as part of a phase, without waiting for the device. on_host=True uses the host's clock: the host waits."""
        if self.cuda and not on_host:
            start = self._event()
            yield
            self.spans.append((name, start, self._event()))
        else:
            start = time.perf_counter()
            yield
            self.host_seconds[name] += time.perf_counter() - start

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call. On a GPU, the work up to here must be done."""
        totals = self.host_seconds
        self.host_seconds = dict.fromkeys(PHASES, 0.0)
        for name, start, end in self.spans:
            totals[name] += start.elapsed_time(end) / 1e3
        self.spans.clear()
        return totals


def profiler(config: Config, run: Path, start_step: int, rank: int):
    """Return a torch.profiler of the steps in train.profile, whose `step` must be called after every step.

    It writes <run>/profile/steps_A-B.json. Returns None without that setting, on other ranks than 0, and if the run resumes after
    the first of these steps.
    """
    if config.train.profile is None or rank != 0:
        return None
    first, last = map(int, config.train.profile.split("-"))
    skipped = first - 1 - start_step
    if skipped < 0:
        return None
    path = run / "profile" / f"steps_{first}-{last}.json"

    def write(profile: torch.profiler.profile) -> None:
        path.parent.mkdir(exist_ok=True)
        profile.export_chrome_trace(str(path))

    warmup = min(1, skipped)  # this step is traced but not recorded: the first one is slow
    schedule = torch.profiler.schedule(wait=skipped - warmup, warmup=warmup, active=last - first + 1, repeat=1)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write, record_shapes=True)


def check_packages(config: Config) -> None:
    """Raise InputError if train.wandb or train.tensorboard need a package or a key that is missing. Nothing is sent."""
    if config.train.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise InputError("train.tensorboard=true needs tensorboard: pip install tensorboard") from error
    if config.train.wandb == "disabled":
        return
    try:
        import wandb
    except ImportError as error:
        raise InputError(f"train.wandb={config.train.wandb} needs wandb: pip install wandb") from error
    if config.train.wandb == "online":
        try:
            silent = "prompt" in inspect.signature(wandb.login).parameters  # of later versions, which deprecate wandb.api
            key = wandb.login(prompt=False, verify=False) if silent else wandb.api.api_key
        except wandb.Error as error:
            raise InputError(
                f"train.wandb=online has no valid key: {error}: run `wandb login`, or use train.wandb=offline"
            ) from error
        if not key:
            raise InputError("train.wandb=online needs a key: run `wandb login`, set WANDB_API_KEY, or use train.wandb=offline")


class Sink(Protocol):
    """Where the scalars and pictures of a run go beside metrics.jsonl."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take scalars by name."""

    def picture(self, step: int, path: Path) -> None:
        """Take a PNG of samples."""

    def close(self) -> None:
        """Write what is left."""


class Wandb:
    """A run of Weights & Biases, by the package's own client."""

    def __init__(self, run: Path, config: Config, wandb_id: str | None) -> None:
        """run: folder of the run; wandb_id: of the wandb run to resume. Raises InputError if wandb does not start."""
        import wandb

        try:
            self.run = wandb.init(
                project=config.train.wandb_project, name=config.train.name, config=config.to_dict(), dir=run,
                mode=cast(Literal["offline", "online"], config.train.wandb), id=wandb_id, resume="allow",
            )  # fmt: skip
        except wandb.Error as error:
            raise InputError(f"train.wandb={config.train.wandb} failed: {error}: use train.wandb=offline") from error

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def picture(self, step: int, path: Path) -> None:
        import wandb

        self.run.log({"samples": wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files in <run>/tensorboard/."""

    def __init__(self, run: Path, start_step: int) -> None:
        """start_step: completed steps; TensorBoard hides what an earlier process wrote of later ones."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run / "tensorboard", purge_step=start_step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, path: Path) -> None:
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


def _lines_up_to(last_step: int, data: bytes) -> tuple[bytes, bytes]:
    """Return the lines of a metrics.jsonl up to a step, and those that are no log lines, such as what a crash of the machine left.

    The last line counts as neither if it is incomplete: a killed run may leave it.
    """
    kept, unreadable = [], []
    *whole, rest = data.split(b"\n")
    for line in [*whole, rest]:
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            if line and not (line is rest and line.isascii()):
                unreadable.append(line + b"\n")
    return b"".join(kept), b"".join(unreadable)


def plot(run: Path) -> Path:
    """Plot loss and images per second of a run's metrics.jsonl. Returns the path of the PNG."""
    from matplotlib.figure import Figure

    lines = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line.get("loss") is not None]
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("loss", "images_per_s"), ("loss", "images per second"), strict=True):
        axes.plot([line["step"] for line in lines], [line[key] for line in lines], linewidth=1)
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        if key == "images_per_s":
            axes.set_ylim(bottom=0)
    figure.suptitle(run.name)
    path = run / "curves.png"
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path


@contextmanager
def optional(say: Callable[[str], None]) -> Iterator[None]:
    """Turn a failure to write a picture in the block, as on a full disk, into a warning. say: prints it."""
    try:
        yield
    except OSError as error:
        say(f"warning: a picture is left out: {error.filename or ''} {error.strerror or error}")


class Log:
    """The log of a run: <run>/metrics.jsonl, the progress bar, wandb and TensorBoard. On other ranks than 0 it does nothing."""

    def __init__(self, run: Path, config: Config, world: World, start_step: int, wandb_id: str | None) -> None:
        """start_step: completed steps; lines of later steps, which a killed run may have left, are cut from metrics.jsonl; of a run
        that begins, all. wandb_id: of the wandb run to resume. Raises InputError if wandb does not start or the log cannot be
        written."""
        self.writes = world.rank == 0
        self.sinks: list[Sink] = []
        self.wandb_id = wandb_id
        if not self.writes:
            return
        self.path = run / "metrics.jsonl"
        self.unwritten = b""  # lines that wait for space on the disk
        unreadable = self._open(run / "metrics.unreadable", start_step or -1)
        if config.train.wandb != "disabled":
            wandb_run = Wandb(run, config, wandb_id)
            self.wandb_id = wandb_run.run.id
            self.sinks.append(wandb_run)
        if config.train.tensorboard:
            self.sinks.append(TensorBoard(run, start_step))
        self.world_size = world.size
        self.batch = config.train.batch_size * config.train.accumulation * world.size  # images per step
        flops_of = lambda model: sum(walk(model, 1, torch.float32, "none")[:2])
        self.flops = flops_of(config.model)  # per image
        self.dense_flops = flops_of(replace(config.model, keep_tokens=1.0))  # the same in the last train.dense_steps
        self.dense_from = config.train.total_steps - config.train.dense_steps
        card = cards.card_of(device_name(world.device))
        self.peak = card.peak(config.train.precision) if card else None  # FLOP/s of a device
        self.bar = progress_bar(config.train.total_steps, start_step)
        if unreadable:
            self.print(f"warning: lines of {self.path} that are no log lines were moved to {unreadable}")
        if card and self.peak:
            self.print(f"MFU is relative to {self.peak / 1e12:g} TFLOP/s: {card.name}, {config.train.precision}, {card.source}")
        self.line_time = time.perf_counter()  # when the last log line was written, plus the pauses since
        self.line_step = start_step  # its step

    def _open(self, unreadable: Path, start_step: int) -> Path | None:
        """Cut metrics.jsonl after a step, and add what is no log line to the file `unreadable`. Returns its path if used."""
        try:
            kept, others = _lines_up_to(start_step, self.path.read_bytes() if self.path.exists() else b"")
            if others:
                with unreadable.open("ab") as file:
                    file.write(others)
            with replacing(self.path) as temporary:
                temporary.write_bytes(kept)
        except OSError as error:
            raise InputError(
                f"the log {self.path} cannot be written: {error.strerror}: move it away, or free some space"
            ) from error
        return unreadable if others else None

    def advance(self) -> None:
        """Count a step, without waiting for the device."""
        if self.writes:
            self.bar.update()

    def write(self, step: int, **values: float | list | None) -> None:
        """Write the log line after `step` steps: the values, and the speed since the last log line by the host's clock.

        The speed is images_per_s of all devices; tflops of each device, which counts the model's own FLOPs and none that are
        recomputed; and mfu if the peak of the device is known.
        """
        if not self.writes:
            return
        now = time.perf_counter()
        rate = (step - self.line_step) * self.batch / (now - self.line_time)
        dense = max(0, step - max(self.dense_from, self.line_step)) / (step - self.line_step)  # share of the steps
        self.line_time = now
        self.line_step = step
        flops = rate / self.world_size * ((1 - dense) * self.flops + dense * self.dense_flops)
        speed = {"images_per_s": round(rate, 2), "tflops": float(f"{flops / 1e12:.4g}")}
        if self.peak:
            speed["mfu"] = round(flops / self.peak, 4)
        line = {"step": step, **values, **speed, "time": round(time.time(), 3)}
        self.event(line)
        flat = {key: value for key, value in line.items() if key not in ("step", "loss_by_t")}
        flat |= {f"loss_by_t/bin_{i}": value for i, value in enumerate(cast(list, values["loss_by_t"]))}
        self._send(step, flat)
        loss = "none" if values["loss"] is None else f"{values['loss']:.4f}"
        share = f"MFU {speed['mfu']:.0%}" if self.peak else f"{speed['tflops']:.3g} TFLOP/s"
        self.bar.set_postfix_str(f"loss {loss}, {rate:.0f} images/s, {share}", refresh=False)  # a narrow terminal cuts the end

    def write_validation(self, step: int, timesteps: Sequence[float], line: dict) -> None:
        """Write a validation line. line: val_loss, val_losses (one per timestep), and metrics by name."""
        self.event({"step": step, **line})
        losses = {f"val_loss_t{t:.2f}": loss for t, loss in zip(timesteps, line["val_losses"], strict=True)}
        values = {key: value for key, value in line.items() if key != "val_losses"} | losses
        self._send(step, {f"validation/{key}": value for key, value in values.items()})

    def _send(self, step: int, values: dict[str, float | None]) -> None:
        """Send scalars to wandb and TensorBoard. None is left out: the loss of skipped steps, a bin of t without samples."""
        self._to_sinks(lambda sink: sink.log(step, {key: value for key, value in values.items() if value is not None}))

    def _to_sinks(self, work: Callable[[Sink], None]) -> None:
        """Do some work for wandb and TensorBoard; the one that cannot write any more is given up with a warning."""
        for sink in list(self.sinks):
            try:
                work(sink)
            except OSError as error:
                self.sinks.remove(sink)
                self.print(f"warning: {type(sink).__name__}: {error.strerror or error}: nothing more is written there")

    def event(self, line: dict) -> None:
        """Append a line to metrics.jsonl. If the disk is full, the line waits in memory, and the next one tries again."""
        if self.writes:
            self.unwritten += (json.dumps(line) + "\n").encode()
            if error := self._append():
                self.print(f"warning: {self.path}: {error.strerror}: its new lines wait until there is space")

    def _append(self) -> OSError | None:
        """Append the unwritten lines to metrics.jsonl, or none of them: then the error is returned."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(self.unwritten)
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)
            return error
        self.unwritten = b""
        return None

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time of the block (a checkpoint, a sample grid) from images_per_s."""
        start = time.perf_counter()
        yield
        if self.writes:
            self.line_time += time.perf_counter() - start

    def picture(self, step: int, path: Path) -> None:
        """Send a PNG to wandb and TensorBoard."""
        self._to_sinks(lambda sink: sink.picture(step, path))

    def print(self, text: str) -> None:
        """Print a line above the progress bar, on stderr."""
        if self.writes:
            self.bar.write(text, file=STDERR)

    def describe(self, text: str) -> None:
        """Show a text in front of the progress bar."""
        if self.writes:
            self.bar.set_description_str(text)

    def close(self) -> None:
        """Flush metrics.jsonl, close the bar, wandb and TensorBoard. Raises InputError if lines could not be written."""
        if not self.writes:
            return
        error = self._append()
        self.bar.close()
        self._to_sinks(lambda sink: sink.close())
        if error:
            raise InputError(
                f"the last lines of {self.path} cannot be written: {error.strerror}: free some space; the checkpoints are whole"
            ) from error
        flush(self.path)


class SkippedSteps:
    """Counts and logs the steps that were skipped because a loss or a gradient was not finite."""

    def __init__(self, loader: Loader, accumulation: int, world: World, log: Log) -> None:
        self.loader = loader
        self.accumulation = accumulation
        self.world = world
        self.log = log
        self.since_log_line = 0
        self.in_a_row = 0

    def add(self, step: int) -> None:
        """Count a skipped step and log it, with the indices of its images on each rank. All ranks must call it."""
        self.since_log_line += 1
        self.in_a_row += 1
        images = [int(i) for micro in range(self.accumulation) for i in self.loader.order.images(step, micro)[0]]
        images_of_ranks: list = [None] * self.world.size
        dist.all_gather_object(images_of_ranks, images, group=self.world.control)
        self.log.event({"step": step + 1, "skipped_in_a_row": self.in_a_row, "images_of_ranks": images_of_ranks})
        self.log.print(f"step {step + 1}: the loss or a gradient is not finite: skipped, {self.in_a_row} in a row")
