"""The logs of a run: progress bar, metrics.jsonl, wandb, the clock of a step's phases, profiles. Only rank 0 writes."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from fastdit.config import Config, InputError
from fastdit.device import device_name
from fastdit.distributed import World
from fastdit.files import flush, replacing, write_atomically
from fastdit.flops import walk
from fastdit.flow import Losses, logged_parts
from fastdit.planning import cards
from fastdit.progress import progress_bar

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


def check_wandb(config: Config) -> None:
    """Raise InputError if train.wandb needs a package or a key that is missing."""
    if config.train.wandb == "disabled":
        return
    try:
        import wandb
    except ImportError as error:
        raise InputError(f"train.wandb={config.train.wandb} needs wandb: pip install wandb") from error
    if config.train.wandb == "online" and not wandb.api.api_key:
        raise InputError("train.wandb=online needs a key: run `wandb login`, set WANDB_API_KEY, or use train.wandb=offline")


def _lines_up_to(last_step: int, text: str) -> str:
    """Return the lines of a metrics.jsonl up to a step. Incomplete lines are dropped: a killed run may leave one."""
    lines = []
    for line in text.splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= last_step:
                lines.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return "".join(lines)


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


class Log:
    """The log of a run: <run>/metrics.jsonl, the progress bar and wandb. On other ranks than 0 it does nothing."""

    def __init__(self, run: Path, config: Config, world: World, start_step: int, wandb_id: str | None) -> None:
        """start_step: completed steps; lines of later steps, which a killed run may have left, are cut from metrics.jsonl; of a run
        that begins, all.
        wandb_id: of the wandb run to resume. Raises InputError if wandb does not start."""
        self.writes = world.rank == 0
        self.wandb = None
        self.wandb_id = wandb_id
        if not self.writes:
            return
        self.path = run / "metrics.jsonl"
        write_atomically(self.path, _lines_up_to(start_step or -1, self.path.read_text() if self.path.exists() else ""))
        if config.train.wandb != "disabled":
            self._start_wandb(run, config)
        self.world_size = world.size
        self.batch = config.train.batch_size * config.train.accumulation * world.size  # images per step
        counted = walk(config.model, 1, torch.float32, "none")
        self.flops = counted.forward + counted.backward  # per image
        card = cards.card_of(device_name(world.device))
        self.peak = card.peak(config.train.precision) if card else None  # FLOP/s of a device
        self.bar = progress_bar(config.train.total_steps, start_step)
        if card and self.peak:
            self.print(f"MFU is relative to {self.peak / 1e12:g} TFLOP/s: {card.name}, {config.train.precision}, {card.source}")
        self.line_time = time.perf_counter()  # when the last log line was written, plus the pauses since
        self.line_step = start_step  # its step

    def _start_wandb(self, run: Path, config: Config) -> None:
        import wandb

        try:
            self.wandb = wandb.init(
                project=config.train.wandb_project, name=config.train.name, config=config.to_dict(), dir=run,
                mode=cast(Literal["offline", "online"], config.train.wandb), id=self.wandb_id, resume="allow",
            )  # fmt: skip
        except wandb.Error as error:
            raise InputError(f"train.wandb={config.train.wandb} failed: {error}: use train.wandb=offline") from error
        self.wandb_id = self.wandb.id

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
        self.line_time = now
        self.line_step = step
        flops = rate / self.world_size * self.flops
        speed = {"images_per_s": round(rate, 2), "tflops": float(f"{flops / 1e12:.4g}")}
        if self.peak:
            speed["mfu"] = round(flops / self.peak, 4)
        line = {"step": step, **values, **speed, "time": round(time.time(), 3)}
        self.event(line)
        if self.wandb:
            flat = {key: value for key, value in line.items() if key not in ("step", "loss_by_t")}
            flat |= {f"loss_by_t/bin_{i}": value for i, value in enumerate(cast(list, values["loss_by_t"]))}
            self.wandb.log(flat, step=step)
        loss = "none" if values["loss"] is None else f"{values['loss']:.4f}"
        share = f"MFU {speed['mfu']:.0%}" if self.peak else f"{speed['tflops']:.3g} TFLOP/s"
        self.bar.set_postfix_str(f"loss {loss}, {rate:.0f} images/s, {share}", refresh=False)  # a narrow terminal cuts the end

    def write_validation(self, step: int, timesteps: Sequence[float], line: dict) -> None:
        """Write a validation line. line: val_loss, val_losses (one per timestep), and metrics by name."""
        self.event({"step": step, **line})
        if self.wandb:
            losses = {f"val_loss_t{t:.2f}": loss for t, loss in zip(timesteps, line["val_losses"], strict=True)}
            values = {key: value for key, value in line.items() if key != "val_losses"} | losses
            self.wandb.log({f"validation/{key}": value for key, value in values.items()}, step=step)

    def event(self, line: dict) -> None:
        """Append a line to metrics.jsonl."""
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time of the block (a checkpoint, a sample grid) from images_per_s."""
        start = time.perf_counter()
        yield
        if self.writes:
            self.line_time += time.perf_counter() - start

    def picture(self, step: int, path: Path) -> None:
        """Send a PNG to wandb."""
        if self.wandb:
            import wandb

            self.wandb.log({"samples": wandb.Image(str(path))}, step=step)

    def print(self, text: str) -> None:
        """Print a line above the progress bar, on stderr."""
        if self.writes:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Flush metrics.jsonl, close the bar and finish the wandb run."""
        if not self.writes:
            return
        flush(self.path)
        self.bar.close()
        if self.wandb:
            self.wandb.finish()
