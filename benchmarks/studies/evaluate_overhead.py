"""The cost of evaluation over sampling: CPU time of `fastdit evaluate` over `fastdit sample --npz` of the same samples.

    python -m benchmarks.studies.evaluate_overhead --checkpoint runs/quickstart [--pairs 5] [--per-class 50] [--threads 2]

Complete processes, start included, take turns, in reverse order every other pair; the reference's statistics are in a file, as in
every evaluation but the first. The row has the median of the pairs' ratios. 5 pairs of 500 samples: 10 minutes on 2 cores.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import results_csv
from fastdit import progress

CSV = "evaluate_overhead"


def cpu_seconds(words: list[str], threads: int) -> float:
    """Return the CPU seconds of a fastdit command in a process of its own."""
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = used()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", "fastdit.cli", *words], env=environment, check=True, capture_output=True)
    return used() - before


def main(words: list[str] | None = None) -> int:
    parser = results_csv.parser(__doc__, results_csv.path_of(CSV))
    parser.add_argument("--checkpoint", required=True, help="run folder or checkpoint of the digits")
    parser.add_argument("--pairs", type=int, default=5, help="number of pairs of processes (default: %(default)s)")
    parser.add_argument("--per-class", type=int, default=50, help="samples of each of the ten classes (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process (default: %(default)s)")
    options = results_csv.parse(parser, words)
    with tempfile.TemporaryDirectory() as folder:
        in_folder = lambda name: str(Path(folder) / name)
        reference = ["--features", "digits", "--reference"]
        cpu_seconds(["evaluate", *reference, "mnist5k", "--save-reference", in_folder("reference.npz")], options.threads)
        commands = {
            "sample": ["sample", "--checkpoint", options.checkpoint, "--per-class", str(options.per_class), "--seed-per-sample",
                       "--npz", in_folder("samples.npz"), "--out", in_folder("grid.png")],
            "evaluate": ["evaluate", options.checkpoint, *reference, in_folder("reference.npz"),
                         "--samples", str(10 * options.per_class), "--out", in_folder("streamed.json")],
        }  # fmt: skip
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        with progress.progress_bar(options.pairs, description="pairs", unit="pair") as bar:
            for pair in range(options.pairs):
                for name in list(commands)[:: -1 if pair % 2 else 1]:
                    seconds[name].append(cpu_seconds(commands[name], options.threads))
                bar.update()
        cpu_seconds(
            ["evaluate", in_folder("samples.npz"), *reference, in_folder("reference.npz"), "--out", in_folder("file.json")],
            options.threads,
        )
        fid = {name: json.loads(Path(in_folder(f"{name}.json")).read_text())["metrics"]["fid"] for name in ("streamed", "file")}
    if not np.isclose(fid["streamed"], fid["file"], rtol=1e-6):
        sys.exit(f"the two did not draw the same samples: Fréchet distances {fid['streamed']} and {fid['file']}")
    ratios = [e / s for e, s in zip(seconds["evaluate"], seconds["sample"], strict=True)]
    row = {
        "samples": 10 * options.per_class, "pairs": options.pairs, "threads": options.threads,
        **{f"{name}_cpu_s": f"{statistics.median(times):.2f}" for name, times in seconds.items()},
        "ratio": f"{statistics.median(ratios):.3f}", "ratio_min": f"{min(ratios):.3f}", "ratio_max": f"{max(ratios):.3f}",
    }  # fmt: skip
    print(results_csv.line(row))
    results_csv.write(options.csv, [row], allow_dirty=options.allow_dirty)
    return 0


if __name__ == "__main__":
    sys.exit(main())
