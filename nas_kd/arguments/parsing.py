"""How arguments are read: errors of one line, numbers, paths and names as people write them, and how a command ends."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nas_kd.arguments.torchrun import end
from nas_kd.data.memory import keep_some
from nas_kd.errors import NasKdError

LOCAL = "local-dir:"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are NasKdErrors, so that a wrong argument is one line and exit code 2. Arguments are not
    abbreviated: one that joins later would make that ambiguous."""

    def __init__(self, prog: str, *, description: str, epilog: str | None = None) -> None:
        plain = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, epilog=epilog, formatter_class=plain, allow_abbrev=False)

    def take_defaults(self, values: Mapping[str, Any]) -> None:
        """What arguments are where they are not given, by their names; values of what is no argument are left out."""
        known = {action.dest for action in self._actions}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        self.set_defaults(**{name: value for name, value in plain.items() if name in known})

    def error(self, message: str) -> None:  # type: ignore[override]
        raise NasKdError(f"{message}; see {self.prog} --help")


def number(least: float, kind: type[int] | type[float] = int, below: float | None = None) -> Callable[[str], float]:
    """The type of an argument that is a number, from `least` and below `below`."""

    def read(text: str) -> float:
        try:
            value = _number(text, kind)
        except ValueError:
            whole = " whole" if kind is int and _is_float(text) else ""
            raise argparse.ArgumentTypeError(f"{text!r} is no{whole} number") from None
        if not value >= least or (below is not None and not value < below):
            top = f" and below {below:g}" if below is not None else ""
            raise argparse.ArgumentTypeError(f"must be at least {least:g}{top}, got {text}")
        return value

    return read


def _number(text: str, kind: type[int] | type[float]) -> float:
    """A number as people write it: 10000, 10_000 or 1e4. Raises ValueError."""
    try:
        return kind(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():
            raise
        return int(value)


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def size(text: str) -> int:
    """The type of an amount of memory: bytes, or with K, M, G or T 1,024 times as much for each step.

    >>> size("4G"), size("1.5m"), size("512")
    (4294967296, 1572864, 512)
    """
    plain = text.strip().upper().removesuffix("B").removesuffix("I")
    power = "KMGT".find(plain[-1:]) + 1 if plain else 0
    try:
        amount = float(plain[:-1] if power else plain)
    except ValueError:
        amount = -1.0
    if not 0 <= amount < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory: write it like 4G or 500M")
    return int(amount * 1024.0**power)


def path(text: str) -> str:
    """The type of a path: ~ is the user's home wherever it stands, which no shell says of `--out=~/results`."""
    return text if "://" in text else str(Path(text).expanduser()) if text.startswith("~") else text


def model_name(text: str) -> str:
    """The type of a model: as `timm.create_model` has it, also with the hub's `timm/` before it; a folder that holds an
    exported model is one by timm's name for it."""
    folder = path(text.removeprefix(LOCAL))
    if text.startswith(LOCAL) or (":" not in text and Path(folder, "config.json").is_file()):
        return f"{LOCAL}{folder}"
    return text.removeprefix("timm/")


def storage(text: str) -> str:
    """The type of a storage: a URL, or a bare file, which is SQLite's."""
    if "://" in text or not text:
        return text
    if "/" not in text and not Path(text).suffix:
        raise argparse.ArgumentTypeError(
            f"cannot open the storage {text}: write {text}.db for a file of SQLite, or a URL like postgresql+psycopg://…"
        )
    if any(character in text for character in "%?#{}"):
        raise argparse.ArgumentTypeError(f"cannot keep a study in {text!r}: choose a file without ?, %, #, {{ and }}")
    return f"sqlite:///{path(text)}"


def command_line(command: str, arguments: Sequence[str]) -> str:
    """A command as it can be pasted into a shell."""
    return f"{command} {shlex.join(arguments)}".rstrip()


def guarded(command: Callable[[Sequence[str]], int], argv: Sequence[str] | None) -> int:
    """Runs a command and returns its exit code; a mistake of the user's becomes one line and 2, Ctrl-C 130."""
    arguments = sys.argv[1:] if argv is None else argv
    keep_some()
    try:
        return command(arguments)
    except NasKdError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        sys.stderr.write(f"nas_kd: {error}\n")
        return end(2)
    except KeyboardInterrupt:
        sys.stderr.write("nas_kd: stopped; what is finished is kept, the same command goes on from there\n")
        return end(130)
