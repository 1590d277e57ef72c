"""run_on_gpu on made-up sections: it resumes, skips what is missing, and lets the others run after a failure."""

import functools
import importlib.util
import os
import signal
import subprocess
import sys
import time
import types

import pytest
import torch

from benchmarks import harness, results_csv, run_on_gpu
from benchmarks.studies import launch_bound


def sections(folder, *texts, needs=(), limit=20):
    """Named a, b, c: Python that runs in `folder`, and writes its name into the file `ran` before."""
    text = "import os, sys, time; os.chdir({!r}); open('ran', 'a').write({!r}); {}"
    commands = {
        name: [sys.executable, "-c", text.format(str(folder), name, text_of)] for name, text_of in zip("abc", texts, strict=False)
    }
    return [run_on_gpu.Section(name, command, needs, limit) for name, command in commands.items()]


def test_a_killed_run_resumes(tmp_path, capfd):
    """SIGKILL in the second of three sections; the next call skips the first."""
    todo = sections(tmp_path, "", "open('pid', 'w').write(str(os.getpid())); time.sleep(0 if os.path.exists('again') else 60)", "")
    state = str(tmp_path / "state.json")
    script = (
        "import pathlib\nfrom benchmarks import run_on_gpu\nfrom benchmarks.run_on_gpu import Section\n"
        f"run_on_gpu.run({todo!r}, pathlib.Path({state!r}), 100)"
    )
    path = os.pathsep.join(sys.path)
    running = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not ((pid := tmp_path / "pid").exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.kill()
    running.wait()
    os.kill(int(pid.read_text()), signal.SIGKILL)
    assert (tmp_path / "ran").read_text() == "ab"
    (tmp_path / "again").touch()
    assert run_on_gpu.run(todo, tmp_path / "state.json", 100) == 0
    assert (tmp_path / "ran").read_text() == "abbc" and "[1/3] a: done before" in capfd.readouterr().out
    assert run_on_gpu.run(todo, tmp_path / "state.json", 100) == 0 and (tmp_path / "ran").read_text() == "abbc"


def test_sections_are_repeated_when_the_sources_change(tmp_path, monkeypatch):
    todo = sections(tmp_path, "")
    for version, ran in (("1", "a"), ("1", "a"), ("2", "aa")):
        monkeypatch.setattr(run_on_gpu, "version", lambda version=version: version)
        assert run_on_gpu.run(todo, tmp_path / "state.json", 100) == 0 and (tmp_path / "ran").read_text() == ran


def test_a_failing_section_and_a_slow_one_let_the_others_run(tmp_path, capfd):
    todo = sections(tmp_path, "sys.exit(3)", "time.sleep(60)", "print('here')")
    todo[1] = todo[1]._replace(limit=0.5)
    assert run_on_gpu.run(todo, tmp_path / "state.json", 100) == 1
    out = capfd.readouterr().out
    for line in ("a: failed: exit code 3", "b: failed: took longer than its 0.5 s", "here", "[3/3] c: done in", "failed: a, b;"):
        assert line in out
    assert run_on_gpu.run(todo, tmp_path / "state.json", 100) == 1
    assert (tmp_path / "ran").read_text().count("c") == 1 and (tmp_path / "ran").read_text().count("a") == 2


def test_a_missing_package_skips_a_section_in_one_line(tmp_path, capfd):
    skipped = sections(tmp_path, "", needs=("pytest", "no_such_package.here"))
    assert run_on_gpu.run([*skipped, *sections(tmp_path, "", "")[1:]], tmp_path / "state.json", 100) == 0
    assert "[1/2] a: skipped, no_such_package.here missing" in capfd.readouterr().out
    assert (tmp_path / "ran").read_text() == "b"


def test_what_does_not_fit_is_left(tmp_path, capfd):
    todo = [*sections(tmp_path, "", limit=50), *sections(tmp_path, "", "")[1:]]
    assert run_on_gpu.run(todo, tmp_path / "state.json", 30) == 1
    assert (tmp_path / "ran").read_text() == "b" and "left: a;" in capfd.readouterr().out
    assert run_on_gpu.run(todo, tmp_path / "state.json", 60) == 0 and (tmp_path / "ran").read_text() == "ba"


def test_a_suites_cases_are_recorded_one_by_one(tmp_path, monkeypatch, capsys):
    """The second of three fails, the third lacks memory for one provider; the next call measures only the second."""
    measured, made, broken = [], [], [True]

    def measure_case(case, say):
        measured.append(case)
        if case == "bad" and broken[0]:
            raise RuntimeError("no luck")
        errors = {"big": "out of memory"} if case == "large" else {}
        key = lambda name: {"case": case, "provider": name, "direction": "forward", "size": "1"}
        return {n: harness.Result(key(n), [] if n in errors else [0.5, 0.6], {}, errors.get(n, "")) for n in ("eager", "big")}

    def groups(full):
        made.append(full)
        return {c: harness.Group(("eager", "big"), lambda say, c=c: measure_case(c, say)) for c in ("ok", "bad", "large")}

    monkeypatch.setitem(sys.modules, "benchmarks.bench_made_up", types.SimpleNamespace(SUITE="made_up", groups=groups))
    csv, state = tmp_path / "rows.csv", tmp_path / "state.json"
    assert run_on_gpu.measure_suite("made_up", csv, state, allow_dirty=True) == 1
    assert "bad: RuntimeError: no luck" in capsys.readouterr().out
    assert made == [True, True]  # workers anew after what broke, and only then
    assert [(row["case"], row["error"]) for row in results_csv.read_suites(csv)] == [
        ("ok", ""), ("ok", ""), ("large", ""), ("large", "out of memory")
    ]  # fmt: skip
    broken[0] = False
    assert run_on_gpu.measure_suite("made_up", csv, state, allow_dirty=True) == 0
    assert measured == ["ok", "bad", "large", "bad"] and len(results_csv.read_suites(csv)) == 6


def test_gpu_needs_a_gpu_and_its_suites_exist(capsys, tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit) as stopped:
            run_on_gpu.main([])
        assert stopped.value.code == 2 and "no CUDA GPU" in capsys.readouterr().err
    for section in run_on_gpu.sections(tmp_path / "rows.csv"):
        assert section.limit < 600
        if "--suite" in section.command:
            assert importlib.import_module(f"benchmarks.bench_{section.command[section.command.index('--suite') + 1]}").groups(True)


def test_what_answers_most_comes_first_and_tuning_last(tmp_path):
    names = [section.name for section in run_on_gpu.sections(tmp_path / "rows.csv")]
    assert names[:2] == ["kernel tests", "parity"] and names[3].startswith("launch bound")
    assert all(name.startswith("tuning") for name in names[-12:]) and len(set(names)) == len(names)
    steps = [section.command[-1] for section in run_on_gpu.sections(tmp_path / "rows.csv") if section.name.startswith("train_step")]
    assert steps == list(run_on_gpu.CUDA_CASES)
    cases = [case for part in run_on_gpu.launch_bound_cases().values() for case in part]
    assert sorted(cases) == sorted(launch_bound.CASES)
    for section in run_on_gpu.sections(tmp_path / "rows.csv"):
        modules = [word for word in section.command if word.startswith("benchmarks.")]
        assert all(importlib.util.find_spec(module) for module in modules) and (modules or "pytest" in section.command), section


def test_a_missing_tool_skips_a_section_in_one_line(tmp_path, capfd):
    todo = [section._replace(tools=("no-such-tool",)) for section in sections(tmp_path, "")]
    assert run_on_gpu.run(todo, tmp_path / "state.json", 100) == 0
    assert "[1/1] a: skipped, there is no no-such-tool in the PATH" in capfd.readouterr().out
    assert not (tmp_path / "ran").exists()


def test_a_section_may_be_one_case_of_a_suite(tmp_path, monkeypatch):
    measured = []

    def result(case, say):
        measured.append(case)
        return {"eager": harness.Result({"case": case, "provider": "eager", "direction": "", "size": "1"}, [0.5], {})}

    groups = lambda full: {c: harness.Group(("eager",), functools.partial(result, c)) for c in ("a", "b")}
    monkeypatch.setitem(sys.modules, "benchmarks.bench_made_up", types.SimpleNamespace(SUITE="made_up", groups=groups))
    assert run_on_gpu.measure_suite("made_up", tmp_path / "rows.csv", tmp_path / "state.json", "b", allow_dirty=True) == 0
    assert measured == ["b"]
