"""A process beside the one that runs a study: `python -m nas_kd.pipeline.helper FOLDER --device DEVICE`."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from nas_kd.arguments.parsing import guarded
from nas_kd.arguments.sharing import STORAGE
from nas_kd.arguments.study import Settings, restore_settings
from nas_kd.costs.latency import limited_threads
from nas_kd.pipeline import ahead, sharing
from nas_kd.pipeline.helpers import PLAN, SETTINGS, STUDY, Claims, done_file
from nas_kd.preparation.job import Job, prepare
from nas_kd.preparation.materials import Materials, collect
from nas_kd.progress import Stages
from nas_kd.search.signals import follow_parent
from nas_kd.search.storage import close_storage


class Helper:
    """What a helper keeps from stage to stage: its own job, and its materials once they are wanted."""

    def __init__(self, job: Job) -> None:
        self.job = job
        # blocks are made of the trained base; materials begin, as the study's did, with the base as it was created
        self._created = {name: tensor.clone() for name, tensor in job.space.base.state_dict().items()}

    @functools.cached_property
    def _collected(self) -> tuple[Job, Materials]:
        """The job and its materials, which the study has made until now, from its cache."""
        self.job.space.base.load_state_dict(self._created)
        return collect(self.job, quiet())

    def do(self, stage: str, plan: Mapping[str, Any], claims: Claims) -> None:
        """Does its part of a stage."""
        if stage == sharing.LIBRARY:
            self.job = sharing.make_blocks(self.job, plan, claims)
        elif stage.startswith(ahead.STAGE):
            ahead.train_queued(*self._collected, plan, claims)
        else:
            sharing.train_models(*self._collected, plan, claims)


Do = Callable[[str, Mapping[str, Any], Claims], None]  # a helper's part of a stage, by its plan
Begin = Callable[[Settings, Mapping[str, Any]], AbstractContextManager[Do]]


@contextlib.contextmanager
def begun(settings: Settings, more: Mapping[str, Any]) -> Iterator[Do]:
    """What helps a study of these settings."""
    job = prepare(settings, stages=quiet())
    try:
        yield Helper(job).do
    finally:
        close_storage(job.storage)


def quiet() -> Stages:
    """Stages that tell nobody."""
    return Stages(Console(stderr=True), quiet=True)


def attend(begin: Begin, folder: Path, device: str, storage: str | None, told: Iterable[str]) -> None:
    """Does its part of each stage that it is told of."""
    kept = json.loads((folder / STUDY).read_text(encoding="utf-8"))
    own = {"storage": storage, "device": device, "quiet": True}
    with begin(restore_settings({**kept.pop(SETTINGS), **own}), kept) as do:
        for stage in told:
            plan = json.loads((folder / stage / PLAN).read_text(encoding="utf-8"))
            with limited_threads(plan["threads"]):
                do(stage, plan, Claims(folder=folder / stage))
            done_file(folder / stage, os.getpid()).touch()


def serve(begin: Begin) -> NoReturn:
    """Runs a helper, as its command line says, until its study ends; then this process ends too, at once: what Python
    and CUDA tidy up first took half a minute on a GPU (docs/results/gpu.md)."""
    code = guarded(functools.partial(_serve, begin), None)
    sys.stderr.flush()
    os._exit(code)


def _serve(begin: Begin, argv: Sequence[str]) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    told = queue.SimpleQueue[str]()
    threading.Thread(target=follow_parent, args=(told.put,), daemon=True).start()
    folder, _, device = argv
    attend(begin, Path(folder), device, os.environ.get(STORAGE), iter(told.get, ""))
    return 0


if __name__ == "__main__":
    serve(begun)
