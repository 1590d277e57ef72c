"""Checks the stub libraries by what fastdit asks of them; prints what each op and attention backend launch.

. DIR/env.sh && python benchmarks/without_gpu/selftest.py         # two minutes the first time; exit code 1: something is wrong
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench_kernels import directions
from count import counted, measure
from fastdit import kernels
from kernel_cases import CASES

CUDA, BF16 = torch.device("cuda", 0), torch.bfloat16


def ops() -> bool:
    """Every op launches Triton kernels, forward and backward."""
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
    """Flash and memory-efficient attention launch; cuDNN's front end may refuse its stub."""
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
    """A capture takes launches and refuses what it refuses on a GPU: a read of a value."""
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


if __name__ == "__main__":
    wrong = [part.__name__ for part in (ops, attention, capture) if not part()]
    print(f"wrong: {', '.join(wrong)}" if wrong else f"all right: torch {torch.__version__}, {torch.cuda.get_device_name()}")
    sys.exit(bool(wrong))
