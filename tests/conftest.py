"""Without a GPU the Triton kernels run in Triton's interpreter. It must be chosen before anything imports triton."""

import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The files that take longest, in this order: a process that begins one of them last would leave the others without work.
LONGEST = (
    "kernels/test_cpp.py", "training/test_faults.py", "training/test_ranks.py", "kernels/test_gated_residual_modulate.py",
    "training/test_loop.py", "kernels/test_swiglu.py", "kernels/test_gated_residual.py", "test_graphs.py", "test_model.py",
    "convert/test_sit.py", "kernels/test_modulate.py", "kernels/test_qk_norm_rope.py", "kernels/test_codegen.py",
)  # fmt: skip


def pytest_collection_modifyitems(items) -> None:
    """Put the longest files first; launch/test.sh has pytest-xdist keep this order."""
    places = {Path(__file__).parent / file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
