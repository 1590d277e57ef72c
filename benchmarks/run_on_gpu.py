"""Runs all measurements on a CUDA machine in one command: correctness, host against GPU time, all suites in full size, tuning.

    python -m benchmarks.run_on_gpu [--minutes 10] [--csv runs/suites_NAME.csv] [--again]

Sections run in order of importance, each in a process of its own with a time limit. The same command resumes where the last one
ended: a section, or a suite's case, that is done with these sources and this torch is not repeated (the CSV's .sections.json file
lists them; --again forgets it), one that failed is. A section starts only if its time limit fits into the minutes that are
left, and is skipped if packages or tools are missing; most need only torch 2.11 or newer and triton.
Exit code 0: all is done or skipped; 1: something failed or is left; 2: no GPU.

The rows of the suites go to --csv, those of studies.launch_bound to launch_bound_NAME.csv beside it. runs/ is not in the
repository: before giving a machine back, copy both files away, and put into benchmarks/results/ what RESULTS.md is to show.

For a machine without network: make wheels of what it lacks on one with network, for its Python, and carry them along:

    pip download --no-deps --only-binary :all: --python-version 3.12 --platform manylinux_2_28_x86_64 --dest wheels \\
        pydantic pydantic-core annotated-types typing-inspection diffusers importlib-metadata mlxtend
    DS_BUILD_OPS=0 pip wheel --no-deps --wheel-dir wheels deepspeed hjson        # in launch/constraints.txt's versions

and there: pip install --no-index --no-deps wheels/*.whl && FASTDIT_BUILD_EXT=0 pip install --no-deps --no-build-isolation -e .
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import results_csv
from benchmarks.bench_train_step import CUDA_CASES
from benchmarks.harness import CSV, DEVICE, EXCUSED, THREADS, reason
from benchmarks.kernel_cases import WIDTHS
from benchmarks.studies import launch_bound

ROOT = Path(__file__).parent.parent
SOURCES = ("benchmarks/**/*.py", "csrc/*", "fastdit/**/*.py", "kernels/*.py", "setup.py", "tests/kernels/*.py")
# module -> package, if their names differ
INSTALL = {"nvidia.dali": "nvidia-dali-cuda130", "skimage": "scikit-image", "sklearn": "scikit-learn"}


class Section(NamedTuple):
    """A step of the run. needs: modules that it imports; limit: time limit in seconds; tools: programs that it calls."""

    name: str
    command: list[str]
    needs: tuple[str, ...]
    limit: float
    tools: tuple[str, ...] = ()


def sections(csv: Path, *flags: str) -> list[Section]:
    """Return the sections, most important first. Tuning is last: its lines go into kernels/tuning.py by hand.

    flags: --allow-dirty, if given, for the sections that write a CSV.
    """
    python = [sys.executable, "-u"]
    script = lambda name, *words: [*python, "-m", f"benchmarks.{name}", *words]
    tests = ["-m", "pytest", "-q", "-m", "not slow", *(f"--ignore=tests/kernels/test_{name}.py" for name in ("codegen", "cpp"))]
    suite = lambda name, *words: [*python, "-m", "benchmarks.run_on_gpu", "--suite", name, "--csv", str(csv), *flags, *words]
    memcheck = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    deepspeed = ("triton", "deepspeed")
    csv_of_launches = ("--csv", str(launches_csv(csv)), *flags)
    data = ("nvidia.dali", "diffusers", "scipy", "skimage", "sklearn")
    return [
        Section("kernel tests", [*python, *tests, "tests/kernels"], ("triton", "pytest"), 240),
        Section("parity", script("parity"), ("triton",), 180),
        Section("memcheck", [*memcheck, *script("parity", "--smallest", "--batch", "3")], ("triton",), 240, ("compute-sanitizer",)),
        *(
            Section(f"launch bound {part}", script("studies.launch_bound", *csv_of_launches, "--cases", *cases), deepspeed, 480)
            for part, cases in launch_bound_cases().items()
        ),
        Section("train and sample", script("gpu_train"), (*deepspeed, "mlxtend"), 480),
        *(Section(f"train_step {case}", suite("train_step", "--case", case), deepspeed, 540) for case in CUDA_CASES),
        Section("kernels", suite("kernels"), ("triton",), 540),
        Section("sampling", suite("sampling"), ("triton",), 300),
        Section("blocks", suite("blocks"), ("triton",), 300),
        Section("end_to_end", suite("end_to_end"), (*deepspeed, *data), 300),
        Section("data", suite("data"), data, 180),
        Section("checkpoint", suite("checkpoint"), ("deepspeed",), 120),
        *(
            Section(f"tuning {op} {width}", script("tune_kernels", "--ops", op, "--widths", str(width), "--batch", "128"),
                    ("triton",), 300)
            for op in ("modulate", "gated_residual", "gated_residual_modulate") for width in WIDTHS
        ),
    ]  # fmt: skip


def launch_bound_cases() -> dict[str, list[str]]:
    """Return launch_bound's cases in parts that fit into a section: those of the small preset, and the others."""
    small = [case for case in launch_bound.CASES if case.startswith("S/2")]
    return {"S/2": small, "B/2, XL/2": [case for case in launch_bound.CASES if case not in small]}


def launches_csv(csv: Path) -> Path:
    """Return the path of launch_bound's CSV, beside that of the suites."""
    return csv.with_name(f"{launch_bound.CSV}_{csv.stem.removeprefix(f'{CSV}_')}.csv")


@functools.cache
def version() -> str:
    """Return a hash of the sources and of torch's version, which needs no git."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()):
        digest.update(f"{path.relative_to(ROOT)}".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def done(state: Path) -> dict[str, int]:
    """Return the sections and cases that the JSON calls done with this version, and their seconds."""
    saved = json.loads(state.read_text()) if state.exists() else {}
    return saved["done"] if saved.get("version") == version() else {}


def note(state: Path, name: str, start: float) -> None:
    """Record that `name`, begun at `start`, is done."""
    temporary = state.with_name(f".{state.name}.tmp")
    seconds = round(time.monotonic() - start)
    temporary.write_text(json.dumps({"version": version(), "done": done(state) | {name: seconds}}, indent=1))
    temporary.replace(state)


def missing(section: Section) -> str:
    """Return what a section lacks here in one sentence, or an empty string."""

    def installed(module: str) -> bool:
        try:
            return importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # its package is missing
            return False

    packages = [INSTALL.get(module, module) for module in section.needs if not installed(module)]
    if packages:
        return f"{' and '.join(packages)} missing: pip install {' '.join(packages)}"
    tools = [tool for tool in section.tools if shutil.which(tool) is None]
    return f"there is no {' and no '.join(tools)} in the PATH" if tools else ""


def execute(command: list[str], limit: float) -> str:
    """Run a command with our output. Returns why it failed, or an empty string. Ends its process group, workers included."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"took longer than its {limit:g} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"exit code {code}" if code else ""


def run(todo: list[Section], state: Path, budget: float) -> int:
    """Run the sections that are not done, for `budget` seconds, and return the exit code."""
    end, failed, left = time.monotonic() + budget, [], []
    for number, section in enumerate(todo, 1):
        say = lambda text, n=number, name=section.name: print(f"[{n}/{len(todo)}] {name}: {text}", flush=True)
        start = time.monotonic()
        if section.name in done(state):
            say("done before")
        elif lack := missing(section):
            say(f"skipped, {lack}")
        elif end - start < section.limit:
            say(f"left for the next call: it may take {section.limit:g} s, and {max(0, end - start):.0f} s are left")
            left.append(section.name)
        else:
            say(f"at most {section.limit:g} s")
            if why := execute(section.command, section.limit):
                say(f"failed: {why}")
                failed.append(section.name)
            else:
                note(state, section.name, start)
                say(f"done in {time.monotonic() - start:.0f} s")
    for state_of, names in (("failed", failed), ("left", left)):
        if names:
            print(f"{state_of}: {', '.join(names)}; the same command runs them again")
    return 1 if failed or left else 0


def measure_suite(name: str, csv: Path, state: Path, case: str | None = None, allow_dirty: bool = False) -> int:
    """Measure a suite's cases that are not done in full size, and write each into the CSV at once. case: the only case to measure.

    Returns exit code 1 if a provider failed.
    """
    module, failed = importlib.import_module(f"benchmarks.bench_{name}"), []
    groups = module.groups(True)
    for number, group in enumerate([case] if case else list(groups), 1):
        start, key = time.monotonic(), f"{name}, {group}"
        say = lambda text, label=f"  {number}/{len(groups)} {key}": print(f"{label}: {text}", flush=True)  # noqa: B008 (per loop)
        if key in done(state):
            say("done before")
            continue
        say("starts")
        try:
            results = groups[group].measure(say)
        except Exception as error:  # the other cases are measured all the same
            errors = {group: reason(error)}
        else:
            results_csv.merge(csv, module.SUITE, [result.row() for result in results.values()], THREADS, DEVICE, allow_dirty)
            errors = {member: result.error for member, result in results.items() if result.error}
        for member, why in errors.items():
            say(f"{member}: {why}")
        if all(why.startswith(EXCUSED) for why in errors.values()):
            note(state, key, start)
        else:
            failed.append(group)
            groups = module.groups(True)  # with new workers: a fault on the GPU disables a process
    return 1 if failed else 0


def main(words: list[str] | None = None) -> int:
    parser = results_csv.parser(__doc__, ROOT / "runs" / results_csv.path_of(CSV, DEVICE).name)
    parser.add_argument("--minutes", type=float, default=10, help="time limit of this call in minutes (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="repeat what is done")
    parser.add_argument("--suite", help=argparse.SUPPRESS)  # in a section's process
    parser.add_argument("--case", help=argparse.SUPPRESS)
    if DEVICE.type != "cuda":
        parser.parse_args(words)
        parser.error("torch finds no CUDA GPU here: `python -m pytest benchmarks` measures a CPU")
    options = results_csv.parse(parser, words)
    csv = options.csv.absolute()
    state = csv.with_suffix(".sections.json")
    if options.suite:
        return measure_suite(options.suite, csv, state, options.case, options.allow_dirty)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`, which ends the section
    csv.parent.mkdir(parents=True, exist_ok=True)
    if options.again:
        state.unlink(missing_ok=True)
    code = run(sections(csv, *["--allow-dirty"] * options.allow_dirty), state, 60 * options.minutes)
    if rows := results_csv.read(csv):
        print(
            f"\n{results_csv.table(rows, ('suite', *results_csv.SHOWN))}\nrows: {csv}: copy it away with {launches_csv(csv).name}"
        )
    return code


if __name__ == "__main__":
    sys.exit(main())
