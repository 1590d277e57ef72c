"""Trains, kills, resumes and samples, as users do, on this device, and compares a killed run with an undisturbed one bit by bit.

    python -m benchmarks.gpu_train [--steps 300] [--out runs/gpu_train] [KEY=VALUE ...]

The quickstart runs twice with train.deterministic=true, once killed by SIGKILL after its first checkpoint and started again; then
batches of one to six digits of one class are sampled. Exit code 1: the weights differ, or a command fails.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
BATCHES = range(1, 7)  # more sizes than torch.compile keeps versions of one function


def command(name: str, out: Path, steps: int, overrides: list[str]) -> list[str]:
    """Return the command of a run of `steps` steps with a checkpoint after each third of them."""
    settings = {
        "train.name": name, "train.out": out, "train.total_steps": steps, "train.decay_steps": 0,
        "train.save_steps": max(1, steps // 3), "train.sample_steps": steps, "validate.steps": 0, "train.deterministic": "true",
    }  # fmt: skip
    given = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "fastdit.cli", "train", "launch/configs/quickstart.yaml", *given, *overrides]


def killed(words: list[str], checkpoints: Path, limit: float = 300) -> None:
    """Start a run, and kill it once there is a checkpoint. Raises RuntimeError if it ends, or `limit` seconds pass, before."""
    process, end = subprocess.Popen(words, cwd=ROOT), time.monotonic() + limit
    try:
        while not list(checkpoints.glob("step_*")):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"no checkpoint in {checkpoints}: the run ended or took longer than {limit:g} s")
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def differing(a: Path, b: Path) -> list[str]:
    """Return the names of the tensors that are not bitwise the same in two runs' last checkpoints."""
    first, second = (
        load_file(sorted((run / "checkpoints").glob("step_*"))[-1] / "weights_rank_0000.safetensors") for run in (a, b)
    )
    same = lambda name: name in first and name in second and torch.equal(first[name], second[name])
    return sorted(name for name in first.keys() | second.keys() if not same(name))


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "gpu_train", help="folder of the runs, emptied first (default: %(default)s)"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further settings of the runs")
    options = parser.parse_args(words)
    out = options.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    undisturbed, resumed = (command(name, out, options.steps, options.overrides) for name in ("undisturbed", "resumed"))
    run = lambda words: subprocess.run(words, cwd=ROOT, check=True)
    run(undisturbed)
    killed(resumed, out / "resumed" / "checkpoints")
    run(resumed)
    if different := differing(out / "undisturbed", out / "resumed"):
        print(f"{len(different)} tensors differ between a run and one that was killed and resumed, first {different[0]}")
        return 1
    print(f"{options.steps} steps, undisturbed and killed: bitwise the same")
    for count in BATCHES:
        sample = ["sample", "--checkpoint", str(out / "undisturbed"), "--class", "3", "--per-class", str(count)]
        run([sys.executable, "-m", "fastdit.cli", *sample, "--out", str(out / f"{count}.png")])
    return 0


if __name__ == "__main__":
    sys.exit(main())
