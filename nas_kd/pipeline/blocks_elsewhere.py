"""Blocks of the library are made by workers on other machines too: each is a job in the study's storage."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from optuna.storages import BaseStorage, InMemoryStorage
from safetensors import SafetensorError

from nas_kd import __version__
from nas_kd.arguments.study import noted_settings, restore_settings
from nas_kd.arguments.worker import LIBRARY as PART
from nas_kd.arguments.worker import WorkerSettings
from nas_kd.errors import ArtifactError, CheckpointError, StudyError
from nas_kd.library.building import Builder, OpenBlocks, open_builder
from nas_kd.library.effort import Step
from nas_kd.library.inputs import LibraryInputs
from nas_kd.library.library import entry_file, made_choices
from nas_kd.pipeline.models_elsewhere import DONE, FILE, more_processes
from nas_kd.preparation.cycles import note_cycles
from nas_kd.preparation.job import Job, choose_device
from nas_kd.preparation.latency import note_latency
from nas_kd.preparation.opening import make_space
from nas_kd.progress import Advance, Stages
from nas_kd.search.artifacts import open_store, pack_files, unpack
from nas_kd.search.jobs import (
    LIBRARY,
    Notes,
    Told,
    are_there,
    do_jobs,
    done_jobs,
    open_jobs,
    post_jobs,
    remove_jobs,
)
from nas_kd.search.storage import storage_errors, using_storage
from nas_kd.search.workers import RetryingStudy
from nas_kd.training.evaluation import predict_logits
from nas_kd.training.ranks import current
from nas_kd.workers.bundle import PRIVATE, begin_with, cache_here, check_version, damaged, locate_files, shared_store
from nas_kd.workers.joining import find_jobs, is_begun, lead_to_end

BLOCKS = "nas_kd blocks"  # the user attribute of these jobs: what workers need for them
_INPUTS = "inputs-{}.safetensors"  # of a library's folder
_PERCENT = 100
_POLL = 1.0  # seconds between two looks for blocks
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksPlan:
    """What workers need to make blocks: of the study its version and settings, the classes and the `facts` of the
    library's inputs, which are in the file `inputs`; the `library`'s folder, and the channels' order in it. Paths are
    relative to the study's cache, which is `folder` on its own machine; `files` are in the artifact store, by SHA-256.
    """

    version: str
    settings: Mapping[str, Any]
    num_classes: int
    facts: Mapping[str, Any]
    inputs: str
    library: str
    folder: str
    artifacts: str | None
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, str]:
        """The files that a worker reads."""
        return self.inputs, f"{self.library}/importance.safetensors"


# the study's own command


def are_open(job: Job) -> bool:
    """Whether workers elsewhere can make blocks: they reach the study's storage."""
    is_shared = job.settings.sharing.storage is not None and not isinstance(job.storage, InMemoryStorage)
    return is_shared and current().size == 1


def make_with_workers(job: Job, count: int, inputs: LibraryInputs, blocks: OpenBlocks) -> Collection[str]:
    """Makes blocks of a library here, in `count` processes, and wherever workers are; what comes of others is fetched.
    Returns the blocks that these made."""
    names = {_key(blocks.folder.name, name): name for name in blocks.shares}
    own = set[str]()

    def report_made(name: str) -> None:
        blocks.report(Step(f"{name}: made by another process", blocks.shares[name]))

    def run(key: str) -> tuple[float, Notes]:
        own.add(key)
        blocks.make(names[key], blocks.report)
        return blocks.shares[names[key]], {}

    with storage_errors("share out blocks of the library"):
        jobs = post_jobs(job.storage, job.settings.name, list(names), LIBRARY)
        note_latency(jobs, job.settings.latency, job.space)
        note_cycles(jobs, job.space)
        plan = _plan(job, inputs, blocks.folder)
        jobs.set_user_attr(BLOCKS, dataclasses.asdict(plan))
        told = Told(jobs, names, own, lambda key, _: report_made(names[key]))
        with more_processes(job, count, PART) as sleep:
            do_jobs(jobs, run, grace=job.settings.sharing.grace_period, sleep=told.beside(sleep))
        told.tell()
        for key, notes in done_jobs(jobs).items():
            if key in names and key not in own:
                _bring(plan, blocks.folder, names[key], notes)
    return [name for key, name in names.items() if key not in own]


def end_blocks(job: Job) -> None:
    """Lets workers go: there are no blocks for them any more."""
    if are_open(job):
        with storage_errors("end the sharing of blocks"):
            jobs = open_jobs(job.storage, job.settings.name, LIBRARY)
            if jobs is not None:
                jobs.set_user_attr(BLOCKS, DONE)
        for path in job.cache.glob(_INPUTS.format("library-*")):
            path.unlink(missing_ok=True)


def forget_blocks(job: Job) -> None:
    """Puts the blocks away, once the study has its trials: until then nothing else may get their number."""
    if are_open(job):
        remove_jobs(job.storage, job.settings.name, LIBRARY)


def _key(library: str, block: str) -> str:
    return f"{library} {block}"


def _plan(job: Job, inputs: LibraryInputs, folder: Path) -> BlocksPlan:
    path = _INPUTS.format(folder.name)
    if not (job.cache / path).exists():
        inputs.write(job.cache / path)
    store = shared_store(job.settings.sharing)
    plan = BlocksPlan(
        version=__version__,
        settings={**noted_settings(job.settings), **PRIVATE},
        num_classes=predict_logits(inputs.base, inputs.images[:1]).shape[1],
        facts=inputs.facts,
        inputs=path,
        library=folder.name,
        folder=str(job.cache.resolve()),
        artifacts=None if store is None else store.address,
    )
    if store is None:
        return plan
    return dataclasses.replace(plan, files={each: store.put(job.cache / each) for each in plan.paths})


def _packed(folder: Path, block: str) -> Path:
    """The file in which the entries of a block travel."""
    return folder.with_name(f"{folder.name}-{block}.zip")


def _bring(plan: BlocksPlan, folder: Path, block: str, notes: Notes) -> None:
    """Fetches the entries of a block that was made elsewhere, where they are not in the folder already."""
    packed = _packed(folder, block)
    if FILE not in notes:
        return
    try:
        open_store(str(plan.artifacts)).get(str(notes[FILE]), packed)
        unpack(packed, folder)
    except ArtifactError as error:
        _logger.warning("a block that was made elsewhere is made here again: %s", error)
    packed.unlink(missing_ok=True)


# workers

_Found = tuple[str, RetryingStudy, BlocksPlan | None]


def take_blocks(settings: WorkerSettings, stages: Stages, sleep: Callable[[float], None] = time.sleep) -> int | None:
    """Makes blocks of the library of a study that is about to begin, beside its command and other workers; returns how
    many. None when it has no library to make: it has begun, or has not posted any within `settings.wait` seconds.

    Raises a NasKdError for everything that is wrong with the storage, the study or its files.
    """
    device = choose_device(settings.device if settings.ray is None else "cpu")
    with using_storage(settings.storage, settings.grace_period, "use the study in its storage") as storage:
        found = _await_blocks(storage, settings, sleep)
        if found is None:
            return None
        name, jobs, plan = found
        if plan is None:
            return 0
        if (led := lead_to_end(settings, name, PART)) is not None:
            return led
        with stages.stage("library", _PERCENT) as advance:
            return _make_if_open(jobs, plan, settings, device, advance)


def _await_blocks(storage: BaseStorage, settings: WorkerSettings, sleep: Callable[[float], None]) -> _Found | None:
    """The study, the blocks of its library that are shared out, and their plan, None where all are made; nothing where
    its trials have begun, or nothing is heard of it for as long as the worker waits."""
    deadline = time.monotonic() + settings.wait
    while True:
        found = _find(storage, settings.study_name)
        if found is not None or is_begun(storage, settings) or time.monotonic() >= deadline:
            return found
        sleep(_POLL)


def _find(storage: BaseStorage, wanted: str) -> _Found | None:
    found = find_jobs(storage, wanted, LIBRARY)
    if found is None:
        return None
    name, jobs = found
    noted: Any = None
    with suppress(KeyError):  # they were put away at this moment
        noted = jobs.user_attrs.get(BLOCKS)
    if noted is None:  # it is about to be told
        return None
    if noted == DONE:
        return name, jobs, None
    check_version(name, noted)
    return name, jobs, BlocksPlan(**noted)


def _make_if_open(
    jobs: RetryingStudy, plan: BlocksPlan, settings: WorkerSettings, device: torch.device, advance: Advance
) -> int:
    """Makes blocks; none where others made the last of them meanwhile, and their files are gone."""
    try:
        return _make(jobs, plan, settings, device, advance)
    except (ArtifactError, KeyError):
        if are_there(jobs) and jobs.user_attrs.get(BLOCKS) != DONE:
            raise
        return 0


def _make(
    jobs: RetryingStudy, plan: BlocksPlan, settings: WorkerSettings, device: torch.device, advance: Advance
) -> int:
    """Makes blocks until none is left; those of another folder than the study's own go into its artifact store."""
    own, address = Path(plan.folder), settings.artifacts or plan.artifacts
    here = cache_here(settings.out, restore_settings(plan.settings).name)
    cache = locate_files(own, plan.paths, here, address, plan.files)
    store = None if cache == own else address
    builder = _builder(jobs, plan, cache, device)
    made = 0

    def share(blocks: OpenBlocks) -> tuple[str, ...]:
        nonlocal made

        def run(key: str) -> tuple[float, Notes]:
            library, _, name = key.partition(" ")
            if library != plan.library:
                raise StudyError(f"this is a worker for another library than {library}")
            if name in blocks.shares:  # else all of it is here
                blocks.make(name, blocks.report)
            return 0.0, {} if store is None else {FILE: _put(store, builder, name)}

        made = do_jobs(jobs, run, grace=settings.grace_period)
        return ()

    builder.build(lambda words: advance(words, _PERCENT * getattr(words, "share", 0.0)), share)
    return made


def _builder(jobs: RetryingStudy, plan: BlocksPlan, cache: Path, device: torch.device) -> Builder:
    """What builds the plan's library on this machine. Raises ArtifactError for a file that is missing or damaged,
    StudyError where another library would come of it."""
    settings, base = begin_with(plan.settings, plan.num_classes, cache)
    base.to(device)
    path = cache / plan.inputs
    try:
        inputs = LibraryInputs.read(path, base, plan.facts)
    except (OSError, SafetensorError, CheckpointError) as error:
        raise damaged(path, str(error).splitlines()[0]) from error
    space = make_space(settings, base.eval(), begun=jobs.user_attrs)
    builder = open_builder(space.base, space.analysis, inputs.images, inputs.spec, cache)
    if builder.folder.name != plan.library:
        raise StudyError("this machine makes another library of the study: use the same versions of nas_kd and timm")
    return builder


def _put(store: str, builder: Builder, name: str) -> str:
    """Keeps the entries of a block in an artifact store."""
    block = builder.analysis.block(name)
    files = [entry_file(builder.folder, block, index).path for index in made_choices(block)]
    packed = _packed(builder.folder, name)
    pack_files(files, packed)
    digest = open_store(store).put(packed)
    packed.unlink()
    return digest
