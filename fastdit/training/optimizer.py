"""The optimizer of a run: parameter groups, learning rate, AdamW for one rank, where ZeRO has nothing to shard, and Muon.

Everything that depends on the choice of optimizer is here: `build` makes it, the names of its state are those of checkpoints, and
`state_bytes` tells memory plans what it takes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdit import kernels
from fastdit.config import Config, TrainConfig
from fastdit.device import DTYPES
from fastdit.model import DiT
from fastdit.training.muon import BATCH, MOMENTUM, NEWTON_SCHULZ_COPIES, Matrix, Orthogonalizer, Span, hidden_matrices

# fp32 state tensors of the shape of the master, by torch's names; checkpoints use them too
STATE_NAMES = ("exp_avg", "exp_avg_sq")  # of AdamW
MUON_STATE_NAMES = ("momentum_buffer",)  # of the matrices that Muon steps


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


def matrices_of(config: Config, model: nn.Module) -> list[Matrix]:
    """Return the matrices that Muon steps; none with train.optimizer=adamw."""
    return hidden_matrices(model, config.model) if config.train.optimizer == "muon" else []


def build(config: Config, model: nn.Module, sharded: bool, ranks: int = 1) -> tuple[list[dict], torch.optim.Optimizer]:
    """Return the parameter groups of a model and the optimizer that steps them.

    config: settings with a resolved precision. model: fp32 weights, on the device that steps them. sharded: whether ZeRO keeps the
    fp32 masters and steps the optimizer on its partitions of them; if not, the optimizer is a OneRankOptimizer with masters and a
    learning-rate schedule of its own, the same on each rank. A sharded Muon is to be told by `share` where the matrices are.
    """
    train, matrices = config.train, matrices_of(config, model)
    named = dict(model.named_parameters())
    names = {m.name for m in matrices}
    members = [[p for name, p in named.items() if (name in names) == chosen] for chosen in ((True, False) if names else (False,))]
    groups = [{"params": parameters} for parameters in members]
    options: dict[str, Any] = dict(betas=(train.beta1, train.beta2), eps=train.eps, weight_decay=train.weight_decay)
    if sharded:
        make = ShardedMuon if names else torch.optim.AdamW
        return groups, make(groups, train.lr, fused=True, **options)
    bf16 = train.precision == "bf16"
    own = (list(named.values()), train.clip, bf16, train.accumulation, lambda step: learning_rate(train, step), ranks)
    if not names:
        return groups, OneRankAdamW(*own, **options)
    stepped = {i: [m for m in matrices if m.name == name] for i, name in enumerate(named) if name in names}
    return groups, OneRankMuon(stepped, DTYPES[train.precision], *own, **options)


class MuonShare(NamedTuple):
    """What Muon steps of a model, zeros with train.optimizer=adamw."""

    parameters: int
    flops: int  # of the Newton-Schulz iterations of one step
    of_one_shape: int  # most elements of matrices of one shape, which are multiplied together


def muon_share(config: Config) -> MuonShare:
    """Return what Muon steps of a config's model."""
    if config.train.optimizer != "muon":
        return MuonShare(0, 0, 0)
    with torch.device("meta"):
        matrices = matrices_of(config, DiT(config.model))
    by_shape: dict[tuple[int, int], int] = {}
    for m in matrices:
        by_shape[m.rows, m.cols] = by_shape.get((m.rows, m.cols), 0) + m.rows * m.cols
    return MuonShare(sum(by_shape.values()), sum(m.flops for m in matrices), max(by_shape.values()))


def state_bytes(config: Config, parameters: float) -> float:
    """Return the bytes that an optimizer keeps of a model of so many parameters, on all ranks together."""
    hidden = muon_share(config).parameters
    return 4 * (len(STATE_NAMES) * (parameters - hidden) + len(MUON_STATE_NAMES) * hidden)


def step_bytes(config: Config, ranks: int) -> float:
    """Return the bytes of the tensors that exist on a rank only during a step, besides gradients."""
    muon, size = muon_share(config), DTYPES[config.train.precision].itemsize
    copies = 1 if ranks == 1 else 3  # updates to send; those received, and the matrices made of them
    return size * (copies * muon.parameters / ranks + NEWTON_SCHULZ_COPIES * min(muon.of_one_shape / ranks, BATCH))


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
        self.by_adamw = [i for i in range(len(self.masters)) if self.state_names(i) == STATE_NAMES]
        self.found_inf = torch.zeros((), device=device)  # on the device: not 0 if the last step was skipped
        count = torch.zeros((), device="cpu")  # one tensor for all masters
        self._count = count.numpy()
        for i, master in enumerate(self.masters):
            self.state[master] = {"step": count, **{name: torch.zeros_like(master) for name in self.state_names(i)}}
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

    def state_names(self, i: int) -> tuple[str, ...]:
        """Return the names of the state of parameter i."""
        return STATE_NAMES

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
        masters = [self.masters[i] for i in self.by_adamw]
        exp_avgs, exp_avg_sqs = ([self.state[master][name] for master in masters] for name in STATE_NAMES)
        copies = None if self.masters is self.parameters else [self.parameters[i].detach() for i in self.by_adamw]
        averages = [[average[i] for i in self.by_adamw] for average in self.averages]
        return kernels.AdamWTensors([m.detach() for m in masters], exp_avgs, exp_avg_sqs, copies, averages)

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
            self._tensors, [gradients[i] for i in self.by_adamw], lr=group["lr"], betas=group["betas"], eps=group["eps"],
            weight_decay=group["weight_decay"], step=self.steps + 1, grad_scale=excess.float(), found_inf=self.found_inf,
            weights=self.average_weights,
        )  # fmt: skip
        self._step_others(gradients, excess.float())
        self.average_weights = ()
        for p in (*self.parameters, *self.masters):
            p.grad = None

    def _step_others(self, gradients: list[Tensor], scale: Tensor) -> None:
        """Step the parameters that AdamW does not, and update their averages and bf16 copies. scale: divisor of the gradients."""


OneRankOptimizer = OneRankAdamW  # what the engine and the EMA ask for; OneRankMuon is one too


class OneRankMuon(OneRankAdamW):
    """Muon on the hidden matrices, and on the other parameters AdamW, with all that OneRankAdamW does besides."""

    def __init__(
        self, matrices: dict[int, list[Matrix]], dtype: torch.dtype, parameters: list[nn.Parameter], *args, **options
    ) -> None:
        """matrices: those in each parameter that Muon steps, by its index. dtype: of the Newton-Schulz iterations. The rest: as for
        OneRankAdamW."""
        self.by_muon = list(matrices)
        super().__init__(parameters, *args, **options)
        spans = [Span(matrices[i][0].name, 0, parameters[i].numel(), number, 0) for number, i in enumerate(self.by_muon)]
        flat = [m for of_parameter in matrices.values() for m in of_parameter]
        self.orthogonalizer = Orthogonalizer(flat, [spans], 0, dtype, self.masters[0].device)

    def state_names(self, i: int) -> tuple[str, ...]:
        """Return the names of the state of parameter i."""
        return MUON_STATE_NAMES if i in self.by_muon else STATE_NAMES

    def _updates(self, gradients: list[Tensor], scale: Tensor, applied: Tensor) -> Iterator[Tensor]:
        """Yield the Nesterov momentum of each parameter, flat fp32. In a skipped step no momentum changes."""
        keep = torch.where(applied, MOMENTUM, 1.0)
        for i in self.by_muon:
            gradient = torch.where(applied, gradients[i].float() / scale, 0)
            momentum = self.state[self.masters[i]]["momentum_buffer"]
            momentum.mul_(keep).add_(gradient)
            yield gradient.add_(momentum, alpha=MOMENTUM).view(-1)

    def _step_others(self, gradients: list[Tensor], scale: Tensor) -> None:
        """A skipped step changes nothing: its factors are 1 and 0, because the host does not know yet that it is skipped."""
        applied, group = self.found_inf == 0, self.param_groups[0]
        masters = [self.masters[i].view(-1) for i in self.by_muon]
        torch._foreach_mul_(masters, torch.where(applied, 1 - group["lr"] * group["weight_decay"], 1.0))
        self.orthogonalizer.step(masters, self._updates(gradients, scale, applied), group["lr"], applied)
        for average, weight in zip(self.averages, self.average_weights, strict=False):
            for i, master in zip(self.by_muon, masters, strict=True):
                average[i].lerp_(master, torch.where(applied, weight, 0.0))
        if self.masters is not self.parameters:
            for i in self.by_muon:
                self.parameters[i].copy_(self.masters[i])


class ShardedMuon(torch.optim.AdamW):
    """Muon on the flat fp32 partitions of hidden matrices that ZeRO makes, and torch's fused AdamW on those of other parameters.

    ZeRO clips the gradients, and calls `step` on all ranks or on none, for one partition or for all of them.
    """

    def __init__(self, groups: list[dict], lr: float, **options) -> None:
        """groups, lr, options: as for torch's AdamW."""
        super().__init__(groups, lr, **options)
        self.orthogonalizers: dict[Tensor, Orthogonalizer] = {}

    def share(self, partition: Tensor, orthogonalizer: Orthogonalizer) -> None:
        """Let Muon step a partition. orthogonalizer: knows it as its tensor 0."""
        self.orthogonalizers[partition] = orthogonalizer
        self.state[partition] = {"step": torch.zeros((), device=partition.device)}
        self.state[partition] |= {name: torch.zeros_like(partition, requires_grad=False) for name in MUON_STATE_NAMES}

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Step the partitions whose gradient is set; Muon uses up its own."""
        for group in self.param_groups:
            for partition in group["params"]:
                if partition in self.orthogonalizers and partition.grad is not None:
                    self._step_partition(partition, group["lr"], group["weight_decay"])
        super().step()

    def _step_partition(self, partition: Tensor, lr: float, weight_decay: float) -> None:
        state, orthogonalizer = self.state[partition], self.orthogonalizers[partition]
        momentum, update = state["momentum_buffer"], cast(Tensor, partition.grad)
        momentum.mul_(MOMENTUM).add_(update)
        update.add_(momentum, alpha=MOMENTUM)
        partition.mul_(1 - lr * weight_decay)
        orthogonalizer.step([partition], [update], lr)
        state["step"] += 1
        partition.grad = None  # AdamW steps what has one
