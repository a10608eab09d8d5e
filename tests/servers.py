"""Real servers for tests and studies: PostgreSQL, and Optuna's gRPC proxy in front of a database."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from warm import warm_python

_POSTGRES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql*/bin")


def postgres_folder() -> Path | None:
    """Where the programs of PostgreSQL are; None when it is not installed."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    folders = [path for pattern in _POSTGRES for path in sorted(Path("/").glob(pattern[1:]))]
    return next((folder for folder in reversed(folders) if (folder / "initdb").exists()), None)


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Postgres:
    """A PostgreSQL server of our own, its data in `folder`."""

    folder: Path
    port: int

    @property
    def url(self) -> str:
        """The storage URL of its database."""
        return f"postgresql+psycopg://nas@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        options = f"-p {self.port} -k {self.folder} -h 127.0.0.1 -c fsync=off -c max_connections=60"
        log = str(self.folder / "log")
        _as_somebody([_program("pg_ctl"), "-D", str(self.folder / "data"), "-o", options, "-l", log, "-w", "start"])

    def stop(self) -> None:
        """Stops the server at once, as a crash would."""
        _as_somebody([_program("pg_ctl"), "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop"])

    def sql(self, statement: str, user: str = "nas") -> str:
        """What psql answers."""
        command = [_program("psql"), "-h", "127.0.0.1", "-p", str(self.port), "-U", user, "-d", "postgres"]
        done = subprocess.run([*command, "-tAc", statement], check=True, capture_output=True, text=True)
        return done.stdout.strip()


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A fresh server while the block runs. PostgreSQL refuses to run as root: there it runs as its own user."""
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # not pytest's folder, which no other user may enter
    if os.getuid() == 0:
        shutil.chown(folder, "postgres")
    server = Postgres(folder, free_port())
    _as_somebody([_program("initdb"), "-D", str(folder / "data"), "-U", "nas", "-A", "trust", "--no-sync"])
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


def _program(name: str) -> str:
    folder = postgres_folder()
    assert folder is not None
    return str(folder / name)


def _as_somebody(command: list[str]) -> None:
    if os.getuid() == 0:
        command = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", *command]
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd="/")
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")


@contextmanager
def grpc_proxy(url: str) -> Iterator[str]:
    """The address of a gRPC proxy in front of a database, in a process of its own, while the block runs."""
    port = free_port()
    program = (
        "import sys, optuna; from optuna.storages import RDBStorage, run_grpc_proxy_server as run\n"
        "run(RDBStorage(sys.argv[1]), host='127.0.0.1', port=int(sys.argv[2]))"
    )
    process = subprocess.Popen(
        [warm_python(), "-c", program, url, str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, process)
        yield f"grpc://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes], patience: float = 600) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError("the gRPC proxy does not answer")
