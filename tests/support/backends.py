"""Where the tests of an op run, and on which backends."""

from functools import partial

import pytest
import torch

from fastdit.kernels import library

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Every input of an op lies here: a GPU runs the compiled kernels, without one Triton's interpreter runs them."""

BACKENDS = [
    "triton",
    pytest.param(
        "cpp",
        marks=[
            pytest.mark.skipif(not library.EXTENSION, reason="the C++ extension is not built"),
            pytest.mark.skipif(DEVICE.type == "cuda", reason="the C++ kernels run on a CPU, and the inputs are on a GPU"),
        ],
    ),
]

zeros = partial(torch.zeros, device=DEVICE)


def interpretable(backend: str, size: tuple[int, ...]) -> tuple[int, ...]:
    """Return the size (samples, tokens, ...) as it is, or at most 2 samples of 33 tokens if Triton's interpreter runs, which takes
    up to 50 ms per row: several programs per sample, the last of them with fewer tokens, and rows as wide."""
    return size if backend == "cpp" or DEVICE.type == "cuda" else (min(size[0], 2), min(size[1], 33), *size[2:])
