"""The optimizer of a run: parameter groups, learning rate, and AdamW for one rank, where ZeRO has nothing to shard.

Everything that depends on the choice of optimizer is here: `build` makes it, STATE_NAMES and STATE_BYTES tell checkpoints and
memory plans what it keeps per parameter.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdit import kernels
from fastdit.config import Config, TrainConfig

STATE_NAMES = ("exp_avg", "exp_avg_sq")  # fp32 state tensors of the shape of the master, by torch's names; checkpoints use them too
STATE_BYTES = 4 * len(STATE_NAMES)  # bytes of state per parameter


def learning_rate_factor(train: TrainConfig, step: int) -> float:
    """Return the factor of train.lr after `step` applied steps.

    It rises linearly to 1 over warmup_steps. The constant schedule then stays at 1 up to the last decay_steps steps, in which it
    falls to 0 at total_steps as 1 - sqrt(progress): arXiv:2405.18392, where that gave a lower loss than a linear fall. The cosine
    schedule falls to 0 at total_steps along half a cosine.
    """
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    if train.schedule == "cosine":
        progress = (step - train.warmup_steps) / max(1, train.total_steps - train.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    decayed = train.decay_steps - max(0, train.total_steps - step)
    return 1 - math.sqrt(decayed / train.decay_steps) if decayed > 0 else 1.0


def learning_rate(train: TrainConfig, step: int) -> float:
    """Return the learning rate after `step` applied steps."""
    return train.lr * learning_rate_factor(train, step)


def build(config: Config, model: nn.Module, sharded: bool, ranks: int) -> tuple[list[dict], torch.optim.Optimizer]:
    """Return the parameter groups of a model and the optimizer that steps them.

    config: settings with a resolved precision. model: fp32 weights, on the device that steps them. sharded: whether ZeRO keeps the
    fp32 masters and steps the optimizer on its partitions of them; if not, the optimizer is a OneRankOptimizer with masters and a
    learning-rate schedule of its own, the same on each of the ranks.
    """
    train = config.train
    groups = [{"params": list(model.parameters())}]
    options: dict[str, Any] = dict(betas=(train.beta1, train.beta2), eps=train.eps, weight_decay=train.weight_decay)
    if sharded:
        return groups, torch.optim.AdamW(groups, train.lr, fused=True, **options)
    parameters = [parameter for group in groups for parameter in group["params"]]
    schedule = lambda step: learning_rate(train, step)
    bf16 = train.precision == "bf16"
    return groups, OneRankAdamW(parameters, train.clip, bf16, train.accumulation, schedule, ranks, **options)


class OneRankAdamW(torch.optim.Optimizer):
    """AdamW on fp32 masters of a model's parameters, with clipping, that skips a step whose gradient is not finite.

    Several ranks average their gradients by one all-reduce, and take the same step.
    Masters, moments, moving averages and weights are updated in one pass, and the host never waits for the device in `step`.
    In fp32 the masters are the parameters themselves. In bf16 the gradients of several micro-steps are summed in fp32.
    The device decides whether a step is applied. `finish_step` waits for its answer, and `step` calls it before it begins the next
    step. It sets `overflow` (the last step was skipped), `_global_grad_norm` (2-norm of its gradient before clipping; DeepSpeed
    reads both by these names), the step count, and the learning rate of the next step.
    """

    def __init__(
        self, parameters: list[nn.Parameter], clip: float, bf16: bool, accumulation: int, lr: float | Callable[[int], float],
        ranks: int = 1, *, betas: tuple[float, float], eps: float, weight_decay: float,
    ) -> None:  # fmt: skip
        """parameters: fp32 initial weights; with bf16=True the caller casts them in place before the first step. clip: largest
        2-norm of the gradient, 0 for no clipping. accumulation: micro-steps per step. lr: learning rate, or a function of the
        number of applied steps."""
        self.parameters = parameters
        self.masters = [p.detach().clone() for p in parameters] if bf16 else parameters
        self.schedule = lr if callable(lr) else lambda steps: lr
        super().__init__(self.masters, dict(lr=self.schedule(0), betas=betas, eps=eps, weight_decay=weight_decay))
        self.clip = clip
        self.ranks = ranks
        self.overflow = False
        self._global_grad_norm = 0.0
        self.averages: Sequence[Sequence[Tensor]] = ()  # moving averages of the masters; set them before the first step
        self.average_weights: Sequence[float] = ()  # weight of the new masters in each average, for one step; empty: no update
        device = self.masters[0].device
        self.found_inf = torch.zeros((), device=device)  # on the device: not 0 if the last step was skipped
        count = torch.zeros((), device="cpu")  # one tensor for all masters
        self._count = count.numpy()
        for master in self.masters:
            self.state[master] = {"step": count, **{name: torch.zeros_like(master) for name in STATE_NAMES}}
        self._tensors: kernels.AdamWTensors | None = None
        # The device copies the norm of the last step's gradient to the host, which reads it once the event has passed.
        self._norm = torch.zeros((), device="cpu", pin_memory=device.type == "cuda")
        self._norm_on_host = self._norm.numpy()
        self._norm_copied = torch.cuda.Event() if device.type == "cuda" else None
        self._unfinished = False
        self.masters_hold_gradients = not bf16 or accumulation > 1 or ranks > 1
        if bf16 and self.masters_hold_gradients:  # a sum in bf16 would lose small gradients
            for parameter, master in zip(parameters, self.masters, strict=True):
                parameter.register_post_accumulate_grad_hook(lambda p, master=master: self._accumulate(p, master))

    @staticmethod
    def _accumulate(parameter: Tensor, master: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None  # the hook runs after it was accumulated
        master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    def _average(self, gradients: list[Tensor]) -> None:
        """Replace gradients by their means over the ranks, by one all-reduce, which gives each rank the same bits."""
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.div_(self.ranks).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    @property
    def steps(self) -> int:
        """Number of applied steps that are finished."""
        return int(self._count)

    def finish_step(self) -> bool:
        """Return whether the last step was applied, True before the first one. Waits until the device has seen its gradients."""
        if self._unfinished:
            self._unfinished = False
            if self._norm_copied:
                self._norm_copied.synchronize()
            self._global_grad_norm = self._norm_on_host.item()
            self.overflow = not math.isfinite(self._global_grad_norm)
            self._count.fill(self.steps + (not self.overflow))
            self.set_learning_rate()
        return not self.overflow

    def set_learning_rate(self) -> None:
        """Set the learning rate of the next step by the schedule."""
        for group in self.param_groups:
            group["lr"] = self.schedule(self.steps)

    def _make_tensors(self) -> kernels.AdamWTensors:
        exp_avgs, exp_avg_sqs = ([self.state[master][name] for master in self.masters] for name in STATE_NAMES)
        copies = None if self.masters is self.parameters else [p.detach() for p in self.parameters]
        return kernels.AdamWTensors([m.detach() for m in self.masters], exp_avgs, exp_avg_sqs, copies, self.averages)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Finish the last step and begin the next one, which is skipped if the norm of its gradient is not finite. The gradients
        are freed."""
        self.finish_step()
        self._tensors = self._tensors or self._make_tensors()
        holders = self.masters if self.masters_hold_gradients else self.parameters
        gradients = [cast(Tensor, p.grad) for p in holders]  # a backward pass reaches all parameters
        if self.ranks > 1:
            self._average(gradients)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))
        self._norm.copy_(norm, non_blocking=True)
        if self._norm_copied:
            self._norm_copied.record()
        self._unfinished = True
        self.found_inf = (norm - norm).ne(0).float()  # inf - inf and NaN - NaN are NaN
        excess = norm.double().add(1e-6).div(self.clip).clamp(min=1) if self.clip else torch.ones_like(norm)
        group = self.param_groups[0]
        kernels.adamw_step(
            self._tensors, gradients, lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
            step=self.steps + 1, grad_scale=excess.float(), found_inf=self.found_inf, weights=self.average_weights,
        )  # fmt: skip
        self.average_weights = ()
        for p in (*self.parameters, *self.masters):
            p.grad = None


OneRankOptimizer = OneRankAdamW  # what the engine and the EMA ask for; a union of classes when there are several
