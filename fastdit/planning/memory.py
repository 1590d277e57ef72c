"""Bytes that training keeps, moves and sends on each GPU: predictions from shapes, none of them measured.

B images a GPU and micro-step, T tokens, H width, F hidden width, N parameters, p bytes of a weight (bf16 2, fp32 4).
"""

from typing import NamedTuple

import torch

from fastdit import kernels
from fastdit.config import Config, ModelConfig
from fastdit.flops import walk
from fastdit.planning.cards import Card
from fastdit.training.engine import deepspeed_config

RESERVE = 2e9  # bytes: CUDA context, cuBLAS and NCCL workspaces
FRAGMENTATION = 0.05  # of a card's memory, that the allocator cannot use
ZERO_3_LIVE = 1_000_000_000  # DeepSpeed's default: this many gathered elements are kept between forward and backward


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
    one, two = (walk(config.model, B, dtype, train.recompute) for B in (1, 2))
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
