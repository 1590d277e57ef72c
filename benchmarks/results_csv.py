"""CSV files of results: every row says on which machine, with which versions, at which commit and when it was measured.

A file is called NAME_MACHINE.csv: NAME is the constant CSV of the script that writes it, MACHINE is `machine`'s.
"""

import argparse
import csv
import datetime
import functools
import io
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from fastdit.config import InputError

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
KEYS = ("suite", "case", "provider", "direction", "size", "precision", "device", "threads")
VALUES = ("median_s", "p20_s", "p80_s", "samples", "images_per_s", "speedup", "mfu", "bound_share", "parity", "peak_mb")
SHOWN = (
    *KEYS[1:5],
    "median_s",
    "images_per_s",
    "speedup",
    "mfu",
    "bound_share",
    "copy_share",
    "host_us",
    "peak_mb",
    "parity",
    "error",
)
# (vendor, family, model) of /proc/cpuinfo; another CPU is called by these three, so that no two share a name
MICROARCHITECTURES = {
    ("AuthenticAMD", "25", "17"): "zen4", ("AuthenticAMD", "26", "2"): "zen5", ("GenuineIntel", "6", "143"): "sapphire_rapids",
    ("GenuineIntel", "6", "207"): "emerald_rapids", ("GenuineIntel", "6", "173"): "granite_rapids",
}  # fmt: skip


@functools.cache
def cpuinfo() -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo; no fields if there is no such file."""
    path = Path("/proc/cpuinfo")
    text = path.read_text().partition("\n\n")[0] if path.exists() else ""
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def hardware(device: torch.device) -> str:
    """Return the name for the `device` column: the GPU's, or the CPU's with the instruction set that torch uses and the limit, if
    any, on the one that oneDNN's matmuls use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    isa = torch.backends.cpu.get_cpu_capability()
    return f"{cpuinfo().get('model name', 'CPU')}, {isa}{f', oneDNN up to {limit}' if limit else ''}"


def machine(device: torch.device = CPU) -> str:
    """Return the machine's name in file names, such as zen4_avx2 or nvidia_h100_80gb_hbm3: a CPU's microarchitecture and widest
    instruction set, with the limit on oneDNN's, if any; a GPU's name."""
    if device.type == "cuda":
        words = [torch.cuda.get_device_name(device)]
    else:
        model = tuple(cpuinfo().get(key, "unknown") for key in ("vendor_id", "cpu family", "model"))
        isa = torch.backends.cpu.get_cpu_capability()
        amx = isa == "AVX512" and "amx_bf16" in cpuinfo().get("flags", "").split()
        limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
        words = [MICROARCHITECTURES.get(model, " ".join(model)), "amx" if amx else isa, f"onednn {limit}" if limit else ""]
    return re.sub("[^a-z0-9]+", "_", " ".join(words).lower()).strip("_")


@functools.cache
def commit() -> str:
    """Return the commit of this checkout, with "-dirty" if a tracked file differs from it; "unknown" without git. Results do not
    count: writing them changes no measurement."""
    git = functools.partial(subprocess.run, capture_output=True, text=True, check=False, cwd=ROOT)
    name = git(["git", "describe", "--always"]).stdout.strip() or "unknown"
    changed = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!benchmarks/RESULTS.md"]
    return name + "-dirty" * bool(git(changed).stdout.strip())


def refuse_dirty(commits: set[str], allow_dirty: bool) -> None:
    """Raise InputError if one of the commits is dirty: nobody could measure its rows again."""
    if dirty := sorted(name for name in commits if name.endswith("-dirty") and not allow_dirty):
        raise InputError(f"commit {dirty[0]} has uncommitted changes: commit them before measuring, or pass --allow-dirty")


def parser(description: str, path: Path) -> argparse.ArgumentParser:
    """Return a parser with the options of every script that writes a CSV. description: the script's docstring; path: the CSV."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    made.add_argument("--csv", type=Path, default=path, help=f"CSV file that receives the rows (default: {shown})")
    made.add_argument("--allow-dirty", action="store_true", help="measure although the checkout has uncommitted changes")
    return made


def parse(made: argparse.ArgumentParser, words: list[str] | None) -> argparse.Namespace:
    """Parse a command line by a `parser`, and refuse a dirty checkout before anything is measured (exit code 2)."""
    options = made.parse_args(words)
    try:
        refuse_dirty({commit()}, options.allow_dirty)
    except InputError as error:
        made.error(str(error))
    return options


def path_of(name: str, device: torch.device | None = CPU) -> Path:
    """Return the path of a script's CSV in results/. device: None for results that do not depend on the machine."""
    return RESULTS / (f"{name}_{machine(device)}.csv" if device else f"{name}.csv")


@functools.cache
def measured_on(device: torch.device) -> dict[str, str]:
    """Return the columns that say where a row comes from."""

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "missing"

    return {
        "device": hardware(device), "torch": torch.__version__, "triton": version("triton"), "deepspeed": version("deepspeed"),
        "python": platform.python_version(), "commit": commit(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV; no rows if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_suites(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV that the suites wrote. Raises ValueError with one sentence if it is not one."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns, rows = reader.fieldnames or (), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a CSV ({error}): name one that `pytest benchmarks --csv` wrote") from error
    if missing := [c for c in ("suite", "case", "provider", "device", *VALUES[:4], "error") if c not in columns]:
        raise ValueError(f"{path} has no column {missing[0]}: name a CSV that `pytest benchmarks --csv` wrote")
    for number, row in enumerate(rows, 2):
        try:
            good = None not in row.values() and all(float(row[c]) > 0 for c in VALUES[:3] if row[c]) and int(row["samples"]) >= 0
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"line {number} of {path} is cut off, or its times are not numbers above 0: measure that suite again")
    return rows


def write(path: Path, rows: list[dict], device: torch.device = CPU, allow_dirty: bool = False) -> None:
    """Replace the CSV at `path` by `rows`, adding to each the columns of `measured_on` that it lacks.

    Columns: keys, values, others in the order of their first row. Raises InputError for rows of a dirty commit unless allow_dirty.
    """
    here = measured_on(device)
    complete = [here | row for row in rows]
    refuse_dirty({row["commit"] for row in complete}, allow_dirty)
    present, last = list(dict.fromkeys(column for row in complete for column in row)), list(here)
    known = [c for c in (*KEYS, *VALUES) if c in present] if "suite" in present else []
    columns = [*known, *(c for c in present if c not in (*known, *last)), *(c for c in last if c not in known)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(complete)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text.getvalue())
    temporary.replace(path)


def merge(path: Path, suite: str, rows: list[dict], threads: int, device: torch.device, allow_dirty: bool = False) -> None:
    """Put a suite's rows into the CSV at `path`, in place of its rows of the same cases. Raises InputError as `write` does."""
    new = [{"suite": suite, **row, "threads": threads} for row in rows]
    case = lambda row: tuple(str(row.get(key, "")) for key in ("suite", "case", "size", "precision", "threads"))
    replaced = set(map(case, new))
    write(path, [row for row in read(path) if case(row) not in replaced] + new, device, allow_dirty)


def table(rows: list[dict], columns: tuple[str, ...]) -> str:
    """Return rows as aligned text without the columns that are empty in all of them."""
    columns = tuple(c for c in columns if any(str(row.get(c, "")) for row in rows))
    cells = [columns, *(tuple(str(row.get(c, "")) for c in columns) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def line(row: dict) -> str:
    """Return a row as one line of text, for a study to print."""
    return "  ".join(f"{key} {value}" for key, value in row.items())
