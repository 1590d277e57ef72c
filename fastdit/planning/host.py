"""Whether a run would be bound by its host: the time of Python and the CUDA driver to launch a step, and of the GPU to run it."""

from typing import NamedTuple

import torch

from fastdit.config import Config
from fastdit.distributed import World
from fastdit.training.engine import compiles


class Host(NamedTuple):
    """What the host does in a step of one rank, per block and around the blocks: its milliseconds, and how often it launches."""

    block_ms: float
    block_launches: float
    outside_ms: float
    outside_launches: float


BLOCK_GRAPHS = "graphs of several ranks"  # train.compile=graphs, where each block has graphs of its own
# By train.compile, and BLOCK_GRAPHS: lines through benchmarks/results/cuda_host_epyc_avx512.csv, as its writer
# benchmarks/without_gpu/cuda_host.py prints them. CPU time of one core of the CPU that the CSV names, without the driver's.
HOST: dict[str, Host] = {
    "none": Host(0.88, 30.3, 0.0, 80.0),
    "blocks": Host(0.83, 30.3, 0.1, 81.0),
    "graphs": Host(0.1, 1.8, 0.6, 42.0),
    BLOCK_GRAPHS: Host(0.14, 2.8, 0.3, 43.0),
}
DRIVER = (2e-6, 5e-6)  # seconds of a launch in NVIDIA's driver, which that measurement does not have


def seconds(config: Config, compiled: str) -> tuple[float, float] | None:
    """Least and most that the host of one rank needs for a micro-step with a train.compile, the optimizer's step included. None:
    not measured."""
    if compiled not in HOST:
        return None
    block_ms, block_launches, outside_ms, outside_launches = HOST[compiled]
    depth = config.model.depth
    launches = outside_launches + depth * block_launches
    least, most = ((outside_ms + depth * block_ms) / 1e3 + launches * each for each in DRIVER)
    return least, most


def predict(config: Config, gpus: int, gpu_seconds: float) -> dict:
    """The host's time for a micro-step, as nested dicts. gpu_seconds: of the GPU's work for a step, at the least.

    `graphs`: the time with train.compile=graphs, where that is another one, fits the run and needs less than the GPU; else None.
    """
    compiled = compiles(config, World(0, gpus, torch.device("cuda"), None))
    work = gpu_seconds / config.train.accumulation
    graphs = seconds(config, BLOCK_GRAPHS if gpus > 1 else "graphs") if config.zero.stage < 3 else None
    if compiled == "graphs":
        return {"compile": compiled, "seconds": graphs, "gpu_seconds": work, "graphs": None}
    better = graphs if graphs and graphs[1] < work else None
    return {"compile": compiled, "seconds": seconds(config, compiled), "gpu_seconds": work, "graphs": better}


def describe(host: dict) -> str:
    """What `predict` found, in one line."""
    number = lambda value: f"{value * 1e3:.{0 if value >= 0.01 else 1}f}"
    between = lambda values: f"{number(values[0])} to {number(values[1])} ms"
    own, work = host["seconds"], host["gpu_seconds"]
    if own is None:
        return f"time of a step with compile={host['compile']} not measured"
    kind = "host-bound" if own[0] > work else "GPU-bound" if own[1] < work else "about even"
    line = f"{between(own)} per micro-step with compile={host['compile']} against {number(work)} ms of GPU work: {kind}"
    if kind != "GPU-bound" and host["graphs"]:
        line += f"; train.compile=graphs: {between(host['graphs'])}"
    return line


def assumption() -> str:
    """What the host's time rests on."""
    return (
        f"host: processor time of one rank without recomputation on one CPU, and {DRIVER[0] * 1e6:.0f} to {DRIVER[1] * 1e6:.0f} us "
        "per launch in the driver; ZeRO adds to it, another CPU differs"
    )
