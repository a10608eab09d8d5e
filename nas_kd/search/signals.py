"""Ctrl-C and SIGTERM while a worker runs trials: they end a training at once, and never come between two writes.

A worker `handles` them. From then on each is held back, but for where `at_once` lets it through, and there where `held`
holds it back again. What was held back becomes a KeyboardInterrupt as soon as it may; a third one, of a user who has
lost patience, comes through anywhere.
"""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C; clusters ask with the other one before they kill
_PATIENCE = 3  # signals


class _State:
    """Of the process: how often it was `asked` to stop, and whether that interrupts what it does now."""

    asked = 0
    open = False


_state = _State()


def is_asked() -> bool:
    """Whether this process was asked to stop, and has not done so yet."""
    return _state.asked > 0


@contextmanager
def handled() -> Iterator[None]:
    """Takes the signals over while the block runs. Does nothing outside of the main thread, where there are none."""
    if not _is_main():
        yield
        return
    before = {number: signal.signal(number, _come) for number in _SIGNALS}
    was, _state.asked, _state.open = (_state.asked, _state.open), 0, False
    try:
        yield
    finally:
        _state.asked, _state.open = was
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def at_once() -> Iterator[None]:
    """Signals interrupt the block at once; one that was held back before does so now."""
    with _opened(True):
        yield


@contextmanager
def held() -> Iterator[None]:
    """Holds signals back until the block is done, whatever is around it."""
    with _opened(False):
        yield


@contextmanager
def _opened(open: bool) -> Iterator[None]:
    if not _is_main():
        yield
        return
    before = _state.open
    _turn(open)
    try:
        yield
    except BaseException:
        _state.open = before  # and nothing is raised: what comes through says more, and ends the block as well
        raise
    _turn(before)


def _turn(open: bool) -> None:
    _state.open = open
    if open and _state.asked:
        raise KeyboardInterrupt


def _come(number: int, frame: FrameType | None) -> None:
    _state.asked += 1
    if _state.open or _state.asked >= _PATIENCE:
        raise KeyboardInterrupt


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def follow_parent(hear: Callable[[str], object] = str) -> None:
    """Ends this process as a cluster would when its parent is gone, however that ended: the pipe to it closes. What
    comes through that until then is heard, line by line."""
    for line in io.FileIO(0, closefd=False):  # not sys.stdin, whose lock a thread must not hold when Python ends
        hear(line.decode().strip())
    os.kill(os.getpid(), signal.SIGTERM)
