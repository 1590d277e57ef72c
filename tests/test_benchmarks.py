"""The benchmarks' tools on made-up CSVs and sections: compare_runs, report and others, and every script's --help."""

import importlib.util
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import compare_runs, gpu_train, harness, parity, report, results_csv

ROOT = Path(__file__).parent.parent
WHERE = {"device": "a CPU", "commit": "abc", "torch": "2.13.0", "date": "2026-01-02"}
OPS, RUNS, SLOW = range(22), ("forward", "backward", "both"), ("op 3", "fused", "both")


def timed(key, samples, reference):
    return harness.Result(key, samples, harness.speedup(reference, samples)).row()


def kernels(path, seed, drift=1.0, slow=None, error=None, skip=(), device="a CPU", noise=0.03):
    """198 rows as the suite of kernels writes them: 9 timings with normal noise.

    slow, error: the (case, provider, direction) that is 20 % slower, or fails; skip: those that are not there.
    """
    rng, bases, rows = np.random.default_rng(seed), np.random.default_rng(0), []
    for op in OPS:
        for run in RUNS:
            base, reference = np.exp(bases.normal(-7, 1)), None
            for provider, share in (("eager", 1), ("compile", 0.8), ("fused", 0.5)):
                key = {"case": f"op {op}", "provider": provider, "direction": run, "size": "8x256x384"}
                own = base * share * drift * np.exp(rng.normal(0, noise, 9)) * (1.2 if tuple(key.values())[:3] == slow else 1)
                reference = own if reference is None else reference
                failed = tuple(key.values())[:3] == error
                row = harness.Result(key, [], {}, "out of memory").row() if failed else timed(key, list(own), list(reference))
                rows += [] if tuple(key.values())[:3] in skip else [row | {"suite": "kernels", "threads": 2}]
    results_csv.write(path, [WHERE | row | {"device": device} for row in rows])
    return str(path)


@pytest.fixture(autouse=True)
def clean_checkout(monkeypatch):
    """Rows are those of a commit, also while this checkout has changes."""
    results_csv.measured_on.cache_clear()
    monkeypatch.setattr(results_csv, "commit", lambda: "abc")
    yield
    results_csv.measured_on.cache_clear()


@pytest.fixture
def before(tmp_path):
    return kernels(tmp_path / "before.csv", 1)


@pytest.mark.parametrize("noise", [0.03, 0.15])
@pytest.mark.parametrize("seed", range(2, 6))
def test_a_rerun_on_a_slower_day_is_no_regression(tmp_path, capsys, seed, noise):
    files = [kernels(tmp_path / f"{drift}.csv", seed + 100 * drift, drift, noise=noise) for drift in (1, 2)]
    assert compare_runs.main(files) == 0
    out = capsys.readouterr().out
    assert "kernels: 198 rows, 0 slower, 0 faster; drift " in out
    assert float(out.split("drift ")[1].split(",")[0]) == pytest.approx(2, rel=noise)


@pytest.mark.parametrize("drift", [1.2, 0.8])
def test_one_slower_row_is_found_and_only_it(tmp_path, before, capsys, drift):
    after = kernels(tmp_path / "after.csv", 2, drift, SLOW)
    assert compare_runs.main([before, after]) == 1
    out = capsys.readouterr().out
    assert "198 rows, 1 slower, 0 faster" in out
    (line,) = (line for line in out.splitlines() if line.startswith("kernels  "))
    assert all(word in line for word in (*SLOW, "reference"))
    assert compare_runs.main([after, before]) == 0
    assert "198 rows, 0 slower, 1 faster" in capsys.readouterr().out
    assert compare_runs.main([before, after, "--threshold", "40"]) == 0


def test_a_reference_that_becomes_slower_blames_itself(tmp_path, before, capsys):
    """Its case's other providers are faster by `speedup` then, and by their own times not."""
    assert compare_runs.main([before, kernels(tmp_path / "after.csv", 2, 1.2, ("op 3", "eager", "both"))]) == 1
    out = capsys.readouterr().out
    assert "198 rows, 1 slower, 0 faster" in out and "drift" in out.split("slower: 1")[1]


def test_a_provider_that_becomes_slower_as_a_whole_is_no_scatter(tmp_path, capsys):
    """One fused train step of a few: the same as all rows of a provider."""

    def steps(path, seed, factor):
        rng, rows = np.random.default_rng(seed), []
        for case in ("S/2", "B/2", "L/2"):
            eager = list(np.exp(rng.normal(0, 0.01, 9)))
            own = {"eager": eager, "engine": list(factor * np.exp(rng.normal(-0.7, 0.01, 9)))}
            rows += [timed({"case": case, "provider": name, "size": "batch 8"}, own[name], eager) for name in own]
        results_csv.write(path, [WHERE | row | {"suite": "train_step", "threads": 2} for row in rows])
        return str(path)

    first = steps(tmp_path / "a.csv", 1, 1)
    assert compare_runs.main([first, steps(tmp_path / "b.csv", 2, 1)]) == 0
    assert compare_runs.main([first, steps(tmp_path / "c.csv", 2, 1.2)]) == 1
    assert "train_step: 6 rows, 3 slower, 0 faster" in capsys.readouterr().out


def test_speedups_of_many_processes_are_judged_by_their_own_spread(tmp_path, capsys):
    """A quiet op that is 20 % slower is reported beside ops that scatter by 15 % between processes and are not."""

    def steps(path, seed, factor, processes=12):
        rng, rows = np.random.default_rng(seed), []
        for op in OPS:
            ratios = 2 * np.exp(rng.normal(0, 0.15 if op else 0.04, 12)) / (1 if op else factor)
            key = {"case": f"op {op}", "provider": "fused", "direction": "both", "size": "8x256x384"}
            eager = timed({**key, "provider": "eager"}, [1.0] * 9, [1.0] * 9)
            own = harness.Result(
                key, [(1 if op else factor) / 2] * 9, harness.spread(list(ratios)) | {"processes": processes}
            ).row()
            rows += [eager, own]
        results_csv.write(path, [WHERE | row | {"suite": "kernels", "threads": 2} for row in rows])
        return str(path)

    first = steps(tmp_path / "a.csv", 1, 1)
    for seed in range(2, 12):
        assert compare_runs.main([first, steps(tmp_path / "b.csv", seed, 1)]) == 0
        capsys.readouterr()
        assert compare_runs.main([first, steps(tmp_path / "c.csv", seed, 1.2)]) == 1
        assert "kernels: 44 rows, 1 slower, 0 faster" in capsys.readouterr().out
    files = [steps(tmp_path / f"{seed}.csv", seed, factor, "") for seed, factor in ((1, 1), (2, 1.2))]
    assert compare_runs.main(files) == 0  # as rows of one process, whose scatter is the suite's


def test_new_failures_and_missing_rows_are_listed(tmp_path, before, capsys):
    fails = kernels(tmp_path / "fails.csv", 2, error=SLOW, skip=[("op 4", "fused", "both")])
    assert compare_runs.main([before, fails]) == 1
    out = capsys.readouterr().out
    assert "fails now: 1" in out and "out of memory" in out and "not in after: 1" in out and "op 4" in out
    assert compare_runs.main([fails, before]) == 0
    assert "not in before: 1" in capsys.readouterr().out


def test_a_single_timing_is_not_judged(tmp_path, capsys):
    def write(name, seconds):
        row = timed({"case": "S/2", "provider": "make the cache", "size": "batch 2"}, [seconds], [])
        results_csv.write(tmp_path / name, [WHERE | row | {"suite": "end_to_end", "threads": 2}])
        return str(tmp_path / name)

    assert compare_runs.main([write("a.csv", 1.0), write("b.csv", 3.0)]) == 0
    assert "1 of a single timing, not judged" in capsys.readouterr().out


def test_bad_input_ends_in_one_sentence(tmp_path, before, capsys):
    elsewhere = kernels(tmp_path / "gpu.csv", 1, device="a GPU")
    more = tmp_path / "more.csv"
    results_csv.write(more, [row | {"threads": "4"} for row in results_csv.read(Path(before))])
    (tmp_path / "bytes.csv").write_bytes(b"\x80\xff\x00garbage")
    (tmp_path / "other.csv").write_text("op,kernel\nmodulate,x\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "cut.csv").write_text("\n".join(Path(before).read_text().splitlines()[:5])[:-60])
    wrong = {
        "none.csv": "cannot be read", "bytes.csv": "cannot be read", "other.csv": "no column suite", "empty.csv": "no column suite",
        "cut.csv": "line 5", elsewhere: "the same device", more: "no row in common",
    }  # fmt: skip
    for path, sentence in wrong.items():
        with pytest.raises(SystemExit) as stopped:
            compare_runs.main([before, str(tmp_path / path)])
        assert stopped.value.code == 2
        assert sentence in capsys.readouterr().err, path


def test_the_page_shows_the_committed_csvs():
    assert report.main(["--check"]) == 0


SCRIPTS = [
    "compare_runs", "gpu_train", "machine_code", "parity", "report", "run_on_gpu", "tune_kernels", "studies.decay_digits",
    "studies.engine_overhead", "studies.evaluate_overhead", "studies.finetune_digits", "studies.launch_bound", "studies.muon_step",
    "studies.optimizer_step", "studies.parquet_speed", "studies.plan_memory", "studies.prepare_folders", "studies.quality",
    "studies.sparse_speed",
    "without_gpu.cuda_host", "without_gpu.cuda_kernels", "without_gpu.selftest",
]  # fmt: skip


def test_every_script_is_in_the_list_above():
    scripts = [path for path in (ROOT / "benchmarks").rglob("*.py") if '__name__ == "__main__"' in path.read_text()]
    names = {".".join(path.relative_to(ROOT / "benchmarks").with_suffix("").parts) for path in scripts}
    assert names - {"without_gpu.stubs.stubs"} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_scripts_help_explains_it(name, capsys):
    """Its command, and a text for every option."""
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and f"python -m benchmarks.{name}" in out
    # an option's text is on its line, two spaces after it, or indented on the next line
    lines = [*out.partition("options:")[2].splitlines(), ""]
    bare = [
        a for a, b in itertools.pairwise(lines) if a.startswith("  -") and not (re.search(r"\S {2,}\S", a) or b.startswith(" " * 8))
    ]
    assert not bare, bare


def csv_of_suites(path):
    """A train step with a provider that failed, an op with a backward and one without, and a suite that nobody knows."""
    steps = {"eager": [0.8, 0.8], "engine": [0.41, 0.39], "+packed": []}
    extra = {"images_per_s": "12345.6", "mfu": "0.5"}
    rows = [{"suite": "train_step"} | timed({"case": "S/2", "provider": n}, s, steps["eager"]) for n, s in steps.items()]
    rows[1] |= extra
    rows[2]["error"] = "parity: a|b"
    for op, runs in {"swiglu": RUNS, "counter_normal": RUNS[:1]}.items():
        for name, factor in (("eager", 1), ("fused", 0.25 if op == "swiglu" else 0.5)):
            for run in runs:
                key = {"case": op, "provider": name, "direction": run, "size": "8x256x384"}
                row = timed(key, [3e-5 * factor] * 2, [3e-5] * 2)
                rows.append(
                    row | {"suite": "kernels", "copy_share": "0.75", "speedup": "9" if run == "backward" else row["speedup"]}
                )
    rows.append({"suite": "new_one", "case": "x", "provider": "y", "median_s": "250", "p20_s": "250", "p80_s": "250", "samples": 1})
    results_csv.write(path, [WHERE | row | {"threads": 2, "precision": "fp32"} for row in rows])


def test_report_fills_the_page_and_checks_it(tmp_path, capsys):
    page, path = tmp_path / "PAGE.md", tmp_path / "results" / "here.csv"
    csv_of_suites(path)
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    words = ["--page", str(page), str(path)]
    assert report.main([*words, "--check"]) == 1 and "old" in page.read_text()
    assert report.main(words) == 0 and report.main([*words, "--check"]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n") and text.endswith(f"{report.END}\nafter\n") and "old" not in text
    assert "**Train step**: a CPU, 2 threads, fp32; torch 2.13.0, commit abc, 2026-01-02 ([rows](results/here.csv))." in text
    for line in (
        "| case | provider | median | images/s | over eager | MFU | error |",
        "| S/2 | eager | 800 ms |  | 1.00 x |  |  |", "| S/2 | engine | 400 ms | 12,346 | 2.00 x | 50 % |  |",
        "| S/2 | +packed |  |  |  |  | parity: a/b |", "| swiglu | 8x256x384 | 4.00 x | 75 % |",
        "| counter_normal, forward | 8x256x384 | 2.00 x | 75 % |", "| x | y | 250 s |",
    ):  # fmt: skip
        assert line in text.splitlines(), line
    for picture in ("here_speedup.png", "here_kernels.png"):
        assert (path.with_name(picture)).read_bytes().startswith(b"\x89PNG") and f"](results/{picture})" in text

    (path.with_name("here_kernels.png")).unlink()
    assert report.main([*words, "--check"]) == 1
    report.main(words)
    csv_text = path.read_text()
    path.write_text(csv_text.replace("12345.6", "12945.6"))
    assert report.main([*words, "--check"]) == 1
    path.write_text(csv_text)
    page.write_text(text.replace("12,346", "13,000"))  # by hand
    assert report.main([*words, "--check"]) == 1
    page.write_text("no markers\n")
    with pytest.raises(SystemExit) as stopped:
        report.main(words)
    assert stopped.value.code == 2 and "once each" in capsys.readouterr().err and page.read_text() == "no markers\n"


def test_only_csvs_of_timed_suites_are_reported(tmp_path):
    """Others lie in the same folder."""
    csv_of_suites(tmp_path / "here.csv")
    results_csv.write(tmp_path / "memory.csv", [{"suite": "plan_memory", "peak_mb": 1}])
    results_csv.write(tmp_path / "quality.csv", [{"step": 1}])
    assert [report.of_suites(tmp_path / name) for name in ("here.csv", "memory.csv", "quality.csv")] == [True, False, False]


def csvs_of_tables(folder):
    """A CSV of each kind in report.TABLES, in their order."""
    host = {"preset": "S/2", "batch": 32, "provider": "blocks", "cpu_ms": "9.334", "launches": "274.0", "triton_launches": "168.0",
            "graph_launches": "1.0", "error": ""}  # fmt: skip
    failed = {key: "" for key in host} | {"preset": "S/2", "batch": 32, "provider": "graphs", "error": "out of memory"}
    block = {"preset": "B/2", "batch": 64}
    blocks = [
        block | {"version": version, "direction": direction, "memory_bound_mb": f"{mb}.2", "launches": launches}
        for version, pair in (("fused", ((504, 4), (876, 9))), ("reference", ((508, 4), (1608, 18))))
        for direction, (mb, launches) in zip(("forward", "backward"), pair, strict=True)
    ]
    step = {
        "preset": "S/2",
        "precision": "bf16",
        "provider": "one pass",
        "threads": 2,
        "rounds": 15,
        "wall_ms": "27.62",
        "gb_s": "42.3",
    }
    found = {"cuda_host.csv": [host, failed], "cuda_kernels.csv": blocks, "optimizer_step_here.csv": [step]}
    for name, rows in found.items():
        results_csv.write(folder / name, [WHERE | row for row in rows])
    return [folder / name for name in found]


def test_report_shows_the_csvs_that_no_suite_writes_after_the_suites(tmp_path, capsys):
    page, suites = tmp_path / "PAGE.md", tmp_path / "here.csv"
    csv_of_suites(suites)
    tables = csvs_of_tables(tmp_path)
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert report.main(["--page", str(page), *map(str, tables), str(suites)]) == 0
    lines = page.read_text().splitlines()
    for line in (
        "| preset | blocks | graphs |", "| S/2 | 9.3 (443) | out of memory |",
        "| preset | fused ops | reference ops, fused by Inductor |", "| B/2 | 504 (4) → 876 (9) | 508 (4) → 1608 (18) |",
        "| preset | precision | one pass |", "| S/2 | bf16 | 27.6 (42) |",
    ):  # fmt: skip
        assert line in lines, line
    (sentence,) = (line for line in lines if line.startswith("**A block"))
    assert (
        "508 MB against 504 MB at B/2" in sentence and "876 MB against ? MB of the eager" in sentence and "1608 MB of" in sentence
    )
    assert sentence.endswith("; torch 2.13.0, commit abc, 2026-01-02 ([rows](cuda_kernels.csv)).")
    order = [next(i for i, line in enumerate(lines) if start in line) for start in ("**Train", "**The host", "**A block", "**Opt")]
    assert order == sorted(order)
    for path in tables:
        path.write_text("preset,batch\nS/2,32\n")
        with pytest.raises(SystemExit) as stopped:
            report.main(["--page", str(page), str(path)])
        assert stopped.value.code == 2 and f"{path} has no rows, or lacks a value" in capsys.readouterr().err


def test_weights_are_compared_bit_by_bit(tmp_path):
    weights = {"a": torch.ones(3), "b": torch.zeros(2)}
    for name, own in {"one": weights, "two": weights, "three": weights | {"a": torch.tensor([1, 1, 1 + 2**-23])}}.items():
        folder = tmp_path / name / "checkpoints" / "step_00000003"
        folder.mkdir(parents=True)
        save_file(own, folder / "weights_rank_0000.safetensors")
    assert gpu_train.differing(tmp_path / "one", tmp_path / "two") == []
    assert gpu_train.differing(tmp_path / "one", tmp_path / "three") == ["a"]


@pytest.mark.slow
def test_a_killed_run_trains_and_samples_as_one_that_was_not(tmp_path, monkeypatch):
    """The section "train and sample", on this device with a small model."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # set where a run began in this process
        monkeypatch.delenv(name, raising=False)
    words = ["model.preset=test/4", "train.batch_size=8", "train.device=cpu", "sample.steps=2", "train.log_steps=5"]
    assert gpu_train.main(["--steps", "30", "--out", str(tmp_path / "out"), *words]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == len(gpu_train.BATCHES)


def test_every_op_is_within_the_bound_of_its_reference(monkeypatch, capsys):
    """parity.py, with one op of which a gradient is wrong."""
    monkeypatch.setattr(parity, "CASES", {"swiglu": parity.CASES["swiglu"]})
    assert parity.main(["--smallest", "--batch", "1"]) == 0 and "all within" in capsys.readouterr().out
    monkeypatch.setattr(parity, "difference", lambda *_: float("nan"))
    assert parity.main(["--smallest", "--batch", "1"]) == 1 and "swiglu 1024" in capsys.readouterr().out
