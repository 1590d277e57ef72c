"""What a run would need and cost, before it is started: FLOPs, memory, bytes moved, time. Predictions, none of them measured.

FLOPs and activations come from the model itself, on the meta device, which computes shapes only. B images per GPU and micro-step,
T tokens, H width, F hidden width, N parameters, W GPUs, p bytes per weight (bf16 2, fp32 4).
"""

import argparse
import dataclasses
import inspect
import json
from typing import NamedTuple

from fastdit.config import RECOMPUTE, ZERO_STAGES, Config, InputError, add_settings, file_and_overrides, parse
from fastdit.data.imagenet import COUNTS
from fastdit.device import DTYPES
from fastdit.flops import Walk, walk
from fastdit.planning import host
from fastdit.planning.cards import CARDS, GPUS_PER_NODE, NETWORK, Card, find_card
from fastdit.planning.memory import (
    FRAGMENTATION,
    RESERVE,
    ZERO_3_LIVE,
    actual_stage,
    communication,
    memory,
    op_bytes,
    optimizer_bytes,
)
from fastdit.training.optimizer import muon_share

IMAGENET_LATENTS = ["model.in_channels=4", "model.num_classes=1000"]  # of 256-pixel images: 4x32x32

# Shares of the datasheet that the fast end of a prediction counts on.
MATMUL_SHARE = 0.70
BANDWIDTH_SHARE = 0.85
LINK_SHARE = 0.80
# The slow end: how much longer published trainers take than the same sum with unfused ops. fast-DiT's XL/2 on an A100 (0.84 steps
# of 128 images per second, its README) takes 1.54x, LightningDiT's XL/1 on 8 H800s (64 epochs in 10 hours, arXiv:2501.01423) 1.76x:
# their geometric mean. Two trainers, so no more than a guide; tests/planning/test_plan.py compares both.
PUBLISHED_OVER_SUM = 1.65


class Rates(NamedTuple):
    """A step's parts in seconds on each GPU, and images per second of all GPUs at the fast and the slow end."""

    matmuls: float
    ops_fused: float
    ops_eager: float
    optimizer: float
    gradients_sent: float
    weights_sent: float
    fast: float
    slow: float


def rates(config: Config, gpus: int, flops: float, bandwidth: float, link: float) -> Rates:
    """Predict the time of a step from the rates that the hardware reaches: FLOP/s of large matmuls, bytes/s of memory and link.

    Fast: matmuls and fused ops one after the other, and the weights' all-gather; gradients are sent during the backward. Slow:
    unfused ops, all that is sent waited for, and PUBLISHED_OVER_SUM.
    """
    train, dtype = config.train, DTYPES[config.train.precision]
    counted = walk(config.model, 1, dtype, "none")
    images, N = train.batch_size * train.accumulation, counted.parameters
    executed = counted.forward + counted.backward + _recomputed(config, counted)
    matmuls = images * executed / flops
    fused, eager = (images * dtype.itemsize * op_bytes(config.model, f, train.recompute) / bandwidth for f in (True, False))
    optimizer = optimizer_bytes(config, N, gpus) / bandwidth + muon_share(config).flops / gpus / flops
    gradients, weights = (sent / link for sent in communication(config, N, gpus))
    fast = matmuls + fused + optimizer + weights
    slow = (matmuls + eager + optimizer) * PUBLISHED_OVER_SUM + gradients + weights
    return Rates(matmuls, fused, eager, optimizer, gradients, weights, images * gpus / fast, images * gpus / slow)


def _recomputed(config: Config, counted: Walk) -> int:
    """Return the FLOPs per image that train.recompute computes again; the matmuls of light are none."""
    return counted.blocks_forward if config.train.recompute == "full" else 0


def on_card(config: Config, card: Card, gpus: int) -> Rates:
    """Return the rates that a prediction counts on for a card of the table."""
    link = card.link if gpus <= GPUS_PER_NODE else min(card.link, NETWORK)
    return rates(
        config, gpus, card.peak(config.train.precision) * MATMUL_SHARE, card.bandwidth * BANDWIDTH_SHARE, link * LINK_SHARE
    )


def settings(path: str | None, overrides: list[str]) -> Config:
    """Return the config to plan for, of a YAML file or for ImageNet's latents if there is none. Every card of the table has bf16
    matmuls: precision "auto" is bf16."""
    config = parse(path, ([] if path else IMAGENET_LATENTS) + overrides)
    return replaced(config, train__precision="bf16") if config.train.precision == "auto" else config


def replaced(config: Config, **values: object) -> Config:
    """Return the config with other values of the settings that section__key names."""
    for name, value in values.items():
        section, _, key = name.partition("__")
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{key: value})})
    return config


def _check(gpus: int, epochs: float, images: int, price: float | None) -> None:
    """Raise InputError for what cannot be planned."""
    for name, value in (("--gpus", gpus), ("--images", images)):
        if value < 1:
            raise InputError(f"{name} {value} must be at least 1")
    if not 0 < epochs < float("inf"):
        raise InputError(f"--epochs {epochs} must be above 0 and finite")
    if price is not None and not 0 <= price < float("inf"):
        raise InputError(f"--price-per-gpu-hour {price} must be at least 0 and finite")


def make(
    config: Config, card: Card, gpus: int = 8, epochs: float = 80, images: int = COUNTS["train"], price: float | None = None
) -> dict:
    """Return the plan as nested dicts, in bytes, FLOPs, seconds, images/s and hours.

    epochs: passes over `images` images; price: cost of a GPU hour. Raises InputError.
    """
    _check(gpus, epochs, images, price)
    train, dtype = config.train, DTYPES[config.train.precision]
    counted, speed = walk(config.model, 1, dtype, "none"), on_card(config, card, gpus)
    model_flops = counted.forward + counted.backward
    step_images = train.batch_size * train.accumulation
    return {
        "prediction": True,
        "model": {"preset": config.model.preset, "parameters": counted.parameters},
        "hardware": {"gpu": card.name, "gpus": gpus, "precision": train.precision, "source": card.source},
        "flops_per_image": {
            "forward": counted.forward, "backward": counted.backward, "total": model_flops,
            "recomputed": _recomputed(config, counted),
        },
        "memory": _memory(config, card, gpus),
        "bytes_per_step_and_gpu": _bytes(config, gpus, counted.parameters),
        "seconds_per_step": {key: value for key, value in speed._asdict().items() if key not in ("fast", "slow")},
        "host": host.predict(config, gpus, step_images * gpus / speed.fast),
        "images_per_s": {"slow": speed.slow, "fast": speed.fast},
        "mfu": {end: getattr(speed, end) / gpus * model_flops / card.peak(train.precision) for end in ("slow", "fast")},
        "run": _duration(speed, step_images, gpus, epochs, images, price),
        "assumptions": assumptions(config, card, gpus),
    }  # fmt: skip


def _memory(config: Config, card: Card, gpus: int) -> dict:
    """Return the plan's `memory`: what a GPU holds under each ZeRO stage that could be set, and the largest batches."""
    train, dtype = config.train, DTYPES[config.train.precision]
    if gpus == 1:
        stages: tuple[int, ...] = (config.zero.stage,)  # the engine runs that, or without ZeRO
    else:
        stages = (2, 3) if config.zero.offload else ZERO_STAGES
    by_stage = [replaced(config, zero__stage=stage) for stage in stages]
    by_recompute = {recompute: replaced(config, train__recompute=recompute) for recompute in RECOMPUTE}
    largest = {recompute: memory(planned, gpus, card).largest_batch or 0 for recompute, planned in by_recompute.items()}
    return {
        "stage": actual_stage(config, gpus), "recompute": train.recompute, "batch_size": train.batch_size, "card": card.memory,
        "saved_per_image_and_block": {mode: walk(config.model, 1, dtype, mode).saved_per_block for mode in RECOMPUTE},
        "stages": {actual_stage(planned, gpus): memory(planned, gpus, card)._asdict() for planned in by_stage},
        "largest_batch": largest, "fits": train.batch_size <= largest[train.recompute],
    }  # fmt: skip


def _bytes(config: Config, gpus: int, N: int) -> dict:
    """Return the plan's `bytes_per_step_and_gpu`: what a step reads, writes and sends."""
    train, itemsize = config.train, DTYPES[config.train.precision].itemsize
    step_images = train.batch_size * train.accumulation
    gradients, weights = communication(config, N, gpus)
    return {
        "ops_fused": step_images * itemsize * op_bytes(config.model, True, train.recompute),
        "ops_unfused": step_images * itemsize * op_bytes(config.model, False, train.recompute),
        "optimizer": optimizer_bytes(config, N, gpus), "gradients_sent": gradients, "weights_sent": weights,
    }  # fmt: skip


def _duration(speed: Rates, step_images: int, gpus: int, epochs: float, images: int, price: float | None) -> dict:
    """Return the plan's `run`: steps, hours and cost."""
    hours = {end: epochs * images / getattr(speed, end) / 3600 for end in ("fast", "slow")}
    return {
        "images_per_step": step_images * gpus, "steps": round(epochs * images / (step_images * gpus)), "epochs": epochs,
        "images": images, "hours": hours, "gpu_hours": {end: value * gpus for end, value in hours.items()},
        "cost": None if price is None else {end: value * gpus * price for end, value in hours.items()},
    }  # fmt: skip


def assumptions(config: Config, card: Card, gpus: int) -> list[str]:
    """Return what the figures rest on, one sentence each."""
    link = f"{card.link / 1e9:.0f} GB/s to each GPU" if gpus <= GPUS_PER_NODE else f"{NETWORK / 1e9:.0f} GB/s per GPU between nodes"
    lines = [
        f"datasheet: {card.source}: {card.bf16 / 1e12:.0f} TFLOP/s bf16, {card.bandwidth / 1e12:.2f} TB/s, {link}, one direction",
        f"fast end: matmuls at {MATMUL_SHARE:.0%} of that, fused ops at {BANDWIDTH_SHARE:.0%} of the memory's rate, the link at "
        f"{LINK_SHARE:.0%}, gradients sent during the backward, nothing waits for the host or the data",
        f"slow end: unfused ops, all sending waited for, and {PUBLISHED_OVER_SUM}x as long: what fast-DiT (A100) and LightningDiT "
        "(H800) published take over the same sum; two trainers",
        "MFU: the model's own FLOPs over the datasheet's rate; recomputed FLOPs do not count",
        f"memory: tensors alive at once, counted on the meta device; {RESERVE / 1e9:.0f} GB and {FRAGMENTATION:.0%} of the card "
        "set aside for CUDA, NCCL and the allocator; latents are made beforehand",
        host.assumption(),
        "not counted in images/s: a host that is the limit; checkpoints, grids, restarts",
    ]  # fmt: skip
    if gpus == 1 and actual_stage(config, gpus) != config.zero.stage:
        lines.append(f"one GPU has nothing to shard: the engine runs without ZeRO, whatever zero.stage={config.zero.stage} says")
    model = config.model
    if model.keep_tokens < 1:
        between = model.depth - sum(model.dense_blocks or ())
        lines.append(
            f"{between} of {model.depth} blocks see {model.kept_tokens} of {model.tokens} tokens; FLOPs, bytes and time are those "
            "of such a step, memory that of a step of train.dense_steps, if there are any"
        )
    if config.zero.stage == 3:
        lines.append(f"ZeRO 3: DeepSpeed keeps up to {ZERO_3_LIVE / 1e9:.0f} G gathered weights from the forward to the backward")
    if config.zero.offload:
        lines.append("offload: AdamW's time on the host and the copies there are not counted")
    return lines


def _size(size: float) -> str:
    """Format bytes in GB, or in MB below 0.1 GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB" if size else "0"


def _range(values: dict[str, float], form: str) -> str:
    """Format the slow and the fast end, the smaller first."""
    return f"{min(values.values()):{form}} to {max(values.values()):{form}}"


def _misfit(usage: dict) -> str:
    """Say that the batch does not fit the card, and what would."""
    recompute, largest = usage["recompute"], usage["largest_batch"]
    text = f"does not fit: {usage['batch_size']} images per GPU with train.recompute={recompute} take "
    text += f"{_size(usage['stages'][usage['stage']]['peak'])} of {_size(usage['card'])}: "
    others = [f"{size} with {other}" for other, size in largest.items() if other != recompute and size > largest[recompute]]
    if largest[recompute]:
        return text + f"at most {largest[recompute]} do" + (f" ({', '.join(others)})" if others else "")
    return text + "not one does" + (f" ({', '.join(others)})" if others else ": use more GPUs, zero.stage=3 or zero.offload=true")


def _overview(plan: dict) -> list[str]:
    """Return the lines on model, hardware, FLOPs, batch and activations."""
    run, usage, flops, hardware = plan["run"], plan["memory"], plan["flops_per_image"], plan["hardware"]
    recomputed = f"; {flops['recomputed'] / 1e12:.4g} more recomputed" if flops["recomputed"] else ""
    saved = ", ".join(f"{recompute} {size / 1e6:.2f}" for recompute, size in usage["saved_per_image_and_block"].items())
    largest = ", ".join(f"{recompute} {size}" for recompute, size in usage["largest_batch"].items())
    zero = f"ZeRO {usage['stage']}" if usage["stage"] else "without ZeRO"
    rows = {
        "model": f"{plan['model']['preset']}, {plan['model']['parameters'] / 1e6:.1f} M parameters",
        "hardware": f"{hardware['gpus']} x {hardware['gpu']}, {hardware['precision']}",
        "TFLOP per image": f"{flops['total'] / 1e12:.4g} (forward {flops['forward'] / 1e12:.4g}, backward "
        f"{flops['backward'] / 1e12:.4g}{recomputed})",
        "batch": f"{usage['batch_size']} images per GPU, {run['images_per_step']:,} per step, {run['steps']:,} steps for "
        f"{run['epochs']:g} epochs of {run['images']:,}",
        "saved per block": f"{saved} MB per image, by train.recompute",
        "largest batch": f"{largest} per GPU, by train.recompute, {zero}",
    }
    width = max(map(len, rows))
    return [f"{name:{width}}  {text}" for name, text in rows.items()]


def _memory_table(usage: dict) -> list[str]:
    """Return the lines on what one GPU holds, one per ZeRO stage."""
    heads = ("ZeRO", "weights", "masters, moments", "EMA", "gradients", "buckets", "activations", "peak", "largest batch")
    table: list[tuple[str, ...]] = [heads]
    for stage, values in usage["stages"].items():
        *sizes, largest = values.values()
        table.append((str(stage or "none"), *map(_size, sizes), str(largest)))
    lines = [f"memory per GPU, of {_size(usage['card'])}, train.recompute={usage['recompute']}"]
    return lines + ["  ".join(f"{cell:>{max(7, len(head))}}" for cell, head in zip(row, heads, strict=True)) for row in table]


def _step_table(plan: dict) -> list[str]:
    """Return the lines on the bytes and milliseconds of a step's parts."""
    moved, seconds = plan["bytes_per_step_and_gpu"], plan["seconds_per_step"]
    rows = [
        ("matmuls, attention", None, seconds["matmuls"]),
        ("ops, fused", moved["ops_fused"], seconds["ops_fused"]),
        ("ops, unfused", moved["ops_unfused"], seconds["ops_eager"]),
        ("update, EMA, buckets", moved["optimizer"], seconds["optimizer"]),
        ("gradients sent", moved["gradients_sent"], seconds["gradients_sent"]),
        ("weights sent", moved["weights_sent"], seconds["weights_sent"]),
    ]
    lines = [f"{'one step, per GPU':22} {'moved':>9} {'ms':>8}"]
    for name, size, time in rows:
        lines.append(f"{name:22} {'' if size is None else _size(size):>9} {time * 1e3:>8.2f}")
    return lines


def describe(plan: dict) -> str:
    """Format a plan as text."""
    run, usage = plan["run"], plan["memory"]
    lines = ["Predictions from the model's shapes and datasheets: nothing here was measured.", ""]
    if not usage["fits"]:
        lines += [_misfit(usage), ""]
    lines += [*_overview(plan), "", *_memory_table(usage), "", *_step_table(plan), ""]
    lines += [
        f"images/s   {_range(plan['images_per_s'], ',.0f')} (MFU {_range(plan['mfu'], '.0%')})",
        f"host       {host.describe(plan['host'])}",
        f"hours      {_range(run['hours'], ',.1f')}",
        f"GPU hours  {_range(run['gpu_hours'], ',.0f')}",
    ]
    if run["cost"]:
        lines.append(f"cost       {_range(run['cost'], ',.0f')}, in the currency of the price")
    return "\n".join([*lines, "", "assumptions", *(f"- {line}" for line in plan["assumptions"])])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastdit plan`."""
    parser.description = (
        "Predict what a run needs, from the model's shapes and a table of datasheets: nothing is measured, and no GPU is needed. "
        "Without a CONFIG.yaml the data are ImageNet's latents (4x32x32, 1000 classes)."
    )
    parser.epilog = "example:\n  fastdit plan --preset XL/2 --gpu h100 --gpus 8 --epochs 80 --price-per-gpu-hour 2.5"
    add_settings(parser)
    add = parser.add_argument
    add("--preset", metavar="NAME", help="Model, as model.preset (default: that of CONFIG.yaml, or XL/2 without one).")
    add("--gpu", default="h100", metavar="NAME", help=f"GPU, one of {', '.join(CARDS)} (default: %(default)s).")
    add("--gpus", type=int, metavar="N", help=f"Number of GPUs, {GPUS_PER_NODE} per node (default: %(default)s).")
    add("--epochs", type=float, metavar="N", help="Passes over the data (default: %(default)s).")
    add("--images", type=int, metavar="N", help="Images per epoch (default: %(default)s, ImageNet's).")
    add("--batch-size", type=int, metavar="N", help="Images per GPU and micro-step, as train.batch_size.")
    add("--stage", type=int, choices=ZERO_STAGES, help="ZeRO stage, as zero.stage.")
    add(
        "--recompute", choices=RECOMPUTE,
        help="What the backward pass computes again to save memory, as train.recompute: nothing, the MLP's activations "
        "(light) or whole blocks (full).",
    )  # fmt: skip
    add("--price-per-gpu-hour", type=float, dest="price", metavar="X", help="Price of a GPU hour, which adds the cost of the run.")
    add("--json", action="store_true", help="Print all figures as JSON, in bytes, FLOPs and seconds.")
    defaults = {name: p.default for name, p in inspect.signature(make).parameters.items()}
    parser.set_defaults(**{name: defaults[name] for name in ("gpus", "epochs", "images")})


def run(arguments: argparse.Namespace) -> str:
    """Plan, and return the plan as text or JSON. Raises InputError."""
    path, overrides = file_and_overrides(arguments.settings)
    options = {
        "model.preset": arguments.preset or (None if path else "XL/2"), "train.batch_size": arguments.batch_size,
        "zero.stage": arguments.stage, "train.recompute": arguments.recompute,
    }  # fmt: skip
    overrides += [f"{key}={value}" for key, value in options.items() if value is not None]
    config = settings(path, overrides)
    plan = make(config, find_card(arguments.gpu), arguments.gpus, arguments.epochs, arguments.images, arguments.price)
    return json.dumps(plan, indent=1) if arguments.json else describe(plan)
