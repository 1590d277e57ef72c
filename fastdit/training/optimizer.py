"""AdamW for one rank, where ZeRO has nothing to shard: masters, moments, moving averages and weights in one pass, no host wait."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastdit import kernels


class OneRankAdamW(torch.optim.Optimizer):
    """AdamW on fp32 masters of a model's parameters, with clipping, and no step where a gradient is not finite.

    In fp32 the masters are the parameters themselves. In bf16 the gradients of several micro-steps are added up in fp32. Whether a
    step was taken the device decides; `settle` asks it, and `step` does before it takes the next. Then `overflow` (the step was not
    taken), `_global_grad_norm` (the 2-norm before clipping), the step count and the learning rate of the next step are set.
    """

    def __init__(
        self, parameters: list[nn.Parameter], clip: float, bf16: bool, accumulation: int, lr: float | Callable[[int], float],
        betas: tuple[float, float], eps: float, weight_decay: float,
    ) -> None:  # fmt: skip
        """parameters: fp32, as they start; with bf16=True they are to be cast in place before the first step. clip: largest norm of
        the gradient, 0 for none. lr: the learning rate, or a function of the number of steps taken before."""
        self.parameters = parameters
        self.masters = [p.detach().clone() for p in parameters] if bf16 else parameters
        self.schedule = lr if callable(lr) else lambda steps: lr
        super().__init__(self.masters, dict(lr=self.schedule(0), betas=betas, eps=eps, weight_decay=weight_decay))
        self.clip, self.overflow, self._global_grad_norm = clip, False, 0.0
        self.averages: Sequence[Sequence[Tensor]] = ()  # of the masters, each a moving average; to be set before the first step
        self.average_weights: Sequence[float] = ()  # of the new masters in each average, for one step; none leaves them out
        device = self.masters[0].device
        self.found_inf = torch.zeros((), device=device)  # of the last step, on the device: not 0 where it was not taken
        count = torch.zeros((), device="cpu")  # one for all
        self._count = count.numpy()
        for master in self.masters:
            self.state[master] = {"step": count, "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
        self._tensors: kernels.AdamWTensors | None = None
        # the norm of the last step's gradient, where the device writes it and the host looks once the event has passed
        self._norm = torch.zeros((), device="cpu", pin_memory=device.type == "cuda")
        self._norm_on_host, self._pending = self._norm.numpy(), False
        self._written = torch.cuda.Event() if device.type == "cuda" else None
        self.sums = not bf16 or accumulation > 1  # the gradients to step with are the masters'
        if bf16 and self.sums:  # a sum in bf16 would lose the small ones
            for parameter, master in zip(parameters, self.masters, strict=True):
                parameter.register_post_accumulate_grad_hook(lambda p, master=master: self._accumulate(p, master))

    @staticmethod
    def _accumulate(parameter: Tensor, master: Tensor) -> None:
        master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
        parameter.grad = None

    @property
    def steps(self) -> int:
        """Taken so far, as far as it is settled."""
        return int(self._count)

    def settle(self) -> bool:
        """Whether the last step was taken. Waits until the device has seen its gradients; True where there was no step yet."""
        if self._pending:
            self._pending = False
            if self._written:
                self._written.synchronize()
            self._global_grad_norm = self._norm_on_host.item()
            self.overflow = not math.isfinite(self._global_grad_norm)
            self._count.fill(self.steps + (not self.overflow))
            self.set_learning_rate()
        return not self.overflow

    def set_learning_rate(self) -> None:
        """To the schedule's for the next step."""
        for group in self.param_groups:
            group["lr"] = self.schedule(self.steps)

    def _make_tensors(self) -> kernels.AdamWTensors:
        moments = ([self.state[master][key] for master in self.masters] for key in ("exp_avg", "exp_avg_sq"))
        copies = None if self.masters is self.parameters else [p.detach() for p in self.parameters]
        return kernels.AdamWTensors([m.detach() for m in self.masters], *moments, copies, self.averages)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Settle the last step, and take the next unless the norm of its gradient is not finite. The gradients are used up."""
        self.settle()
        self._tensors = self._tensors or self._make_tensors()
        gradients = [p.grad for p in (self.masters if self.sums else self.parameters)]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))
        self._norm.copy_(norm, non_blocking=True)
        if self._written:
            self._written.record()
        self._pending = True
        self.found_inf = (norm - norm).ne(0).float()  # infinity less itself is NaN
        excess = norm.double().add(1e-6).div(self.clip).clamp(min=1) if self.clip else torch.ones_like(norm)
        group = self.param_groups[0]
        kernels.adamw_step(
            self._tensors, gradients, lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
            step=self.steps + 1, grad_scale=excess.float(), found_inf=self.found_inf, weights=self.average_weights,
        )  # fmt: skip
        self.average_weights = ()
        for p in (*self.parameters, *self.masters):
            p.grad = None
