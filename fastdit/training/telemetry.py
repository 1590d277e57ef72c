"""What a run says of itself: progress bar, JSON lines, wandb, versions. Rank 0 speaks, the others stay silent."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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

TIME_BINS = 8
PHASES = ("data_wait", "forward_backward", "optimizer", "ema")


def loss_sums(losses: Losses) -> Tensor:
    """Return fp32 [1 + 2·TIME_BINS + P]: the sum of losses.total; its sums and the numbers of samples in bins of t; and the sums of
    the P flow.logged_parts().

    Uses a matmul: index_add on CUDA sums in nondeterministic order.
    """
    bins = (losses.t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
    one_hot = (bins[:, None] == torch.arange(TIME_BINS, device=losses.t.device)).float()
    parts = [losses.parts[name].sum()[None] for name in logged_parts()]
    return torch.cat((losses.total.sum()[None], losses.total @ one_hot, one_hot.sum(0), *parts))


class StepClock:
    """Seconds that the phases of the steps take: on a GPU between events in its stream, on a CPU by the clock of the host."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.spans = device.type == "cuda", []

    @contextmanager
    def phase(self, name: str, on_host: bool = False) -> Iterator[None]:
        """Time what happens inside; on_host=True: by the clock of the host, for a wait of its own. Never waits for the device."""
        now = time.perf_counter if on_host or not self.cuda else self._event
        start = now()
        yield
        self.spans.append((name, start, now()))

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last reading. On a GPU the work up to here must be done."""
        totals = dict.fromkeys(PHASES, 0.0)
        for name, start, end in self.spans:
            totals[name] += end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
        self.spans.clear()
        return totals


def profiler(config: Config, run: Path, start_step: int, rank: int):
    """A torch.profiler of the steps train.profile names, to be told of every step, or None: without the setting, on other ranks
    than 0, and when a run continues behind them. Writes <run>/profile/steps_A-B.json."""
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

    warmup = min(1, skipped)  # a step that is traced and thrown away: the first one is slow
    schedule = torch.profiler.schedule(wait=skipped - warmup, warmup=warmup, active=last - first + 1, repeat=1)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write, record_shapes=True)


def check_wandb(config: Config) -> None:
    """Raise InputError when wandb is asked for and missing, or online without a key."""
    if config.train.wandb == "disabled":
        return
    try:
        import wandb
    except ImportError as error:
        raise InputError(f"train.wandb={config.train.wandb} needs wandb: pip install wandb") from error
    if config.train.wandb == "online" and not wandb.api.api_key:
        raise InputError("train.wandb=online needs a key: run `wandb login`, set WANDB_API_KEY, or use train.wandb=offline")


def _kept_lines(text: str, last_step: int) -> str:
    """The lines of a metrics.jsonl up to a step. A run that was killed may have left its last line half written."""
    kept = []
    for line in text.splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return "".join(kept)


def plot(run: Path) -> Path:
    """Draw the loss and the images/s of a run's metrics.jsonl; returns the PNG."""
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
    """The log of a run: `<run>/metrics.jsonl`, the progress bar, wandb."""

    def __init__(self, run: Path, config: Config, world: World, start_step: int, wandb_id: str | None) -> None:
        """start_step: steps done before; later lines of metrics.jsonl, of a run that was killed, are cut. wandb_id: of the
        run to continue. Raises InputError when wandb does not start."""
        self.speaks, self.batch = world.rank == 0, config.train.batch_size * config.train.accumulation * world.size
        self.wandb, self.wandb_id = None, wandb_id
        if not self.speaks:
            return
        self.path = run / "metrics.jsonl"
        write_atomically(self.path, _kept_lines(self.path.read_text() if self.path.exists() else "", start_step))
        if config.train.wandb != "disabled":
            import wandb

            try:
                self.wandb = wandb.init(
                    project=config.train.wandb_project, name=config.train.name, config=config.to_dict(), dir=run,
                    mode=config.train.wandb, id=wandb_id, resume="allow",
                )  # fmt: skip
            except wandb.errors.Error as error:
                raise InputError(f"train.wandb={config.train.wandb} failed: {error}: use train.wandb=offline") from error
            self.wandb_id = self.wandb.id
        counted = walk(config.model, 1, torch.float32, "none")
        self.world_size, self.flops = world.size, counted.forward + counted.backward  # of an image
        self.peak = None  # FLOP/s of this device
        if card := cards.card_of(device_name(world.device)):
            self.peak = card.peak(config.train.precision)
        self.bar = progress_bar(config.train.total_steps, start_step)
        if card:
            self.say(f"MFU is of {self.peak / 1e12:g} TFLOP/s: {card.name}, {config.train.precision}, {card.source}")
        self.time, self.step = time.perf_counter(), start_step

    def advance(self) -> None:
        """Count a step; never waits for the device."""
        if self.speaks:
            self.bar.update()

    def write(self, step: int, **values: float | list | None) -> None:
        """One line after `step` steps: the values, and by the wall clock since the last line images/s, TFLOP/s of each device (the
        model's own: what is recomputed does not count) and, where its peak is known, MFU."""
        if not self.speaks:
            return
        now = time.perf_counter()
        rate = (step - self.step) * self.batch / (now - self.time)
        self.time, self.step = now, step
        flops = rate / self.world_size * self.flops
        achieved = {"tflops": float(f"{flops / 1e12:.4g}")} | ({"mfu": round(flops / self.peak, 4)} if self.peak else {})
        line = {"step": step, **values, "images_per_s": round(rate, 2), **achieved, "time": round(time.time(), 3)}
        self.event(line)
        if self.wandb:
            flat = {key: value for key, value in line.items() if key not in ("step", "loss_by_t")}
            flat |= {f"loss_by_t/bin_{i}": value for i, value in enumerate(values["loss_by_t"])}
            self.wandb.log(flat, step=step)
        loss = "none" if values["loss"] is None else f"{values['loss']:.4f}"
        share = f"MFU {achieved['mfu']:.0%}" if self.peak else f"{achieved['tflops']:.3g} TFLOP/s"
        self.bar.set_postfix_str(f"loss {loss}, {rate:.0f} images/s, {share}", refresh=False)  # a narrow terminal cuts the end

    def event(self, line: dict) -> None:
        """A line of its own in metrics.jsonl."""
        if self.speaks:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave what happens inside (a checkpoint, a grid of samples) out of images/s."""
        start = time.perf_counter()
        yield
        if self.speaks:
            self.time += time.perf_counter() - start

    def picture(self, step: int, path: Path) -> None:
        """Send a PNG to wandb."""
        if self.wandb:
            import wandb

            self.wandb.log({"samples": wandb.Image(str(path))}, step=step)

    def say(self, text: str) -> None:
        """Print a line beside the bar."""
        if self.speaks:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        if not self.speaks:
            return
        flush(self.path)
        self.bar.close()
        if self.wandb:
            self.wandb.finish()
