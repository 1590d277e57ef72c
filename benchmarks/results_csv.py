"""How a benchmark writes its rows: a CSV whose every row says on what, with what and when it was measured. Needs torch alone."""

import csv
import datetime
import functools
import io
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

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


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the instruction set that torch uses, and the one that oneDNN's matmuls are held to."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
    held = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}{f', oneDNN up to {held}' if held else ''}"


@functools.cache
def measured_on(device: torch.device) -> dict[str, str]:
    """The columns that say where a row comes from."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "missing"

    return {
        "device": device_name(device), "torch": torch.__version__, "triton": version("triton"), "deepspeed": version("deepspeed"),
        "python": platform.python_version(), "commit": commit.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_suites(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV that the suites wrote. Raises ValueError, in one sentence, where it is none."""
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
            raise ValueError(f"line {number} of {path} is cut off, or its times are no numbers above 0: measure that suite again")
    return rows


def write(path: Path, rows: list[dict], device: torch.device | None = None) -> None:
    """Replace the CSV at `path` by `rows`, each with where it was measured added where it does not say so yet. Columns: keys,
    values, others in the order of their first row."""
    here = measured_on(device or torch.device("cpu"))
    whole = [here | row for row in rows]
    found, last = list(dict.fromkeys(column for row in whole for column in row)), list(here)
    known = [c for c in (*KEYS, *VALUES) if c in found] if "suite" in found else []
    columns = [*known, *(c for c in found if c not in (*known, *last)), *(c for c in last if c not in known)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(whole)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text.getvalue())
    temporary.replace(path)


def merge(path: Path, suite: str, rows: list[dict], threads: int, device: torch.device) -> None:
    """Put a suite's rows into the CSV at `path` for those that it held of the same cases of that suite."""
    new = [{"suite": suite, **row, "threads": threads} for row in rows]
    same = lambda row: tuple(str(row.get(key, "")) for key in ("suite", "case", "size", "precision", "threads"))
    again = set(map(same, new))
    write(path, [row for row in read(path) if same(row) not in again] + new, device)


def table(rows: list[dict], columns: tuple[str, ...]) -> str:
    """Rows as aligned text; columns that are empty in all of them are left out."""
    columns = tuple(c for c in columns if any(str(row.get(c, "")) for row in rows))
    cells = [columns, *(tuple(str(row.get(c, "")) for c in columns) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)
