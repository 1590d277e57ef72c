"""launch/train.sh: the GPUs, hosts, ports and files that it hands to DeepSpeed's launcher, here a stub that writes them down."""

import socket
import subprocess
from pathlib import Path

import pytest

from commands import environment, free_port

TRAIN = Path(__file__).parent.parent / "launch" / "train.sh"


@pytest.fixture
def train(tmp_path):
    """Run train.sh in an empty folder of a node with some GPUs; returns exit code, stderr and the launcher's arguments."""
    (tmp_path / "bin").mkdir()
    for name, body in (("python", "echo $GPUS_HERE"), ("deepspeed", f'echo "$@" >> {tmp_path}/calls')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "empty").mkdir()

    def run(gpus, *words, **variables):
        variables = {"MASTER_PORT": free_port(), "VENV": str(tmp_path), "GPUS_HERE": str(gpus), **variables}
        done = subprocess.run(
            ["bash", TRAIN, *map(str, words)], cwd=tmp_path / "empty", env=environment(**variables), capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        calls = tmp_path / "calls"
        return done.returncode, done.stderr, calls.read_text() if calls.exists() else ""

    return run


@pytest.mark.parametrize(
    ("gpus", "variables", "wanted"),
    [
        (0, {}, "--num_gpus 1"),
        (8, {}, "--num_gpus 8"),
        (8, {"GPUS": "2"}, "--num_gpus 2"),
        (4, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, "--include localhost:4,5,6,7"),
        (4, {"CUDA_VISIBLE_DEVICES": "4,5,6,7", "GPUS": "2"}, "--include localhost:4,5"),
    ],
)
def test_gpus(train, gpus, variables, wanted):
    code, said, call = train(gpus, "mine.yaml", **variables)
    assert code == 0, said
    assert wanted in call and call.endswith("--module fastdit.cli train mine.yaml\n")


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}, "CUDA_VISIBLE_DEVICES=GPU-8932f937 must be numbers"),
        ({"CUDA_VISIBLE_DEVICES": "4,5", "GPUS": "3"}, "GPUS=3 is more than the GPUs of CUDA_VISIBLE_DEVICES=4,5"),
        ({"HOSTFILE": "typo"}, "HOSTFILE=typo is not there"),
    ],
)
def test_what_would_train_elsewhere_is_refused(train, variables, sentence):
    code, said, call = train(2, "mine.yaml", **variables)
    assert code == 2 and sentence in said and len(said.splitlines()) == 1 and not call


def test_a_port_in_use_is_refused(train):
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen(1)
        port = str(holder.getsockname()[1])
        code, said, call = train(0, "mine.yaml", MASTER_PORT=port)
    assert (
        code == 2 and said == f"train.sh: MASTER_PORT={port} is in use on this node: set MASTER_PORT to another port\n" and not call
    )
