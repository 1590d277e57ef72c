"""What a run would need and cost, before it is started: FLOPs, memory, bytes moved, time. Predictions, none of them measured.

FLOPs and activations come from the model itself, on the meta device, which computes shapes alone. B images a GPU and micro-step,
T tokens, H width, F hidden width, N parameters, W GPUs, p bytes of a weight (bf16 2, fp32 4).
"""

import dataclasses
import functools
import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit import host, kernels
from fastdit.config import Config, InputError, ModelConfig, nearest, parse
from fastdit.engine import deepspeed_config
from fastdit.model import Attention, DiT, Mlp

IMAGENET_IMAGES = 1_281_167  # of the training set
IMAGENET_LATENTS = ["model.in_channels=4", "model.num_classes=1000"]  # of 256-pixel images: 4x32x32


class Card(NamedTuple):
    """Datasheet figures of one GPU: dense bf16 with fp32 sums, fp32 without tensor cores, memory, its rate, and the link to the
    node's other GPUs in one direction (half of the number that NVIDIA prints)."""

    name: str
    device: str  # what torch.cuda.get_device_name says of it, and of no other
    bf16: float  # FLOP/s
    fp32: float  # FLOP/s
    bandwidth: float  # bytes/s
    memory: float  # bytes
    link: float  # bytes/s
    source: str

    def peak(self, precision: str) -> float:
        """FLOP/s in train.precision."""
        return self.bf16 if precision == "bf16" else self.fp32


# Where a datasheet gives tensor-core rates with sparsity, half of them.
CARDS = {
    "a100": Card("A100 SXM 80 GB", "NVIDIA A100-SXM4-80GB", 312e12, 19.5e12, 2.039e12, 80e9, 300e9, "NVIDIA A100 datasheet (2021)"),
    "h100": Card("H100 SXM", "NVIDIA H100 80GB HBM3", 989.4e12, 67e12, 3.35e12, 80e9, 450e9, "NVIDIA H100 datasheet (2023)"),
    "h800": Card("H800 SXM", "NVIDIA H800", 989.4e12, 67e12, 3.35e12, 80e9, 200e9,
                 "as H100 SXM, with NVLink cut to 400 GB/s in both directions"),
    "h200": Card("H200 SXM", "NVIDIA H200", 989.4e12, 67e12, 4.8e12, 141e9, 450e9, "NVIDIA H200 datasheet (2024)"),
    "b200": Card("B200 SXM", "NVIDIA B200", 2250e12, 75e12, 8e12, 180e9, 900e9,
                 "NVIDIA HGX B200 datasheet (2025), an eighth of a board"),
    "rtx4090": Card("RTX 4090", "NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12, 1.008e12, 24e9, 32e9,
                    "NVIDIA Ada whitepaper (2022); PCIe 4.0 x16"),
    "rtx5090": Card("RTX 5090", "NVIDIA GeForce RTX 5090", 209.5e12, 104.8e12, 1.792e12, 32e9, 64e9,
                    "NVIDIA RTX Blackwell whitepaper (2025); PCIe 5.0 x16"),
}  # fmt: skip
GPUS_A_NODE = 8
NETWORK = 50e9  # bytes/s a GPU and direction between nodes: one 400 Gb/s adapter for each

# Shares of the datasheet that the fast end of a prediction counts on.
MATMUL_SHARE = 0.70
BANDWIDTH_SHARE = 0.85
LINK_SHARE = 0.80
# The slow end: how much longer published trainers take than the same sum with unfused ops. fast-DiT's XL/2 on an A100 (0.84 steps
# of 128 images a second, its README) takes 1.54x, LightningDiT's XL/1 on 8 H800s (64 epochs in 10 hours, arXiv:2501.01423) 1.76x:
# their geometric mean. Two trainers, so no more than a guide; tests/test_plan.py compares both.
PUBLISHED_OVER_SUM = 1.65

RESERVE = 2e9  # bytes: CUDA context, cuBLAS and NCCL workspaces
FRAGMENTATION = 0.05  # of a card's memory, that the allocator cannot use
ZERO_3_LIVE = 1_000_000_000  # DeepSpeed's default: this many gathered elements are kept between forward and backward


class Live(TorchDispatchMode):
    """Counts the bytes that live tensors take, from their creation to the end of their storage."""

    def __init__(self, ignored: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet(t.untyped_storage() for t in ignored)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and t.untyped_storage() not in self.seen:
                storage = t.untyped_storage()
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


class Walk(NamedTuple):
    """One forward and backward of a batch on the meta device."""

    forward: int  # FLOPs of matmuls and attention
    backward: int  # without what is recomputed
    blocks_forward: int  # the share of the blocks in `forward`
    kept: int  # bytes that the forward leaves for the backward
    kept_block: int  # of them a block's
    peak: int  # most bytes of activations and their gradients at once
    parameters: int


@functools.cache
def walk(model: ModelConfig, batch: int, dtype: torch.dtype, recompute: str) -> Walk:
    """Count a forward and backward of `batch` images. recompute: "none" | "light" | "full", as train.checkpoint.

    FLOPs: 2·M·N·K of every Linear, and again for each of its two gradients that is needed; 4·T²·H of attention and twice that
    backward (a fused backward's second score matmul is not counted: model FLOPs). Parameters' gradients are not in `peak`.
    """
    if model.attention == "flash":  # keeps the same as sdpa's fused kernels
        model = dataclasses.replace(model, attention="sdpa")
    with torch.device("meta"):
        dit = DiT(model)
    dit.to("meta", dtype).train().set_recompute(recompute)
    for p in dit.parameters():  # ZeRO moves each gradient into a bucket
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    live = Live([*dit.parameters(), *dit.buffers()])
    forward, backward, edges = 0, 0, []

    def linear(module: nn.Linear, inputs: tuple, out: Tensor) -> None:
        nonlocal forward, backward
        flops = 2 * out.numel() * module.in_features
        forward += flops
        backward += flops * (1 + inputs[0].requires_grad)

    def mlp(module: Mlp, inputs: tuple, out: Tensor) -> None:  # which calls ops on its Linears' weights
        nonlocal forward, backward
        flops = 2 * (out.numel() // out.shape[-1]) * (module.up.weight.numel() + module.down.weight.numel())
        forward += flops
        backward += 2 * flops

    def attention(module: Attention, inputs: tuple, out: Tensor) -> None:
        nonlocal forward, backward
        B, T, H = out.shape
        forward += 4 * B * T * T * H
        backward += 8 * B * T * T * H

    for module in dit.modules():
        for kind, count in ((nn.Linear, linear), (Mlp, mlp), (Attention, attention)):
            if isinstance(module, kind):
                module.register_forward_hook(count)
    mark = lambda *_: edges.append((live.now, forward))
    dit.blocks[0].register_forward_pre_hook(mark)
    dit.blocks[-1].register_forward_hook(mark)
    x = torch.empty(batch, model.in_channels, model.input_size, model.input_size, device="meta")
    t, labels = torch.empty(batch, device="meta"), torch.empty(batch, dtype=torch.int64, device="meta")
    with kernels.backend("triton"), live:
        v = dit(x, t, labels)
        kept, first_pass = live.now, (forward, backward)
        (before, flops_before), (after, flops_after) = edges
        v.backward(torch.empty_like(v))
    return Walk(*first_pass, flops_after - flops_before, kept, (after - before) // len(dit.blocks), live.peak, dit.num_parameters)


def op_bytes(model: ModelConfig, fused: bool, recompute: str = "none") -> float:
    """Elements that all blocks' ops between matmuls read and write an image, forward and backward; bytes in bf16 are twice that.

    Fused: kernels.BYTES. Else the chains of PyTorch ops that they replace, each reading and writing memory
    once: modulate (norm, multiply, add), gate (multiply, add), the sum of two residual gradients, silu and multiply, a norm and six
    half-width products and sums a rotation. The patch embedding, the noise and the loss, under 1 %, are left out.
    """
    T, H, F = (model.input_size // model.patch_size) ** 2, model.width, model.hidden
    norm, rope = model.qk_norm != "none", model.positions != "absolute"
    if fused:  # elements: half of the bytes in bf16
        ops = ("gated_residual_modulate", "qk_norm_rope", "swiglu")
        residual, qk, swiglu = ([n // 2 for n in kernels.BYTES[op]] for op in ops)
    else:
        residual = (11, 19)  # forward 6 + 5; backward 10 + 6 and 3 for the sum
        qk = (4 * norm + 18 * rope, 6 * norm + 18 * rope + 6)  # both of q and k; 6: the packed gradient
        swiglu = (5, 13)
    forward = 2 * residual[0] * H + qk[0] * H + swiglu[0] * F
    backward = 2 * residual[1] * H + qk[1] * H + swiglu[1] * F
    again = {"none": 0, "light": F if fused else swiglu[0] * F, "full": forward}[recompute]  # fused: one output more
    return model.depth * T * (forward + backward + again)


class Memory(NamedTuple):
    """Bytes on one GPU."""

    weights: float
    masters: float  # fp32, and AdamW's two moments
    ema: float
    gradients: float  # where they are together at the end of a backward, with the fp32 sums and ZeRO's copy of them
    buckets: float
    activations: float  # at their peak
    peak: float  # of all of them: activations go while gradients come
    largest_batch: int | None  # None: no card


def actual_stage(config: Config, gpus: int) -> int:
    """The ZeRO stage that the engine runs for zero.stage; 0: one GPU, nothing to shard."""
    return deepspeed_config(config, gpus)["zero_optimization"]["stage"]


def memory(config: Config, gpus: int, card: Card | None = None) -> Memory:
    """What training takes on one GPU. config: its precision is settled. Without a card (a CPU) buckets take only what is used of
    them, and no more than a model's gradients."""
    train, bf16, stage = config.train, config.train.precision == "bf16", actual_stage(config, gpus)
    p, dtype = (2, torch.bfloat16) if bf16 else (4, torch.float32)
    one, two = (walk(config.model, B, dtype, train.checkpoint) for B in (1, 2))
    N, share, bucket = one.parameters, one.parameters / gpus, min(config.zero.bucket, one.parameters)
    sums = train.accumulation > 1
    # Of the gradients: what is held through the forward, and all at the end of a backward with ZeRO's copies.
    held, end = {
        0: (4 * N * sums, 4 * N if sums else p * N),
        1: (4 * N, 4 * N + 4 * share),
        2: (4 * share * sums, (8 + p * bf16) * share),
        3: (p * share, (4 + p) * share),
    }[stage]
    weights = share * p + min(N, ZERO_3_LIVE) * p if stage == 3 else N * p
    masters = 0 if config.zero.offload else 8 * share if stage == 0 and not bf16 else 12 * share
    ema = 0 if config.zero.offload else 4 * share * (1 + len(train.ema_more))
    # of the reduction, two of them: ZeRO 1 reduces fp32 sums
    buckets = {0: 0, 1: 8 * bucket, 2: 2 * p * bucket, 3: 2 * p * bucket}[stage] if card else 0
    per_image = two.peak - one.peak
    fixed = one.peak - per_image
    states = weights + masters + ema + buckets
    activations = fixed + per_image * train.batch_size
    largest = None
    if card:
        room = card.memory * (1 - FRAGMENTATION) - RESERVE - states
        largest = max(0, int((room - held - fixed) // per_image)) if end <= room else 0
    return Memory(weights, masters, ema, end, buckets, activations, states + max(held + activations, end), largest)


def optimizer_bytes(config: Config, N: int, gpus: int) -> float:
    """Bytes that a step moves on one GPU besides the model's: gradients into buckets and fp32 sums, their norm, AdamW, EMA."""
    p, share = (2 if config.train.precision == "bf16" else 4), N / gpus
    copies = (1 + len(config.train.ema_more)) / config.train.ema_every
    if actual_stage(config, gpus) == 0:  # sums of several micro-steps, norm, then one pass: gradient, AdamW, weights, EMA
        micro = config.train.accumulation
        sums, gradient = (micro * (p + 8), 4) if micro > 1 else (0, p)
        return N * (sums + 2 * gradient + 24 + p * (p < 4) + 8 * copies)
    reduce = config.train.accumulation * (4 * p * N * (gpus > 1) + (p + 8) * share)  # one GPU has no buckets
    return reduce + share * (4 + 8 + 8 + 28 + 4 + p + 12 * copies)  # norm, copy, clip, AdamW 4 in 3 out, weights, EMA


def communication(config: Config, N: int, gpus: int) -> tuple[float, float]:
    """Bytes that one GPU sends a step, by ring algorithms: (gradients, weights)."""
    p, others, micro = (2 if config.train.precision == "bf16" else 4), (gpus - 1) / gpus, config.train.accumulation
    gradients = {0: 0, 1: 8 * N, 2: p * N * micro, 3: p * N * micro}[actual_stage(config, gpus)]
    weights = {0: 0, 1: p * N, 2: p * N, 3: p * N * micro}[actual_stage(config, gpus)]
    return gradients * others, weights * others


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
    executed = counted.forward + counted.backward + (counted.blocks_forward if train.checkpoint == "full" else 0)
    matmuls = images * executed / flops
    fused, eager = (images * p * op_bytes(config.model, how, train.checkpoint) / bandwidth for how in (True, False))
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


def find_card(name: str) -> Card:
    """A row of CARDS. Raises InputError."""
    key = name.lower().replace(" ", "").replace("-", "")
    if key not in CARDS:
        raise InputError(f"--gpu {name} is not in plan's table: {nearest(key, list(CARDS))}")
    return CARDS[key]


def card_of(device: str) -> Card | None:
    """The row of CARDS for a name that torch.cuda.get_device_name gave. None for others: slower relatives share most of a name."""
    return next((card for card in CARDS.values() if card.device == device), None)


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
    largest = {how: memory(replaced(config, train__checkpoint=how), gpus, card).largest_batch for how in ("none", "light", "full")}
    gradients, weights = communication(config, N, gpus)
    hours = {end: epochs * images / getattr(speed, end) / 3600 for end in ("fast", "slow")}
    return {
        "prediction": True,
        "model": {"preset": config.model.preset, "parameters": N},
        "hardware": {"gpu": card.name, "gpus": gpus, "precision": train.precision, "source": card.source},
        "flops_per_image": {
            "forward": counted.forward, "backward": counted.backward, "total": model_flops,
            "recomputed": counted.blocks_forward if train.checkpoint == "full" else 0,
        },
        "memory": {
            "stage": actual_stage(config, gpus), "checkpoint": train.checkpoint, "batch_size": train.batch_size,
            "card": card.memory,
            "saved_per_image_and_block": {
                how: walk(config.model, 1, dtype, how).kept_block for how in ("none", "light", "full")
            },
            "stages": {
                actual_stage(planned, gpus): memory(planned, gpus, card)._asdict()
                for planned in (replaced(config, zero__stage=stage) for stage in stages)
            },
            "largest_batch": largest, "fits": train.batch_size <= largest[train.checkpoint],
        },
        "bytes_per_step_and_gpu": {
            "ops_fused": step_images * p * op_bytes(config.model, True, train.checkpoint),
            "ops_unfused": step_images * p * op_bytes(config.model, False, train.checkpoint),
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
    how, largest = memory["checkpoint"], memory["largest_batch"]
    text = f"does not fit: {memory['batch_size']} images a GPU with train.checkpoint={how} take "
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
         + " MB an image, by train.checkpoint"),
        ("largest batch", ", ".join(f"{how} {size}" for how, size in memory["largest_batch"].items())
         + " a GPU, by train.checkpoint, " + (f"ZeRO {memory['stage']}" if memory["stage"] else "without ZeRO")),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    lines = ["Predictions from the model's shapes and datasheets: nothing here was measured.", ""]
    lines += [] if memory["fits"] else [_misfit(memory), ""]
    lines += [f"{name:{width}}  {text}" for name, text in rows]
    heads = ("ZeRO", "weights", "masters, moments", "EMA", "gradients", "buckets", "activations", "peak", "largest batch")
    lines += ["", f"memory a GPU, of {_size(memory['card'])}, train.checkpoint={memory['checkpoint']}"]
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
