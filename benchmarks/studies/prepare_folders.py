"""The cost of `fastdit prepare` on class folders: CPU time of this version over another, on many small files.

    python -m benchmarks.studies.prepare_folders --before OTHER/.venv/bin/fastdit [--after .venv/bin/fastdit] [--rounds 5]

The files are made: JPEGs of 32x32 pixels of noise, 100,000 in 1,000 folders. Each command is a process of its own that makes a new
index; user and system time are added, as other processes share the machine. The two versions take turns, in reverse order every
other round. The row has the medians, and the median, least and greatest of the rounds' ratios; `again_s` is the CPU time of this
version where the index exists, and `open_s` that of opening it in a run. 5 rounds: 5 minutes on 2 cores.
"""

import io
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import results_csv
from fastdit import progress
from fastdit.data.index import open_index

CSV = "prepare_folders"


def make(root: Path, files: int, folders: int) -> None:
    """Write JPEGs of noise to class folders."""
    random = np.random.default_rng(0)
    images = []
    for _ in range(100):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(file, "JPEG")
        images.append(file.getvalue())
    for folder in range(folders):
        (root / f"n{folder:08d}").mkdir(parents=True)
    for i in range(files):
        (root / f"n{i % folders:08d}" / f"n{i % folders:08d}_{i}.JPEG").write_bytes(images[i % 100])


def cpu_seconds(executable: str, source: Path, out: Path) -> float:
    """Return the CPU seconds of `fastdit prepare` in a process of its own."""
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = used()
    # not from this checkout, from which `python -m` would import
    subprocess.run([executable, "prepare", source, "--out", out], check=True, capture_output=True, cwd=out.parent)
    return used() - before


def main(words: list[str] | None = None) -> int:
    parser = results_csv.parser(__doc__, results_csv.path_of(CSV))
    parser.add_argument("--before", required=True, help="fastdit executable of the version to compare with")
    parser.add_argument(
        "--after", default=str(Path(sys.executable).with_name("fastdit")), help="fastdit executable (default: this)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: %(default)s)")
    parser.add_argument("--files", type=int, default=100_000, help="number of files (default: %(default)s)")
    parser.add_argument("--folders", type=int, default=1000, help="number of class folders (default: %(default)s)")
    options = results_csv.parse(parser, words)
    commands = {"before": options.before, "after": options.after}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root / "images", options.files, options.folders)
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        again: list[float] = []
        with progress.progress_bar(options.rounds, description="rounds", unit="round") as bar:
            for turn in range(options.rounds):
                for name in list(commands)[:: -1 if turn % 2 else 1]:
                    seconds[name].append(cpu_seconds(commands[name], root / "images", root / f"{name}_{turn}.index"))
                again.append(cpu_seconds(options.after, root / "images", root / f"after_{turn}.index"))
                bar.update()
        opened = []
        for _ in range(options.rounds):
            started = time.process_time()
            rows = len(open_index(root / "after_0.index").rows("train"))
            opened.append(time.process_time() - started)
        if not rows == len(np.load(root / "before_0.index" / "train.npy", mmap_mode="r")) == options.files:
            sys.exit(f"an index has not all of the {options.files:,} images")
    ratios = [a / b for a, b in zip(seconds["after"], seconds["before"], strict=True)]
    row = {
        "files": options.files, "folders": options.folders, "rounds": options.rounds,
        **{f"{name}_cpu_s": f"{statistics.median(times):.2f}" for name, times in seconds.items()},
        "ratio": f"{statistics.median(ratios):.3f}", "ratio_min": f"{min(ratios):.3f}", "ratio_max": f"{max(ratios):.3f}",
        "again_s": f"{statistics.median(again):.2f}",
        "open_s": f"{statistics.median(opened):.3f}", "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    print(results_csv.line(row))
    results_csv.write(options.csv, [row], allow_dirty=options.allow_dirty)
    return 0


if __name__ == "__main__":
    sys.exit(main())
