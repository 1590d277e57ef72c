"""What a run would need and cost, before it is started: FLOPs, memory, bytes moved, time. Predictions, none of them measured.

FLOPs and activations come from the model itself, on the meta device, which computes shapes alone. B images a GPU and micro-step,
T tokens, H width, F hidden width, N parameters, W GPUs, p bytes of a weight (bf16 2, fp32 4).
"""

import dataclasses
from typing import NamedTuple

import torch

from fastdit.config import Config, InputError, parse
from fastdit.flops import walk
from fastdit.planning import host
from fastdit.planning.cards import GPUS_A_NODE, NETWORK, Card
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

IMAGENET_LATENTS = ["model.in_channels=4", "model.num_classes=1000"]  # of 256-pixel images: 4x32x32


# Shares of the datasheet that the fast end of a prediction counts on.
MATMUL_SHARE = 0.70
BANDWIDTH_SHARE = 0.85
LINK_SHARE = 0.80
# The slow end: how much longer published trainers take than the same sum with unfused ops. fast-DiT's XL/2 on an A100 (0.84 steps
# of 128 images a second, its README) takes 1.54x, LightningDiT's XL/1 on 8 H800s (64 epochs in 10 hours, arXiv:2501.01423) 1.76x:
# their geometric mean. Two trainers, so no more than a guide; tests/test_plan.py compares both.
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
    """The time of a step, from what the hardware reaches: FLOP/s of large matmuls, bytes/s of memory and of the link.

    Fast: matmuls and fused ops one after the other, and the weights' all-gather; gradients are sent behind the backward. Slow:
    unfused ops, all that is sent waited for, and PUBLISHED_OVER_SUM.
    """
    train, bf16 = config.train, config.train.precision == "bf16"
    p, dtype = (2, torch.bfloat16) if bf16 else (4, torch.float32)
    counted = walk(config.model, 1, dtype, "none")
    images, N = train.batch_size * train.accumulation, counted.parameters
    executed = counted.forward + counted.backward + (counted.blocks_forward if train.recompute == "full" else 0)
    matmuls = images * executed / flops
    fused, eager = (images * p * op_bytes(config.model, how, train.recompute) / bandwidth for how in (True, False))
    optimizer = optimizer_bytes(config, N, gpus) / bandwidth
    gradients, weights = (sent / link for sent in communication(config, N, gpus))
    fast = matmuls + fused + optimizer + weights
    slow = (matmuls + eager + optimizer) * PUBLISHED_OVER_SUM + gradients + weights
    return Rates(matmuls, fused, eager, optimizer, gradients, weights, images * gpus / fast, images * gpus / slow)


def on_card(config: Config, card: Card, gpus: int) -> Rates:
    """The rates that a prediction counts on for a card of the table."""
    link = card.link if gpus <= GPUS_A_NODE else min(card.link, NETWORK)
    return rates(
        config, gpus, card.peak(config.train.precision) * MATMUL_SHARE, card.bandwidth * BANDWIDTH_SHARE, link * LINK_SHARE
    )


def settings(path: str | None, overrides: list[str]) -> Config:
    """The config to plan for: of a YAML file, or ImageNet's latents where there is none; on these GPUs "auto" is bf16."""
    config = parse(path, ([] if path else IMAGENET_LATENTS) + overrides)
    precision = "bf16" if config.train.precision == "auto" else config.train.precision
    return dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))


def replaced(config: Config, **keys: object) -> Config:
    """The config with other settings, named section__key."""
    for name, value in keys.items():
        section, _, key = name.partition("__")
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{key: value})})
    return config


def make(config: Config, card: Card, gpus: int, epochs: float, images: int, price: float | None) -> dict:
    """The whole plan as nested dicts, in bytes, FLOPs, seconds, images/s, hours. price: of a GPU hour. Raises InputError."""
    for name, value in (("--gpus", gpus), ("--images", images)):
        if value < 1:
            raise InputError(f"{name} {value} must be at least 1")
    if not 0 < epochs < float("inf"):
        raise InputError(f"--epochs {epochs} must be above 0")
    if price is not None and not 0 <= price < float("inf"):
        raise InputError(f"--price-per-gpu-hour {price} must be at least 0")
    train = config.train
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    counted, speed = walk(config.model, 1, dtype, "none"), on_card(config, card, gpus)
    model_flops = counted.forward + counted.backward
    peak = card.peak(train.precision)
    step_images = train.batch_size * train.accumulation
    p, N = dtype.itemsize, counted.parameters
    # on one GPU the engine's own choice alone
    stages = (config.zero.stage,) if gpus == 1 else (2, 3) if config.zero.offload else (1, 2, 3)
    largest = {how: memory(replaced(config, train__recompute=how), gpus, card).largest_batch for how in ("none", "light", "full")}
    gradients, weights = communication(config, N, gpus)
    hours = {end: epochs * images / getattr(speed, end) / 3600 for end in ("fast", "slow")}
    return {
        "prediction": True,
        "model": {"preset": config.model.preset, "parameters": N},
        "hardware": {"gpu": card.name, "gpus": gpus, "precision": train.precision, "source": card.source},
        "flops_per_image": {
            "forward": counted.forward, "backward": counted.backward, "total": model_flops,
            "recomputed": counted.blocks_forward if train.recompute == "full" else 0,
        },
        "memory": {
            "stage": actual_stage(config, gpus), "recompute": train.recompute, "batch_size": train.batch_size,
            "card": card.memory,
            "saved_per_image_and_block": {
                how: walk(config.model, 1, dtype, how).saved_per_block for how in ("none", "light", "full")
            },
            "stages": {
                actual_stage(planned, gpus): memory(planned, gpus, card)._asdict()
                for planned in (replaced(config, zero__stage=stage) for stage in stages)
            },
            "largest_batch": largest, "fits": train.batch_size <= largest[train.recompute],
        },
        "bytes_per_step_and_gpu": {
            "ops_fused": step_images * p * op_bytes(config.model, True, train.recompute),
            "ops_unfused": step_images * p * op_bytes(config.model, False, train.recompute),
            "optimizer": optimizer_bytes(config, N, gpus), "gradients_sent": gradients, "weights_sent": weights,
        },
        "seconds_per_step": {key: value for key, value in speed._asdict().items() if key not in ("fast", "slow")},
        "host": host.predict(config, gpus, step_images * gpus / speed.fast),
        "images_per_s": {"slow": speed.slow, "fast": speed.fast},
        "mfu": {end: getattr(speed, end) / gpus * model_flops / peak for end in ("slow", "fast")},
        "run": {
            "images_a_step": step_images * gpus, "steps": round(epochs * images / (step_images * gpus)), "epochs": epochs,
            "images": images, "hours": hours, "gpu_hours": {end: value * gpus for end, value in hours.items()},
            "cost": None if price is None else {end: value * gpus * price for end, value in hours.items()},
        },
        "assumptions": assumptions(config, card, gpus),
    }  # fmt: skip


def assumptions(config: Config, card: Card, gpus: int) -> list[str]:
    """What the figures rest on."""
    link = f"{card.link / 1e9:.0f} GB/s to each GPU" if gpus <= GPUS_A_NODE else f"{NETWORK / 1e9:.0f} GB/s a GPU between nodes"
    lines = [
        f"datasheet: {card.source}: {card.bf16 / 1e12:.0f} TFLOP/s bf16, {card.bandwidth / 1e12:.2f} TB/s, {link}, one direction",
        f"fast end: matmuls at {MATMUL_SHARE:.0%} of that, fused ops at {BANDWIDTH_SHARE:.0%} of the memory's rate, the link at "
        f"{LINK_SHARE:.0%}, gradients sent behind the backward, nothing waits for the host or the data",
        f"slow end: unfused ops, all sending waited for, and {PUBLISHED_OVER_SUM}x as long: what fast-DiT (A100) and LightningDiT "
        "(H800) published take over the same sum; two trainers",
        "MFU: the model's own FLOPs over the datasheet's rate; what is recomputed does not count",
        f"memory: tensors alive at once, counted on the meta device; {RESERVE / 1e9:.0f} GB and {FRAGMENTATION:.0%} of the card "
        "set aside for CUDA, NCCL and the allocator; latents are made beforehand",
        host.assumption(),
        "not counted in images/s: a host that is the limit; checkpoints, grids, restarts",
    ]  # fmt: skip
    if actual_stage(config, gpus) != config.zero.stage:
        lines.append(f"one GPU has nothing to shard: the engine runs without ZeRO, whatever zero.stage={config.zero.stage} says")
    if config.zero.stage == 3:
        lines.append(f"ZeRO 3: DeepSpeed keeps up to {ZERO_3_LIVE / 1e9:.0f} G gathered weights from the forward to the backward")
    if config.zero.offload:
        lines.append("offload: AdamW's time on the host and the copies there are not counted")
    return lines


def _size(size: float) -> str:
    """Bytes as text: in GB, or MB below 0.1 GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB" if size else "0"


def _misfit(memory: dict) -> str:
    """What is wrong where the batch does not fit the card, and what would."""
    how, largest = memory["recompute"], memory["largest_batch"]
    text = f"does not fit: {memory['batch_size']} images a GPU with train.recompute={how} take "
    text += f"{_size(memory['stages'][memory['stage']]['peak'])} of {_size(memory['card'])}: "
    others = [f"{size} with {other}" for other, size in largest.items() if other != how and size > largest[how]]
    if largest[how]:
        return text + f"at most {largest[how]} do" + (f" ({', '.join(others)})" if others else "")
    return text + "not one does" + (f" ({', '.join(others)})" if others else ": use more GPUs, zero.stage=3 or zero.offload=true")


def describe(plan: dict) -> str:
    """A plan as text."""
    run, memory, speed, moved = plan["run"], plan["memory"], plan["images_per_s"], plan["bytes_per_step_and_gpu"]
    flops, hardware = plan["flops_per_image"], plan["hardware"]
    between = lambda values, form: f"{min(values.values()):{form}} to {max(values.values()):{form}}"
    rows = [
        ("model", f"{plan['model']['preset']}, {plan['model']['parameters'] / 1e6:.1f} M parameters"),
        ("hardware", f"{hardware['gpus']} x {hardware['gpu']}, {hardware['precision']}"),
        ("TFLOP an image", f"{flops['total'] / 1e12:.4g} (forward {flops['forward'] / 1e12:.4g}, backward "
         f"{flops['backward'] / 1e12:.4g}"
         + (f"; {flops['recomputed'] / 1e12:.4g} more recomputed)" if flops["recomputed"] else ")")),
        ("batch", f"{memory['batch_size']} images a GPU, {run['images_a_step']:,} a step, {run['steps']:,} steps for "
         f"{run['epochs']:g} epochs of {run['images']:,}"),
        ("saved a block", ", ".join(f"{how} {size / 1e6:.2f}" for how, size in memory["saved_per_image_and_block"].items())
         + " MB an image, by train.recompute"),
        ("largest batch", ", ".join(f"{how} {size}" for how, size in memory["largest_batch"].items())
         + " a GPU, by train.recompute, " + (f"ZeRO {memory['stage']}" if memory["stage"] else "without ZeRO")),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    lines = ["Predictions from the model's shapes and datasheets: nothing here was measured.", ""]
    lines += [] if memory["fits"] else [_misfit(memory), ""]
    lines += [f"{name:{width}}  {text}" for name, text in rows]
    heads = ("ZeRO", "weights", "masters, moments", "EMA", "gradients", "buckets", "activations", "peak", "largest batch")
    lines += ["", f"memory a GPU, of {_size(memory['card'])}, train.recompute={memory['recompute']}"]
    table = [heads]
    for stage, values in memory["stages"].items():
        table.append((str(stage or "none"), *(_size(values[key]) for key in list(values)[:-1]), str(values["largest_batch"])))
    lines += ["  ".join(f"{cell:>{max(7, len(head))}}" for cell, head in zip(row, heads, strict=True)) for row in table]
    lines += ["", f"{'one step, a GPU':22} {'moved':>9} {'ms':>8}"]
    for name, size, time in (
        ("matmuls, attention", None, "matmuls"), ("ops, fused", "ops_fused", "ops_fused"),
        ("ops, unfused", "ops_unfused", "ops_eager"),
        ("AdamW, EMA, buckets", "optimizer", "optimizer"), ("gradients sent", "gradients_sent", "gradients_sent"),
        ("weights sent", "weights_sent", "weights_sent"),
    ):  # fmt: skip
        seconds = plan["seconds_per_step"][time]
        lines.append(f"{name:22} {_size(moved[size]) if size else '':>9} {seconds * 1e3:>8.2f}")
    lines += [
        "",
        f"images/s   {between(speed, ',.0f')} (MFU {between(plan['mfu'], '.0%')})",
        f"host       {host.describe(plan['host'])}",
        f"hours      {between(run['hours'], ',.1f')}",
    ]
    lines.append(f"GPU hours  {between(run['gpu_hours'], ',.0f')}")
    if run["cost"]:
        lines.append(f"cost       {between(run['cost'], ',.0f')}, in the currency of the price")
    return "\n".join([*lines, "", "assumptions", *(f"- {line}" for line in plan["assumptions"])])
