"""Checks the stub libraries by what fastdit asks of them, and prints what each op and attention backend launches.

    . DIR/env.sh && python -m benchmarks.without_gpu.selftest

Takes two minutes the first time. Exit code 1: a check failed.
"""

import argparse
import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.bench_kernels import directions
from benchmarks.kernel_cases import CASES
from benchmarks.train_steps import config_of, trainer_step
from benchmarks.without_gpu.count import counted, measure
from fastdit import kernels
from fastdit.model import DiT
from fastdit.planning.host import BLOCK_GRAPHS
from fastdit.presets import PRESETS
from fastdit.sampling import fast

CUDA, BF16 = torch.device("cuda", 0), torch.bfloat16
PRESET, BATCH = "test/4", 4
# provider of train_steps.py -> graphs that a micro-step replays. One rank: forward, backward; several: one backward per part
TRAINING = {"none": 0, "blocks": 0, "graphs": 2, BLOCK_GRAPHS: 1 + 1 + PRESETS[PRESET]["depth"] + 1}


def ops() -> bool:
    """Check that every op launches Triton kernels, forward and backward."""
    good = kernels.backend_in_use(CUDA) == "triton"
    for op, case in CASES.items():
        function, inputs = case.make(case.sizes[0], 4, BF16, CUDA)
        backward = any(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs)
        for name, call in directions(function, inputs, backward).items():
            seen = measure(call, 50)
            print(f"{op} {name:10} {seen}", flush=True)
            good &= seen.counts["driver_launches"] > 0
    return good


def attention() -> bool:
    """Check that flash and memory-efficient attention launch; cuDNN's front end may refuse its stub."""
    q = torch.randn(2, 6, 256, 64, device=CUDA, dtype=BF16, requires_grad=True)
    good = True
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with counted() as seen, sdpa_kernel([backend]):
                out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
                out.backward(torch.ones_like(out))
            print(backend.name, {name: value for name, value in seen.items() if value})
        except RuntimeError as error:
            print(backend.name, str(error).splitlines()[0][:100])
            good &= backend == SDPBackend.CUDNN_ATTENTION
    return good


def capture() -> bool:
    """Check that a capture records launches and refuses, as on a GPU, a read of a value."""
    x, graph = torch.ones(8, device=CUDA), torch.cuda.CUDAGraph()
    with counted() as seen, torch.cuda.graph(graph):
        x + 1
    print("a capture:", {name: value for name, value in seen.items() if value})
    good = seen["captured"] > 0
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.sum().item()
    except RuntimeError as error:
        print("a read in a capture:", str(error).splitlines()[0])
        return good
    return False


def train_step(provider: str, *settings: str) -> dict[str, float]:
    """Return the counts of one step of a run. kernels: all kinds, those of graphs with their copies and fills."""
    with redirect_stdout(None), redirect_stderr(io.StringIO()):  # a run's log and progress bar
        seen = measure(trainer_step(PRESET, provider, BATCH, "train.precision=bf16", *settings), 2, 2)
    print(f"train.compile={provider} {' '.join(settings)}: {seen}", flush=True)
    return seen.counts | {"kernels": sum(seen.counts[name] for name in ("launches", "driver_launches", "graph_nodes"))}


def training() -> bool:
    """Check a step of a run under every train.compile except model, and that each recomputes as configured, captured or not."""
    good = True
    for provider, replays in TRAINING.items():
        steps = {mode: train_step(provider, f"train.recompute={mode}") for mode in ("none", "light", "full")}
        good &= all(step["graph_launches"] == replays for step in steps.values())
        good &= steps["none"]["kernels"] <= steps["light"]["kernels"] < steps["full"]["kernels"]
        good &= train_step(provider, "train.accumulation=2")["graph_launches"] == 2 * replays
    return good


def sampling() -> bool:
    """Check that a velocity is one replay of all that its model launches."""
    model = DiT(config_of(PRESET, "none", BATCH, ".").model).to(CUDA, BF16).eval()
    # not through model.prepare, whose number of classes depends on values
    with torch.no_grad():
        x, rows = torch.randn(BATCH, 4, 32, 32, device=CUDA), torch.arange(BATCH, device=CUDA)
        inputs = x, torch.ones((), device=CUDA), model.class_embedding(rows), rows
        run = fast.fast_velocity(model, CUDA)
        plain, replayed = measure(lambda: model.velocity(*inputs), 2), measure(lambda: run(*inputs), 2)
    print(f"a velocity: {plain}\n  by a graph: {replayed}", flush=True)
    launched = plain.counts["launches"] + plain.counts["driver_launches"]
    return replayed.counts["graph_launches"] == 1 and replayed.counts["graph_nodes"] >= launched > 0


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(words)
    # capture is last: the failed capture leaves torch's random number generator in it
    wrong = [part.__name__ for part in (ops, attention, sampling, training, capture) if not part()]
    print(f"wrong: {', '.join(wrong)}" if wrong else f"all right: torch {torch.__version__}, {torch.cuda.get_device_name()}")
    sys.stdout.flush()
    os._exit(bool(wrong))  # the NCCL stub never reports that it has ended


if __name__ == "__main__":
    main()
