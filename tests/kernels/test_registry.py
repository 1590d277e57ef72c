"""Every op of kernels.OPS has what kernels/README.md asks of an op."""

import re
from pathlib import Path

import pytest

from fastdit import kernels

ROOT = Path(__file__).parents[2]


def readme_bytes() -> dict[str, tuple[int, int]]:
    """(forward, backward) of every row of the table of ops in kernels/README.md that begins with numbers; a dash is 0."""
    rows = {}
    for line in (ROOT / "kernels/README.md").read_text().partition("## The ops")[2].partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        numbers = [re.match(r"(\d+)|—", cell) for cell in cells[1:3]]
        if line.startswith("| `") and all(numbers):
            rows |= {op: tuple(int(n[1] or 0) for n in numbers) for op in re.findall(r"`(\w+)`", cells[0])}
    return rows


def test_the_readme_states_the_bytes_of_every_op():
    assert readme_bytes() == kernels.BYTES


@pytest.mark.parametrize("op", kernels.OPS)
def test_every_op_states_its_bytes(op):
    assert all(isinstance(n, int) for n in kernels.BYTES[op]) and len(kernels.BYTES[op]) == 2
