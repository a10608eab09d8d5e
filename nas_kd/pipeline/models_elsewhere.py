"""Models of the results are trained by workers on other machines too: each is a job in the study's storage."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import nn

from nas_kd.arguments.worker import MODELS as PART
from nas_kd.arguments.worker import WorkerSettings
from nas_kd.costs.latency import limited_threads
from nas_kd.data.images import Images
from nas_kd.data.originals import open_originals
from nas_kd.data.splits import Splits
from nas_kd.errors import ArtifactError, StudyError
from nas_kd.files.arrays import load_arrays
from nas_kd.genotype import Genotype
from nas_kd.pipeline.baselines import WantedModel, whole_of
from nas_kd.pipeline.refining import RefinementContext, file_of, refine_in, refinement_context
from nas_kd.preparation.job import Job, choose_device, storage_url
from nas_kd.preparation.materials import Materials
from nas_kd.progress import Advance, Stages
from nas_kd.search.artifacts import open_store
from nas_kd.search.jobs import Notes, do_jobs, done_jobs, open_jobs, post_jobs, remove_jobs
from nas_kd.search.space import Space
from nas_kd.search.storage import storage_errors
from nas_kd.search.workers import RetryingStudy
from nas_kd.training.ranks import current
from nas_kd.training.views import Views, open_views
from nas_kd.workers.bundle import (
    Bundle,
    damaged,
    equip,
    fetch,
    locate,
    read_bundle,
    settings_of,
    shared_store,
    view_files,
)
from nas_kd.workers.joining import joined, lead_to_end
from nas_kd.workers.pool import local_workers, share_of_threads, stop_all, worker_arguments

MODELS = "nas_kd models"  # the study's user attribute: what is to be trained once the search is done
COMING, DONE = "coming", "done"
_POLL = 1.0  # seconds between two looks for models
FILE = "file"  # what a job notes: the SHA-256 of what it made in the artifact store
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsPlan:
    """What workers need to train models, beside the study's bundle: the folder of `views`, the `parts` of the images,
    the context's `key`; the models by the names of their files; and what is in the artifact store, by SHA-256."""

    key: str
    views: str
    parts: tuple[str, ...]
    models: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, str]


# the study's own command


def expect_models(job: Job, study: optuna.Study) -> None:
    """Lets workers wait for the models that follow the search; those of a study whose storage nobody else reaches have
    nothing to wait for."""
    if job.settings.sharing.storage is not None:
        study.set_user_attr(MODELS, COMING)


def are_shared(job: Job, pending: Sequence[WantedModel], materials: Materials) -> bool:
    """Whether workers elsewhere can train models of a plan."""
    fits = isinstance(materials.refine_views, Views) and all(wanted.start is None for wanted in pending)
    return fits and len(pending) > 1 and current().size == 1 and _study_of(job) is not None


def _study_of(job: Job) -> RetryingStudy | None:
    """A job's study where workers may be at it."""
    name, storage = job.settings.name, job.storage
    if job.settings.sharing.storage is None or name not in optuna.get_all_study_names(storage):
        return None
    study = RetryingStudy(name, storage)
    return study if MODELS in study.user_attrs else None


def train_with_workers(
    job: Job,
    plan: Sequence[WantedModel],
    materials: Materials,
    count: int,
    advance: Advance,
    first: Callable[[], object] = lambda: None,
) -> None:
    """Trains models here, in `count` processes, and wherever workers are; what comes of others is fetched. This process
    does something else `first`."""
    context = refinement_context(job, materials)
    models = {file_of(context, wanted).name: wanted for wanted in plan}
    study = _study_of(job)
    assert study is not None
    bundle = read_bundle(study)
    assert bundle is not None

    own = set[str]()

    def run(name: str) -> tuple[float, Notes]:
        own.add(name)
        return refine_in(context, models[name], advance).val_accuracy, {}

    with storage_errors("share out models"):
        jobs = post_jobs(job.storage, job.settings.name, list(models))
        study.set_user_attr(MODELS, dataclasses.asdict(_plan(job, bundle, context, models)))
        with more_processes(job, count, PART) as sleep:
            first()
            do_jobs(jobs, run, grace=job.settings.sharing.grace_period, sleep=sleep)
        for name, notes in done_jobs(jobs).items():
            _bring(bundle, job.cache / name, notes)
            if name in models and name not in own:
                advance(f"{models[name].role}: trained by another process", models[name].epochs)


def forget_models(job: Job) -> None:
    """Lets workers go: there are no models for them."""
    with storage_errors("end the sharing of models"):
        study = _study_of(job)
        if study is not None:
            study.set_user_attr(MODELS, DONE)
            remove_jobs(job.storage, job.settings.name)


def _plan(job: Job, bundle: Bundle, context: RefinementContext, models: Mapping[str, WantedModel]) -> ModelsPlan:
    views = context.views
    assert isinstance(views, Views)
    assert views.folder is not None
    originals = ("originals_pixels", "originals_sizes") if bundle.originals else ()
    fresh = ("train_pixels", *originals) if job.settings.refinement.distill == "online" else ()
    parts = ("train_labels", "val_pixels", "val_labels", "test_pixels", "test_labels", *fresh)
    paths = [
        *(f"{bundle.images}/{part}.npy" for part in parts),
        *view_files(job.settings.data.augment, views.folder.name),
    ]
    store = shared_store(job.settings.sharing)
    return ModelsPlan(
        key=context.key,
        views=views.folder.name,
        parts=parts,
        models={
            name: {
                "role": wanted.role,
                "genotype": wanted.genotype.to_json(),
                "epochs": wanted.epochs,
                "whole": wanted.space is not job.space,
            }
            for name, wanted in models.items()
        },
        files={} if store is None else {path: store.put(job.cache / path) for path in paths},
    )


@contextmanager
def more_processes(job: Job, count: int, part: str) -> Iterator[Callable[[float], None]]:
    """Other processes of this machine that do a part of the study's work while the block runs; each, this one too, has
    its share of the threads. What waits beside them sleeps by what this gives."""
    command = [*worker_arguments(job.settings.name, job.settings.sharing.grace_period, part), "--out", str(job.out)]
    others = local_workers(
        command, storage_url(job.settings.sharing, job.out), job.settings.training.device, count, first=1
    )

    def sleep(seconds: float) -> None:
        time.sleep(seconds)
        for other in others:
            other.code()  # a process that is asked for no code is there even when it is dead

    try:
        for other in others:
            other.start()
        with limited_threads(share_of_threads(count)):
            yield sleep
        for other in others:
            if other.code():
                _logger.warning("a process beside this one ended (%s): others have done its work", other.words())
    finally:
        stop_all(others)


def _bring(bundle: Bundle, path: Path, notes: Notes) -> None:
    if path.exists() or FILE not in notes:
        return
    try:
        open_store(str(bundle.artifacts)).get(str(notes[FILE]), path)
    except ArtifactError as error:
        _logger.warning("a model that was trained elsewhere is trained here again: %s", error)


# workers


def take_models(settings: WorkerSettings, stages: Stages, sleep: Callable[[float], None] = time.sleep) -> int:
    """Trains models of a study whose search is done, beside its command and other workers; returns how many.

    Raises a NasKdError for everything that is wrong with the storage, the study or its files.
    """
    device = choose_device(settings.device if settings.ray is None else "cpu")
    with joined(settings, sleep) as (storage, study, bundle):
        plan = _await_plan(study, max(settings.grace_period, settings.wait), sleep)
        jobs = None if plan is None else open_jobs(storage, study.study_name)
        if plan is None or jobs is None:
            return 0
        if (led := lead_to_end(settings, study.study_name, PART)) is not None:
            return led
        site = _site(study, bundle, plan, settings, device)
        with stages.stage("models", sum(model["epochs"] for model in plan.models.values())) as advance:
            return _train(jobs, plan, site, settings.grace_period, advance)


def _await_plan(study: optuna.Study, patience: float, sleep: Callable[[float], None]) -> ModelsPlan | None:
    """The models to train, as soon as the study's command has chosen them; None where there are none, or nothing is
    heard of it for so many seconds."""
    deadline = time.monotonic() + patience
    while (noted := study.user_attrs.get(MODELS)) == COMING and time.monotonic() < deadline:
        sleep(_POLL)
    if not isinstance(noted, dict):
        return None
    return ModelsPlan(**{**noted, "parts": tuple(noted["parts"])})


def _train(jobs: RetryingStudy, plan: ModelsPlan, site: _Site, grace: float, advance: Advance) -> int:
    """Trains models until none is left; what is not in the study's own folder goes into its artifact store."""

    def run(name: str) -> tuple[float, Notes]:
        wanted = site.wanted(plan.models[name])
        path = file_of(site.context, wanted)
        if path.name != name:
            raise StudyError(f"this machine makes another model of {name}: use the same versions of nas_kd and timm")
        refined = refine_in(site.context, wanted, advance)
        return refined.val_accuracy, {} if site.store is None else {FILE: open_store(site.store).put(path)}

    return do_jobs(jobs, run, grace=grace)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Site:
    """Where a worker trains: its context, the spaces of genotypes, and the address of the artifact store that takes
    models; None where they are in the study's own folder."""

    context: RefinementContext
    space: Space[nn.Module]
    name: str
    store: str | None

    def wanted(self, model: Mapping[str, Any]) -> WantedModel:
        """What a plan says of a model."""
        space = whole_of(self.space, self.name) if model["whole"] else self.space
        assert space is not None
        genotype = Genotype.from_json(model["genotype"])
        return WantedModel(role=model["role"], genotype=genotype, space=space, epochs=model["epochs"])


def _site(
    study: optuna.Study, bundle: Bundle, plan: ModelsPlan, settings: WorkerSettings, device: torch.device
) -> _Site:
    """The files of a plan here. Raises ArtifactError for those that are not to be had, missing or damaged."""
    cache = locate(bundle, settings.out, settings.artifacts)
    own = cache == Path(bundle.folder)
    address = settings.artifacts or bundle.artifacts
    if not own:
        fetch(plan.files, address, cache)
    space, _ = equip(bundle, cache, device, study.user_attrs)
    splits = _splits(bundle, plan, cache)
    views = open_views(cache / plan.views, splits.train.labels, bundle.mean, bundle.std)
    if views is None:
        raise damaged(cache / plan.views, "it is not there, or does not match its checksums")
    given = settings_of(bundle)
    context = RefinementContext(settings=given, device=device, cache=cache, splits=splits, views=views, key=plan.key)
    return _Site(context=context, space=space, name=given.network.model, store=None if own else address)


def _splits(bundle: Bundle, plan: ModelsPlan, cache: Path) -> Splits:
    """The images of a plan; those to train on without pixels where views have them."""
    loaded = load_arrays(cache / bundle.images, plan.parts)
    if loaded is None:
        raise damaged(cache / bundle.images, "it is not there, or does not match its checksums")
    arrays = {name: torch.from_numpy(array) for name, array in loaded[0].items()}
    labels = arrays["train_labels"]
    form = len(labels), *arrays["val_pixels"].shape[1:]
    pixels = arrays.get("train_pixels", torch.zeros(1, dtype=torch.uint8).expand(form))  # of no size
    return Splits(
        train=Images(pixels, labels, bundle.mean, bundle.std, open_originals(loaded[0], len(bundle.mean))),
        val=Images(arrays["val_pixels"], arrays["val_labels"], bundle.mean, bundle.std),
        test=Images(arrays["test_pixels"], arrays["test_labels"], bundle.mean, bundle.std),
        class_names=(),
        num_classes=bundle.num_classes,
        mean=bundle.mean,
        std=bundle.std,
        digest="",
    )
