"""Models of the results are trained side by side: by this process and others beside it, which share out a plan.

Another process is `python -m nas_kd.pipeline.sharing FOLDER`, which finds in FOLDER what the study is and what is
planned. Whoever makes the file of a model there first trains it. What nobody finished is trained here in the end, so
that a process that dies costs time alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch
from optuna.storages import InMemoryStorage
from rich.console import Console

from nas_kd.arguments.parsing import guarded
from nas_kd.arguments.study import STORAGE, restore_settings
from nas_kd.costs.latency import limited_threads
from nas_kd.genotype import Genotype
from nas_kd.pipeline.baselines import Wanted, whole_space
from nas_kd.pipeline.elsewhere import are_shared, forget_models, train_with_workers
from nas_kd.pipeline.refining import is_refined, refine_one
from nas_kd.preparation.estimate import predicted_seconds, refined_models
from nas_kd.preparation.job import Job, prepare, storage_url
from nas_kd.preparation.materials import Materials, collect
from nas_kd.progress import Advance, Stages
from nas_kd.results.refine import Refined
from nas_kd.search.signals import follow_parent
from nas_kd.search.storage import close_storage
from nas_kd.training.ranks import current
from nas_kd.workers.crew import LocalWorker, devices_for, environment, stop_all

_WORTH = 30.0  # seconds of training must be left for another process, which takes ten to begin
_MOST = 8  # processes unless --jobs asks for more
_EACH = 2 << 30  # bytes that a process takes
_PLAN, _POLL = "plan.json", 0.2
_logger = logging.getLogger(__name__)


def refine_all(job: Job, plan: Sequence[Wanted], materials: Materials, advance: Advance) -> list[Refined]:
    """Trains each model of a plan, or fetches what was trained before, in as many processes as pay."""
    pending = [wanted for wanted in plan if not is_refined(job, wanted, materials)]
    count = _processes(job, pending)
    if are_shared(job, pending, materials):
        train_with_workers(job, pending, materials, count, advance)
    elif count > 1:
        with _others(job, pending, count) as claims:
            claims.work(lambda wanted, tell: refine_one(job, wanted, materials, tell), advance)
            claims.wait(advance)
    forget_models(job)
    return [refine_one(job, wanted, materials, advance) for wanted in plan]


def _processes(job: Job, pending: Sequence[Wanted]) -> int:
    """How many processes train what is left: one where that is soon done, or where it cannot be shared."""
    settings = job.settings
    if isinstance(job.storage, InMemoryStorage) or any(wanted.start is not None for wanted in pending):
        return 1
    if current().size > 1:  # torchrun's processes share each of them
        return 1
    epochs = max((wanted.epochs for wanted in pending), default=0)
    seconds = predicted_seconds(job, 0, epochs)["refine"] * len(pending) / refined_models(settings)
    if seconds < _WORTH:
        return 1
    if job.device.type == "cuda":
        places = torch.cuda.device_count() if settings.device in (None, "cuda") else 1
    else:
        places = settings.jobs if settings.jobs > 1 else min(_MOST, torch.get_num_threads())
    return max(1, min(places, len(pending), 1 + _fitting()))


def _fitting() -> int:
    """How many more processes find memory, where the system says how much there is."""
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:
        return _MOST
    return (int(available[1]) << 10) // _EACH if available else _MOST


@dataclasses.dataclass(kw_only=True, eq=False)
class Claims:
    """What is planned, dearest first, in a `folder` in which each model has a file of who trains it and how far it
    is; `others` are the processes beside this one."""

    folder: Path
    plan: Sequence[Wanted]
    others: Sequence[LocalWorker] = ()
    heard: dict[str, int] = dataclasses.field(default_factory=dict)
    own: set[str] = dataclasses.field(default_factory=set)

    def work(self, train: Callable[[Wanted, Advance], object], advance: Advance) -> None:
        """Trains what nobody else does, one model after the other."""
        for number, wanted in enumerate(self.plan):
            path = self.folder / f"{number}.txt"
            try:
                file = path.open("x", encoding="utf-8")
            except FileExistsError:
                continue
            self.own.add(path.name)
            with file:
                train(wanted, functools.partial(self._tell, file, advance))

    def _tell(self, file: TextIO, advance: Advance, words: str, steps: float = 1, /) -> None:
        file.write(f"{words}\n")
        file.flush()
        advance(words, steps)
        self.listen(advance)

    def listen(self, advance: Advance) -> None:
        """Tells of what others did since the last time."""
        for path in self.folder.glob("*.txt"):
            if path.name in self.own:
                continue
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]
            for words in lines[self.heard.get(path.name, 0) :]:
                advance(words)
            self.heard[path.name] = len(lines)

    def wait(self, advance: Advance) -> None:
        """Waits for the others to end."""
        while any(other.code() is None for other in self.others):
            time.sleep(_POLL)
            self.listen(advance)
        for other in self.others:
            if other.code():
                _logger.warning("a process beside this one ended (%s): its model is trained here", other.words())


@contextlib.contextmanager
def _others(job: Job, pending: Sequence[Wanted], count: int) -> Iterator[Claims]:
    """Starts the other processes; each, this one too, has its share of the threads as long as they run."""
    with tempfile.TemporaryDirectory(prefix="refining-", dir=job.cache) as draft:
        folder = Path(draft)
        plan = sorted(pending, key=lambda wanted: -wanted.epochs * wanted.space.cost(wanted.genotype).macs)
        _write(job, plan, folder)
        shared = environment(storage_url(job.settings, job.out), count)
        devices = devices_for(job.settings.device, count)[1:]
        others = [
            LocalWorker([str(folder), "--device", device], shared, module="nas_kd.pipeline.sharing")
            for device in devices
        ]
        try:
            for other in others:
                other.start()
            with limited_threads(max(1, torch.get_num_threads() // count)):
                yield Claims(folder=folder, plan=plan, others=others)
        finally:
            stop_all(others)


def _write(job: Job, plan: Sequence[Wanted], folder: Path) -> None:
    models = [
        {
            "role": wanted.role,
            "genotype": wanted.genotype.to_json(),
            "epochs": wanted.epochs,
            "whole": wanted.space is not job.space,
        }
        for wanted in plan
    ]
    settings = {**dataclasses.asdict(job.settings), "storage": None, "out": str(job.out), "new_study": False}
    (folder / _PLAN).write_text(json.dumps({"settings": settings, "models": models}), encoding="utf-8")


def share(folder: Path, device: str, storage: str | None) -> None:
    """Trains models of the plan in a folder until each is somebody's."""
    kept = json.loads((folder / _PLAN).read_text(encoding="utf-8"))
    settings = restore_settings({**kept["settings"], "storage": storage, "device": device, "quiet": True})
    stages = Stages(Console(stderr=True), quiet=True)
    job = prepare(settings, stages=stages)
    try:
        materials = collect(job, stages)
        whole = whole_space(job) if any(model["whole"] for model in kept["models"]) else None
        plan = [
            Wanted(
                role=model["role"],
                genotype=Genotype.from_json(model["genotype"]),
                space=whole if model["whole"] and whole is not None else job.space,
                epochs=model["epochs"],
            )
            for model in kept["models"]
        ]
        claims = Claims(folder=folder, plan=plan)
        claims.work(lambda wanted, tell: refine_one(job, wanted, materials, tell), lambda words, steps=1, /: None)
    finally:
        close_storage(job.storage)


def main(argv: Sequence[str]) -> int:
    """A process beside the one that runs a study: the folder of the plan, and the device."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=follow_parent, daemon=True).start()
    folder, _, device = argv
    share(Path(folder), device, os.environ.get(STORAGE))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, None))
