"""The benchmarks of a CUDA machine's host and compiler, as far as they run without the stub libraries."""

import csv
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import train_steps
from benchmarks.studies import launch_bound
from benchmarks.without_gpu import count, cuda_host, cuda_kernels
from benchmarks.without_gpu.inductor_graphs import Kernel, launched_bytes
from fastdit.config import InputError
from fastdit.kernels import tuning

ROOT = Path(__file__).parent.parent


@pytest.fixture
def counters(monkeypatch):
    """Counters that never count."""
    names = [*cuda_host.COUNTS, "captured"]
    monkeypatch.setattr(count, "counters", lambda: (names, [0] * len(names)))


@pytest.mark.parametrize("provider", ["none", "eager reference"])
def test_a_step_of_a_provider_is_measured(counters, provider):
    values = cuda_host.measure_step("test/4", provider, 2)
    assert "error" not in values and 0 < float(values["host_min_ms"]) <= float(values["host_ms"])
    assert {"cpu_ms", "launches", "triton_launches", "graph_launches", "syncs", "copies"} <= values.keys()


def test_a_provider_that_does_not_exist_is_a_row_that_says_so(counters, monkeypatch):
    monkeypatch.setitem(train_steps.PROVIDERS, "made up", "nonsense")
    assert cuda_host.measure_step("test/4", "made up", 2)["error"].startswith("train.compile=nonsense is unknown")


def test_a_process_that_fails_is_a_row_that_says_so(monkeypatch):
    monkeypatch.delenv("GPUSTUB_LIB", raising=False)
    assert cuda_host.measured_in_a_process("test/4", "none", 2)["error"].startswith("exit code 2: ")


def test_without_the_stub_libraries_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.delenv("GPUSTUB_LIB", raising=False)
    with pytest.raises(SystemExit) as stopped:
        cuda_host.main(["--presets", "S/2", "--allow-dirty"])
    assert stopped.value.code == 2 and "env.sh" in capsys.readouterr().err


def test_plans_table_is_a_line_through_the_depths():
    """Of 12 and 28 blocks, at 0.5 ms a block and 3 ms around them; a graph's time does not depend on them; errors are left out."""
    rows = [
        {"preset": preset, "provider": provider, "cpu_ms": f"{each * depth + 3}", "launches": "10", "triton_launches": f"{depth}",
         "graph_launches": "2", "error": ""}
        for preset, depth in (("S/2", 12), ("B/2", 12), ("XL/2", 28)) for provider, each in (("blocks", 0.5), ("graphs", -1e-3))
    ]  # fmt: skip
    rows += [{"preset": "S/2", "provider": "model", "error": "out of memory"}]
    table = cuda_host.plan_table(rows)
    assert table == {"blocks": (0.5, 1.0, 3.0, 12.0), "graphs": (0.0, 1.0, 3.0, 12.0)}
    assert cuda_host.plan_table(rows[:4]) == {}  # one depth


def test_counts_and_times_of_a_call(monkeypatch):
    live = [0, 5]
    monkeypatch.setattr(count, "counters", lambda: (["launches", "syncs"], live))

    def call():
        live[0] += 3

    found = count.measure(call, repeats=4, warm=2)
    assert found.counts == {"launches": 3, "syncs": 0} and 0 < found.best <= found.median and found.cpu > 0
    assert str(found).endswith("; 3 launches")


def test_a_row_of_a_block_sums_by_kind():
    mib = 1_000_000
    kernels = [Kernel("op", "fused op", 3 * mib, 2), Kernel("red", "triton", mib, column_sum=True), Kernel("mm", "gemm", 5 * mib)]
    row = cuda_kernels.row(kernels)
    assert (row["launches"], row["fused_ops_launches"], row["inductor_launches"], row["gemms_launches"]) == ("3", "2", "1", "1")
    assert (row["memory_bound_mb"], row["gemm_attention_mb"], row["column_sums"]) == ("4.0", "5.0", "1")


def launched(op, *shapes, **options):
    """What a fastdit op launches for S/2 at 64 images on an H100: bytes of each kernel. shapes: of its bf16 inputs; other arguments
    as they are."""
    with FakeTensorMode():
        given = [torch.empty(t, dtype=torch.bfloat16) if isinstance(t, tuple) else t for t in shapes]
        return launched_bytes(getattr(torch.ops.fastdit, op).default, tuple(given), options)


B, T, H, F, N, D = 64, 256, 384, 1024, 6, 64  # S/2 at 64 images
BTH = (B, T, H)
TOKENS = 2 * B * T * H  # bytes of bf16


def test_launches_of_fused_ops_are_those_counted_by_hand(monkeypatch):
    """10 and 4 programs fit on one of 132 multiprocessors: 20 parts of 13 tokens of each sample, and 512 of 32 of all rows."""
    monkeypatch.setattr(tuning, "architecture", lambda device: 90)
    stats, row, sums = 4 * 2 * B * T, 2 * B * H, 4 * B * 20 * H  # fp32 [2,B,T], bf16 [B,H], one of the sums fp32 [B,20,H]
    rows = [BTH] * 4 + [(4, B, T)] + [(B, H)] * 3  # stats as bf16 [4,B,T]: the same bytes
    name = "gated_residual_modulate_backward_triton"
    assert launched(name, *rows) == [6 * TOKENS + stats + 2 * row + 3 * sums, 3 * sums + 3 * row]
    assert launched(name, *rows, (H,)) == [
        6 * TOKENS + stats + 2 * row + 4 * sums + 2 * H, 3 * sums + 3 * row, sums + 2 * H,
    ]  # fmt: skip
    assert launched(name, None, *rows[1:])[0] == 5 * TOKENS + stats + 2 * row + 3 * sums  # dy, which stands in for dr, is read once
    hidden, sums, bias = 2 * B * T * F, 4 * 512 * 2 * F, 2 * 2 * F
    both = (B, T, F), (B, T, 2 * F)
    assert launched("swiglu_backward_triton", *both) == [5 * hidden]
    assert launched("swiglu_backward_triton", *both, (2 * F,)) == [5 * hidden + bias + sums, sums + bias]
    assert launched("swiglu_backward_triton", *both, (2 * F,), again=True) == [6 * hidden + bias + sums, sums + bias]
    tables = 2 * 2 * D + 2 * 2 * T * D // 2  # two weights [D], cos and sin [T,D/2]
    heads = (B, T, 3 * H), (D,), (D,), (T, D // 2), (T, D // 2), N, 1e-6
    assert launched("qk_norm_rope_forward_triton", *heads) == [4 * TOKENS + tables]  # q and k read and written, v not


@pytest.mark.slow
def test_a_block_is_compiled_for_a_gpu_that_is_not_there(tmp_path):
    """The fused forward is four ops and no kernel of Inductor's."""
    path = tmp_path / "rows.csv"
    command = [
        sys.executable,
        "-m",
        "benchmarks.without_gpu.cuda_kernels",
        "--presets",
        "S/2",
        "--versions",
        "fused",
        "--allow-dirty",
        "--csv",
        str(path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    forward, backward = csv.DictReader(path.read_text().splitlines())
    assert (forward["fused_ops_launches"], forward["inductor_launches"], forward["copies_launches"]) == ("4", "0", "0")
    assert (backward["column_sums"], backward["inductor_launches"], backward["copies_launches"]) == ("0", "0", "0")
    assert float(backward["memory_bound_mb"]) > float(forward["memory_bound_mb"]) > 200
    assert all(row["device"].startswith("NVIDIA H100") and "not run" in row["device"] for row in (forward, backward))


def test_launch_bound_measures_a_step(monkeypatch):
    """With a made-up profile of three steps, two kernels in each."""

    def events(call):
        assert len(call()) == launch_bound.PROFILED
        return [types.SimpleNamespace(key="gemm", self_device_time_total=6, count=3),
                types.SimpleNamespace(key="reduce", self_device_time_total=3, count=3)]  # fmt: skip

    monkeypatch.setattr(launch_bound, "gpu_events", events)
    values, longest = launch_bound.measure("test/4", "none", 2)
    assert float(values["step_ms"]) > 0 and float(values["images_per_s"]) > 0 and float(values["peak_mb"]) > 0
    assert (values["busy_ms"], values["kernels"]) == ("0.003", "2")
    assert [line.split() for line in longest] == [["0.002", "ms", "1", "x", "gemm"], ["0.001", "ms", "1", "x", "reduce"]]


def test_launch_bound_cases_parse_and_bad_ones_say_what_is_wanted(capsys):
    assert launch_bound.parsed("S/2 eager reference compiled 32") == ("S/2", "eager reference compiled", 32)
    assert {launch_bound.parsed(case)[1] for case in launch_bound.CASES} <= train_steps.PROVIDERS.keys()
    for case in ("S/2 blocks", "S/9 blocks 3", "S/2 nonsense 3", "S/2 blocks 0", ""):
        with pytest.raises(InputError, match="S/2 blocks 32"):
            launch_bound.parsed(case)
    with pytest.raises(SystemExit) as stopped:
        launch_bound.main(["--cases", "S/2", "--allow-dirty"])
    assert stopped.value.code == 2
