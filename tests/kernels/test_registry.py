"""Every op of kernels.OPS is in all the places that kernels/README.md lists under "Adding an op"."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks.kernel_cases import CASES
from fastdit import kernels

ROOT = Path(__file__).parents[2]
# two ops of one kernel; the file of any other op has its name
FILES = {"counter_normal": "counter_random", "counter_uniform": "counter_random"}
FORWARD_ONLY = {"counter_random"}
NO_LIBRARY_OPS = {"adamw"}  # files with BYTES whose op is not in OPS
EXCEPTIONS = {  # (op, place): why it is missing
    ("counter_uniform", "eager_counter_uniform in benchmarks/bench_kernels.py"): "it draws one number per sample: nothing to time",
}


def read(path: str) -> str:
    return (ROOT / path).read_text() if (ROOT / path).exists() else ""


def readme_bytes() -> dict[str, tuple[int, int]]:
    """(forward, backward) of every row of the table of ops in kernels/README.md that begins with numbers; a dash is 0."""
    rows = {}
    for line in read("kernels/README.md").partition("## The ops")[2].partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        numbers = [re.match(r"(\d+)|—", cell) for cell in cells[1:3]]
        if line.startswith("| `") and all(numbers):
            rows |= {op: tuple(int(n[1] or 0) for n in numbers) for op in re.findall(r"`(\w+)`", cells[0])}
    return rows


def missing(op: str) -> list[str]:
    """The places that have no entry for `op`, but for EXCEPTIONS."""
    file = FILES.get(op, op)
    names = [f"{file}_{direction}" for direction in ("forward", "backward")[: 1 if file in FORWARD_ONLY else 2]]
    entries = {
        f"{op} in kernels/__init__.py": hasattr(kernels, op) and op in kernels.__all__,
        f"{op}_reference in kernels/__init__.py": hasattr(kernels, f"{op}_reference") and f"{op}_reference" in kernels.__all__,
        f"{op} in kernels.BYTES": op in kernels.BYTES,
        f"BYTES in kernels/{file}.py": "\nBYTES = (" in read(f"kernels/{file}.py"),
        f"tests/kernels/test_{file}.py": bool(read(f"tests/kernels/test_{file}.py")),
        f"CASES[{op!r}] in benchmarks/kernel_cases.py": op in CASES,
        f"eager_{op} in benchmarks/bench_kernels.py": f"\ndef eager_{op}(" in read("benchmarks/bench_kernels.py"),
        f"row `{op}` in kernels/README.md": op in readme_bytes(),
        f"`{op}` in the table of machine code in kernels/README.md": f"\n| {op}, forward |" in read("kernels/README.md"),
        f"kernels.{op} in tests/kernels/test_cpp.py": bool(re.search(rf"kernels\.{op}\b", read("tests/kernels/test_cpp.py"))),
    }
    for name in names:
        entries[f"{name}_kernel in kernels/{file}.py"] = f"\ndef {name}_kernel(" in read(f"kernels/{file}.py")
        entries[f"KERNEL({name}, ..) in csrc/ops.h"] = f"KERNEL({name}," in read("csrc/ops.h")
        entries[f"schema of {name} in csrc/ops.cpp"] = f'"{name}(' in read("csrc/ops.cpp")
        entries[f"call of {name} in tests/kernels/race_test.cpp"] = f"ops::{name}(" in read("tests/kernels/race_test.cpp")
        for backend in ("triton", "cpp"):
            library_op = f"{name}_{backend}"
            entries[f"library op fastdit::{library_op}"] = hasattr(torch.ops.fastdit, library_op)
            has_fake = torch._C._dispatch_has_kernel_for_dispatch_key
            entries[f"fake of fastdit::{library_op}"] = hasattr(torch.ops.fastdit, library_op) and has_fake(
                f"fastdit::{library_op}", "Meta"
            )
    if "launch_for(" in read(f"kernels/{file}.py"):  # its launch parameters are in the table of tuning.py
        table = read("tests/kernels/test_tuning.py").partition("\nKERNELS = ")[2].partition("\n")[0]
        entries[f"{op} in KERNELS of tests/kernels/test_tuning.py"] = f'"{op}"' in table
        for name in names:
            entries[f"{name} in default_launch of kernels/tuning.py"] = f'"{name}"' in read("kernels/tuning.py")
        for script in ("tune_kernels", "run_on_gpu"):
            entries[f"{op} in benchmarks/{script}.py"] = f'"{op}"' in read(f"benchmarks/{script}.py")
    return [place for place, there in entries.items() if not there and (op, place) not in EXCEPTIONS]


@pytest.mark.parametrize("op", kernels.OPS)
def test_every_op_is_in_all_places(op):
    places = missing(op)
    assert not places, f"{op} is missing: " + "; ".join(places)


def test_every_file_of_an_op_is_in_ops():
    files = {file.stem for file in (ROOT / "kernels").glob("*.py") if re.search(r"^BYTES = \(", file.read_text(), re.M)}
    assert files == {FILES.get(op, op) for op in kernels.OPS} | NO_LIBRARY_OPS


def test_an_op_that_is_nowhere_is_missing_everywhere():
    places = missing("layer_norm")
    assert len(places) == 26 and "layer_norm_reference in kernels/__init__.py" in places
    assert "KERNEL(layer_norm_backward, ..) in csrc/ops.h" in places and "row `layer_norm` in kernels/README.md" in places


def test_every_exception_is_one():
    """None is left over from an op that has its entry by now."""
    before = dict(EXCEPTIONS)
    try:
        EXCEPTIONS.clear()
        assert all(place in missing(op) for op, place in before)
    finally:
        EXCEPTIONS.update(before)


def test_the_readme_states_the_bytes_of_every_op():
    assert readme_bytes() == kernels.BYTES
