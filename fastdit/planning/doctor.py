"""`fastdit doctor`: a machine's measured rates, the time of the step that they allow, and of the step that training takes.

Under torchrun all ranks measure at once, and rank 0 reports what it measured.
"""

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fastdit import distributed, progress
from fastdit.checkpoint import RunState
from fastdit.config import Config, add_settings, file_and_overrides, parse
from fastdit.device import DTYPES, check_backend, device_name, synchronize
from fastdit.planning import cards, plan
from fastdit.planning.machine_rates import attention_rate, copy_rate, hidden_share, link_rate, matmul_rate, seconds
from fastdit.training import engine
from fastdit.training.loop import Trainer, open_data

WARMUP_STEPS = 2
TIMED_STEPS = 6
PROFILED_STEPS = 2
BATCHES = 20  # that the loader's rate is measured over, after a first one
# Names in the profiler: ops whose self time (on CUDA that of their kernels) is matmuls; gloo's spans and NCCL's kernels.
MATMULS = re.compile(
    r"aten::(addmm|mm|bmm|baddbmm|linear|_scaled_dot_product|_(flash|efficient|cudnn)_attention_)|mkl(dnn)?::|flash_attn::"
)
COLLECTIVES = re.compile(r"gloo:|ncclDevKernel")


def data_rate(loader, config: Config, device: torch.device) -> float:
    """Return the images/s that this rank's loader gives while nothing else runs, from its first steps."""
    batches = iter(range(BATCHES + 1))
    accumulation = config.train.accumulation
    per_batch = seconds(lambda: loader.batch(*divmod(next(batches), accumulation)), device, BATCHES)
    return config.train.batch_size / per_batch


def profiled(events: Iterable, device: torch.device) -> tuple[float, float]:
    """Return the seconds in (matmuls and attention, collectives) of a profile's key_averages."""
    matmuls = collectives = 0.0  # microseconds
    for event in events:
        if MATMULS.match(event.key):
            matmuls += event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if COLLECTIVES.match(event.key):  # gloo's spans have no self time
            collectives += event.self_device_time_total if device.type == "cuda" else event.cpu_time_total
    return matmuls / 1e6, collectives / 1e6


def measured_step(config: Config, world: distributed.World, loader, codec, run: Path) -> dict[str, float]:
    """Return the seconds of a training step ("step") and of its phases, and of its matmuls and collectives in a profile of further
    steps."""
    trainer = Trainer(config, world, loader, codec, run, None, RunState())
    first = BATCHES // config.train.accumulation + 1  # loaders read ahead: continue after what data_rate read

    def steps(numbers: Iterable[int]) -> None:
        for step in numbers:
            trainer.step(first + step)
            trainer.log.advance()
        synchronize(world.device)

    try:
        steps(range(WARMUP_STEPS))
        trainer.clock.read()
        start = time.perf_counter()
        steps(range(WARMUP_STEPS, WARMUP_STEPS + TIMED_STEPS))
        elapsed = time.perf_counter() - start
        phases = trainer.clock.read()
        activities = [ProfilerActivity.CPU]
        if world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiler:
            steps(range(WARMUP_STEPS + TIMED_STEPS, WARMUP_STEPS + TIMED_STEPS + PROFILED_STEPS))
    finally:
        trainer.log.close()
    matmuls, collectives = profiled(profiler.key_averages(), world.device)
    per_step = {phase: spent / TIMED_STEPS for phase, spent in {"step": elapsed, **phases}.items()}
    return {**per_step, "matmuls": matmuls / PROFILED_STEPS, "collectives": collectives / PROFILED_STEPS}


def compare(expected: plan.Rates, fused: bool, step: dict[str, float], overlapped: bool) -> dict[str, dict[str, float]]:
    """Return {part: {"expected", "measured"}} in seconds per step: data, matmuls, ops, optimizer, communication.

    overlapped: gradients are sent during the backward, as on CUDA, and count on neither side. A profile does not tell which phase
    a collective was in: its time is divided between backward and optimizer as the bytes are.
    """
    sent = expected.gradients_sent + expected.weights_sent
    in_backward = step["collectives"] * expected.gradients_sent / sent if sent else 0.0
    in_optimizer = step["collectives"] - in_backward
    in_backward = 0.0 if overlapped else in_backward
    parts = {
        "data": (0.0, step["data_wait"]),
        "matmuls": (expected.matmuls, step["matmuls"]),
        "ops": (
            expected.ops_fused if fused else expected.ops_eager, step["forward_backward"] - step["matmuls"] - in_backward,
        ),
        "optimizer": (expected.optimizer, step["optimizer"] + step["ema"] - in_optimizer),
        "communication": (expected.weights_sent if overlapped else sent, in_backward + in_optimizer),
    }  # fmt: skip
    return {name: {"expected": predicted, "measured": max(0.0, measured)} for name, (predicted, measured) in parts.items()}


def examine(config: Config) -> dict:
    """Measure everything for a config, in seconds, bytes/s, FLOP/s and images/s of all ranks. All ranks must call it.

    Writes only into a temporary folder. Raises InputError for bad input, as training would.
    """
    world = distributed.start(config.train.device)
    config = engine.resolve_precision(config, world.device)
    backend = check_backend(world.device)
    _, loader, codec = open_data(config, world)
    model, train, device = config.model, config.train, world.device
    tokens = (model.input_size // model.patch_size) ** 2
    up = model.hidden if model.mlp == "gelu" else 2 * model.hidden
    shape = (train.batch_size * tokens, model.width, up)  # the MLP's first matmul: M, K, N
    measured = _measured_rates(config, world, loader, shape)
    settings = {"total_steps": WARMUP_STEPS + TIMED_STEPS + PROFILED_STEPS, "wandb": "disabled", "profile": None, "resume": "never"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        short = plan.replaced(config, **{f"train__{key}": value for key, value in settings.items()})
        step = measured_step(short, world, loader, codec, Path(folder))
    expected = plan.rates(config, world.size, measured["matmul"], measured["copy"], measured["link"] or float("inf"))
    parts = compare(expected, backend != "reference", step, device.type == "cuda")
    images = train.batch_size * train.accumulation * world.size
    card = cards.card_of(device_name(device))
    of_datasheet = measured["matmul"] / card.peak(train.precision) if card else None
    return {
        "device": device_name(device), "ranks": world.size, "precision": train.precision, "kernels": backend,
        "compiled": engine.compiles(config, world), "data_source": config.data.source, "images_per_step": images,
        "matmul": {"shape": shape, "flops": measured["matmul"], "of_datasheet": of_datasheet},
        "copy_bytes_per_s": measured["copy"], "link_bytes_per_s": measured["link"],
        "attention": dict(zip(("kind", "flops"), measured["attention"], strict=True)), "overlap_hidden": measured["overlap"],
        "data_images_per_s": measured["data"] * world.size, "step_s": step["step"], "parts_s": parts,
        "images_per_s": {
            "expected": images / sum(part["expected"] for part in parts.values()), "measured": images / step["step"],
        },
        "largest_gap": max(parts, key=lambda name: parts[name]["measured"] - parts[name]["expected"]),
    }  # fmt: skip


def _measured_rates(config: Config, world: distributed.World, loader, shape: tuple[int, int, int]) -> dict:
    """Return the rates of matmuls, copies, the link, attention, overlap and data, by these names."""
    train, device, dtype = config.train, world.device, DTYPES[config.train.precision]
    measurements = {
        "matmul": lambda: matmul_rate(shape, dtype, device),
        "copy": lambda: copy_rate(device),
        "link": lambda: link_rate(world.size, device),
        "attention": lambda: attention_rate(config.model, train.batch_size, dtype, device),
        "overlap": lambda: hidden_share(device, shape, dtype),
        "data": lambda: data_rate(loader, config, device),
    }
    rates = {}
    with progress.progress_bar(len(measurements), unit="rate", disable=world.rank != 0) as bar:
        for name, measurement in measurements.items():
            bar.set_description(name)
            rates[name] = measurement()
            bar.update()
    return rates


def describe(report: dict) -> str:
    """Format what `examine` returned as text."""
    return "\n".join([*_rates_table(report), "", *_step_table(report), "", *_summary(report)])


def _rates_table(report: dict) -> list[str]:
    matmul, attention, link, hidden = (report[key] for key in ("matmul", "attention", "link_bytes_per_s", "overlap_hidden"))
    M, K, N = matmul["shape"]
    share = f", {matmul['of_datasheet']:.0%} of its datasheet's peak" if matmul["of_datasheet"] else ""
    compiled = engine.COMPILED[report["compiled"]]
    overlap = "not applicable: a CPU has no streams"
    if hidden is not None:
        overlap = f"{hidden:.0%} of a copy on a stream of its own is hidden behind matmuls"
    rows = {
        "device": f"{report['ranks']} x {report['device']}; {report['precision']}, {report['kernels']} kernels, {compiled}",
        "matmul": f"{matmul['flops'] / 1e12:.3g} TFLOP/s, [{M},{K}] by [{K},{N}]{share}",
        "attention": f"{attention['flops'] / 1e12:.3g} TFLOP/s forward and backward, {attention['kind']}",
        "copy": f"{report['copy_bytes_per_s'] / 1e9:.3g} GB/s, reads and writes",
        "link": f"{link / 1e9:.3g} GB/s sent by each rank in an all-reduce" if link else "not measured: one rank",
        "overlap": overlap,
        "data": f"{report['data_images_per_s']:,.0f} images/s from {report['data_source']}, nothing else running",
    }
    return [f"{name:10} {text}" for name, text in rows.items()]


def _step_table(report: dict) -> list[str]:
    rows = {name: (part["expected"], part["measured"]) for name, part in report["parts_s"].items()}
    rows["all"] = (sum(part["expected"] for part in report["parts_s"].values()), report["step_s"])
    head = f"a step of {report['images_per_step']} images, ms"
    lines = [f"{head:30} {'expected':>9} {'measured':>9}"]
    return lines + [f"{name:30} {expected * 1e3:>9.1f} {measured * 1e3:>9.1f}" for name, (expected, measured) in rows.items()]


def _summary(report: dict) -> list[str]:
    rate, name = report["images_per_s"], report["largest_gap"]
    part = report["parts_s"][name]
    gap = (part["measured"] - part["expected"]) * 1e3
    return [
        f"images/s: {rate['expected']:,.1f} expected at these rates, {rate['measured']:,.1f} measured in training steps",
        f"largest gap: {name}, {gap:.1f} ms more than expected" if gap > 0 else "no part takes longer than expected",
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastdit doctor`."""
    parser.description = (
        "Measure the rates of matmuls, attention, memory, links and data, the step that they allow, and a few real training steps; "
        "name the largest gap. Runs as one process or under torchrun, and leaves no files."
    )
    parser.epilog = "example:\n  fastdit doctor launch/configs/quickstart.yaml train.batch_size=128"
    add_settings(parser)
    parser.add_argument("--json", action="store_true", help="Print all figures as JSON, in seconds, bytes/s, FLOP/s and images/s.")


def run(arguments: argparse.Namespace) -> str:
    """Examine, and return the report as text or JSON. Raises InputError."""
    report = examine(parse(*file_and_overrides(arguments.settings)))
    return json.dumps(report, indent=1) if arguments.json else describe(report)
