"""What tests share that run fastdit's commands, in this process or in others."""

import itertools
import os
import socket

from fastdit import cli

# A run that began in this process sets them; a command in a process of its own must not take itself for one of its ranks.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# Below the range from which the system gives ports to outgoing connections (32768 and up on Linux), and 500 per pytest worker: a
# port that is free now is still free when the launcher's ranks listen on it seconds later.
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_ports = itertools.cycle(range(20_000 + 500 * _worker, 20_500 + 500 * _worker))


def free_port() -> str:
    """A TCP port of this machine for a launcher's --master_port."""
    for port in itertools.islice(_ports, 500):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will: a port in TIME_WAIT is free
            try:
                s.bind(("", port))
            except OSError:
                continue
            return str(port)
    raise RuntimeError("no free port")


def environment(**more: str) -> dict[str, str]:
    """The environment of a command of its own on a CPU, with one thread; more: further variables."""
    own = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    return own | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} | more


def complains(capsys, words, *expected) -> None:
    """Assert that a command ends with exit code 2 after one sentence that holds the expected texts."""
    assert cli.main([str(word) for word in words]) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("fastdit: ") and all(text in sentence for text in expected), sentence
