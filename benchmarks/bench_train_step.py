"""A train step, one optimisation added at a time, against the eager reference: images/s, share of the bound, peak memory.

Each provider is a process of its own with the allocator settings of its real use. Providers take turns of three steps on the same
data, timesteps and noise, after two steps that are not timed; a matmul and a copy are measured in every turn. A row has
numbers only if its losses of the first 20 steps are the eager reference's (PARITY); "sparse 75 %" is another model, and is not
compared.

On a GPU a turn has 20 steps, so that the host can run ahead, and the providers, which do not fit into its memory together, run one
after the other. `gpu_busy`: the share of a turn in which a kernel runs, from a profile of further steps; far below 1 means that the
host limits the step.
"""

import functools
import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.eager_reference import EagerDiT, comparable, fastdit_model, train_step
from benchmarks.harness import (
    DEVICE,
    PRECISION,
    Group,
    Result,
    Worker,
    busy_seconds,
    gpu_events,
    quantiles,
    speedup,
    start,
    synchronize,
    take_turns,
    timed,
)
from benchmarks.roofline import shares, train_flops
from fastdit import distributed, flow, kernels
from fastdit.config import Config, ModelConfig, TrainConfig
from fastdit.model import DiT
from fastdit.training import engine

SUITE = "train_step"
# width, depth, heads, hidden, class width; batch; shape of the matmul whose rate is the bound
CASES = {
    "base": ((384, 12, 6, 1536, 2048), 8, (2048, 384, 1536)),
    "S/2": ((384, 12, 6, 1024, None), 8, (2048, 384, 1536)),
    "wide": ((1088, 4, 17, 4352, 2048), 4, (1024, 1088, 8704)),
}
CUDA_CASES = {  # batches that a GPU needs longer for than the host for the launches of the fastest provider
    "S/2": ((384, 12, 6, 1024, None), 256, (65536, 384, 2048)),
    "B/2": ((768, 12, 12, 2048, None), 256, (65536, 768, 4096)),
    "L/2": ((1024, 24, 16, 2688, None), 64, (16384, 1024, 5376)),
    "XL/2": ((1152, 28, 18, 3072, None), 64, (16384, 1152, 6144)),
}
SPARSE = "sparse 75 %"
# what each provider adds to the one before
PROVIDERS = {
    "eager": "the base script's step",
    "+allocator": "glibc's allocator set up for tensors",
    "+packed": "fastdit's model: packed projections, few modulation Linears; in bf16, weights in bf16 with fp32 masters",
    "+kernels": "the fused ops instead of their references",
    "+adamw": "torch's fused AdamW",
    "+compile": "blocks under torch.compile",
    "engine": "under DeepSpeed, as `fastdit train` runs it",
    "graphs": "with train.compile=graphs",
    SPARSE: "the engine's step, with a quarter of the tokens in all blocks but the first and the last two: another model",
    "eager compiled": "the base script's step, its model under torch.compile",
}
CHAIN = "S/2"  # on a GPU the other cases measure MAIN only
MAIN = ("eager", "engine", "graphs", "eager compiled")
WARM, TURN, PARITY_STEPS = 2, {"cpu": 3, "cuda": 20}[DEVICE.type], 20
# Limit on |loss − eager loss| / eager loss in 20 steps. AdamW's first steps have the size lr whatever the gradient's size, so that
# rounding decides the sign of the smallest. In fp32 the largest at S/2 was 4.2e-5; the limit in bf16 is four of its rounding units.
PARITY = {"fp32": 1e-3, "bf16": 2**-6}[PRECISION]
OPTIMIZER_PARTS = 4
LR, WEIGHT_DECAY = 1e-4, 0.01  # the base script's


def matmul_of(case: str) -> tuple[int, int, int]:
    """Return M, K, N of the matmul whose rate is the bound on this device."""
    return (CUDA_CASES if DEVICE.type == "cuda" else CASES)[case][2]


def batch(step: int, size: int) -> tuple[Tensor, ...]:
    """Return x0, labels, t and noise of a step: the same in every process."""
    ids = flow.sample_ids(step, 0, size, DEVICE)
    draw = lambda stream, shape: kernels.counter_normal(0, stream, ids, shape)
    labels = (kernels.counter_uniform(0, 103, ids, ()) * 1000).long()
    return draw(100, (4, 32, 32)), labels, draw(101, ()).sigmoid(), draw(102, (4, 32, 32))


Step = Callable[[tuple[Tensor, ...]], float | Tensor]


def eager_step(shape: tuple, compiled: bool) -> Step:
    model = EagerDiT(comparable(*shape)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY)
    if compiled:
        model.compile(dynamic=False)
    return lambda data: train_step(model, optimizer, *data, PRECISION)


def velocity_loss(model, x0: Tensor, labels: Tensor, t: Tensor, noise: Tensor, *chosen: Tensor) -> Tensor:
    return kernels.flow_matching_loss(model(kernels.flow_interpolate(x0, noise, t), t, labels, *chosen), x0, noise).mean()


def plain_step(shape: tuple, backend: str, fused_adamw: bool | None, compiled: bool) -> Step:
    """Return a step of fastdit's model in a plain loop; in bf16 with fp32 masters. fused_adamw: None for torch's default."""
    model = fastdit_model(EagerDiT(comparable(*shape))).to(DEVICE)
    masters = list(model.parameters())
    if PRECISION == "bf16":
        masters = [p.detach().clone() for p in masters]
        model.bfloat16()
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False, fullgraph=True)
    parameters = list(model.parameters())
    # in parts, so that only a part of the gradients exists in fp32 at a time
    cuts = [len(masters) * i // OPTIMIZER_PARTS for i in range(OPTIMIZER_PARTS + 1)]
    parts = [(masters[a:b], parameters[a:b]) for a, b in itertools.pairwise(cuts)]
    optimizers = [torch.optim.AdamW(part, LR, weight_decay=WEIGHT_DECAY, fused=fused_adamw) for part, _ in parts]

    def run(data: tuple[Tensor, ...]) -> Tensor:
        with kernels.backend(backend):
            loss = velocity_loss(model, *data)
            loss.backward()
        for optimizer, (part_masters, weights) in zip(optimizers, parts, strict=True):
            if PRECISION == "bf16":
                for master, p in zip(part_masters, weights, strict=True):
                    master.grad, p.grad = p.grad.float(), None
            optimizer.step()
            optimizer.zero_grad()
            if PRECISION == "bf16":
                with torch.no_grad():
                    torch._foreach_copy_(weights, part_masters)
        return loss.detach()

    return run


def model_config(shape: tuple, name: str) -> ModelConfig:
    """Return the ModelConfig of a provider's model."""
    config = comparable(*shape)
    dense = min(2, (config.depth - 1) // 2)
    return replace(config, dense_blocks=(dense, dense), keep_tokens=0.25) if name == SPARSE else config


def engine_step(shape: tuple, size: int, compiled: str = "auto", name: str = "engine") -> Step:
    """Return a step as `fastdit train` runs it, under DeepSpeed's defaults, without data loader, EMA and logs. compiled:
    train.compile; name: of the provider."""
    train = TrainConfig(
        compile=compiled,
        batch_size=size,
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        beta2=0.999,
        clip=0.0,
        schedule="constant",
        warmup_steps=0,
    )
    world = distributed.start(DEVICE.type)
    config = engine.resolve_precision(Config(model=model_config(shape, name), train=train), world.device)
    made = DiT(config.model) if name == SPARSE else fastdit_model(EagerDiT(config.model))
    model = engine.initialize(made, config, world)
    ids = torch.arange(size, device=world.device)

    def run(data: tuple[Tensor, ...]) -> Tensor:
        loss = velocity_loss(model, *data, *flow.choose_tokens(config.model, 0, ids, dense=False))
        model.backward(loss)
        model.step()
        return loss.detach()

    return run


def provider(name: str, shape: tuple, size: int) -> Callable[[int, int], tuple]:
    """In a worker: return a function of (first step, number of steps) to their losses, seconds and CPU seconds per step; or, with
    busy=True, to the seconds per step in which a kernel runs."""
    plain = functools.partial(plain_step, shape)
    step = {
        "eager": lambda: eager_step(shape, False), "+allocator": lambda: eager_step(shape, False),
        "+packed": lambda: plain("reference", None, False), "+kernels": lambda: plain("auto", None, False),
        "+adamw": lambda: plain("auto", True, False), "+compile": lambda: plain("auto", True, True),
        "engine": lambda: engine_step(shape, size), "graphs": lambda: engine_step(shape, size, "graphs"),
        SPARSE: lambda: engine_step(shape, size, name=SPARSE),
        "eager compiled": lambda: eager_step(shape, True),
    }[name]()  # fmt: skip

    def run(first: int, count: int, busy: bool = False) -> tuple[list[float], float, float] | float:
        data = [batch(first + i, size) for i in range(count)]
        run_all = lambda: [step(each) for each in data]
        if busy:
            synchronize()
            return busy_seconds(gpu_events(run_all)) / count
        losses, wall, cpu = timed(run_all)
        return [float(loss) for loss in losses], wall / count, cpu / count

    return run


def in_turns(
    makers: dict[str, Callable[[], Worker]], matmul: tuple[int, int, int], turns: int, say: Callable
) -> tuple[dict, list, dict, dict, dict]:
    """Run all providers in turns: on a GPU each by itself, with limits of its own.

    Returns each provider's turns, the first not timed; the turns of the limits; peak bytes; busy seconds on a GPU; errors.
    """
    taken, peaks, busy, errors, limits = {}, {}, {}, {}, []
    for group in [(name,) for name in makers] if DEVICE.type == "cuda" else [tuple(makers)]:
        workers, failed = start({name: makers[name] for name in group}, say)
        errors |= failed
        first, failed = take_turns({name: lambda _, w=w: w(0, WARM) for name, w in workers.items()}, 1, say)
        errors |= failed
        calls = {n: lambda turn, w=w: w(WARM + turn * TURN, TURN) for n, w in workers.items() if n not in errors}
        rates = Worker("benchmarks.roofline:Limits", matmul)
        later, failed = take_turns({"limits": lambda _, rates=rates: rates(), **calls}, turns, say)
        errors |= failed
        limits += later.pop("limits")
        taken |= {name: first[name] + returned for name, returned in later.items()}
        for name in calls.keys() - errors.keys():
            peaks[name] = workers[name].peak_memory()
            if DEVICE.type == "cuda":
                busy[name] = workers[name](WARM + turns * TURN, 3, True)
        for worker in (rates, *workers.values()):
            worker.stop()
    return taken, limits, peaks, busy, errors


def measure(
    case: str, shape: tuple, size: int, matmul: tuple[int, int, int], names: tuple[str, ...], turns: int, say: Callable
) -> dict[str, Result]:
    tuned = lambda name: name not in ("eager", "eager compiled")
    make = functools.partial(Worker, "benchmarks.bench_train_step:provider")
    makers = {name: functools.partial(make, name, shape, size, allocator=tuned(name)) for name in names}
    taken, limits, peaks, busy, errors = in_turns(makers, matmul, turns, say)
    losses = {n: [x for turn in taken[n] for x in turn[0]][:PARITY_STEPS] for n in taken if n not in errors}
    parity = {name: difference(mine, losses.get("eager", [])) for name, mine in losses.items() if name != SPARSE}
    errors |= {
        n: f"parity: the losses differ by {p:.1e}, more than {PARITY:.1e}"
        for n, p in parity.items()
        if not p <= PARITY and n != SPARSE
    }
    rates = tuple(statistics.median(turn[k] for turn in limits) for k in (0, 1))
    samples = {name: [] if name in errors else [turn[1] for turn in taken[name][1:]] for name in names}
    results = {}
    for name in names:
        key, values = {"case": case, "provider": name, "size": f"batch {size}"}, {}
        if samples[name]:
            median = quantiles(samples[name])[0]
            with torch.device("meta"):
                model = DiT(model_config(shape, name))
            mfu, share = shares(model, size, median, rates)
            values = {
                "images_per_s": f"{size / median:.4g}", **speedup(samples["eager"], samples[name]),
                "mfu": f"{mfu:.3f}", "bound_share": f"{share:.3f}", "parity": f"{parity[name]:.1e}" if name in parity else "",
                "parity_steps": len(losses[name]), "peak_mb": f"{peaks[name] / 1e6:.0f}",
                "cpu_s": f"{statistics.median(turn[2] for turn in taken[name][1:]):.6g}",
                "gflop_per_image": f"{train_flops(model.config) / 1e9:.2f}", "gemm_gflops": f"{rates[0] / 1e9:.1f}",
                "copy_gb_s": f"{rates[1] / 1e9:.1f}",
            }  # fmt: skip
            if name in busy:
                values["gpu_busy"] = f"{busy[name] / median:.3f}"
        results[name] = Result(key, samples[name], values, errors.get(name, ""))
    return results


def difference(losses: list[float], eager: list[float]) -> float:
    """Return the largest difference relative to the eager reference's loss; infinite if a loss is missing or not finite."""
    if len(losses) != len(eager) or not all(map(math.isfinite, losses + eager)):
        return math.inf
    return max(abs(ours - theirs) / theirs for ours, theirs in zip(losses, eager, strict=True))


def groups(full: bool) -> dict[str, Group]:
    cuda = DEVICE.type == "cuda"
    cases = CUDA_CASES if cuda else CASES
    chosen = list(cases) if full else ["S/2"]
    rounds, part = (5, 1) if cuda else (9, 1) if full else (6, 2)

    def group(case: str) -> Group:
        shape, size, matmul = cases[case]
        names = (tuple(PROVIDERS) if case == CHAIN else MAIN) if cuda else of_cpu(full)
        return Group(names, functools.partial(measure, case, shape, size // part, matmul, names, rounds))

    return {case: group(case) for case in chosen}


def of_cpu(full: bool) -> tuple[str, ...]:
    """Return the providers on a CPU: without CUDA graphs and compiled blocks, which gain nothing there."""
    return tuple(name for name in PROVIDERS if name not in ("+compile", "graphs") and (full or "compile" not in name))


def test_train_step(replay, group, member) -> None:
    replay(group, member)
