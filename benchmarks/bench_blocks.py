"""One DiT block with its modulation: eager, eager under torch.compile, and fastdit's, on the same weights.

`parity`: the largest difference from the eager block's output, relative to its largest value. Needs only torch and triton.
"""

import functools
from collections.abc import Callable

import torch
import torch._functorch.config
from torch import Tensor, nn

from benchmarks.bench_kernels import BOUND, Turns, batch_above_cache, directions, in_processes, interleave, together
from benchmarks.eager_reference import EagerDiT, comparable, fastdit_model
from benchmarks.harness import DEVICE, DTYPE, PRECISION, SWEEPS, Group, Result, Worker
from fastdit import kernels
from fastdit.model import DiT

SUITE = "blocks"
DIRECTIONS = ("forward", "both")
CASES = {"S/2": (384, 6, 1024), "B/2": (768, 12, 2048), "L/2": (1024, 16, 2688), "base/2": (1088, 17, 4352)}  # width, heads, hidden


class EagerBlock(nn.Module):
    """The eager reference's block as its trainer runs it: autocast over fp32 weights in bf16."""

    def __init__(self, model: EagerDiT) -> None:
        super().__init__()
        self.block = model.blocks[0]
        self.cos = model.cos
        self.sin = model.sin

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B,T,H], condition [B,H] -> [B,T,H]."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=PRECISION == "bf16"):
            return self.block(x, condition, self.cos, self.sin)


class FusedBlock(nn.Module):
    """fastdit's block by itself: the norms that a model fuses into its neighbours' ops are a separate op, or left out."""

    def __init__(self, model: DiT) -> None:
        super().__init__()
        self.block = model.blocks[0]
        self.modulation = model.modulation[0]
        self.cos = model.cos
        self.sin = model.sin

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B,T,H], condition [B,H] -> [B,T,H]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).unflatten(-1, (6, -1)).unbind(1)
        y = kernels.modulate(x, shift1, scale1)
        x, y = kernels.gated_residual_modulate(x, self.block.attention(y, self.cos, self.sin), gate1, shift2, scale2)
        return kernels.gated_residual(x, self.block.mlp(y) + self.block.mlp.down.bias, gate2)


def measure(case: str, batch: int, names: tuple[str, ...], sweeps: int) -> Turns:
    """Measure all members of a group; runs in a worker."""
    width, heads, hidden = CASES[case]
    torch._functorch.config.donated_buffer = False
    model = EagerDiT(comparable(width, 1, heads, hidden, None))
    fused = FusedBlock(fastdit_model(model).to(DEVICE, DTYPE))
    eager = EagerBlock(model.to(DEVICE))
    x = torch.randn(batch, 256, width, device=DEVICE)
    condition = torch.randn(batch, width, device=DEVICE)
    blocks: dict[str, Callable] = {
        "eager": eager, "compile": torch.compile(eager, dynamic=False), "fused": fused,
        "fused+compile": torch.compile(fused, dynamic=False),
    }  # fmt: skip

    def calls(name: str) -> dict[str, Callable[[], object]]:
        ours = name.startswith("fused")
        inputs = [t.to(DTYPE if ours else torch.float32).requires_grad_() for t in (x.clone(), condition.clone())]
        weights = (fused if ours else eager).parameters()
        run = directions(lambda *inputs: blocks[name](*inputs[:2]), (*inputs, *weights), True)
        return {d: run[d] for d in DIRECTIONS}

    with torch.no_grad():
        expected = eager(x, condition).float()
        parity = ((fused(x.to(DTYPE), condition.to(DTYPE)).float() - expected).abs().max() / expected.abs().max()).item()
    ours = [name for name in names if name.startswith("fused")]
    errors = {name: f"parity: the outputs differ by {parity:.1e}" for name in ours} if parity > 2 * BOUND else {}
    return interleave({name: functools.partial(calls, name) for name in names}, DIRECTIONS, errors, sweeps, parity)


def served() -> Callable:
    """Return what a worker of this suite calls."""
    return measure


def groups(full: bool) -> dict[str, Group]:
    cuda = DEVICE.type == "cuda"
    cases = list(CASES) if cuda else ["S/2", "base/2"]
    names = ("eager", "compile", "fused", "fused+compile") if cuda else ("eager", "compile", "fused")
    worker = functools.cache(lambda _: Worker("benchmarks.bench_blocks:served"))
    members = tuple(f"{name} {direction}" for name in names for direction in DIRECTIONS)

    def group(case: str, say: Callable[[str], None]) -> dict[str, Result]:
        batch = batch_above_cache(256 * CASES[case][0]) if cuda else 4
        processes = in_processes(worker, full, say, case, batch, names, SWEEPS[full])
        return together(processes, members, {"case": case, "size": f"{batch}x256x{CASES[case][0]}"})

    return {case: Group(members, functools.partial(group, case)) for case in (cases if full else cases[:1])}


def test_blocks(replay, group, member) -> None:
    replay(group, member)
