"""How a benchmark writes its rows: a CSV whose every row says on what, with what and when it was measured."""

import csv
import datetime
import io
import platform
import subprocess
from pathlib import Path

import torch

from fastdit import telemetry
from fastdit.checkpoint import write_atomically


def write(path: Path, rows: list[dict]) -> None:
    """Replace the CSV at `path` by `rows`, each with device, torch version, commit and date added. The rows' keys are alike."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    measured = {
        "device": telemetry.device_name(torch.device("cpu")), "torch": torch.__version__, "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown", "date": datetime.date.today().isoformat(),
    }  # fmt: skip

    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0], *measured], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | measured for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue())
