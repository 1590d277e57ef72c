"""AdamW for one rank, where ZeRO has nothing to shard: fp32 masters of bf16 parameters, without a copy of all gradients in fp32."""

import math

import torch
from torch import Tensor, nn

PART = 16_000_000  # elements whose gradients are there in fp32 at a time


class OneRankAdamW(torch.optim.AdamW):
    """torch's fused AdamW on fp32 masters of a model's parameters, with clipping, and no step where a gradient is not finite.

    In fp32 the masters are the parameters themselves. In bf16 the gradients of several micro-steps are added up in fp32.
    DeepSpeed's engine reads `overflow` (the step was not taken) and `_global_grad_norm` (the 2-norm before clipping) after a step.
    """

    def __init__(self, parameters: list[nn.Parameter], clip: float, bf16: bool, accumulation: int, **options) -> None:
        """parameters: fp32, as they start; with bf16=True they are to be cast in place before the first step. clip: largest norm of
        the gradient, 0 for none. options: of torch.optim.AdamW."""
        self.parameters = parameters
        self.masters = [p.detach().clone() for p in parameters] if bf16 else parameters
        super().__init__(self.masters, fused=True, **options)
        self.clip, self.overflow, self._global_grad_norm = clip, False, 0.0
        self.sums = not bf16 or accumulation > 1  # the gradients to step with are the masters'
        if bf16 and self.sums:  # a sum in bf16 would lose the small ones
            for parameter, master in zip(parameters, self.masters, strict=True):
                parameter.register_post_accumulate_grad_hook(lambda p, master=master: self._accumulate(p, master))

    @staticmethod
    def _accumulate(parameter: Tensor, master: Tensor) -> None:
        master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
        parameter.grad = None

    def _parts(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """(parameters, masters) of some PART elements each, where gradients are still to be made fp32; else all."""
        if self.sums:
            return [(self.parameters, self.masters)]
        parts, size = [], PART
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if size >= PART:
                parts.append(([], []))
                size = 0
            parts[-1][0].append(parameter)
            parts[-1][1].append(master)
            size += parameter.numel()
        return parts

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Read the norm of the gradient on the host and step, unless it is not finite. The gradients are used up."""
        norms = torch._foreach_norm([p.grad for p in (self.masters if self.sums else self.parameters)], 2, dtype=torch.float32)
        self._global_grad_norm = torch.linalg.vector_norm(torch.stack(norms)).item()
        self.overflow = not math.isfinite(self._global_grad_norm)
        if not self.overflow:
            excess = (self._global_grad_norm + 1e-6) / self.clip if self.clip else 0.0
            # the fused kernel divides by grad_scale as it reads the gradients
            self.grad_scale = torch.full((), excess, device=self.masters[0].device) if excess > 1 else None
            for parameters, masters in self._parts():
                if not self.sums:
                    for p, master in zip(parameters, masters, strict=True):
                        master.grad, p.grad = p.grad.float(), None
                super().step()
                for master in masters:
                    master.grad = None  # before the next part's are made
                if masters is not parameters:
                    torch._foreach_copy_(parameters, masters)
        for p in (*self.parameters, *self.masters):
            p.grad = None
