"""Work that worker processes do ahead of the one that waits for it, by torch's own data loader.

What comes out does not depend on the processes: which item is next, and what it is worked from, is decided here.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from nas_kd.data.memory import give_back
from nas_kd.errors import DataError, NasKdError

_AHEAD = 2  # items that each process has ready
_SHARED = "/dev/shm"
_LOOK = 5  # seconds without an item, after which it is seen whether the processes live
PATIENCE = 30.0  # seconds without an item, after which it is said so
_MUCH = 0.5  # of the time may be spent on waiting, once it is as many seconds as these:
_SOON = 30.0
_logger = logging.getLogger(__name__)
_told: set[str] = set()  # sources whose slowness was said
# else the garbage collector, where it finds one in a circle, closes the queues by which its processes are told to end
_at_work: set[_Running] = set()

In = TypeVar("In")
Out = TypeVar("Out")


def work_ahead(
    work: Callable[[In], Out],
    items: Sequence[In],
    *,
    processes: int,
    source: str,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Out]:
    """What `work` makes of each item, in their order, made by so many processes, each two items ahead.

    Says so once when most of the time goes into waiting for them, and when nothing comes for half a minute; `source`
    is where the items come from, in words. Nothing of torch's global randomness is used. Raises what `work` raises if
    that is a NasKdError, and DataError when a process ends before its time.
    """
    if len(items) < 2:
        yield from map(work, items)
        return
    running = _Running(_Items(work, items), min(processes, len(items)), source)
    _at_work.add(running)
    try:
        begun, waited = clock(), 0.0
        for _ in items:
            asked = clock()
            result = running.next()
            came = clock()
            waited += came - asked
            _say_slow(source, waited, came - begun, processes)
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        _at_work.remove(running)
        running.end()


def fitting(processes: int, each: int) -> int:
    """How many of these processes find memory that can be shared for the items they have ready, of `each` so many
    bytes: a container has 64 MiB of it unless it is asked for more."""
    try:
        memory = os.statvfs(_SHARED)
    except OSError:
        return processes
    return min(processes, memory.f_bavail * memory.f_frsize // 2 // max(1, (_AHEAD + 1) * each))


def wait_for(future: Future[Out], what: str) -> Out:
    """The result of a thread; says so when it lets one wait for half a minute, and at each doubling of that."""
    waited = PATIENCE
    while True:
        try:
            return future.result(waited)
        except TimeoutError:
            if future.done():  # it is the thread's own
                raise
            _say_nothing_came(what, waited)
            waited *= 2


def _say_nothing_came(what: str, seconds: float) -> None:
    _logger.warning("nothing came from %s for %.0f seconds: its disk is slow or gone; still waiting", what, seconds)


class _Items(Dataset[Any], Generic[In, Out]):
    """What `work` makes of each item, or an error in its place: what the loader itself raises is about processes."""

    def __init__(self, work: Callable[[In], Out], items: Sequence[In]) -> None:
        self.work, self.items = work, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Out | Exception:
        try:
            return self.work(self.items[index])
        except NasKdError as error:
            return error
        except Exception:  # as a text, since not each can be sent
            return RuntimeError(f"in a process that decodes images:\n{traceback.format_exc()}")


def _loader(items: Dataset[Any], count: int) -> DataLoader[Any]:
    return DataLoader(
        items,
        batch_size=None,
        num_workers=count,
        prefetch_factor=_AHEAD,
        collate_fn=_as_it_is,
        timeout=_LOOK,
        generator=torch.Generator(),  # else starting it would draw from the global one
    )


class _Running:
    """Processes at work on items."""

    def __init__(self, items: Dataset[Any], count: int, source: str) -> None:
        self.source = source
        give_back()  # else each process has what was freed here
        before, handler = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
        with warnings.catch_warnings():  # of more processes than cores, which wait for a disk; of threads beside a fork
            warnings.simplefilter("ignore")
            self.loaded: Any = iter(_loader(items, count))
        self.processes = [child for child in multiprocessing.active_children() if child not in before]
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)  # torch's raises wherever the main thread is, in a trial's notes too

    def next(self) -> Any:
        """What was made of the next item."""
        waited, patience = 0.0, PATIENCE
        while True:
            started = time.monotonic()
            try:
                return next(self.loaded)
            except RuntimeError:
                self._check()
                elapsed = time.monotonic() - started
                if elapsed < _LOOK / 2:  # something else than time is up
                    raise
                waited += elapsed
            if waited >= patience:
                patience *= 2
                _say_nothing_came(self.source, waited)

    def end(self) -> None:
        """Ends the processes, also where an exception that somebody keeps holds on to this."""
        self.loaded.__del__()

    def _check(self) -> None:
        dead = [process for process in self.processes if not process.is_alive()]
        if dead:
            raise DataError(
                f"a process that decodes images of {self.source} ended before its time (exit code {dead[0].exitcode}): "
                "memory or /dev/shm may be short, use fewer --workers or --batch-size; the same command goes on"
            )


def _as_it_is(item: Any) -> Any:
    return item


def _say_slow(source: str, waited: float, total: float, processes: int) -> None:
    if total < _SOON or waited < _MUCH * total or source in _told:
        return
    _told.add(source)
    _logger.warning(
        "%.0f%% of the time goes into waiting for images of %s, which %d processes read and decode: more --workers, "
        "smaller files or a faster disk would help",
        100 * waited / total,
        source,
        processes,
    )
