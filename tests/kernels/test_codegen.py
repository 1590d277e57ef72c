"""The machine code of what the public ops launch, compiled without a GPU by benchmarks/machine_code.py in a process of its own
(Triton cannot compile where its interpreter is on). bf16, batch 32, every size in benchmarks/kernel_cases.py."""

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernel_cases import CASES
from fastdit.kernels import tuning

swiglu = sys.modules["fastdit.kernels.swiglu"]  # the package's attribute of that name is the function

ROOT = Path(__file__).parents[2]
TEXT = {"op", "direction", "kernel", "grid", "device", "torch", "triton", "deepspeed", "python", "commit", "date"}
ADALN = ("modulate", "gated_residual", "gated_residual_modulate", "gated_residual_modulate_bias")
REDUCTION = "token_sums.reduce_partials_kernel"  # stores 1/(2·parts) of what it loads, so its stores may be narrow
NARROW = {
    "qk_norm_rope_72": "half a head is 36 columns, which no power of two divides into 128 bits",
    "counter_normal": "loads one id a program and nothing else",
    "counter_uniform": "one number a sample",
}


@pytest.fixture(
    scope="module", params=[90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100, 120))], ids=lambda a: f"sm_{a}"
)
def rows(request, tmp_path_factory) -> list[dict]:
    """One dict for each kernel that each op launches at each size: op, direction, kernel, and integers."""
    path = tmp_path_factory.mktemp("codegen") / "codegen.csv"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.machine_code", "--arch", str(request.param), "--csv", path, "--allow-dirty"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with path.open() as file:
        return [{k: v if k in TEXT else float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def failing(rows: list[dict], passes) -> list[str]:
    return [f"{r['kernel']} at {r['size']:.0f} ({r['op']} {r['direction']}): {r}" for r in rows if not passes(r)]


def test_registers_hold_everything(rows):
    """No byte of local memory, no stack, no spill instruction."""
    assert not failing(rows, lambda r: r["local"] == r["stack"] == r["spills"] == 0)


def test_accesses_are_128_bits_wide(rows, record_property):
    """By bytes of the instructions. Narrower are the tail of a two-tile row (64 or 128 columns, a ninth of the row or less, but as
    many instructions as the tile) and scalars such as the statistics of a row."""
    for row in rows:
        if row["op"] in NARROW:
            shares = f"{row['load_share_128']:.0%} of loads, {row['store_share_128']:.0%} of stores are 128 bits wide"
            record_property(f"{row['kernel']} for {row['op']} {row['direction']}", f"{shares} ({NARROW[row['op']]})")
    main = [r for r in rows if r["op"] not in NARROW]
    assert not failing(main, lambda r: r["loads_128"] > 0 and r["load_share_128"] >= 0.6)
    assert not failing(main, lambda r: r["kernel"] == REDUCTION or (r["stores_128"] > 0 and r["store_share_128"] >= 0.6))


def test_occupancy_is_what_the_tuning_table_states(rows):
    """A backward that is cut into `blocks` programs an SM must fit so many: a second, small wave would double its time."""
    cut = [r for r in rows if r["op"] in ADALN and r["direction"] == "backward" and r["kernel"] != REDUCTION]

    def stated(r: dict) -> int:
        return tuning.default_launch(f"{r['op'].removesuffix('_bias')}_backward", int(r["size"]), int(r["arch"])).blocks

    assert len(cut) == 4 * len(ADALN)
    assert not failing(cut, lambda r: r["blocks_per_sm"] >= stated(r))
    summing = [r for r in rows if r["op"] in ("swiglu_bias", "swiglu_linear") and r["kernel"] == "swiglu.swiglu_backward_kernel"]
    assert len(summing) == 2 * len(CASES["swiglu"].sizes)
    assert not failing(summing, lambda r: r["blocks_per_sm"] >= swiglu.blocks(int(r["size"])))


def test_a_sum_over_all_samples_is_several_programs(rows):
    """A single program would wait for 17 loads in turn, while a card has room for hundreds of programs."""
    over_all = [r for r in rows if r["op"].startswith("qk_norm_rope") and r["kernel"] == REDUCTION]
    assert over_all and not failing(over_all, lambda r: int(r["grid"].split("x")[0]) >= 4)


def test_number_of_launches(rows):
    """As kernel_cases.py states: one for a forward; for a backward one, one that reduces partial sums, and with a bias one more."""
    for op, case in CASES.items():
        for size in case.sizes:
            launched = [r["direction"] for r in rows if (r["op"], r["size"]) == (op, size)]
            assert launched.count("forward") == case.forward_launches <= 1, (op, size)
            assert launched.count("backward") <= case.backward_launches <= 3, (op, size)


def test_grids_and_shared_memory_fit_every_card(rows):
    assert not failing(rows, lambda r: all(int(n) <= 65535 for n in r["grid"].split("x")[1:]))
    assert not failing(rows, lambda r: r["shared"] <= 99 * 1024)


def test_another_batch_size_compiles_nothing(rows):
    assert not failing(rows, lambda r: r["recompiled"] == 0)


def test_offsets_are_64_bits_wide(rows):
    """Any offset that comes from a program's number, a row count or a stride."""
    assert not failing(rows, lambda r: r["narrow_offsets"] == 0)


def test_the_readme_shows_the_committed_figures():
    codegen = importlib.import_module("benchmarks.machine_code")
    with codegen.RESULTS.open() as file:
        committed = list(csv.DictReader(file))
    assert {int(row["arch"]) for row in committed} == set(codegen.ARCHITECTURES)
    assert {row["op"] for row in committed} == set(CASES)
    assert codegen.markdown(committed) in codegen.README.read_text()
