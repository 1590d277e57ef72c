"""Ranks that are forked from a process which has imported torch, DeepSpeed and fastdit: the imports are three quarters of the CPU
time of a short run. What the ranks then run is a command like any other.

As a script, this is that process. It reads one request per line and answers with the exit code. Tests of the launchers themselves
start torchrun and deepspeed.
"""

import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# deepspeed.initialize imports the last three, and with the first of them TorchInductor
PRELOADED = (
    "fastdit.training.loop", "fastdit.training.validation", "matplotlib.backends.backend_agg", "torch.profiler",
    "deepspeed.runtime.zero.muon.original_muon", "deepspeed.runtime.zero.stage3", "setuptools",
)  # fmt: skip


def run(ranks: int, words: list, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess:
    """Run a command on several ranks to its end, with the variables that the deepspeed launcher sets.

    words: "-m" and a module, or a script, and their arguments. variables: further ones of the environment. The exit code is that of
    the first rank that fails; the others are then told to stop, and killed 30 s later, as by torchrun.
    """
    from commands import free_port  # not in the process that forks

    server = _server()
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    with tempfile.TemporaryDirectory() as folder:
        texts = [Path(folder, name) for name in ("stdout", "stderr")]
        request = {"ranks": ranks, "words": words, "timeout": timeout, "variables": variables, "texts": texts}
        server.stdin.write(json.dumps(request, default=str) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"the process that forks ended with exit code {server.wait()}"
        return subprocess.CompletedProcess(words, int(answer), *(path.read_text() for path in texts))


@functools.cache
def _server() -> subprocess.Popen:
    """Start the process that forks; it ends with this one, whose end of the pipe is then closed."""
    from commands import environment
    from fastdit.cli import ALLOCATOR

    command = [sys.executable, "-W", "ignore", __file__]
    variables = environment(GLIBC_TUNABLES=ALLOCATOR)  # without it a command would start itself again
    return subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _become(rank: int, request: dict) -> None:
    """Run a request as one of its ranks. Ends this process."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in enumerate(request["texts"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
    os.environ.update(request["variables"], RANK=str(rank), LOCAL_RANK=str(rank))
    module = request["words"][0] == "-m"
    sys.argv = [*map(str, request["words"][module:])]
    if module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()


def _wait(ranks: list[int], timeout: float) -> int:
    """Wait for processes until all have ended. Returns the first exit code that is not 0, if there is one."""
    first, end = 0, time.monotonic() + timeout
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            ranks.remove(pid)
            code = os.waitstatus_to_exitcode(status)
            if code and not first:
                first, end = code, time.monotonic() + 30
                for other in ranks:
                    os.kill(other, signal.SIGTERM)
        elif time.monotonic() > end:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
        else:
            time.sleep(0.01)
    return first


def _serve() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        request, children = json.loads(line), []
        for rank in range(request["ranks"]):
            children.append(os.fork())
            if not children[-1]:
                _become(rank, request)
        print(_wait(children, request["timeout"]), flush=True)


if __name__ == "__main__":
    _serve()
