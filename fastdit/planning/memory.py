"""Bytes that training keeps, moves and sends on each GPU: predictions from shapes, none of them measured.

B images per GPU and micro-step, T tokens, H width, F hidden width, N parameters, p bytes per weight (bf16 2, fp32 4), W GPUs.
"""

from dataclasses import replace
from typing import NamedTuple

from fastdit import kernels
from fastdit.config import Config, ModelConfig
from fastdit.device import DTYPES
from fastdit.flops import walk
from fastdit.planning.cards import Card
from fastdit.training.engine import deepspeed_config
from fastdit.training.optimizer import muon_share, state_bytes, step_bytes

RESERVE = 2e9  # bytes: CUDA context, cuBLAS and NCCL workspaces
FRAGMENTATION = 0.05  # share of a card's memory that the allocator cannot use
ZERO_3_LIVE = 1_000_000_000  # DeepSpeed's default: elements that stay gathered between forward and backward
FP32 = 4  # bytes per element: masters, each of AdamW's two moments, averages, sums of gradients
UPDATE = 2 * FP32  # bytes to read and write an fp32 element


def op_bytes(model: ModelConfig, fused: bool, recompute: str = "none") -> float:
    """Elements that all blocks' ops between matmuls read and write an image, forward and backward; bytes in bf16 are twice that.

    Fused: kernels.BYTES. Else the chains of PyTorch ops that they replace, each reading and writing memory
    once: modulate (norm, multiply, add), gate (multiply, add), the sum of two residual gradients, silu and multiply, a norm and six
    half-width products and sums a rotation. GELU and the sums of gradients of biases in the attention are PyTorch's in both cases.
    The patch embedding, the noise and the loss, under 1 %, are left out.
    """
    H, F = model.width, model.hidden
    norm, rope, gelu = model.qk_norm != "none", model.positions.startswith("rope"), model.mlp == "gelu"
    if fused:  # elements: half of the bytes in bf16
        ops = ("gated_residual_modulate", "qk_norm_rope", "swiglu")
        residual, qk, activation = ([n // 2 for n in kernels.BYTES[op]] for op in ops)
    else:
        residual = (11, 19)  # forward 6 + 5; backward 10 + 6 and 3 for the sum
        qk = (4 * norm + 18 * rope, 6 * norm + 18 * rope + 6)  # both of q and k; 6: the packed gradient
        activation = (5, 13)
    if gelu:
        activation = (2, 4)  # in, out; dout, in, din, and din again for the sum that is up's bias's gradient
    biases = 4 * model.linear_bias  # the gradients of qkv 3 and out 1, read again for the biases' sums
    forward = 2 * residual[0] * H + qk[0] * H + activation[0] * F
    backward = 2 * residual[1] * H + (qk[1] + biases) * H + activation[1] * F
    light = F if fused and not gelu else activation[0] * F  # the fused backward writes one output more
    again = {"none": 0, "light": light, "full": forward}[recompute]
    return model.block_tokens * (forward + backward + again)


class Memory(NamedTuple):
    """Bytes on one GPU."""

    weights: float
    masters: float  # fp32, and the optimizer's state
    ema: float
    gradients: float  # at the end of a backward, with the fp32 sums, ZeRO's copy of them, and what Muon's step makes of them
    buckets: float
    activations: float  # their peak
    peak: float  # peak of the total: activations are freed while gradients appear
    largest_batch: int | None  # None: no card


class Gradients(NamedTuple):
    """Bytes of gradients on one GPU, without those in buckets."""

    forward: float  # during a forward pass
    end: float  # at the end of a backward pass, with ZeRO's copies


def actual_stage(config: Config, gpus: int) -> int:
    """Return the ZeRO stage that the engine runs for zero.stage; 0: without ZeRO, such as on one GPU."""
    return deepspeed_config(config, gpus)["zero_optimization"]["stage"]


def gradients_of(stage: int, N: int, share: float, p: int, accumulates: bool) -> Gradients:
    """Return what gradients take under a ZeRO stage. share: parameters per GPU; accumulates: several micro-steps per step."""
    if stage == 0:  # fp32 sums of the micro-steps, or the gradients of the only one, which AdamW uses up
        return Gradients(FP32 * N, FP32 * N) if accumulates else Gradients(0, p * N)
    copy = FP32  # bytes per parameter of ZeRO's fp32 copy of its share, for AdamW
    if stage == 1:  # fp32 sums of all gradients
        return Gradients(FP32 * N, FP32 * N + copy * share)
    if stage == 2:  # fp32 sums of its share, and in bf16 the reduced gradients beside them
        reduced = p if p < FP32 else 0
        return Gradients(FP32 * share if accumulates else 0, (FP32 + copy + reduced) * share)
    return Gradients(p * share, (p + copy) * share)


def memory(config: Config, gpus: int, card: Card | None = None) -> Memory:
    """Return what training takes on one GPU. config: with its precision resolved. Without a card (on a CPU) buckets take only what
    is used of them, and no more than a model's gradients."""
    train, stage, dtype = config.train, actual_stage(config, gpus), DTYPES[config.train.precision]
    p = dtype.itemsize
    model = replace(config.model, keep_tokens=1.0) if train.dense_steps else config.model  # the steps that take most
    one, two = (walk(model, B, dtype, train.recompute) for B in (1, 2))
    N = one.parameters
    share = N / gpus if stage else N
    gradients = gradients_of(stage, N, share, p, train.accumulation > 1 or (gpus > 1 and not stage))
    gradients = gradients._replace(end=gradients.end + step_bytes(config, gpus if stage else 1))
    weights = share * p + min(N, ZERO_3_LIVE) * p if stage == 3 else N * p
    separate_masters = stage > 0 or p < FP32  # without ZeRO, fp32 weights are the masters
    masters = 0 if config.zero.offload else state_bytes(config, N) * share / N + FP32 * separate_masters * share
    ema = 0 if config.zero.offload else FP32 * share * (1 + len(train.ema_more))
    buckets = 0
    if card and stage:  # two: one is reduced while the other fills; ZeRO 1 reduces fp32 sums
        buckets = 2 * (FP32 if stage == 1 else p) * min(config.zero.bucket, N)
    per_image = two.peak - one.peak
    fixed = one.peak - per_image
    activations = fixed + per_image * train.batch_size
    states = weights + masters + ema + buckets
    largest = None
    if card:
        room = card.memory * (1 - FRAGMENTATION) - RESERVE - states
        largest = max(0, int((room - gradients.forward - fixed) // per_image)) if gradients.end <= room else 0
    peak = states + max(gradients.forward + activations, gradients.end)
    return Memory(weights, masters, ema, gradients.end, buckets, activations, peak, largest)


def optimizer_bytes(config: Config, N: int, gpus: int) -> float:
    """Return the bytes that a step moves on one GPU besides the model's.

    They are of gradients into buckets and fp32 sums, of the gradients' norm, of AdamW or Muon and of the EMA. Those of Muon's
    matmuls are left out.
    """
    muon = muon_share(config).parameters / gpus
    less = muon * (UPDATE - 2 * DTYPES[config.train.precision].itemsize)  # one momentum, and an update that is written and read
    p, share, micro = DTYPES[config.train.precision].itemsize, N / gpus, config.train.accumulation
    averages = (1 + len(config.train.ema_more)) / config.train.ema_every  # updates per step
    accumulate = p + UPDATE  # a micro-step's gradient is read and added to a sum
    if actual_stage(config, gpus) == 0:  # one pass: AdamW writes the weights and updates the averages too
        sums, gradient = (micro * accumulate, FP32) if micro > 1 or gpus > 1 else (0, p)
        sums += 3 * UPDATE * (gpus > 1)  # into the buffer of the all-reduce, in it, and back
        norm = gradient
        adamw = gradient + 3 * UPDATE  # the master and two moments
        weights = p if p < FP32 else 0  # fp32 weights are the masters
        return N * (sums + norm + adamw + weights + UPDATE * averages) - less
    buckets = 4 * p * N if gpus > 1 else 0  # copied in and reduced there: each reads and writes; one GPU has none
    norm = FP32
    copy, clip = UPDATE, UPDATE
    adamw = FP32 + 3 * UPDATE  # reads the gradient
    weights = FP32 + p  # read from the masters
    ema = FP32 + UPDATE  # reads the masters
    return micro * (buckets + accumulate * share) + share * (norm + copy + clip + adamw + weights + ema * averages) - less


def communication(config: Config, N: int, gpus: int) -> tuple[float, float]:
    """Return the bytes (of gradients, of weights and of Muon's updates) that one GPU sends per step.

    Ring algorithms send (W-1)/W of a tensor to reduce-scatter or to gather it.
    """
    p, others, micro = DTYPES[config.train.precision].itemsize, (gpus - 1) / gpus, config.train.accumulation
    stage = actual_stage(config, gpus)
    if stage == 0:  # all-reduces the fp32 sums once; nothing on one GPU
        return 2 * FP32 * N * others, 0.0
    muon = 2 * p * muon_share(config).parameters / gpus * others  # its share of the updates to their owners, and those it owns back
    if stage == 1:  # all-reduces the fp32 sums once: reduce-scatter and gather
        return 2 * FP32 * N * others, p * N * others + muon
    gathers = micro if stage == 3 else 1
    return p * N * micro * others, p * N * gathers * others + muon
