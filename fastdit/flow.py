"""Rectified flow: timesteps, label dropout and the loss of a step. B batch size, C/h/w channels, rows and columns of the latent.

A timestep t in (0,1] mixes x_t = (1−t)·x0 + t·noise; the model predicts the velocity noise − x0 (arXiv:2209.03003), or the data x0,
of which `velocity` makes one.
Every random number of training is named by (seed, stream, step, index in the global batch): it is the same at 1, 2 or 8 ranks, with
or without accumulation, on any device to rounding.
"""

import math
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdit import kernels
from fastdit.config import FlowConfig, ModelConfig

SMALLEST_T = 0.05  # floor of t in the loss of predicted data, as in arXiv:2511.13720: its weight 1/t² would have no bound

PARTS = ("flow",)  # terms of the loss, by the names under which `Losses.parts` holds them; a second one is logged by its name


class Stream(IntEnum):
    """Purpose of a random number; part of its name in kernels.counter_normal and counter_uniform."""

    TIME = 0
    NOISE = 1
    LABEL_DROPOUT = 2
    POSTERIOR = 3
    FLIP = 4
    SAMPLE = 5
    CROP = 6
    SAMPLE_STEP = 7
    SAMPLE_CLASS = 8
    EVALUATION_LABEL = 9
    VALIDATION = 10
    TOKENS = 11
    PATH_DROP = 12


class Losses(NamedTuple):
    """Loss of each sample of a batch."""

    total: Tensor  # fp32 [B], what training minimises
    t: Tensor  # fp32 [B], the timesteps
    parts: dict[str, Tensor]  # fp32 [B] of each of PARTS


def logged_parts() -> tuple[str, ...]:
    """Return the parts that are logged beside the total: none if there is only one, which is the total."""
    return PARTS if len(PARTS) > 1 else ()


def sample_ids(step: int, first: int, count: int, device: torch.device) -> Tensor:
    """Return int64 [count], the names of samples first .. first+count−1 of the global batch of a step (both below 2^31)."""
    return torch.arange(first, first + count, device=device) + (step << 32)


def sample_timesteps(config: FlowConfig, seed: int, ids: Tensor) -> Tensor:
    """Return logit-normal timesteps fp32 [B] in (0,1): sigmoid(mean + std·normal) (SD3, arXiv:2403.03206, equation 19), shifted to
    s·t/(1 + (s−1)·t) (equation 23), which adds ln s to the mean."""
    normal = kernels.counter_normal(seed, Stream.TIME, ids, ())
    return torch.sigmoid(config.logit_mean + math.log(config.time_shift) + config.logit_std * normal)


def drop_labels(config: FlowConfig, seed: int, ids: Tensor, labels: Tensor, null: int) -> Tensor:
    """Return labels int64 [B], each replaced by the null class with probability label_dropout (arXiv:2207.12598)."""
    dropped = kernels.counter_uniform(seed, Stream.LABEL_DROPOUT, ids, ()) < config.label_dropout
    return torch.where(dropped, null, labels)


def velocity(output: Tensor, x_t: Tensor, t: Tensor, prediction: str) -> Tensor:
    """Return the velocity of a model's output [B,C,h,w]: the output itself, or fp32 (x_t − output)/t if it predicts the data.

    For x_t = x0 + t·(noise − x0). t fp32 [B] or [], above 0; prediction: "v" or "x".
    """
    if prediction == "v":
        return output
    return (x_t - output.float()) / (t.view(-1, 1, 1, 1) if t.ndim else t)


def choose_tokens(config: ModelConfig, seed: int, ids: Tensor, dense: bool) -> tuple[Tensor, ...]:
    """Return what a model with dense blocks is given in training besides the batch, nothing for other models.

    That is the tokens that the blocks between see, int64 [B,K], a random subset per sample in ascending order; and whether a sample
    leaves these blocks out, bool [B]. dense: K is the number of all tokens.
    """
    if config.dense_blocks is None:
        return ()
    order = kernels.counter_uniform(seed, Stream.TOKENS, ids, (config.tokens,)).argsort(dim=1, stable=True)
    kept = config.tokens if dense else config.kept_tokens
    dropped = kernels.counter_uniform(seed, Stream.PATH_DROP, ids, ()) < config.path_drop
    return order[:, :kept].sort(dim=1).values, dropped


def losses_at(model: nn.Module, x0: Tensor, noise: Tensor, t: Tensor, labels: Tensor, prediction: str, *chosen: Tensor) -> Losses:
    """Return the loss of each sample at given timesteps. The terms of the loss are defined here, for training and validation.

    model: (x_t, t, labels, *chosen) -> velocity or data, as `prediction` says; x0 and noise fp32 [B,C,h,w]; t fp32 [B]; labels
    int64 [B]; chosen: what `choose_tokens` returned, nothing in validation.
    The loss of predicted data is |v − (noise − x0)|², which is |output − x0|²/t², with t at least SMALLEST_T.
    """
    x_t = kernels.flow_interpolate(x0, noise, t)
    v = velocity(model(x_t, t, labels, *chosen), x_t, t, prediction)
    weight = None if prediction == "v" else (t / SMALLEST_T).clamp(max=1).square()
    loss = kernels.flow_matching_loss(v, x0, noise, weight)
    return Losses(total=loss, t=t, parts={"flow": loss})


def losses(
    model: nn.Module, x0: Tensor, labels: Tensor, ids: Tensor, config: FlowConfig, *, seed: int, null: int,
    chosen: tuple[Tensor, ...] = (),
) -> Losses:  # fmt: skip
    """Return the training loss of each sample, at random timesteps, noise and label dropout.

    model and chosen: as in `losses_at`; x0 fp32 [B,C,h,w]; labels int64 [B]; ids int64 [B] from `sample_ids`, on the device of x0;
    seed: the run's; null: id of the null class.
    """
    t = sample_timesteps(config, seed, ids)
    labels = drop_labels(config, seed, ids, labels, null)
    noise = kernels.counter_normal(seed, Stream.NOISE, ids, tuple(x0.shape[1:]))
    return losses_at(model, x0, noise, t, labels, config.prediction, *chosen)
