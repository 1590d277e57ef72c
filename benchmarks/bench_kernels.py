"""Each op against the chain that an eager trainer runs, and that chain under torch.compile: forward, backward, both.

`gb_per_s`: the bytes that the algorithm must move (roofline.MOVED) per second; `copy_share`: that rate over tensor.copy_'s in the
same run; data that fit into a cache can exceed it. `peak_mb`: what one call allocates besides its inputs. `parity`: the largest
difference of outputs and gradients from the op's reference, relative to the largest value.

On a GPU the work of a call is recorded into a CUDA graph and replayed, so that its median excludes the host, on tensors that do not
fit into the L2 cache; `host_us` is the time that the host needs to launch a call.
"""

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from benchmarks.eager_reference import rotate_interleaved
from benchmarks.harness import (
    DEVICE,
    DTYPE,
    PROCESSES,
    SWEEPS,
    Group,
    Result,
    Worker,
    quantiles,
    seconds,
    spread,
    start,
    synchronize,
    take_turns,
    timed,
)
from benchmarks.kernel_cases import CASES, TOKENS
from benchmarks.roofline import MOVED
from fastdit import kernels
from fastdit.planning.machine_rates import COPY

SUITE = "kernels"
DIRECTIONS = ("forward", "backward", "both")
PROVIDERS = ("eager", "compile", "fused")
FLOW = ("flow_interpolate", "flow_matching_loss", "counter_normal")  # ops whose size is the latent's side
BOUND = {torch.float32: 2**-14, torch.bfloat16: 2**-6}[DTYPE]  # limit on parity: two bf16 roundings; fp32 sums in another order
RECORDED = 10  # calls in a CUDA graph
REPLAYS = 5  # replays per sample
HOST_CALLS = 5  # calls per measurement of the host's time
HIDDEN = {384: 1024, 768: 2048, 1024: 2688, 1088: 4352, 1152: 3072}  # width -> SwiGLU hidden width


def eager_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale[:, None]) + shift[:, None]


def eager_gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return x + branch * gate[:, None]


def eager_gated_residual_modulate(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    r = eager_gated_residual(x, branch, gate)
    return r, eager_modulate(r, shift, scale)


def eager_qk_norm_rope(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, ...]:
    """On the outputs of three projections, with the fp32 norm weights and interleaved tables of the eager model."""
    D = len(q_weight)
    q, k, v = (t.unflatten(-1, (heads, D)).transpose(1, 2) for t in (q, k, v))
    q, k = F.rms_norm(q, (D,), q_weight), F.rms_norm(k, (D,), k_weight)
    return rotate_interleaved(q, cos, sin), rotate_interleaved(k, cos, sin), v


def eager_swiglu(packed: Tensor) -> Tensor:
    value, gate = packed.chunk(2, dim=-1)
    return value * F.silu(gate)


def eager_flow_interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    t = t[:, None, None, None]
    return (1 - t) * x0 + t * noise


def eager_flow_matching_loss(v: Tensor, x0: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    return ((v - (noise - x0)) ** 2).flatten(1).mean(1) * weight


def eager_counter_normal(_seed: int, _stream: int, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(len(ids), *shape, device=ids.device)


def eager(op: str, inputs: tuple) -> tuple[Callable, tuple]:
    """Return the eager chain of an op, and its inputs made from the op's."""
    if op == "qk_norm_rope":
        qkv, q_weight, k_weight, cos, sin, heads, _ = inputs
        separate = (t.detach().contiguous().requires_grad_() for t in qkv.chunk(3, dim=-1))
        weights = (w.detach().float().requires_grad_() for w in (q_weight, k_weight))
        inputs = (*separate, *weights, *(t.repeat_interleave(2, dim=1) for t in (cos, sin)), heads)
    return globals()[f"eager_{op}"], inputs


def moved(op: str, size: int, batch: int) -> tuple[int, int]:
    """Return the bytes that forward and backward must move."""
    elements = batch * 4 * size**2 if op in FLOW else batch * TOKENS * size
    itemsize = 4 if op == "counter_normal" else DTYPE.itemsize  # its numbers are fp32
    return MOVED[op][0] * elements * itemsize, MOVED[op][1] * elements * itemsize


def directions(function: Callable, inputs: tuple, backward: bool) -> dict[str, Callable[[], object]]:
    """Return a call per direction; output gradients are ones of the outputs' dtypes."""
    calls: dict[str, Callable[[], object]] = {"forward": lambda: function(*inputs)}
    if backward:
        wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
        outputs = lambda: [t for t in _tuple(function(*inputs)) if t.requires_grad]
        graph = outputs()
        ones = [torch.ones_like(t) for t in graph]
        calls["backward"] = lambda: torch.autograd.grad(graph, wanted, ones, retain_graph=True)
        calls["both"] = lambda: torch.autograd.grad(outputs(), wanted, ones)
    return calls


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def difference(function: Callable, inputs: tuple, backward: bool) -> float:
    """Return the largest difference of outputs and gradients from the op's reference, relative to the tensor's largest value."""
    results = []
    for backend in ("auto", "reference"):
        with kernels.backend(backend):
            outputs = _tuple(function(*inputs))
            gradients = directions(function, inputs, True)["both"]() if backward else ()
        results.append([t.detach().float() for t in (*outputs, *gradients)])
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True))


def allocated(call: Callable[[], object]) -> int:
    """Return the most bytes that a call had allocated at a time."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def timer(call: Callable[[], object]) -> Callable[[], list[float]]:
    """Return a function that returns samples of a call's seconds: replays of its recorded work on a GPU; on a CPU means of as many
    calls as take 20 ms."""
    if DEVICE.type == "cuda":
        return Replayed(call)

    def times() -> list[float]:
        calls = max(1, int(0.02 / seconds(call, 1)))
        return [seconds(call, calls) for _ in range(3)]

    return times


class Replayed:
    """RECORDED calls' work on the GPU, in one CUDA graph. Made and used inside `one_stream`."""

    def __init__(self, call: Callable[[], object]) -> None:
        for _ in range(2):  # compiles
            call()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            for _ in range(RECORDED):
                call()

    def __call__(self) -> list[float]:
        """Return the seconds per call of each replay."""
        self.graph.replay()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
        marks[0].record()
        for mark in marks[1:]:
            self.graph.replay()
            mark.record()
        synchronize()
        return [a.elapsed_time(b) / 1e3 / RECORDED for a, b in itertools.pairwise(marks)]


@contextmanager
def one_stream() -> Iterator[None]:
    """Run forwards and backwards on a GPU in one stream that can be recorded, unlike the default stream."""
    if DEVICE.type != "cuda":
        yield
        return
    synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
    synchronize()


def host_seconds(call: Callable[[], object]) -> float:
    """Return the host's seconds per call, the smallest of REPLAYS means; HOST_CALLS calls do not fill the GPU's queue."""
    means = []
    for _ in range(REPLAYS):
        synchronize()
        means.append(timed(lambda: [call() for _ in range(HOST_CALLS)], wait=False).wall / HOST_CALLS)
    return min(means)


def batch_above_cache(elements: int) -> int:
    """Return the batch size at which a tensor is twice the size of the GPU's L2 cache. elements: elements per sample."""
    return -(-2 * torch.cuda.get_device_properties(DEVICE).L2_cache_size // (elements * DTYPE.itemsize))


def fill(inputs: tuple) -> None:
    """Fill floating-point inputs, which kernel_cases leaves uninitialised on a CPU, with normal numbers."""
    with torch.no_grad():
        for t in inputs:
            if isinstance(t, Tensor) and t.is_floating_point():
                t.normal_()


Calls = dict[str, Callable[[], object]]


class Turns(NamedTuple):
    """What one process measured; the keys are "provider direction".

    samples: seconds of each turn; allocated: bytes of a call; errors: reasons of members without samples; bandwidth: bytes/s of a
    copy; host: the host's seconds per call, None on a CPU, where they are the samples.
    """

    samples: dict[str, list[list[float]]]
    allocated: dict[str, int]
    errors: dict[str, str]
    bandwidth: float
    parity: float
    host: dict[str, float] | None = None


def interleave(
    makers: dict[str, Callable[[], Calls]], runs: tuple[str, ...], errors: dict[str, str], sweeps: int, parity: float
) -> Turns:
    """Measure every provider and each of its directions `runs` in turns, with a copy. errors: reasons of providers that are wrong
    and not measured."""
    with one_stream():
        providers, failed = start({name: make for name, make in makers.items() if name not in errors}, lambda _: None)
        errors = {f"{name} {run}": why for name, why in (errors | failed).items() for run in runs}
        calls = {f"{name} {run}": by_run[run] for name, by_run in providers.items() for run in runs}
        timers, failed = start({member: lambda call=call: timer(call) for member, call in calls.items()}, lambda _: None)
        errors |= failed
        source, target = (torch.ones(COPY // 4, device=DEVICE) for _ in range(2))
        turns = {"copy": lambda _: [seconds(lambda: target.copy_(source), 3)]}
        turns |= {member: lambda _, times=times: times() for member, times in timers.items()}
        samples, failed = take_turns(turns, sweeps, lambda _: None)
        errors |= failed
        good = {member: call for member, call in calls.items() if member not in errors}
        sizes = {member: allocated(call) for member, call in good.items()}
        host = {member: host_seconds(call) for member, call in good.items()} if DEVICE.type == "cuda" else None
    return Turns(samples, sizes, errors, 2 * COPY / statistics.median(s for [s] in samples["copy"]), parity, host)


def together(processes: list[Turns], members: tuple[str, ...], key: dict[str, str]) -> dict[str, Result]:
    """Return one result per member.

    The addresses of tensors differ between processes and stay the same in one, which on a CPU moves a median by 4 %, rarely by 30.
    So the speed-up of several processes is the median of theirs, with the spread between them.
    """
    results = {}
    for member in members:
        name, run = member.split()
        why = next((p.errors[member] for p in processes if member in p.errors), "")
        values = {}
        if not why:
            values["peak_mb"] = f"{max(p.allocated[member] for p in processes) / 1e6:.2f}"
            if all(p.host for p in processes):
                values["host_us"] = f"{statistics.median(p.host[member] for p in processes) * 1e6:.1f}"
            pairs = [zip(p.samples.get(f"eager {run}", ()), p.samples[member], strict=False) for p in processes]
            ratios = [[quantiles(theirs)[0] / quantiles(ours)[0] for theirs, ours in pair] for pair in pairs]
            if all(ratios):
                several = len(ratios) > 1
                values |= spread([statistics.median(r) for r in ratios] if several else ratios[0])
                values["processes"] = len(ratios) if several else ""
            if name.startswith("fused"):
                values["parity"] = f"{max(p.parity for p in processes):.1e}"
        samples = [] if why else [s for p in processes for turn in p.samples[member] for s in turn]
        results[member] = Result(key | {"provider": name, "direction": run}, samples, values, why)
    return results


def measure(op: str, size: int, batch: int, sweeps: int) -> Turns:
    """Measure all members of a group; runs in a worker."""
    function, inputs = CASES[op].make(size, batch, DTYPE, DEVICE)
    fill(inputs)
    runs = directions_of(op)
    backward = len(runs) > 1
    chain, chain_inputs = eager(op, inputs)
    torch._functorch.config.donated_buffer = False  # a graph whose backward runs more than once
    makers = {
        "eager": lambda: directions(chain, chain_inputs, backward),
        "compile": lambda: directions(torch.compile(chain, dynamic=False), chain_inputs, backward),
        "fused": lambda: directions(function, inputs, backward),
    }
    parity = difference(function, inputs, backward)
    errors = {"fused": f"parity: differs from the reference by {parity:.1e} of the largest value"} if parity > BOUND else {}
    return interleave(makers, runs, errors, sweeps, parity)


def rows(op: str, size: int, batch: int, members: tuple[str, ...], processes: list[Turns]) -> dict[str, Result]:
    """Return the group's results, with the rates of the bytes that its algorithm must move."""
    shape = f"{batch}x4x{size}x{size}" if op in FLOW else f"{batch}x{TOKENS}x{size}"
    results = together(processes, members, {"case": op, "size": shape})
    bandwidth = statistics.median(p.bandwidth for p in processes)
    forward, back = moved(op, size, batch)
    bytes_of = {"forward": forward, "backward": back, "both": forward + back}
    for result in results.values():
        if result.samples:
            rate = bytes_of[result.key["direction"]] / quantiles(result.samples)[0]
            result.values.update(
                gb_per_s=f"{rate / 1e9:.1f}", copy_share=f"{rate / bandwidth:.3f}", copy_gb_s=f"{bandwidth / 1e9:.1f}"
            )
    return results


def directions_of(op: str) -> tuple[str, ...]:
    return DIRECTIONS[:1] if op in ("flow_interpolate", "counter_normal") else DIRECTIONS  # data and noise need no gradient


def served() -> Callable:
    """Return what a worker of this suite calls."""
    return measure


def in_processes(worker: Callable[[int], Worker], full: bool, say: Callable[[str], None], *arguments) -> list[Turns]:
    """Return what each process measured, one after the other. worker: returns the worker of a number."""
    measured = []
    for i in range(PROCESSES[full]):
        say(f"process {i + 1} of {PROCESSES[full]}")
        measured.append(worker(i)(*arguments))
    return measured


def groups(full: bool) -> dict[str, Group]:
    cuda = DEVICE.type == "cuda"
    batch = lambda op, size: batch_above_cache(4 * size**2 if op in FLOW else TOKENS * size) if cuda else 8
    widths = {(True, True): (384, 768, 1088, 1152), (True, False): (1152,), (False, True): (384, 1088)}.get((cuda, full), (384,))
    worker = functools.cache(lambda _: Worker("benchmarks.bench_kernels:served"))

    def group(op: str, size: int, say: Callable[[str], None]) -> dict[str, Result]:
        processes = in_processes(worker, full, say, op, size, batch(op, size), SWEEPS[full])
        return rows(op, size, batch(op, size), made[f"{op} {size}"].members, processes)

    made = {}
    for op in MOVED:
        members = tuple(f"{name} {run}" for name in PROVIDERS for run in directions_of(op))
        for size in (32,) if op in FLOW else widths:
            size = HIDDEN[size] if op == "swiglu" else size
            made[f"{op} {size}"] = Group(members, functools.partial(group, op, size))
    return made


def test_kernels(replay, group, member) -> None:
    replay(group, member)
