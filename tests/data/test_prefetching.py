"""Work that processes do ahead: in order, and nothing that befalls them is silent."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nas_kd.data import prefetching
from nas_kd.data.prefetching import fitting, wait_for, work_ahead
from nas_kd.errors import DataError


def numbers(item: int) -> tuple[int, torch.Tensor, int]:
    return item, torch.full((1000,), item), os.getpid()


def test_what_comes_is_in_order_and_made_by_processes_that_end() -> None:
    before, state, handler = multiprocessing.active_children(), torch.get_rng_state(), signal.getsignal(signal.SIGCHLD)
    found = list(work_ahead(numbers, range(40, 60), processes=3, source="here"))
    assert [item for item, _, _ in found] == list(range(40, 60))
    assert all((tensor == item).all() for item, tensor, _ in found)
    assert len({pid for _, _, pid in found} - {os.getpid()}) == 3
    assert multiprocessing.active_children() == before
    assert torch.equal(state, torch.get_rng_state())  # dropout draws from it
    assert signal.getsignal(signal.SIGCHLD) == handler


def test_who_stops_listening_leaves_no_process() -> None:
    before = multiprocessing.active_children()
    ahead = work_ahead(numbers, range(100), processes=2, source="here")
    assert next(ahead)[0] == 0
    assert len(multiprocessing.active_children()) == len(before) + 2
    ahead.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == before


@pytest.fixture
def ended_by_force(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The processes that did not end by themselves within torch's five seconds."""
    ended = list[int | None]()
    monkeypatch.setattr(BaseProcess, "terminate", lambda process: ended.append(process.pid))
    return ended


def test_who_is_forgotten_in_a_circle_has_its_processes_end(ended_by_force: list[int | None]) -> None:
    before = multiprocessing.active_children()
    ahead = work_ahead(numbers, range(100), processes=2, source="here")
    assert next(ahead)[0] == 0
    circle: list[object] = [ahead]
    circle.append(circle)
    del ahead, circle
    gc.collect()
    assert multiprocessing.active_children() == before
    assert not ended_by_force


def test_an_error_that_is_kept_keeps_no_process(ended_by_force: list[int | None]) -> None:
    before = multiprocessing.active_children()
    with pytest.raises(DataError) as kept:
        list(work_ahead(broken, range(100), processes=2, source="here"))
    assert multiprocessing.active_children() == before
    circle: list[object] = [kept]
    circle.append(circle)
    del kept, circle
    gc.collect()
    assert not ended_by_force


def test_one_item_needs_no_process() -> None:
    assert [pid for _, _, pid in work_ahead(numbers, [7], processes=2, source="here")] == [os.getpid()]


def broken(item: int) -> int:
    if item == 3:
        raise DataError("the third is broken")
    return item


def test_an_error_comes_in_its_place_and_in_its_words() -> None:
    ahead = work_ahead(broken, range(6), processes=2, source="here")
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"^the third is broken$"):
        next(ahead)


def test_a_bug_comes_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)decodes images:.*in work_on_nothing.*ZeroDivisionError"):
        list(work_ahead(work_on_nothing, range(3), processes=2, source="here"))


def work_on_nothing(item: int) -> float:
    return 1 / item


def killed(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_process_that_is_killed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetching, "_LOOK", 0.2)
    with pytest.raises(DataError, match=r"a process that decodes images of there ended .*\(exit code -9\).*--workers"):
        list(work_ahead(killed, range(6), processes=2, source="there"))


class Answer(logging.Handler):
    """Gives a pipe, which somebody waits for, what is to be read from it once a warning says that this lasts."""

    def __init__(self, pipe: Path) -> None:
        super().__init__(logging.WARNING)
        self.pipe, self.said = pipe, ""

    def emit(self, record: logging.LogRecord) -> None:
        if not self.said:
            self.said = record.getMessage()
            self.pipe.write_bytes(b"at last")


def test_a_disk_that_does_not_answer_is_told_and_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetching, "_LOOK", 0.1)
    monkeypatch.setattr(prefetching, "PATIENCE", 0.3)
    files = [tmp_path / name for name in ("first", "slow", "last")]
    files[0].write_bytes(b"first")
    files[2].write_bytes(b"last")
    os.mkfifo(files[1])
    answer = Answer(files[1])
    logging.getLogger("nas_kd").addHandler(answer)
    assert [*work_ahead(Path.read_bytes, files, processes=2, source="the attic")] == [b"first", b"at last", b"last"]
    assert answer.said.startswith("nothing came from the attic for")


def test_threads_are_waited_for_in_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetching, "PATIENCE", 0.2)
    os.mkfifo(tmp_path / "slow")
    answer = Answer(tmp_path / "slow")
    logging.getLogger("nas_kd").addHandler(answer)
    with ThreadPoolExecutor(1) as pool:
        assert wait_for(pool.submit((tmp_path / "slow").read_bytes), "slow.png") == b"at last"
    assert answer.said.startswith("nothing came from slow.png for")


def ticking(step: float) -> Callable[[], float]:
    """A clock that goes so far at each look."""
    now = iter(range(1000))
    return lambda: step * next(now)


@pytest.mark.parametrize(("step", "lines"), [(1.0, 0), (20.0, 1)])
def test_that_most_of_the_time_is_waiting_is_told_once(
    step: float, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        list(work_ahead(abs, range(5), processes=1, source=f"the cellar {step}", clock=ticking(step)))
    assert caplog.text.count("of the time goes into waiting for images of the cellar") == lines


def test_as_many_work_as_find_memory_that_is_shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free = SimpleNamespace(f_bavail=64 << 10, f_frsize=1 << 10)  # of a container that asked for nothing
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    assert [fitting(8, each << 20) for each in (1, 2, 5, 20)] == [8, 5, 2, 0]
    monkeypatch.undo()
    monkeypatch.setattr(prefetching, "_SHARED", str(tmp_path / "nowhere"))
    assert fitting(8, 1 << 40) == 8
