"""What tests share that start fastdit in processes of its own."""

import itertools
import os
import socket

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
