"""The CSVs of results: their names, the commits of their rows, and who writes them."""

import ast
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import results_csv
from fastdit.config import InputError

ROOT = Path(__file__).parent.parent


# CSV -> why its rows name a dirty commit. Shrinks only: a new measurement replaces the file.
DIRTY = {"quality.csv": "a training run and half an hour of sampling, on a machine that is no longer there"}


def test_every_csv_is_written_by_a_script_of_today():
    """A script names its CSV in a constant CSV; the file is called that, or that and its machine."""
    writers: dict[str, str] = {}
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["CSV"]:
                name = ast.literal_eval(node.value)
                assert name not in writers, f"{path.name} and {writers[name]} both write {name}.csv"
                writers[name] = path.name
    unclaimed = [
        path.name
        for path in sorted(results_csv.RESULTS.iterdir())
        if not any(path.stem == name or path.stem.startswith(f"{name}_") for name in writers)
    ]
    assert not unclaimed, f"no script in benchmarks/ writes {', '.join(unclaimed)}: delete them, or measure them again"


def test_every_row_names_a_commit():
    for path in sorted(results_csv.RESULTS.glob("*.csv")):
        commits = {row["commit"] for row in results_csv.read(path)}
        dirty = any(commit.endswith("-dirty") for commit in commits)
        assert "" not in commits and dirty == (path.name in DIRTY), f"{path.name}: {commits}"


def test_rows_of_a_dirty_checkout_are_refused_before_they_are_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results_csv, "commit", lambda: "abc-dirty")
    results_csv.measured_on.cache_clear()
    path = tmp_path / "rows.csv"
    parser = results_csv.parser("A study.", path)
    with pytest.raises(SystemExit) as stopped:
        results_csv.parse(parser, [])
    assert stopped.value.code == 2
    assert (
        "commit abc-dirty has uncommitted changes: commit them before measuring, or pass --allow-dirty" in capsys.readouterr().err
    )
    with pytest.raises(InputError, match="abc-dirty has uncommitted changes"):
        results_csv.write(path, [{"case": "x"}])
    assert not path.exists()
    assert results_csv.parse(parser, ["--allow-dirty"]).csv == path
    results_csv.write(path, [{"case": "x"}], allow_dirty=True)
    assert results_csv.read(path)[0]["commit"] == "abc-dirty"


def test_results_do_not_make_a_checkout_dirty(tmp_path, monkeypatch):
    monkeypatch.undo()  # the commit of `clean_checkout`
    monkeypatch.setattr(results_csv, "ROOT", tmp_path)
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    files = [tmp_path / name for name in ("benchmarks/results/rows.csv", "benchmarks/RESULTS.md", "benchmarks/study.py")]
    for file in files:
        file.write_text("1")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    endings = []
    for file in files:
        file.write_text("2")
        results_csv.commit.cache_clear()
        endings.append(results_csv.commit().endswith("-dirty"))
    results_csv.commit.cache_clear()
    assert endings == [False, False, True]


def test_two_machines_never_share_a_file_name(monkeypatch):
    """Two Xeons of one model name, a Zen 4 with its AVX-512 masked, and a CPU that has no name yet."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)

    def name(isa, vendor, family, model, flags=""):
        fields = {"vendor_id": vendor, "cpu family": family, "model": model, "flags": flags, "model name": "Xeon"}
        monkeypatch.setattr(results_csv, "cpuinfo", lambda: fields)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: isa)
        return results_csv.machine()

    assert name("AVX512", "GenuineIntel", "6", "143", "avx2 amx_bf16") == "sapphire_rapids_amx"
    assert name("AVX512", "GenuineIntel", "6", "207", "avx2 amx_bf16") == "emerald_rapids_amx"
    assert name("AVX2", "AuthenticAMD", "25", "17") == "zen4_avx2"
    assert name("AVX2", "GenuineIntel", "6", "85") == "genuineintel_6_85_avx2"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert name("AVX512", "AuthenticAMD", "26", "2") == "zen5_avx512_onednn_avx2"


def test_a_row_says_that_onednn_was_held_to_an_instruction_set(monkeypatch) -> None:
    """bf16 matmuls without AMX are another machine's: compare_runs must not take them for the same one's."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    free = results_csv.hardware(results_csv.CPU)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert results_csv.hardware(results_csv.CPU) == f"{free}, oneDNN up to AVX512_CORE_BF16"
