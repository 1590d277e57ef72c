"""CUDA graphs, and a training step recorded as CUDA graphs: one launch for the forward pass and one per part of the backward pass.

If the model or the batch is small, the host needs longer to launch the kernels of a block than the GPU to run them. The launches
are the same in every step, so they are recorded once and replayed.

The model is cut into parts, each a function from tensors to tensors. On one rank there is one part; on several ranks embedding,
blocks and output are separate parts, so that a part's gradients are complete, and ZeRO's hooks send them, while the backward passes
of the parts before it run.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastdit.model import DiT, Subset

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    """Return the stream of all captures of a process: cuBLAS keeps a workspace, 32 MiB on Hopper, per stream that it has used."""
    return torch.cuda.Stream()


def graph_pool(device: torch.device) -> "_POOL_HANDLE | None":
    """Return a memory pool for graphs that are always replayed in the same order, None on a CPU, which has no graphs."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def warm_up(work: Callable[[], object]) -> None:
    """Run work that is about to be recorded on the stream of captures, so that Triton compiles and cuBLAS makes its workspace:
    neither is allowed during a capture."""
    stream = _capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)


class Recorded:
    """Work that can be repeated on the same memory: a CUDA graph.

    Without a pool, on a CPU, the work is run again and its results are copied to the memory of the first ones.
    """

    def __init__(self, work: Callable[[], list[Tensor]], pool: "_POOL_HANDLE | None") -> None:
        """work: reads and returns tensors that are always at the same addresses. pool: from `graph_pool`."""
        self.work = work if pool is None else None
        if pool is None:
            self.results = work()
            return
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: DALI's and NCCL's threads call CUDA meanwhile, which is an error in the default mode
        with torch.cuda.graph(self.graph, pool, _capture_stream(), capture_error_mode="thread_local"):
            self.results = work()

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat the work; `results` then holds the new results."""
        if self.work is None:
            self.graph.replay()
            return
        with torch.enable_grad():
            results = self.work()
        for result, new in zip(self.results, results, strict=True):
            result.copy_(new)


class Part(NamedTuple):
    """A piece of the forward pass."""

    run: Callable[..., tuple[Tensor, ...]]  # its results are the inputs of the next part
    parameters: list[nn.Parameter]  # that it uses


def one_part(model: DiT) -> list[Part]:
    """Return the forward pass as one part."""
    forward = model.forward

    def run(*inputs: Tensor) -> tuple[Tensor]:
        return (forward(*inputs),)

    return [Part(run, list(model.parameters()))]


def parts_by_block(model: DiT) -> list[Part]:
    """Return the forward pass as a part for the embedding, one per block and one for the output. The modulation of later blocks
    travels through the parts, and behind it the stream of the first dense blocks to the block after which it is joined."""
    between = model.between
    subset: Subset | None = None  # of the batch; not differentiable, so that it does not travel

    def run_embed(x: Tensor, t: Tensor, labels: Tensor, *chosen: Tensor) -> tuple[Tensor, ...]:
        nonlocal subset
        subset = model.subset(*chosen) if chosen else None
        return model.embed(x, t, labels)

    def run_block(i: int, x: Tensor, y: Tensor, *later: Tensor) -> tuple[Tensor, ...]:
        modulation, later = later[:6], later[6:]
        x, y = model.run_block(model.blocks[i], x, y, modulation, subset if i in between else None)
        if i + 1 == between.start and between:
            return (*(subset.take(t) if subset else t for t in (x, y)), *later, x)
        if i + 1 == between.stop and between:
            return *model.join(later[-1], x, modulation, subset), *later[:-1]
        return x, y, *later

    def run_output(_: Tensor, y: Tensor) -> tuple[Tensor]:
        return (model.project(y),)

    own = [list(block.parameters()) for block in model.blocks]
    if model.fusion is not None:
        own[between.stop - 1].extend(model.fusion.parameters())
    later = {*itertools.chain(*own), *model.output.parameters()}
    return [
        Part(run_embed, [p for p in model.parameters() if p not in later]),
        *(Part(functools.partial(run_block, i), parameters) for i, parameters in enumerate(own)),
        Part(run_output, list(model.output.parameters())),
    ]


class TrainingGraphs:
    """Replaces model.forward while the model trains: the same velocities and the same gradients, from recorded work.

    The velocity is valid until the next forward pass, and so are gradients that are not in a parameter's .grad. All batches must
    have the shapes of the first.
    """

    def __init__(self, model: DiT, parts: list[Part]) -> None:
        self.model = model
        self.parts = parts
        self.eager_forward = model.forward
        self.recorded = False
        self.steps = 0  # forward passes replayed

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the velocity, as DiT.forward does with these arguments. Raises ValueError if their shapes are not the first's."""
        if not (self.model.training and torch.is_grad_enabled()):
            return self.eager_forward(*inputs)
        if not self.recorded:
            self._record([tensor.clone() for tensor in inputs])
        if [tensor.shape for tensor in inputs] != [tensor.shape for tensor in self.inputs]:
            raise ValueError(
                f"a model recorded for batches of {list(self.inputs[0].shape)} is given {list(inputs[0].shape)}: use "
                "train.compile=blocks"
            )
        for buffer, tensor in zip(self.inputs, inputs, strict=True):
            buffer.copy_(tensor)
        self._keep_gradients()
        self.forward.replay()
        self.steps += 1
        link: Tensor | None = None
        for i, part in enumerate(self.parts):
            link = _RunPart.apply(link, self, i, *part.parameters)
        assert link is not None  # there is at least one part
        return link

    def _record(self, inputs: list[Tensor]) -> None:
        """Record all passes on `inputs`, which become the buffers of every step's inputs. `release` deletes what this sets."""
        pool = graph_pool(inputs[0].device)
        self.inputs = inputs
        self.token = torch.empty(0, device=inputs[0].device)  # orders the parts in the backward pass, holds no data
        self.grad_out = torch.zeros_like(inputs[0], dtype=self.model.output.weight.dtype)  # of the velocity
        if pool is not None:
            warm_up(self._step)
        self.forward = Recorded(self._forward, pool)
        backward = []
        for i in reversed(range(len(self.parts))):
            backward.append(Recorded(functools.partial(self._backward, i), pool))
            if pool is not None:  # frees this part's memory for the parts that are recorded after it
                self._states[i] = ([], ())
                self._incoming[i + 1] = ()
        self.backward = backward[::-1]
        self.recorded = True

    def release(self) -> None:
        """Free the memory of the recorded work; the next step records it again."""
        if not self.recorded:
            return
        self._keep_gradients()
        self.recorded = False
        del self.inputs, self.forward, self.backward, self.grad_out, self._states, self._incoming

    def _keep_gradients(self) -> None:
        """Copy gradients that an earlier micro-step left in .grad out of the recorded memory, which the next forward pass
        overwrites with activations."""
        for part, backward in zip(self.parts, self.backward, strict=True):
            for p, gradient in zip(part.parameters, backward.results, strict=True):
                if p.grad is not None and p.grad.data_ptr() == gradient.data_ptr():
                    p.grad = p.grad.clone()

    def _step(self) -> None:
        """Run the forward and backward pass without recording."""
        self._forward()
        for i in reversed(range(len(self.parts))):
            self._backward(i)
        self._states = []
        self._incoming = []

    def _forward(self) -> list[Tensor]:
        """Run all parts, each on tensors detached from the part before, and keep what their backward passes need. Returns the
        velocity."""
        self._states: list[tuple[list[Tensor], tuple[Tensor, ...]]] = []  # of each part: its inputs and its results
        results = self.inputs
        for i, part in enumerate(self.parts):
            inputs = [tensor.detach().requires_grad_(i > 0) for tensor in results]
            results = part.run(*inputs)
            self._states.append((inputs, results))
        # gradients of each part's results, by the part's number + 1
        self._incoming: list[Sequence[Tensor | None]] = [() for _ in self.parts]
        self._incoming.append([self.grad_out])
        return [results[0].detach()]

    def _backward(self, i: int) -> list[Tensor]:
        """Return the gradients of a part's parameters; those of its inputs are kept for the part before."""
        inputs, results = self._states[i]
        pairs = [(result, grad) for result, grad in zip(results, self._incoming[i + 1], strict=True) if grad is not None]
        inputs = inputs if i else []  # the batch itself needs no gradient
        leaves = [*inputs, *self.parts[i].parameters]
        outputs, grads = [result for result, _ in pairs], [grad for _, grad in pairs]
        gradients = list(torch.autograd.grad(outputs, leaves, grads, allow_unused=True))  # None for an input that is not used
        self._incoming[i] = gradients[: len(inputs)]
        return gradients[len(inputs) :]


class _RunPart(torch.autograd.Function):
    """A part's node in autograd's graph: its backward replays the part's backward pass and returns the gradients of its parameters.

    The nodes are linked by an empty tensor, so that autograd runs them in reverse order; the last one returns the velocity.
    """

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
        # new tensors on the same memory: autograd uses them as .grad without a copy
        return graphs.token if i else None, None, None, *(gradient.detach() for gradient in graphs.backward[i].results)


def release_recorded(model: nn.Module) -> None:
    """Free the memory of a model's recorded work until its next step; nothing if the model does not train by recorded work."""
    if isinstance(model.forward, TrainingGraphs):
        model.forward.release()


def record_training(model: DiT, per_block: bool) -> None:
    """Make `model` train by recorded work from its next step. per_block: gradients arrive block by block.

    The parameters must stay at their addresses, as with optimizers that update them in place.
    """
    parts = parts_by_block(model) if per_block else one_part(model)
    model.forward = TrainingGraphs(model, parts)  # pyright: ignore[reportAttributeAccessIssue]: replaces a method
