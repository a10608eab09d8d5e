"""Faults at chosen writes: a process ends, or is asked to stop, after its k-th write to a study or to the disk."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from optuna.storages import BaseStorage
from warm import warm_python

Fault = Callable[[], None]
_DIED = 71  # the exit code of a process that a fault ended
_WRITES = (
    "create_new_study set_study_user_attr set_study_system_attr create_new_trial set_trial_param "
    "set_trial_state_values set_trial_intermediate_value set_trial_user_attr set_trial_system_attr"
).split()
_READS = "get_all_trials get_trial get_study_user_attrs get_study_system_attrs get_trial_system_attrs".split()


class Died(BaseException):
    """What ends a process that is none of its own: nobody catches it."""


def die() -> None:
    """As SIGKILL would: nothing is cleaned up."""
    os._exit(_DIED)


def die_here() -> None:
    """As if this were a process of its own, which writes nothing any more."""
    raise Died


class Count:
    """Counts writes, and lets `fault` come just after those of the numbers `at` (from 1)."""

    def __init__(self, at: Container[int], fault: Fault) -> None:
        self.at, self.fault, self.writes, self.came = at, fault, 0, False

    def wrote(self) -> None:
        """One more was done."""
        self.writes += 1
        if self.writes in self.at:
            self.came = True
            self.fault()

    @property
    def is_dead(self) -> bool:
        """Whether the fault was the end of what is taken for a process."""
        return self.came and self.fault is die_here


class Turns:
    """Two processes that write and read a study by turns, until one of them ends."""

    def __init__(self, take: int, give: int) -> None:
        self.taken, self.given, self.depth = take, give, 0

    @contextmanager
    def own(self) -> Iterator[None]:
        """Waits for the turn and gives it back; the other one's end gives it for good."""
        self.depth += 1
        if self.depth == 1:  # a read may be made of others
            os.read(self.taken, 1)
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                with suppress(BrokenPipeError):
                    os.write(self.given, b"x")


def two_turns() -> tuple[Turns, Turns, list[int]]:
    """The turns of two processes, the first of which begins, and all that others have to close."""
    first, second = os.pipe(), os.pipe()
    os.write(first[1], b"x")
    return Turns(first[0], second[1]), Turns(second[0], first[1]), [*first, *second]


@contextmanager
def watched(storage: BaseStorage, count: Count, turns: Turns | None = None) -> Iterator[None]:
    """Counts what is written to a storage while the block runs."""

    def watch(name: str) -> None:
        inner = getattr(storage, name)

        def call(*arguments: Any, **more: Any) -> Any:
            if count.is_dead:
                raise Died
            with turns.own() if turns else nullcontext():
                result = inner(*arguments, **more)
                if name in _WRITES:
                    count.wrote()
                return result

        setattr(storage, name, call)

    for name in (*_WRITES, *_READS):
        watch(name)
    try:
        yield
    finally:
        for name in (*_WRITES, *_READS):
            delattr(storage, name)


def fork(run: Callable[[], None]) -> int:
    """Runs something in a child process; returns its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12+: pytest-xdist has threads that only listen
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        run()
        code = 0
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:  # whatever became of its streams: a child that went on would run the tests that are left
        with suppress(ValueError, OSError):
            sys.stderr.flush()
        os._exit(code)


def ended_well(child: int) -> bool:
    """Waits for a child process: whether it came to its end, False where a fault ended it. Anything else fails."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, _DIED), f"a process ended with {code}"
    return code == 0


def exit_code(command: Callable[[], int]) -> int:
    """Runs a command that trains in a process of its own, and not in a fork of this one, in which torch refuses to once
    another test has trained on several threads; its exit code, or the negative number of the signal that ended it."""
    script = "import sys, cloudpickle; sys.exit(cloudpickle.load(sys.stdin.buffer)())"
    return subprocess.run([warm_python(), "-c", script], input=cloudpickle.dumps(command), check=False).returncode


@contextmanager
def watched_files(count: Count, patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Counts the moments at which files and folders come into being, or are replaced, and names those that did; a fault
    comes just before."""
    names: list[str] = []

    def watch(name: str) -> None:
        inner = getattr(os, name)

        def move(source: Any, target: Any, **more: Any) -> None:
            count.wrote()  # before: what was written is not there yet
            inner(source, target, **more)
            names.append(Path(target).name)

        patched.setattr(os, name, move)

    with patch.context() as patched:
        for name in ("replace", "rename"):
            watch(name)
        yield names
