"""A model's training step as CUDA graphs: one launch for the forward pass and one for each part of the backward pass.

A block launches 11 fused kernels, 13 matmuls and the attention, and the host needs longer to launch them than the GPU to run
them wherever the model or the batch is small. What is launched is the same in every step, so it is recorded once and replayed.

The model is cut into parts, each a function from tensors to tensors. One part on one rank; on several ranks embedding, blocks and
output are parts of their own, so that a part's gradients are complete, and ZeRO's hooks send them, while the parts before it run.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastdit.model import DiT

WARM_UP = (
    2  # steps before the recording: Triton compiles, cuBLAS makes its handles and workspaces, neither of which can be recorded
)


class Part(NamedTuple):
    """A piece of the forward pass: `run` maps tensors to tensors, each the next part's inputs; parameters: those that it uses."""

    run: Callable[..., tuple[Tensor, ...]]
    parameters: list[nn.Parameter]


def whole(model: DiT) -> list[Part]:
    """The forward pass as one part."""
    forward = model.forward
    return [Part(lambda x, t, labels: (forward(x, t, labels),), list(model.parameters()))]


def by_block(model: DiT) -> list[Part]:
    """The forward pass as a part for the embedding, one for each block and one for the output. The modulation of the blocks to
    come travels through the parts."""

    def block_part(block: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
        return lambda x, y, *modulation: (*model.run_block(block, x, y, modulation[:6]), *modulation[6:])

    blocks, output = set(model.blocks.parameters()), set(model.output.parameters())
    embedding = [p for p in model.parameters() if p not in blocks and p not in output]
    return [
        Part(model.embed, embedding),
        *(Part(block_part(block), list(block.parameters())) for block in model.blocks),
        Part(lambda x, y: (model.project(y),), list(output)),
    ]


class Recorded:
    """Work that can be repeated on the same memory: a CUDA graph. On a CPU, where there are none, the work is called again and its
    results are copied to where the first ones lie."""

    def __init__(self, work: Callable[[], list[Tensor | None]], device: torch.device, pool: tuple | None) -> None:
        self.graph, self.work = None, work
        if device.type != "cuda":
            self.results = work()
            return
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: DALI's threads may ask CUDA for memory meanwhile
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.results = work()

    @torch.no_grad()
    def replay(self) -> None:
        if self.graph:
            self.graph.replay()
            return
        with torch.enable_grad():
            results = self.work()
        for kept, new in zip(self.results, results, strict=True):
            if kept is not None:
                kept.copy_(new)


class TrainingGraphs:
    """Takes the place of model.forward while the model trains: the same velocities and the same gradients, from recorded work.

    The velocity and all gradients keep their memory: a step's are valid until the next one's. All batches must have the shapes of
    the first.
    """

    def __init__(self, model: DiT, parts: list[Part]) -> None:
        self.model, self.plain, self.parts = model, model.forward, parts
        self.inputs: list[Tensor] = []  # of the recorded work; empty until the first step

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Velocity [B,C,h,w]; as DiT.forward. Raises ValueError when the shapes are not those of the first call."""
        if not (self.model.training and torch.is_grad_enabled()):
            return self.plain(x, t, labels)
        given = x, t, labels
        if not self.inputs:
            self._record([tensor.clone() for tensor in given])
        if [tensor.shape for tensor in given] != [tensor.shape for tensor in self.inputs]:
            raise ValueError(
                f"a model recorded for batches of {list(self.inputs[0].shape)} is given {list(x.shape)}: use train.compile=blocks"
            )
        for buffer, tensor in zip(self.inputs, given, strict=True):
            buffer.copy_(tensor)
        self.forward.replay()
        link: Tensor | None = None
        for i, part in enumerate(self.parts):
            link = _RunPart.apply(link, self, i, *part.parameters)
        return link

    def _record(self, inputs: list[Tensor]) -> None:
        self.inputs, device = inputs, inputs[0].device
        self.token = torch.empty(0, device=device)  # orders the parts in the backward pass, carries nothing
        self.grad_out: Tensor | None = None
        pool = None
        if device.type == "cuda":
            pool = torch.cuda.graph_pool_handle()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self.grad_out = torch.zeros_like(self._forward()[0])
                    self._incoming = {len(self.parts): [self.grad_out]}
                    for i in reversed(range(len(self.parts))):
                        self._backward(i)
                self._states = []
            torch.cuda.current_stream().wait_stream(side)
        self.forward = Recorded(self._forward, device, pool)
        self.out = self.forward.results[0]
        self.grad_out = torch.zeros_like(self.out)
        self._incoming = {len(self.parts): [self.grad_out]}
        self.backward: list[Recorded] = [None] * len(self.parts)
        for i in reversed(range(len(self.parts))):
            self.backward[i] = Recorded(lambda i=i: self._backward(i), device, pool)
            if (
                device.type == "cuda"
            ):  # recorded: later parts may use the memory of this one's activations and of the gradients it took
                self._states[i] = self._incoming[i + 1] = None
        # The gradients of the parameters come last in what a part's backward returns.
        self.gradients = [r.results[len(r.results) - len(p.parameters) :] for r, p in zip(self.backward, self.parts, strict=True)]

    def _forward(self) -> list[Tensor]:
        """Run all parts, each on tensors cut off from the part before, and keep what their backward passes need."""
        self._states, state = [], self.inputs
        for i, part in enumerate(self.parts):
            given = [tensor.detach().requires_grad_(i > 0) for tensor in state]
            state = part.run(*given)
            self._states.append((given, state))
        return [state[0].detach()]

    def _backward(self, i: int) -> list[Tensor | None]:
        """The gradients of a part's inputs, which the part before takes, and of its parameters."""
        given, made = self._states[i]
        pairs = [(m, grad) for m, grad in zip(made, self._incoming[i + 1], strict=True) if grad is not None]
        inputs = given if i else []
        wanted = [*inputs, *self.parts[i].parameters]
        found = list(torch.autograd.grad([m for m, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True))
        if i not in self._incoming:  # later calls copy their results to these
            self._incoming[i] = found[: len(inputs)]
        return found


class _RunPart(torch.autograd.Function):
    """The place of a part in autograd's graph: its backward replays the part's and hands over the gradients of its parameters."""

    @staticmethod
    def forward(ctx, link: Tensor | None, graphs: TrainingGraphs, i: int, *parameters: Tensor) -> Tensor:
        ctx.graphs, ctx.i = graphs, i
        last = i == len(graphs.parts) - 1
        return (graphs.out if last else graphs.token).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        graphs, i = ctx.graphs, ctx.i
        if i == len(graphs.parts) - 1:
            graphs.grad_out.copy_(grad)
        pairs = list(zip(graphs.parts[i].parameters, graphs.gradients[i], strict=True))
        for p, gradient in pairs:  # of a micro-step before, still in the memory that is written next
            if p.grad is not None and p.grad.data_ptr() == gradient.data_ptr():
                p.grad = p.grad.clone()
        graphs.backward[i].replay()
        # new tensors on the same memory: autograd takes them as .grad without a copy
        return graphs.token if i else None, None, None, *(gradient.detach() for _, gradient in pairs)


def record_training(model: DiT, per_block: bool) -> None:
    """Make `model` train by recorded work from its next step on. per_block: gradients arrive block by block.

    The parameters must keep their memory from then on, as optimizers do that update them in place.
    """
    model.forward = TrainingGraphs(model, by_block(model) if per_block else whole(model))
