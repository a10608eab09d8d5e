"""Processes beside a study's own on this machine, and how they share out work with it.

Each is `python -m nas_kd.pipeline.helper FOLDER`, or a like module of another command, finds in FOLDER what the study
is, is told by its standard input of every stage in which there is something to share, and waits in between. Whoever
makes the file of a part in the folder of a stage first does it. What nobody finished is done by the study in the end,
so that a process that dies costs time alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
from optuna.storages import InMemoryStorage

from nas_kd.arguments.study import noted_settings
from nas_kd.files.atomic import write_text
from nas_kd.preparation.job import Job, storage_url
from nas_kd.progress import Advance
from nas_kd.search.workers import is_gone, worker_name
from nas_kd.training.ranks import current
from nas_kd.workers.pool import LocalWorker, local_workers, stop_all

HELPER = "nas_kd.pipeline.helper"
STUDY, PLAN = "study.json", "plan.json"  # of the folder, and of a stage in it
SETTINGS = "settings"  # of the job, in the first
_PREFIX, _OWNER = "sharing-", "owner.txt"
_MOST = 8  # processes unless --jobs asks for more
_EACH, _EACH_ON_GPU = 2 << 30, 4 << 30  # bytes that a process takes, and of a GPU's memory
_BESIDE = 4  # processes that share a GPU
_BUSY = 3e9  # MACs forward of a batch: steps of that keep a GPU busy by themselves
_POLL = 0.2
_END = 5.0  # seconds for a helper to end
_logger = logging.getLogger(__name__)
Part = TypeVar("Part")


def processes(job: Job, most: int, *, light: bool = False) -> int:
    """How many processes share work of a study, of so many parts: one where there is no study to share."""
    return 1 if isinstance(job.storage, InMemoryStorage) else places(job, most, light=light)


def places(job: Job, most: int, *, light: bool = False) -> int:
    """How many processes find a place on this machine, for work of so many parts; `light` work keeps no GPU busy,
    whatever the base."""
    if current().size > 1:  # torchrun's processes share each training
        return 1
    on_device = min(_MOST, torch.get_num_threads()) if job.device.type == "cpu" else _on_gpus(job, light)
    found = job.settings.sharing.jobs if job.settings.sharing.jobs > 1 else on_device
    return max(1, min(found, most, 1 + _fitting()))


def _on_gpus(job: Job, light: bool) -> int:
    """One for each GPU; several where a GPU would wait for Python, and for cuDNN, which takes seconds to choose the
    kernels of a new student (docs/results/gpu.md)."""
    gpus = torch.cuda.device_count() if job.settings.training.device in (None, "cuda") else 1
    if not light and job.space.base_cost().macs * job.settings.training.batch_size > _BUSY:
        return gpus
    fitting = torch.cuda.mem_get_info(job.device)[0] // _EACH_ON_GPU
    return min(_MOST, gpus * max(1, min(_BESIDE, torch.get_num_threads() // (2 * gpus), fitting)))


def _fitting() -> int:
    """How many more processes find memory, where the system says how much there is."""
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:
        return _MOST
    return (int(available[1]) << 10) // _EACH if available else _MOST


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """Of a part that is done: what it took, and what there is to know of it (a JSON value)."""

    seconds: float = 0.0
    note: Any = None


@dataclasses.dataclass(kw_only=True, eq=False)
class Claims:
    """A `folder` in which each part of some work has a file of who does it and how far it is; `others` are the
    processes beside this one."""

    folder: Path
    others: Sequence[LocalWorker] = ()
    heard: dict[str, int] = dataclasses.field(default_factory=dict)
    own: set[str] = dataclasses.field(default_factory=set)
    ended: set[int] = dataclasses.field(default_factory=set)

    def work(self, parts: Sequence[Part], do: Callable[[Part, Advance], Any], advance: Advance) -> list[Part]:
        """Does what nobody else does, one part after the other; returns what others have taken. What `do` returns, a
        JSON value, is noted."""
        return [
            part for number, part in enumerate(parts) if not self.take(number, functools.partial(do, part), advance)
        ]

    def take(self, number: int, do: Callable[[Advance], Any], advance: Advance) -> bool:
        """Does a part, unless somebody took it before; returns whether it did."""
        path, started = self.folder / f"{number}.txt", time.monotonic()
        try:
            file = path.open("x", encoding="utf-8")
        except FileExistsError:
            return False
        self.own.add(path.name)
        with file:
            note = do(functools.partial(self._tell, file, advance))
        text = json.dumps([time.monotonic() - started, note])
        write_text(self._made_file(number), text)
        return True

    def made(self, number: int) -> Made | None:
        """A part, as soon as it is done; an empty one where those who may have taken it have all ended."""
        self.listen(pass_over)
        path = self._made_file(number)
        if path.exists():
            return Made(*json.loads(path.read_text(encoding="utf-8")))
        return Made() if all(other.code() is not None for other in self.others) else None

    def _made_file(self, number: int) -> Path:
        return self.folder / f"{number}.made"

    def _tell(self, file: TextIO, advance: Advance, words: str, steps: float = 1, /) -> None:
        file.write(f"{steps!r} {words}\n")
        file.flush()
        advance(words, steps)
        self.listen(advance)

    def listen(self, advance: Advance) -> None:
        """Tells of what others did since the last time, and of those that have ended, which should go on."""
        for other in self.others:
            if other.code() is not None and other.pid not in self.ended:
                self.ended.add(other.pid)
                _logger.warning("a process beside this one ended (%s): what it had taken is done here", other.words())
        for path in self.folder.glob("*.txt"):
            if path.name in self.own:
                continue
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]
            for line in lines[self.heard.get(path.name, 0) :]:
                steps, _, words = line.partition(" ")
                advance(words, float(steps))
            self.heard[path.name] = len(lines)

    def wait(self, advance: Advance) -> None:
        """Waits until the others have done what they took, or have ended."""
        while any(other.code() is None and not done_file(self.folder, other.pid).exists() for other in self.others):
            time.sleep(_POLL)
            self.listen(advance)
        self.listen(advance)


def pass_over(words: str, steps: float = 1, /) -> None:
    """Tells nobody how far a part is: a helper writes it down alone, the study says it."""


def done_file(folder: Path, process: int) -> Path:
    """The file by which a process says that it has done all it can of a stage."""
    return folder / f"{process}.done"


@dataclasses.dataclass(kw_only=True, eq=False)
class Helpers:
    """The processes beside a study's own, `others`, which begin when they are first wanted: each runs `module`, and
    finds the job's settings, and `more` if there is (JSON values), in the folder."""

    job: Job
    folder: Path
    module: str = HELPER
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    others: list[LocalWorker] = dataclasses.field(default_factory=list)

    def start(self, count: int) -> None:
        """Starts what `count` processes lack, this one included, and those that have ended."""
        settings = noted_settings(self.job.settings)
        settings |= {"storage": None, "out": str(self.job.out), "new_study": False}
        (self.folder / STUDY).write_text(json.dumps({SETTINGS: settings, **self.more}), encoding="utf-8")
        url, first = storage_url(self.job.settings.sharing, self.job.out), 1 + len(self.others)
        command, device = [str(self.folder)], self.job.settings.training.device
        self.others += local_workers(command, url, device, count, first=first, module=self.module)
        for other in tuple(self.others):
            try:
                if not other.pid or other.code() is not None:
                    other.start()
            except OSError as error:  # no memory for it, or too many processes
                other.wait(0)
                self.others.remove(other)
                _logger.warning("there is no process beside this one: %s", error.strerror or error)

    def stop(self) -> None:
        """Ends them all; they have nothing to put back."""
        stop_all(self.others, _END)
        self.others.clear()

    def share(self, stage: str, plan: Mapping[str, Any], count: int) -> Claims:
        """Tells the helpers what there is to share; each takes as many threads as this process."""
        self.start(count)
        folder = self.folder / stage
        folder.mkdir(exist_ok=True)
        (folder / PLAN).write_text(json.dumps({**plan, "threads": torch.get_num_threads()}), encoding="utf-8")
        for other in self.others:
            other.tell(stage)
        return Claims(folder=folder, others=self.others)


@contextlib.contextmanager
def helping(job: Job, module: str = HELPER, more: Mapping[str, Any] | None = None) -> Iterator[Helpers]:
    """The processes beside a study's own (see `Helpers`), which end with the block."""
    job.cache.mkdir(parents=True, exist_ok=True)
    _clear(job.cache)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=job.cache) as folder:
        (Path(folder) / _OWNER).write_text(worker_name(), encoding="utf-8")
        helpers = Helpers(job=job, folder=Path(folder), module=module, more=more or {})
        try:
            yield helpers
        finally:
            helpers.stop()


def _clear(cache: Path) -> None:
    """Removes what studies left here that were killed."""
    for owner in cache.glob(f"{_PREFIX}*/{_OWNER}"):
        if is_gone(owner.read_text(encoding="utf-8")):
            shutil.rmtree(owner.parent, ignore_errors=True)
