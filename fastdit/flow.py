"""Rectified flow: timesteps, label dropout and the loss of a step. B batch, C/h/w the latent.

Every random number of training is named by (seed, stream, step, index in the global batch): the same at 1, 2 or 8 ranks, with
or without accumulation, on any device to rounding.
"""

from enum import IntEnum

import torch
from torch import Tensor, nn

from fastdit import kernels
from fastdit.config import FlowConfig


class Stream(IntEnum):
    """What a random number is for; part of its name in kernels.counter_normal and counter_uniform."""

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


def sample_ids(step: int, first: int, count: int, device: torch.device) -> Tensor:
    """int64 [count]: the names of samples first .. first+count−1 of the global batch of a step (both below 2^31)."""
    return torch.arange(first, first + count, device=device) + (step << 32)


def sample_timesteps(config: FlowConfig, seed: int, ids: Tensor) -> Tensor:
    """Logit-normal timesteps, fp32 [B] in (0,1): sigmoid(mean + std·normal) (SD3, arXiv:2403.03206, equation 19)."""
    normal = kernels.counter_normal(seed, Stream.TIME, ids, ())
    return torch.sigmoid(config.logit_mean + config.logit_std * normal)


def drop_labels(config: FlowConfig, seed: int, ids: Tensor, labels: Tensor, null: int) -> Tensor:
    """labels int64 [B] with each replaced by the null class with probability label_dropout (arXiv:2207.12598)."""
    dropped = kernels.counter_uniform(seed, Stream.LABEL_DROPOUT, ids, ()) < config.label_dropout
    return torch.where(dropped, null, labels)


def losses(model: nn.Module, config: FlowConfig, null: int, x0: Tensor, labels: Tensor, seed: int, ids: Tensor) -> Tensor:
    """The flow-matching loss of each sample, fp32 [B].

    model(x_t, t, labels) -> v; null: the id of the null class; x0 fp32 [B,C,h,w]; labels int64 [B]; ids int64 [B] from
    `sample_ids`, on the device of x0.
    """
    t = sample_timesteps(config, seed, ids)
    labels = drop_labels(config, seed, ids, labels, null)
    noise = kernels.counter_normal(seed, Stream.NOISE, ids, tuple(x0.shape[1:]))
    v = model(kernels.flow_interpolate(x0, noise, t), t, labels)
    return kernels.flow_matching_loss(v, x0, noise)
