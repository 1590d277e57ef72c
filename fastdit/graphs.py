"""CUDA graphs, and a model's training step as such: one launch for the forward pass and one for each part of the backward pass.

The host needs longer to launch the kernels of a block than the GPU to run them wherever the model or the batch is small. What is
launched is the same in every step, so it is recorded once and replayed.

The model is cut into parts, each a function from tensors to tensors. One part on one rank; on several ranks embedding, blocks and
output are parts of their own, so that a part's gradients are complete, and ZeRO's hooks send them, while the parts before it run.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastdit.model import DiT


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    """One for all captures of a process: cuBLAS keeps a workspace, of 32 MiB on Hopper, for each stream that it has worked on."""
    return torch.cuda.Stream()


def graph_pool(device: torch.device) -> tuple | None:
    """A memory pool for graphs that are replayed in one order, or None where there are no graphs: on a CPU."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def warm_up(work: Callable[[], object]) -> None:
    """Do on the stream of captures what is to be recorded: Triton compiles and cuBLAS makes its workspace, neither of which a
    capture allows."""
    stream = _capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)


class Recorded:
    """Work that can be repeated on the same memory: a CUDA graph. Without a pool, on a CPU, the work is done again and its results
    are copied to where the first ones lie."""

    def __init__(self, work: Callable[[], list[Tensor | None]], pool: tuple | None) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self.work = work if pool is None else None
        if pool is None:
            self.results = work()
            return
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: DALI's and NCCL's threads call CUDA meanwhile, which the default mode turns into errors
        with torch.cuda.graph(self.graph, pool, _capture_stream(), capture_error_mode="thread_local"):
            self.results = work()

    @torch.no_grad()
    def replay(self) -> None:
        """Do the work again: `results` holds the new ones."""
        if self.graph:
            self.graph.replay()
            return
        with torch.enable_grad():
            results = self.work()
        for kept, new in zip(self.results, results, strict=True):
            if kept is not None:
                kept.copy_(new)


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

    later = {*model.blocks.parameters(), *model.output.parameters()}
    return [
        Part(model.embed, [p for p in model.parameters() if p not in later]),
        *(Part(block_part(block), list(block.parameters())) for block in model.blocks),
        Part(lambda x, y: (model.project(y),), list(model.output.parameters())),
    ]


class TrainingGraphs:
    """Takes the place of model.forward while the model trains: the same velocities and the same gradients, from recorded work.

    The velocity is valid until the next step's, and gradients that are not in a parameter's .grad are until its forward pass. All
    batches must have the shapes of the first.
    """

    def __init__(self, model: DiT, parts: list[Part]) -> None:
        self.model = model
        self.parts = parts
        self.plain = model.forward
        self.recorded = False
        self.steps = 0  # forward passes replayed

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Velocity [B,C,h,w]; as DiT.forward, with labels. Raises ValueError when the shapes are not those of the first call."""
        if not (self.model.training and torch.is_grad_enabled()):
            return self.plain(x, t, labels)
        given = x, t, labels
        if not self.recorded:
            self._record([tensor.clone() for tensor in given])
        if [tensor.shape for tensor in given] != [tensor.shape for tensor in self.inputs]:
            raise ValueError(
                f"a model recorded for batches of {list(self.inputs[0].shape)} is given {list(x.shape)}: use train.compile=blocks"
            )
        for buffer, tensor in zip(self.inputs, given, strict=True):
            buffer.copy_(tensor)
        self._keep_gradients()
        self.forward.replay()
        self.steps += 1
        link: Tensor | None = None
        for i, part in enumerate(self.parts):
            link = _RunPart.apply(link, self, i, *part.parameters)
        return link

    def _record(self, inputs: list[Tensor]) -> None:
        pool = graph_pool(inputs[0].device)
        self.inputs = inputs
        self.token = torch.empty(0, device=inputs[0].device)  # orders the parts in the backward pass, carries nothing
        self.grad_out = torch.zeros_like(inputs[0], dtype=self.model.output.weight.dtype)  # of the velocity
        if pool is not None:
            warm_up(self._step)
        self.forward = Recorded(self._forward, pool)
        backward = []
        for i in reversed(range(len(self.parts))):
            backward.append(Recorded(functools.partial(self._backward, i), pool))
            if pool is not None:  # what is recorded after it may use this part's memory
                self._states[i] = self._incoming[i + 1] = None
        self.backward = backward[::-1]
        self.recorded = True

    def release(self) -> None:
        """Give back the memory of the recorded work; the next step records it again."""
        if self.recorded:
            self._keep_gradients()
        self.recorded = False
        self.inputs = self.forward = self.backward = self.grad_out = self._states = self._incoming = None

    def _keep_gradients(self) -> None:
        """Copy what a micro-step before left in .grad out of the recorded memory, where activations lie before gradients do."""
        for part, backward in zip(self.parts, self.backward, strict=True):
            for p, gradient in zip(part.parameters, backward.results, strict=True):
                if p.grad is not None and p.grad.data_ptr() == gradient.data_ptr():
                    p.grad = p.grad.clone()

    def _step(self) -> None:
        """Forward and backward pass, not recorded."""
        self._forward()
        for i in reversed(range(len(self.parts))):
            self._backward(i)
        self._states, self._incoming = [], []

    def _forward(self) -> list[Tensor]:
        """Run all parts, each on tensors cut off from the part before, and keep what their backward passes need."""
        self._states: list[tuple | None] = []
        state = self.inputs
        for i, part in enumerate(self.parts):
            given = [tensor.detach().requires_grad_(i > 0) for tensor in state]
            state = part.run(*given)
            self._states.append((given, state))
        # of each part's results, by the part's number + 1
        self._incoming: list[list[Tensor | None] | None] = [None] * len(self.parts) + [[self.grad_out]]
        return [state[0].detach()]

    def _backward(self, i: int) -> list[Tensor | None]:
        """The gradients of a part's parameters; those of its inputs are kept for the part before."""
        given, made = self._states[i]
        pairs = [(m, grad) for m, grad in zip(made, self._incoming[i + 1], strict=True) if grad is not None]
        inputs = given if i else []
        wanted = [*inputs, *self.parts[i].parameters]
        found = list(torch.autograd.grad([m for m, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True))
        self._incoming[i] = found[: len(inputs)]
        return found[len(inputs) :]


class _RunPart(torch.autograd.Function):
    """The place of a part in autograd's graph: its backward replays the part's and hands over the gradients of its parameters."""

    @staticmethod
    def forward(ctx, link: Tensor | None, graphs: TrainingGraphs, i: int, *parameters: Tensor) -> Tensor:
        ctx.graphs = graphs
        ctx.i = i
        ctx.step = graphs.steps
        last = i == len(graphs.parts) - 1
        return (graphs.forward.results[0] if last else graphs.token).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        graphs, i = ctx.graphs, ctx.i
        if ctx.step != graphs.steps:
            raise RuntimeError("a recorded step's backward pass must come before the next forward pass, which replaces its memory")
        if i == len(graphs.parts) - 1:
            graphs.grad_out.copy_(grad)
        graphs.backward[i].replay()
        # new tensors on the same memory: autograd takes them as .grad without a copy
        return graphs.token if i else None, None, None, *(gradient.detach() for gradient in graphs.backward[i].results)


def release_recorded(model: nn.Module) -> None:
    """Where `model` trains by recorded work, give its memory back until the next step."""
    if isinstance(model.forward, TrainingGraphs):
        model.forward.release()


def record_training(model: DiT, per_block: bool) -> None:
    """Make `model` train by recorded work from its next step on. per_block: gradients arrive block by block.

    The parameters must keep their memory from then on, as with optimizers that update them in place.
    """
    model.forward = TrainingGraphs(model, by_block(model) if per_block else whole(model))
