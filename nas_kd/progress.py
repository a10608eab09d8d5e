"""What a person sees while a study runs: a bar per stage on a terminal, plain lines in a file."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TextIO

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from nas_kd.data.memory import give_back

_PIPE_WIDTH = 400  # columns: nothing is cut where no terminal sets a width
_ROUNDING = 1e-6  # of a step
_QUIET_SECONDS = 5.0  # between two plain lines of one stage

_WORKERS_SECONDS = 30.0  # between two plain lines of one worker


class Advance(Protocol):
    """Called after some work of a stage, with a few words on it and how many of its steps it was."""

    def __call__(self, words: str, steps: float = 1, /) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLine:
    """What a worker is at: `done` of `total` epochs of a trial, and words on it."""

    done: int
    total: int
    words: str


class Board(Protocol):
    """A stage with workers: the steps that are done, and what each worker is at."""

    @property
    def advance(self) -> Advance:
        """Called after each step, with a few words on it."""

    def show(self, workers: Mapping[str, WorkerLine]) -> None:
        """The workers by their names, as they are now."""


class Stages:
    """Shows the stages of a run and keeps how long each took. `seconds` maps a finished stage to its duration."""

    def __init__(self, console: Console, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.quiet, self.clock = console, quiet, clock
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: float = 1) -> Iterator[Advance]:
        """One stage of `total` steps; the block calls what it gets after each step, with a few words on it."""
        give_back()
        started = self.clock()
        show = self._bar if self.console.is_terminal and not self.quiet else self._lines
        with show(name, total) as advance:
            yield advance
        self.seconds[name] = self.seconds.get(name, 0.0) + self.clock() - started

    @contextmanager
    def board(self, name: str, total: int) -> Iterator[Board]:
        """A stage on which several workers are: a `Board` to tell who does what, beside the steps."""
        give_back()
        started = self.clock()
        if self.console.is_terminal and not self.quiet:
            with self._progress() as progress:
                task = progress.add_task(name, total=total, words="")
                yield _BarBoard(progress, task)
                progress.update(task, completed=total)
        else:
            with self._lines(name, total) as advance:
                yield _LineBoard(advance, self._print, self.clock)
        self.seconds[name] = self.seconds.get(name, 0.0) + self.clock() - started

    @contextmanager
    def _bar(self, name: str, total: float) -> Iterator[Advance]:
        with self._progress() as progress:
            task = progress.add_task(name, total=total, words="")

            def advance(words: str, steps: float = 1, /) -> None:
                progress.update(task, advance=steps, words=words)

            yield advance
            progress.update(task, completed=total)

    def _progress(self) -> Progress:
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[words]}"),
        )
        return Progress(*columns, console=self.console)

    @contextmanager
    def _lines(self, name: str, total: float) -> Iterator[Advance]:
        started = last = self.clock()
        done = 0.0
        self._print(f"{name}: {total:.0f} step{'s' if total > 1 else ''}")

        def advance(words: str, steps: float = 1, /) -> None:
            nonlocal done, last
            done += steps
            now = self.clock()
            if done > 0 and (now - last >= _QUIET_SECONDS or done >= total - _ROUNDING):
                left = (now - started) / done * max(0, total - done)
                self._print(f"{name}: {done:.0f}/{total:.0f}, {words + ', ' if words else ''}about {left:.0f} s left")
                last = now

        yield advance
        self._print(f"{name}: done in {self.clock() - started:.0f} s")

    def say(self, line: str) -> None:
        """One line between the stages."""
        self._print(line)

    def _print(self, line: str) -> None:
        if not self.quiet:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class _BarBoard:
    """A bar for the stage and a live line for each worker."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task
        self.lines: dict[str, TaskID] = {}

    def advance(self, words: str, steps: float = 1, /) -> None:
        self.progress.update(self.task, advance=steps, words=words)

    def show(self, workers: Mapping[str, WorkerLine]) -> None:
        for name in self.lines.keys() - workers.keys():
            self.progress.remove_task(self.lines.pop(name))
        for name, line in workers.items():
            if name not in self.lines:
                self.lines[name] = self.progress.add_task(name, total=line.total, words="")
            self.progress.update(self.lines[name], completed=line.done, total=line.total, words=line.words)


class _LineBoard:
    """Plain lines: one for each worker now and then."""

    def __init__(self, advance: Advance, write: Callable[[str], None], clock: Callable[[], float]) -> None:
        self.advance, self.write, self.clock = advance, write, clock
        self.last = clock()

    def show(self, workers: Mapping[str, WorkerLine]) -> None:
        if self.clock() - self.last >= _WORKERS_SECONDS:
            self.last = self.clock()
            for name, line in workers.items():
                self.write(f"  {name}: {line.words}, {line.done}/{line.total}")


def configure_logging(console: Console, *, quiet: bool, debug: bool) -> None:
    """Sends the package's log lines to the console; only the command line calls this."""
    level = logging.DEBUG if debug else logging.ERROR if quiet else logging.WARNING
    handler = RichHandler(console=console, show_path=False, show_time=False, markup=False, highlighter=None)
    logger = logging.getLogger("nas_kd")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def configure(console: Console, *, quiet: bool, debug: bool) -> None:
    """Makes the process a command's own, before torch is imported: log lines go to the console, libraries are quiet."""
    # threads that spin while they wait make training many times slower beside any other work on the same cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    import optuna

    configure_logging(console, quiet=quiet, debug=debug)
    optuna.logging.set_verbosity(optuna.logging.DEBUG if debug else optuna.logging.ERROR)
    for library in ("timm", "huggingface_hub"):  # what they warn of comes back as an error
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def console_for(stream: TextIO) -> Console:
    """A console on a stream; into a pipe or file it writes plain lines, as long as they are."""
    return Console(file=stream) if stream.isatty() else Console(file=stream, width=_PIPE_WIDTH)
