"""A Python that has imported torch, timm, Optuna and nas_kd before it is asked to run anything.

Importing takes five to eight CPU-seconds, more than most commands of these tests take. `warm_python()` is the path of
an executable that takes what `python` takes (`-m MODULE …`, `-c PROGRAM …`, `FILE …`), and hands it over to a server,
which has imported everything and computed nothing, and forks. What runs is a process of its own, with the number,
streams, environment, signals and end of one. The executable stands for it: passes signals on, and ends as it ended;
where it is killed itself, what it stands for dies a moment later. One true end-to-end test of each command begins with
a cold Python instead.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import pkgutil
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

_ADDRESS = "NAS_KD_WARM_PYTHON"
_AT_IMPORT = ("HF_", "OMP_", "MKL_", "MALLOC_", "PYTHON", "CUDA")  # what is read when modules are imported
_PASSED = (signal.SIGTERM, signal.SIGINT)
_OTHERS = "psycopg optuna.storages sqlalchemy.dialects.sqlite sqlalchemy.dialects.postgresql cloudpickle"


@functools.cache
def warm_python() -> str:
    """The path of the executable; its server ends with this process. Where a system has no pidfds: a cold Python."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return sys.executable
    folder = tempfile.mkdtemp(prefix="warm-")
    executable, address = Path(folder) / "python", f"{folder}/socket"
    cold = shlex.join([sys.executable, "-ES", __file__])
    executable.write_text(f'#!/bin/sh\n{_ADDRESS}={shlex.quote(address)} exec {cold} "$@"\n')
    executable.chmod(0o700)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(listener.fileno()), str(executable)],
        stdin=subprocess.PIPE,  # whose end is the server's
        pass_fds=[listener.fileno()],
        start_new_session=True,
    )
    listener.close()
    atexit.register(_end, server, folder)
    return str(executable)


def _end(server: subprocess.Popen[bytes], folder: str) -> None:
    server.communicate()
    for path in Path(folder).iterdir():
        path.unlink()
    Path(folder).rmdir()


def _relevant(environment: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key.startswith(_AT_IMPORT)}


# the executable: standard library alone, so that it is there in some 20 milliseconds


def ask(arguments: list[str]) -> None:
    """Has the server run a command, passes signals on to it and ends as it ends."""
    environment = dict(os.environ)
    address = environment.pop(_ADDRESS)
    arguments = arguments[1:] if arguments[0] == "-u" else arguments
    cold = functools.partial(os.execve, sys.executable, [sys.executable, *arguments], environment)
    if arguments[0].startswith("-") and arguments[0] not in ("-m", "-c"):
        cold()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        request = {"arguments": arguments, "environment": environment, "folder": os.getcwd()}
        socket.send_fds(server, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
        answers = server.makefile()
        child = int(answers.readline())
        if child < 0:  # other settings than it was started with
            cold()
        for number in _PASSED:
            signal.signal(number, lambda number, _: os.kill(child, number))
        code = int(answers.readline() or 1)
    if code < 0:
        with suppress(OSError):  # SIGKILL is always that
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


# the server


def serve(listener: socket.socket, executable: str) -> list[str]:
    """Forks for each request; returns, in the child, with the arguments of what is to be run."""
    given = dict(os.environ)
    _import_all()
    made = {key: value for key, value in os.environ.items() if given.get(key) != value}  # by what was imported
    with selectors.DefaultSelector() as events:
        events.register(listener, selectors.EVENT_READ)
        events.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in events.select():
                if key.fileobj == 0:
                    os._exit(0)
                elif key.fileobj is listener:
                    client = listener.accept()[0]
                    arguments = _begin(client, events, _relevant(given))
                    if arguments is not None:
                        listener.close()
                        os.environ.update(made)
                        sys.executable = executable  # of the processes that it starts in its turn
                        return arguments
                elif key.fileobj in events.get_map():
                    _ended(events, *key.data)


def _import_all() -> None:
    import nas_kd

    for module in pkgutil.walk_packages(nas_kd.__path__, "nas_kd."):
        if not module.name.endswith("__main__"):
            with suppress(ImportError):  # an extra that is not installed
                import_module(module.name)
    for name in _OTHERS.split():
        with suppress(ImportError):
            import_module(name)
    # a fork has the locks of threads, and not the threads: ONNX Runtime, imported, has one
    assert len(os.listdir("/proc/self/task")) == 1
    gc.collect()
    gc.freeze()


def _begin(client: socket.socket, events: selectors.BaseSelector, mine: dict[str, str]) -> list[str] | None:
    text, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
    while not text.endswith(b"\n"):
        text += client.recv(1 << 20)
    request = json.loads(text)
    child = os.fork() if _relevant(request["environment"]) == mine else -1
    if child == 0:
        for _, process, other in [key.data for key in events.get_map().values() if key.data]:
            with suppress(OSError):  # each is there twice
                os.close(process)
            other.close()
        events.close()
        client.close()
        _become(request, streams)
        return list(request["arguments"])
    for stream in streams:
        os.close(stream)
    client.sendall(f"{child}\n".encode())
    if child < 0:
        client.close()
        return None
    process = os.pidfd_open(child)
    for source in (process, client):  # the end of either
        events.register(source, selectors.EVENT_READ, (child, process, client))
    return None


def _ended(events: selectors.BaseSelector, child: int, process: int, client: socket.socket) -> None:
    """Where the executable was killed, what it stands for is killed too."""
    with suppress(ProcessLookupError):
        done, status = os.waitpid(child, os.WNOHANG)
        if not done:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
    with suppress(BrokenPipeError):
        client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    for source in (process, client):
        events.unregister(source)
    os.close(process)
    client.close()


def _become(request: dict[str, Any], streams: list[int]) -> None:
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run(arguments: list[str]) -> None:
    """What `python` does with such arguments."""
    flag, *rest = arguments
    if flag == "-m":
        module, *rest = rest
        sys.argv = [module, *rest]
        sys.path.insert(0, os.getcwd())
        sys.modules.pop(module, None)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif flag == "-c":
        program, *rest = rest
        sys.argv = ["-c", *rest]
        sys.path.insert(0, "")
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), vars(main))
    else:
        sys.argv = [flag, *rest]
        runpy.run_path(flag, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1:2] != ["--serve"]:
        ask(sys.argv[1:])
    sys.path.pop(0)
    run(serve(socket.socket(fileno=int(sys.argv[2])), sys.argv[3]))
