"""Processes as torchrun starts them, for tests that kill one of them."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence


def start_ranks(command: Sequence[str], count: int = 2) -> list[subprocess.Popen[str]]:
    """Starts a command so many times, as the ranks of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def end_of(process: subprocess.Popen[str]) -> tuple[str, int]:
    """What a process said on standard error, and its exit code."""
    return process.communicate()[1], process.returncode
