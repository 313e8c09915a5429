"""Several processes on one machine (gloo, CPU), as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Sequence


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(command: Callable[[int], Sequence[str]], processes: int, **environment: str) -> list[int]:
    """Run `command(rank)` for every rank at once; their exit statuses."""
    port, started = str(free_port()), []
    for rank in range(processes):
        told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
        started.append(subprocess.Popen(command(rank), env={**os.environ, **told, **environment}))
    return [process.wait(timeout=300) for process in started]
