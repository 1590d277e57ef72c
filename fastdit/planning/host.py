"""Whether a run would be limited by its host: the time that Python and the CUDA driver take to launch a step, against the GPU's."""

from typing import NamedTuple

import torch

from fastdit.config import Config
from fastdit.distributed import World
from fastdit.training.engine import compiles


class Host(NamedTuple):
    """The host's work for a micro-step of one rank, the optimizer's step included."""

    block_ms: float  # processor time per block
    block_launches: float  # kernels and graphs launched per block
    outside_ms: float  # processor time outside the blocks
    outside_launches: float


BLOCK_GRAPHS = "graphs of several ranks"  # train.compile=graphs on several ranks: each block has its own graphs
# By train.compile, and BLOCK_GRAPHS: lines fitted to benchmarks/results/cuda_host_epyc_avx512.csv, as its writer
# benchmarks/without_gpu/cuda_host.py prints them. CPU time of one core of the CPU that the CSV names, without the driver's.
HOST: dict[str, Host] = {
    "none": Host(0.88, 30.3, 0.0, 80.0),
    "blocks": Host(0.83, 30.3, 0.1, 81.0),
    "graphs": Host(0.1, 1.8, 0.6, 42.0),
    BLOCK_GRAPHS: Host(0.14, 2.8, 0.3, 43.0),
}
DRIVER = (2e-6, 5e-6)  # seconds per launch in NVIDIA's driver, least and most: not part of that measurement


def seconds(config: Config, compiled: str) -> tuple[float, float] | None:
    """Return the least and most seconds that the host of one rank needs for a micro-step with a train.compile, the optimizer's step
    included, or None if that was not measured."""
    if compiled not in HOST:
        return None
    block_ms, block_launches, outside_ms, outside_launches = HOST[compiled]
    depth = config.model.depth
    launches = outside_launches + depth * block_launches
    least, most = ((outside_ms + depth * block_ms) / 1e3 + launches * each for each in DRIVER)
    return least, most


def predict(config: Config, gpus: int, gpu_seconds: float) -> dict:
    """Return the host's time for a micro-step, as a dict. gpu_seconds: least time of the GPU for a step.

    `graphs` is the time with train.compile=graphs, if the run does not use graphs but could, and they need less time than the GPU;
    else None.
    """
    compiled = compiles(config, World(0, gpus, torch.device("cuda"), None))
    work = gpu_seconds / config.train.accumulation
    graphs = seconds(config, BLOCK_GRAPHS if gpus > 1 else "graphs") if config.zero.stage < 3 else None
    if compiled == "graphs":
        return {"compile": compiled, "seconds": graphs, "gpu_seconds": work, "graphs": None}
    better = graphs if graphs and graphs[1] < work else None
    return {"compile": compiled, "seconds": seconds(config, compiled), "gpu_seconds": work, "graphs": better}


def describe(host: dict) -> str:
    """Format what `predict` returned, in one line."""
    if host["seconds"] is None:
        return f"time of a step with compile={host['compile']} not measured"
    (least, most), work = host["seconds"], host["gpu_seconds"]
    kind = "host-bound" if least > work else "GPU-bound" if most < work else "about even"
    line = f"{_milliseconds(least)} to {_milliseconds(most)} ms per micro-step with compile={host['compile']} against "
    line += f"{_milliseconds(work)} ms of GPU work: {kind}"
    if kind != "GPU-bound" and host["graphs"]:
        least, most = host["graphs"]
        line += f"; train.compile=graphs: {_milliseconds(least)} to {_milliseconds(most)} ms"
    return line


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.{0 if seconds >= 0.01 else 1}f}"


def assumption() -> str:
    """Return the sentence on what the host's time rests on."""
    return (
        f"host: processor time of one rank without recomputation on one CPU, and {DRIVER[0] * 1e6:.0f} to {DRIVER[1] * 1e6:.0f} us "
        "per launch in the driver; ZeRO adds to it, another CPU differs"
    )
