"""How fast this machine is, and what keeps a run from it: measured rates, the step that they allow, the step that training takes.

Under torchrun all ranks measure at once; rank 0 reports its own figures.
"""

import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fastdit import attention, distributed, kernels, progress
from fastdit.checkpoint import RunState
from fastdit.config import Config
from fastdit.device import DTYPES, check_backend, device_name, synchronize, versions
from fastdit.kernels import library
from fastdit.planning import cards, plan
from fastdit.planning.machine_rates import attention_rate, copy_rate, hidden_share, link_rate, matmul_rate, seconds
from fastdit.training import engine
from fastdit.training.loop import Trainer, open_data

WARM, STEPS, PROFILED = 2, 6, 2  # training steps
READ = 20  # batches, after a first one
# As the profiler calls them: the ops whose own time, or whose kernels', is matmuls; gloo's spans and NCCL's kernels.
MATMULS = re.compile(
    r"aten::(addmm|mm|bmm|baddbmm|linear|_scaled_dot_product|_(flash|efficient|cudnn)_attention_)|mkl(dnn)?::|flash_attn::"
)
COLLECTIVES = re.compile(r"gloo:|ncclDevKernel")


def info() -> str:
    """Versions, the device, and what runs on it by default, as text."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend, built = check_backend(device), None
    if library.EXTENSION:
        built = f"built, runs {library.INSTRUCTION_SETS[library.cpp.isa()]}"
    config = engine.settle(Config(), device)
    zero = engine.deepspeed_config(config, 2)["zero_optimization"]
    overlap = "with" if zero["overlap_comm"] else "without"
    rows = {
        **versions(), "device": device_name(device),
        "C++ extension": built or "not built: install again with a C++ compiler and FASTDIT_BUILD_EXT=1",
        "precision": f"auto is {config.train.precision} here",
        "default ZeRO": f"stage {zero['stage']} {overlap} overlap, buckets of {zero['reduce_bucket_size']:,} elements",
    }  # fmt: skip
    if device.type == "cuda":
        allowed = attention.fused_kernels(config.model, DTYPES[config.train.precision], device, training=True)
        rows["attention"] = f"{' or '.join(allowed)}, as PyTorch chooses"
    lines = [f"{name:20} {value}" for name, value in rows.items()]
    return "\n".join([*lines, "", f"kernel backend on {device.type}:", *(f"  {op:26} {backend}" for op in kernels.OPS)])


def data_rate(loader, config: Config, device: torch.device) -> float:
    """Images/s that this rank's loader gives when nobody else works, from its first steps."""
    call = iter(range(READ + 1))
    accumulation = config.train.accumulation
    taken = seconds(lambda: loader.batch(*divmod(next(call), accumulation)), device, READ)
    return config.train.batch_size / taken


def profiled(events: Iterable, device: torch.device) -> tuple[float, float]:
    """Seconds in (matmuls and attention, collectives) of a profile's key_averages."""
    cuda = device.type == "cuda"
    matmul = lambda event: event.self_device_time_total if cuda else event.self_cpu_time_total
    collective = lambda event: event.self_device_time_total if cuda else event.cpu_time_total  # gloo's spans have none of their own
    of = lambda pattern, time: sum(time(event) for event in events if pattern.match(event.key)) / 1e6
    return of(MATMULS, matmul), of(COLLECTIVES, collective)


def measured_step(config: Config, world: distributed.World, loader, codec, run: Path) -> dict[str, float]:
    """Seconds of a training step and of its phases, and in a profile of other steps of its matmuls and collectives."""
    trainer = Trainer(config, world, loader, codec, run, None, RunState())
    first = READ // config.train.accumulation + 1  # loaders read ahead: go on behind what data_rate read

    def steps(numbers: Iterable[int]) -> None:
        for step in numbers:
            trainer.step(first + step)
            trainer.log.advance()
        synchronize(world.device)

    try:
        steps(range(WARM))
        trainer.clock.read()
        start = time.perf_counter()
        steps(range(WARM, WARM + STEPS))
        taken = time.perf_counter() - start
        phases = trainer.clock.read()
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (world.device.type == "cuda")
        with profile(activities=kinds) as found:
            steps(range(WARM + STEPS, WARM + STEPS + PROFILED))
    finally:
        trainer.log.close()
    matmuls, collectives = (s / PROFILED for s in profiled(found.key_averages(), world.device))
    return {"step": taken / STEPS, "matmuls": matmuls, "collectives": collectives, **{k: s / STEPS for k, s in phases.items()}}


def compare(expected: plan.Rates, fused: bool, step: dict[str, float], overlapped: bool) -> dict[str, dict[str, float]]:
    """{part: {"expected", "measured"}} in seconds of a step: data, matmuls, ops, optimizer, communication.

    overlapped: gradients are sent behind the backward, as on CUDA, and count on neither side. A profile does not tell which phase
    a collective was in: it is divided between backward and optimizer as the bytes are.
    """
    sent = expected.gradients_sent + expected.weights_sent
    in_backward = step["collectives"] * expected.gradients_sent / sent if sent else 0.0
    in_optimizer = step["collectives"] - in_backward
    in_backward = 0.0 if overlapped else in_backward
    parts = {
        "data": (0.0, step["data_wait"]),
        "matmuls": (expected.matmuls, step["matmuls"]),
        "ops": (
            expected.ops_fused if fused else expected.ops_eager, step["forward_backward"] - step["matmuls"] - in_backward,
        ),
        "optimizer": (expected.optimizer, step["optimizer"] + step["ema"] - in_optimizer),
        "communication": (expected.weights_sent if overlapped else sent, in_backward + in_optimizer),
    }  # fmt: skip
    return {name: {"expected": a, "measured": max(0.0, b)} for name, (a, b) in parts.items()}


def examine(config: Config) -> dict:
    """Measure everything for a config, in seconds, bytes/s, FLOP/s and images/s of all ranks. All ranks must call it.

    Nothing is written but into a temporary folder. Raises InputError for bad input, as training would.
    """
    world = distributed.start(config.train.device)
    config = engine.settle(config, world.device)
    backend = check_backend(world.device)
    _, loader, codec = open_data(config, world)
    model, train, device = config.model, config.train, world.device
    dtype = DTYPES[train.precision]
    shape = (train.batch_size * (model.input_size // model.patch_size) ** 2, model.width, 2 * model.hidden)  # SwiGLU's first
    measure = {
        "matmul": lambda: matmul_rate(shape, dtype, device),
        "copy": lambda: copy_rate(device),
        "link": lambda: link_rate(world.size, device),
        "attention": lambda: attention_rate(model, train.batch_size, dtype, device),
        "overlap": lambda: hidden_share(device, shape, dtype),
        "data": lambda: data_rate(loader, config, device),
    }
    found = {}
    with progress.progress_bar(len(measure), unit="rate", disable=world.rank != 0) as bar:
        for name, work in measure.items():
            bar.set_description(name)
            found[name] = work()
            bar.update()
    settings = {"total_steps": WARM + STEPS + PROFILED, "wandb": "disabled", "profile": None, "resume": "never"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        short = plan.replaced(config, **{f"train__{key}": value for key, value in settings.items()})
        step = measured_step(short, world, loader, codec, Path(folder))
    expected = plan.rates(config, world.size, found["matmul"], found["copy"], found["link"] or float("inf"))
    parts = compare(expected, backend != "reference", step, device.type == "cuda")
    images = train.batch_size * train.accumulation * world.size
    card = cards.card_of(device_name(device))
    return {
        "device": device_name(device), "ranks": world.size, "precision": train.precision, "kernels": backend,
        "compiled": engine.compiles(config, world), "data_source": config.data.source, "images_a_step": images,
        "matmul": {"shape": shape, "flops": found["matmul"], "of_datasheet": card and found["matmul"] / card.peak(train.precision)},
        "copy_bytes_per_s": found["copy"], "link_bytes_per_s": found["link"],
        "attention": dict(zip(("kind", "flops"), found["attention"], strict=True)), "overlap_hidden": found["overlap"],
        "data_images_per_s": found["data"] * world.size, "step_s": step["step"], "parts_s": parts,
        "images_per_s": {
            "expected": images / sum(part["expected"] for part in parts.values()), "measured": images / step["step"],
        },
        "largest_gap": max(parts, key=lambda name: parts[name]["measured"] - parts[name]["expected"]),
    }  # fmt: skip


def describe(found: dict) -> str:
    """What `examine` returned, as text."""
    matmul, attended, link, hidden = (found[key] for key in ("matmul", "attention", "link_bytes_per_s", "overlap_hidden"))
    M, K, N = matmul["shape"]
    share = f", {matmul['of_datasheet']:.0%} of its datasheet's peak" if matmul["of_datasheet"] else ""
    compiled = engine.COMPILED[found["compiled"]]
    overlap = "not applicable: a CPU has no streams"
    if hidden is not None:
        overlap = f"{hidden:.0%} of a copy on a stream of its own is hidden behind matmuls"
    rows = [
        ("device", f"{found['ranks']} x {found['device']}; {found['precision']}, {found['kernels']} kernels, {compiled}"),
        ("matmul", f"{matmul['flops'] / 1e12:.3g} TFLOP/s, [{M},{K}] by [{K},{N}]{share}"),
        ("attention", f"{attended['flops'] / 1e12:.3g} TFLOP/s forward and backward, {attended['kind']}"),
        ("copy", f"{found['copy_bytes_per_s'] / 1e9:.3g} GB/s, reads and writes"),
        ("link", f"{link / 1e9:.3g} GB/s sent by each rank in an all-reduce" if link else "not measured: one rank"),
        ("overlap", overlap),
        ("data", f"{found['data_images_per_s']:,.0f} images/s from {found['data_source']}, nothing else running"),
    ]
    lines = [f"{name:10} {text}" for name, text in rows]
    parts, rate = found["parts_s"], found["images_per_s"]
    times = [(name, part["expected"], part["measured"]) for name, part in parts.items()]
    times.append(("all", sum(part["expected"] for part in parts.values()), found["step_s"]))
    head = f"a step of {found['images_a_step']} images, ms"
    lines += ["", f"{head:30} {'expected':>9} {'measured':>9}"]
    lines += [f"{name:30} {expected * 1e3:>9.1f} {measured * 1e3:>9.1f}" for name, expected, measured in times]
    lines += ["", f"images/s: {rate['expected']:,.1f} expected at these rates, {rate['measured']:,.1f} measured in training steps"]
    name = found["largest_gap"]
    gap = (parts[name]["measured"] - parts[name]["expected"]) * 1e3
    lines.append(f"largest gap: {name}, {gap:.1f} ms more than expected" if gap > 0 else "no part takes longer than expected")
    return "\n".join(lines)
