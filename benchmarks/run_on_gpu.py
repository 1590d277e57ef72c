"""Everything that a CUDA machine is wanted for, in one command: is it right, who waits for whom, all suites in full size, tuning.

    python benchmarks/gpu.py [--minutes 10] [--csv runs/NAME.csv] [--again]

Sections, what answers most first, each a process of its own with a time limit. The same command goes on where the last one ended: a
section, or a suite's case, that is done with these sources and this torch is not repeated (`NAME.sections.json` beside the CSV
says which; --again forgets it), one that failed is. A section starts only where its whole limit fits into the minutes that are
left. One whose packages or tools are missing is skipped; most need torch 2.11 or newer and triton only.
Exit code 0: nothing is left but what was skipped; 1: something failed or is left; 2: no GPU.

The rows of the suites go to --csv, those of launch_bound.py to NAME.launch_bound.csv beside it. runs/ is not in the repository:
before a machine is given back, copy both away, and put into benchmarks/results/ what the README shall show.

A machine without network: make wheels of what it lacks on one with network, for its Python, and carry them along:

    pip download --no-deps --only-binary :all: --python-version 3.12 --platform manylinux_2_28_x86_64 --dest wheels \\
        pydantic pydantic-core annotated-types typing-inspection diffusers importlib-metadata mlxtend
    DS_BUILD_OPS=0 pip wheel --no-deps --wheel-dir wheels deepspeed hjson        # of launch/constraints.txt's versions

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
import re
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
from benchmarks.harness import DEVICE, EXCUSED, THREADS, reason
from benchmarks.kernel_cases import WIDTHS
from benchmarks.studies import launch_bound

ROOT = Path(__file__).parent.parent
SOURCES = ("benchmarks/**/*.py", "csrc/*", "fastdit/**/*.py", "kernels/*.py", "setup.py", "tests/kernels/*.py")
# where the import has another name
INSTALL = {"nvidia.dali": "nvidia-dali-cuda130", "skimage": "scikit-image", "sklearn": "scikit-learn"}


class Section(NamedTuple):
    """needs: modules; limit: seconds; tools: programs."""

    name: str
    command: list[str]
    needs: tuple[str, ...]
    limit: float
    tools: tuple[str, ...] = ()


def sections(csv: Path) -> list[Section]:
    """In the order of what they answer. Tuning comes last: its lines are put into kernels/tuning.py by hand."""
    python = [sys.executable, "-u"]
    script = lambda name, *words: [*python, "-m", f"benchmarks.{name}", *words]
    tests = ["-m", "pytest", "-q", "-m", "not slow", *(f"--ignore=tests/kernels/test_{name}.py" for name in ("codegen", "cpp"))]
    suite = lambda name, *words: [*python, "-m", "benchmarks.run_on_gpu", "--suite", name, "--csv", str(csv), *words]
    memcheck = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    data = ("nvidia.dali", "diffusers", "scipy", "skimage", "sklearn")
    return [
        Section("kernel tests", [*python, *tests, "tests/kernels"], ("triton", "pytest"), 240),
        Section("parity", script("parity"), ("triton",), 180),
        Section("memcheck", [*memcheck, *script("parity", "--smallest", "--batch", "3")], ("triton",), 240, ("compute-sanitizer",)),
        *(
            Section(f"launch bound {part}", script("studies.launch_bound", "--csv", str(launches_csv(csv)), "--cases", *cases),
                    ("triton", "deepspeed"), 480)
            for part, cases in launch_bound_cases().items()
        ),
        Section("train and sample", script("gpu_train"), ("triton", "deepspeed", "mlxtend"), 480),
        *(Section(f"train_step {case}", suite("train_step", "--case", case), ("triton", "deepspeed"), 540) for case in CUDA_CASES),
        Section("kernels", suite("kernels"), ("triton",), 540),
        Section("sampling", suite("sampling"), ("triton",), 300),
        Section("blocks", suite("blocks"), ("triton",), 300),
        Section("end_to_end", suite("end_to_end"), ("triton", "deepspeed", *data), 300),
        Section("data", suite("data"), data, 180),
        Section("checkpoint", suite("checkpoint"), ("deepspeed",), 120),
        *(
            Section(f"tuning {op} {width}", script("tune_kernels", "--ops", op, "--widths", str(width), "--batch", "128"),
                    ("triton",), 300)
            for op in ("modulate", "gated_residual", "gated_residual_modulate") for width in WIDTHS
        ),
    ]  # fmt: skip


def launch_bound_cases() -> dict[str, list[str]]:
    """launch_bound.py's cases in parts that fit into a section: of the small preset, and of the others."""
    small = [case for case in launch_bound.CASES if case.startswith("S/2")]
    return {"S/2": small, "B/2, XL/2": [case for case in launch_bound.CASES if case not in small]}


def launches_csv(csv: Path) -> Path:
    """Where launch_bound.py's rows go: no suite, so not among the suites' rows."""
    return csv.with_name(f"{csv.stem}.launch_bound.csv")


@functools.cache
def version() -> str:
    """Of the sources and of torch; also where there is no git."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()):
        digest.update(f"{path.relative_to(ROOT)}".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def done(state: Path) -> dict[str, int]:
    """Sections and cases that the JSON calls done with this version, and their seconds."""
    found = json.loads(state.read_text()) if state.exists() else {}
    return found["done"] if found.get("version") == version() else {}


def note(state: Path, name: str, start: float) -> None:
    """Call `name`, begun at `start`, done."""
    temporary = state.with_name(f".{state.name}.tmp")
    seconds = round(time.monotonic() - start)
    temporary.write_text(json.dumps({"version": version(), "done": done(state) | {name: seconds}}, indent=1))
    temporary.replace(state)


def missing(section: Section) -> str:
    """What a section lacks here, in one sentence; or nothing."""

    def found(module: str) -> bool:
        try:
            return importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # of the package that it is in
            return False

    packages = [INSTALL.get(module, module) for module in section.needs if not found(module)]
    if packages:
        return f"{' and '.join(packages)} missing: pip install {' '.join(packages)}"
    tools = [tool for tool in section.tools if shutil.which(tool) is None]
    return f"there is no {' and no '.join(tools)} in the PATH" if tools else ""


def execute(command: list[str], limit: float) -> str:
    """Run a command, whose output is ours; why it failed, or nothing. Ends its whole process group, workers included."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"took longer than its {limit:g} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # nobody is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"exit code {code}" if code else ""


def run(todo: list[Section], state: Path, budget: float) -> int:
    """Run the sections that are not done, for `budget` seconds; the exit code."""
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
    for what, names in (("failed", failed), ("left", left)):
        if names:
            print(f"{what}: {', '.join(names)}; the same command runs them again")
    return 1 if failed or left else 0


def measure_suite(name: str, csv: Path, state: Path, case: str | None = None) -> int:
    """Measure a suite's cases, in full size, that are not done, each into the CSV at once; exit code 1 where a provider failed.
    case: the only one."""
    module, failed = importlib.import_module(f"benchmarks.bench_{name}"), []
    groups = module.groups(True)
    for number, group in enumerate([case] if case else list(groups), 1):
        start, key = time.monotonic(), f"{name}, {group}"
        say = lambda text, place=f"  {number}/{len(groups)} {key}": print(f"{place}: {text}", flush=True)  # noqa: B008 (the loop's)
        if key in done(state):
            say("done before")
            continue
        say("starts")
        try:
            results = groups[group].measure(say)
        except Exception as error:  # the other cases shall be measured
            errors = {group: reason(error)}
        else:
            results_csv.merge(csv, module.SUITE, [result.row() for result in results.values()], THREADS, DEVICE)
            errors = {member: result.error for member, result in results.items() if result.error}
        for member, why in errors.items():
            say(f"{member}: {why}")
        if all(why.startswith(EXCUSED) for why in errors.values()):
            note(state, key, start)
        else:
            failed.append(group)
            groups = module.groups(True)  # with new workers: after a fault on the GPU a process can do no more
    return 1 if failed else 0


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of this call (default: %(default)s)")
    parser.add_argument("--csv", type=Path, help="where the rows go (default: runs/<the GPU's name>.csv)")
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--suite", help=argparse.SUPPRESS)  # in a section's process
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if DEVICE.type != "cuda":
        parser.error("there is no CUDA GPU for torch here: `pytest benchmarks` measures a CPU")
    name = re.sub("[^a-z0-9]+", "_", results_csv.device_name(DEVICE).lower()).strip("_")
    csv = (options.csv or ROOT / "runs" / f"{name}.csv").absolute()
    state = csv.with_suffix(".sections.json")
    if options.suite:
        return measure_suite(options.suite, csv, state, options.case)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of `finally`, which ends the section
    csv.parent.mkdir(parents=True, exist_ok=True)
    if options.again:
        state.unlink(missing_ok=True)
    code = run(sections(csv), state, 60 * options.minutes)
    if rows := results_csv.read(csv):
        print(
            f"\n{results_csv.table(rows, ('suite', *results_csv.SHOWN))}\nrows: {csv}: copy it away with {launches_csv(csv).name}"
        )
    return code


if __name__ == "__main__":
    sys.exit(main())
