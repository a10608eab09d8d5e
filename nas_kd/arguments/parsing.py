"""How arguments are read: errors of one line, numbers within their range, and how a command ends."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence

from nas_kd.errors import NasKdError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are NasKdErrors, so that a wrong argument is one line and exit code 2."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise NasKdError(f"{message}; see {self.prog} --help")


def number(least: float, kind: type[int] | type[float] = int, below: float | None = None) -> Callable[[str], float]:
    """The type of an argument that is a number, from `least` and below `below`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not value >= least or (below is not None and not value < below):
            top = f" and below {below:g}" if below is not None else ""
            raise argparse.ArgumentTypeError(f"must be at least {least:g}{top}, got {text}")
        return value

    return read


def guarded(command: Callable[[Sequence[str]], int], argv: Sequence[str] | None) -> int:
    """Runs a command and returns its exit code; a mistake of the user's becomes one line and 2, Ctrl-C 130."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        return command(arguments)
    except NasKdError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        sys.stderr.write(f"nas_kd: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("nas_kd: stopped; what is finished is kept, the same command goes on from there\n")
        return 130
