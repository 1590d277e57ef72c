"""Helpers of tests that run fastdit's commands, in this process or in others."""

import itertools
import json
import os
import socket
from pathlib import Path

from fastdit import cli
from fastdit.config import parse

# A run in this process sets them; a command in another process must not take itself for one of its ranks.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# Overrides of a run that takes a second.
TINY = [
    "model.preset=test/4", "train.precision=bf16", "train.batch_size=4", "train.warmup_steps=1", "train.lr=1e-3",
    "train.log_steps=2", "train.save_steps=2", "train.sample_steps=4", "train.schedule=cosine",
    "sample.steps=2", "sample.solver=euler",
]  # fmt: skip

# Below the range from which the system gives ports to outgoing connections (32768 and up on Linux), and 500 per pytest worker: a
# port that is free now is still free when the launcher's ranks listen on it seconds later.
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_ports = itertools.cycle(range(20_000 + 500 * _worker, 20_500 + 500 * _worker))


def free_port() -> str:
    """Return a free TCP port for a launcher's --master_port."""
    for port in itertools.islice(_ports, 500):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a port in TIME_WAIT is free
            try:
                s.bind(("", port))
            except OSError:
                continue
            return str(port)
    raise RuntimeError("no free port")


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a command in another process, on a CPU and with one thread. more: further variables."""
    inherited = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    return inherited | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} | more


def complains(capsys, words, *expected) -> None:
    """Assert that a command ends with exit code 2 after one sentence that holds the expected texts."""
    assert cli.main([str(word) for word in words]) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("fastdit: ") and all(text in sentence for text in expected), sentence


def settings(out: Path, *overrides: str) -> list[str]:
    """Return the overrides of a tiny run in <out>/r."""
    return [*TINY, f"train.out={out}", "train.name=r", *overrides]


def trained_run(out: Path, *overrides: str) -> Path:
    """Train a tiny run of four steps that keeps its last checkpoint. Returns its folder."""
    from fastdit.training.loop import train

    return train(parse(None, settings(out, "train.total_steps=4", "train.keep_checkpoints=1", *overrides)))


def lines_of(run: Path) -> dict[int, dict]:
    """Return the last line of each step in a run's metrics.jsonl, without the settings that a resumed run changed."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "changed" not in line}


def snapshot(folder: Path) -> dict[str, int]:
    """Return the modification time of every file below a folder."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
