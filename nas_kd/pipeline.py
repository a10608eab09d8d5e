"""The stages of a study, in the order in which the data goes: base → teacher → views → trials → front → results.

Each stage is a function from values to values, made of the package's public pieces.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import timm
import torch
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from torch import nn

from nas_kd import __version__
from nas_kd.arguments import Settings
from nas_kd.budget import KINDS, Budget, Cost, short
from nas_kd.errors import DeviceError, OutputError, TrainingError
from nas_kd.genotype import Genotype
from nas_kd.models.hub import create_base
from nas_kd.models.reduction import reduce_stride
from nas_kd.models.student import build_student
from nas_kd.progress import Advance, Stages
from nas_kd.results.export import Card, export
from nas_kd.results.front import front, write_front_csv
from nas_kd.results.latency import measure_together
from nas_kd.results.refine import Candidate, Refined, Refinement, refine
from nas_kd.results.report import write_report
from nas_kd.results.rows import ModelRow, Role, StudySummary, TrialRow
from nas_kd.search.options import parse_options
from nas_kd.search.sampler import make_sampler
from nas_kd.search.space import Space
from nas_kd.search.starts import random_genotype, uniform_width_student
from nas_kd.search.storage import check_study, open_storage, open_study, retry_dead_trials, sqlite_url
from nas_kd.search.trials import (
    DIRECTIONS,
    OBJECTIVES,
    Objective,
    Proxy,
    best_score,
    cost_of,
    count_trained,
    importances,
    is_trained,
    run_trials,
)
from nas_kd.training.augment import default_augmentation, derive_seed
from nas_kd.training.checkpoint import load_checkpoint
from nas_kd.training.data import DIGITS, DataSpec, Splits, load_splits
from nas_kd.training.images import AugmentedImages, Images
from nas_kd.training.loop import evaluate, recalibrate
from nas_kd.training.recipe import Recipe
from nas_kd.training.sources import open_source
from nas_kd.training.teacher import Teacher, TeacherCache, TeacherResult, adopt_teacher, prepare_teacher
from nas_kd.training.views import OnlineViews, Views, ViewSpec, build_views, views_bytes

_DIGITS_SIZE = 16  # at the base's own stride: measured, docs/decisions.md
# by default: images that a training sees on a CPU, and the most epochs; a GPU affords ten times as many
_TEACHER, _REFINE = (60_000, 20), (60_000, 15)
_GPU = 10
_TEACHER_LR = 0.03
_LEAST_FRONT = 5  # models that a study gives, from the layers behind the front if need be
_CALIBRATION = 512


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """A study that is ready to run: checked settings, the base and its space. Nothing is trained yet."""

    settings: Settings
    device: torch.device
    out: Path
    space: Space[nn.Module]
    budget: Budget
    data: DataSpec
    trained_elsewhere: bool
    storage: BaseStorage

    @property
    def cache(self) -> Path:
        """Where content-addressed files are kept."""
        return self.out / "cache"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Materials:
    """What trials and refinement train on: the splits, the teacher, and views with its logits."""

    splits: Splits
    teacher: TeacherResult
    proxy_views: Views | OnlineViews
    refine_views: Views | OnlineViews


# before anything is trained


def prepare(settings: Settings) -> Job:
    """Checks everything that can be checked before an image is decoded or a network trained.

    Raises a NasKdError for each mistake that a user can make.
    """
    device = choose_device(settings.device)
    out = open_folder(Path(settings.out or Path("results") / settings.name))
    digits = settings.dataset == DIGITS
    in_chans = settings.in_chans or (1 if digits else 3)
    source = open_source(settings.dataset, settings.data_dir)
    base = make_base(settings, settings.num_classes or len(source.class_names), in_chans)
    if settings.initial_checkpoint:
        load_checkpoint(base, Path(settings.initial_checkpoint))
    space = Space(
        base,
        budget=settings.budget,
        img_size=settings.img_size or (_DIGITS_SIZE if digits else None),
        options=parse_options(settings.space, settings.pin),
        name=settings.model,
    )
    assert space.budget is not None
    elsewhere = bool(settings.pretrained or settings.initial_checkpoint)
    storage = open_storage(settings.storage or sqlite_url(out / "study.db"))
    check_study(storage, settings.name, _choices_made(settings, space.budget))
    return Job(
        settings=settings,
        device=device,
        out=out,
        space=space,
        budget=space.budget,
        data=_data_spec(settings, space, base if elsewhere else None),
        trained_elsewhere=elsewhere,
        storage=storage,
    )


def _is_trained(settings: Settings, base: nn.Module) -> bool:
    """Whether the base can teach as it is: timm drops a pretrained classifier that has other classes."""
    config: Any = getattr(base, "pretrained_cfg", None) or {}
    whole = config.get("num_classes") == getattr(base, "num_classes", None)
    return bool(settings.initial_checkpoint) or (settings.pretrained and whole)


def choose_device(name: str | None) -> torch.device:
    """The device of this name, by default a GPU where there is one. Raises DeviceError when it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device makes tensors, but holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        text = str(error).splitlines()[0][:120]
        raise DeviceError(f"there is no device {name!r} on this machine ({text}): use --device cpu") from error
    return device


def open_folder(folder: Path) -> Path:
    """Creates the output folder. Raises OutputError when it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"cannot write the output folder {folder}: {reason}; choose another --out") from error
    return folder


def make_base(settings: Settings, classes: int, in_chans: int) -> nn.Module:
    """The base from timm, its strides reduced where asked for; the same initial weights for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(settings.seed, "weights"))
        base = create_base(settings.model, pretrained=settings.pretrained, num_classes=classes, in_chans=in_chans)
    return base if settings.reduction is None else reduce_stride(base, settings.reduction, in_chans)


def _data_spec(settings: Settings, space: Space[nn.Module], trained: nn.Module | None) -> DataSpec:
    """Weights from elsewhere bring their normalisation; else it is taken from the training images."""
    config: Any = getattr(trained, "pretrained_cfg", None) or {}
    channels, side, _ = space.input_size
    known = len(config.get("mean", ())) == channels
    return DataSpec(
        dataset=settings.dataset,
        data_dir=settings.data_dir,
        img_size=side,
        in_chans=channels,
        num_classes=settings.num_classes,
        mean=tuple(config["mean"]) if known else None,
        std=tuple(config["std"]) if known else None,
        val_fraction=settings.val_fraction,
        train_images=settings.train_images,
        seed=settings.seed,
        workers=settings.workers,
    )


# the stages


def run(job: Job, stages: Stages) -> StudySummary:
    """Runs every stage, or what is left of them, and writes the results into the output folder."""
    materials = gather(job, stages)
    study = search(job, materials, stages)
    models = take_home(job, study, materials, stages)
    summary = summarise(job, study, models, materials, stages)
    write_front_csv(job.out / "front.csv", summary.models)
    write_report(job.out / "report.html", summary)
    return summary


def gather(job: Job, stages: Stages) -> Materials:
    """Images, the teacher, and its logits on augmented views: everything that is paid for once."""
    settings = job.settings
    with stages.stage("data"):
        splits = load_splits(job.data, job.cache)
    epochs = _epochs(settings.teacher_epochs, _TEACHER, splits, job.device)
    with stages.stage("teacher", 1 if job.trained_elsewhere else epochs) as advance:
        teacher = _teacher(job, splits, epochs, advance)
    refine_epochs = _epochs(settings.refine_epochs, _REFINE, splits, job.device)
    with stages.stage("views", 2) as advance:
        subset = splits.train[: settings.proxy_images]
        proxy_views = _views(job, splits, teacher, min(settings.views, settings.proxy_epochs), subset)
        advance("for trials")
        whole = _views(job, splits, teacher, min(settings.views, refine_epochs), splits.train)
        advance("for refinement")
    return Materials(splits=splits, teacher=teacher, proxy_views=proxy_views, refine_views=whole)


def _epochs(given: int | None, default: tuple[int, int], splits: Splits, device: torch.device) -> int:
    images, most = default
    if device.type != "cpu":
        images, most = _GPU * images, _GPU * most
    return given or max(1, min(most, round(images / len(splits.train))))


def _teacher(job: Job, splits: Splits, epochs: int, advance: Advance) -> TeacherResult:
    base = job.space.base.to(job.device)
    if job.trained_elsewhere:
        return adopt_teacher(base, splits)
    settings = job.settings
    recipe = dataclasses.replace(_recipe(settings, epochs), distill_weight=0.0)
    if not settings.pretrained:  # pretrained weights are tuned gently, like inherited ones
        recipe = dataclasses.replace(recipe, lr=_TEACHER_LR)
    cache = TeacherCache(folder=job.cache, key=f"{settings.model} {settings.pretrained} {settings.seed}")
    augmentation = default_augmentation(settings.dataset)

    def report(epoch: int, accuracy: float) -> None:
        advance(f"val accuracy {100 * accuracy:.1f} %")

    return prepare_teacher(base, splits, recipe=recipe, augmentation=augmentation, cache=cache, report=report)


def _views(job: Job, splits: Splits, teacher: TeacherResult, count: int, images: Images) -> Views | OnlineViews:
    """Cached views, or the teacher beside the student in every step where they would be too large to keep."""
    augmentation = default_augmentation(job.settings.dataset)
    spec = ViewSpec(count=count, augmentation=augmentation, seed=job.settings.seed, key=splits.digest)
    if views_bytes(images, spec, splits.num_classes) > spec.max_bytes:
        return OnlineViews(AugmentedImages(images, augmentation, job.settings.seed), Teacher(teacher.network))
    return build_views(images, teacher.network, spec, job.cache)


def _recipe(settings: Settings, epochs: int) -> Recipe:
    return Recipe(epochs=epochs, batch_size=settings.batch_size, lr=settings.lr, amp=settings.amp, seed=settings.seed)


def search(job: Job, materials: Materials, stages: Stages) -> optuna.Study:
    """Trains proxies of genotypes within the budget until `--trials` of them have been trained."""
    settings = job.settings
    study = open_study(
        job.storage,
        settings.name,
        directions=DIRECTIONS,
        config=_config(job, materials),
        sampler=make_sampler(settings.sampler, job.space, settings.seed),
    )
    study.set_metric_names(list(OBJECTIVES))
    retry_dead_trials(study)
    job.space.enqueue(study)
    recipe = _recipe(settings, settings.proxy_epochs)
    proxy = Proxy(views=materials.proxy_views, val=materials.splits.val, recipe=recipe, device=str(job.device))
    objective = Objective(job.space, proxy)
    with stages.stage("search", max(1, settings.trials - count_trained(study))) as advance:

        def tick(trial: FrozenTrial) -> None:
            if is_trained(trial):
                score = best_score(trial)
                words = "stopped, its loss is not finite" if math.isnan(score) else f"{100 * score:.1f} %"
                advance(f"trial {trial.number}: {words} at {short(cost_of(trial).params)}")

        run_trials(study, objective, trained=settings.trials, tick=tick)
    return study


def _config(job: Job, materials: Materials) -> dict[str, Any]:
    """What must stay the same for the trials of a study to be comparable."""
    return {
        **_choices_made(job.settings, job.budget),
        "teacher": materials.teacher.digest,
        "data": materials.splits.digest,
        "proxy images": len(materials.proxy_views),
    }


def _choices_made(settings: Settings, budget: Budget) -> dict[str, Any]:
    """The part of the configuration that is known before anything is trained."""
    return {
        "model": settings.model,
        "budget": str(budget),
        "space": settings.space,
        "pin": list(settings.pin),
        "proxy": repr(_recipe(settings, settings.proxy_epochs)),
        "version": __version__,
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """One model of the results: what it is, what it costs and how well it does. `refined` holds the network."""

    role: Role
    genotype: Genotype | None
    cost: Cost
    refined: Refined


def take_home(job: Job, study: optuna.Study, materials: Materials, stages: Stages) -> list[ModelRow]:
    """Refines the front and the baselines, tests each once, measures latency, and exports."""
    chosen = choose_front(study, job.settings.front)
    plan: list[tuple[Role, Genotype]] = [("front", genotype) for genotype in chosen]
    plan += _baselines(job, chosen)
    epochs = _epochs(job.settings.refine_epochs, _REFINE, materials.splits, job.device)
    models = [_teacher_model(job, materials)]
    with stages.stage("refine", len(plan) * epochs) as advance:
        for role, genotype in plan:
            refined = _refine(job, role, genotype, materials, epochs, advance)
            models.append(Model(role=role, genotype=genotype, cost=job.space.cost(genotype), refined=refined))
    with stages.stage("latency"):
        named = {str(index): model.refined.network for index, model in enumerate(models)}
        latencies = measure_together(named, job.space.input_size, device=str(job.device))
    with stages.stage("export", len(models)) as advance:
        rows = []
        for index, model in enumerate(models):
            rows.append(_export(job, model, latencies[str(index)], materials))
            advance(rows[-1].name)
    return rows


def choose_front(study: optuna.Study, count: int) -> list[Genotype]:
    """The genotypes of the study's front: the best score among them, the others evenly over their parameters.

    Where the front has fewer than five, it is filled up from the fronts of what is left. Raises TrainingError when no
    trial came to its end.
    """
    left = [trial for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
    left = list({trial.user_attrs["digest"]: trial for trial in reversed(left)}.values())[::-1]
    if not left:
        raise TrainingError(
            f"none of the trials of {study.study_name!r} came to its end: lower --lr, or train more of them"
        )
    chosen: list[FrozenTrial] = []
    while left and len(chosen) < min(count, _LEAST_FRONT):
        layer = front(left, [tuple(trial.values) for trial in left])
        left = [trial for trial in left if trial not in layer]
        chosen += layer
    best, *others = sorted(chosen, key=lambda trial: (-trial.values[0], trial.values[1]))
    others.sort(key=lambda trial: trial.values[1])
    step = max(1.0, len(others) / max(1, count - 1))
    spread = [others[int(index * step)] for index in range(min(len(others), count - 1))]
    return [Genotype.from_json(trial.user_attrs["genotype"]) for trial in (best, *spread)]


def _baselines(job: Job, chosen: list[Genotype]) -> list[tuple[Role, Genotype]]:
    """What the front must beat: one width everywhere, a random genotype, its own best one without a teacher."""
    baselines: list[tuple[Role, Genotype]] = [("no teacher", chosen[0])]
    uniform = uniform_width_student(job.space.table, job.budget)
    if uniform is not None:
        baselines.append(("uniform", uniform))
    drawn = random_genotype(job.space.table, job.budget, derive_seed(job.settings.seed, "random genotype"))
    if drawn is not None:
        baselines.append(("random", drawn))
    return baselines


def _refine(job: Job, role: Role, genotype: Genotype, materials: Materials, epochs: int, advance: Advance) -> Refined:
    recipe = dataclasses.replace(_recipe(job.settings, epochs), eval_epochs=tuple(range(1, epochs + 1)))
    if role == "no teacher":
        recipe = dataclasses.replace(recipe, lr=_TEACHER_LR, distill_weight=0.0)
    views = materials.refine_views

    def build() -> nn.Module:
        if role == "no teacher":  # the same student from scratch
            settings = dataclasses.replace(job.settings, pretrained=False)
            fresh = make_base(settings, materials.splits.num_classes, job.data.in_chans)
            with torch.random.fork_rng():  # the cheap convolutions get weights of their own
                torch.manual_seed(derive_seed(job.settings.seed, "fresh weights"))
                return build_student(fresh, job.space.analysis, genotype).to(job.device)
        student = job.space.student(genotype).to(job.device)
        recalibrate(student, views.sample(_CALIBRATION))
        return student

    refinement = Refinement(
        data=views,
        splits=materials.splits,
        recipe=recipe,
        folder=job.cache,
        key=f"{materials.splits.digest} {materials.teacher.digest} {job.settings.views} {job.settings.seed}",
    )

    def report(epoch: int, accuracy: float) -> None:
        advance(f"{role}: val accuracy {100 * accuracy:.1f} %")

    return refine(Candidate(role=role, digest=genotype.digest, build=build), refinement, report=report)


def _teacher_model(job: Job, materials: Materials) -> Model:
    test = evaluate(materials.teacher.network, materials.splits.test)
    refined = Refined(
        network=materials.teacher.network, val_accuracy=materials.teacher.val_accuracy, test_accuracy=test
    )
    return Model(role="teacher", genotype=None, cost=job.space.table.base(), refined=refined)


def _export(job: Job, model: Model, latency_ms: float, materials: Materials) -> ModelRow:
    settings, refined = job.settings, model.refined
    genotype = model.genotype or job.space.analysis.identity
    name = f"{_stem(settings.model)}-{model.cost.params / 1e6:.2f}M-{100 * refined.test_accuracy:.1f}"
    if model.role not in ("front", "teacher"):
        name += f"-{model.role.replace(' ', '-')}"
    name += f"-{genotype.digest[:4]}" if _taken(job.out / name, genotype) else ""
    # a teacher from elsewhere may have seen the validation images: its accuracy there, and its students', mean nothing
    val = None if job.trained_elsewhere else refined.val_accuracy
    facts = {
        "role": model.role,
        "digest": genotype.digest,
        "genotype": genotype.to_json(),
        "params": model.cost.params,
        "macs": model.cost.macs,
        "test accuracy": round(refined.test_accuracy, 4),
        "command": settings.command,
        "seed": settings.seed,
    }
    card = Card(
        input_size=job.space.input_size,
        mean=materials.splits.mean,
        std=materials.splits.std,
        label_names=materials.splits.class_names,
        facts=facts,
        title=name,
    )
    export(refined.network, job.out / name, card)
    return ModelRow(
        name=name,
        role=model.role,
        digest=genotype.digest,
        cost=model.cost,
        val_accuracy=val,
        test_accuracy=refined.test_accuracy,
        latency_ms=latency_ms,
        path=name,
        genotype=genotype,
    )


def _stem(model: str) -> str:
    return Path(model.partition(":")[2]).name if ":" in model else model


def _taken(folder: Path, genotype: Genotype) -> bool:
    """Whether another genotype has been exported under this name."""
    config = folder / "config.json"
    return config.is_file() and f'"{genotype.digest}"' not in config.read_text(encoding="utf-8")


# what the report says


def summarise(
    job: Job, study: optuna.Study, models: Iterable[ModelRow], materials: Materials, stages: Stages
) -> StudySummary:
    """The whole study as plain rows for report and table."""
    settings = job.settings
    return StudySummary(
        study_name=settings.name,
        command=settings.command,
        seed=settings.seed,
        base=settings.model,
        dataset=settings.dataset or "folder",
        budget=job.budget,
        models=tuple(models),
        trials=tuple(map(_trial_row, study.get_trials(deepcopy=False))),
        importances=importances(study),
        stages=tuple(stages.seconds.items()),
        notes=tuple(_notes(job, materials)),
        environment=_environment(job),
    )


def _trial_row(trial: FrozenTrial) -> TrialRow:
    attributes = trial.user_attrs
    rungs = {int(key.split("/")[1]): value for key, value in attributes.items() if key.startswith("rung/")}
    state: Any = "failed"
    if trial.state == TrialState.COMPLETE:
        state = "trained"
    elif trial.state == TrialState.PRUNED:
        state = "stopped" if is_trained(trial) else "over budget"
    score = best_score(trial)
    return TrialRow(
        number=trial.number,
        state=state,
        digest=attributes.get("digest", ""),
        cost=cost_of(trial) if all(kind in attributes for kind in KINDS) else None,
        score=None if math.isnan(score) else score,
        rungs=tuple(sorted(rungs.items())),
        seconds=float(attributes.get("seconds", 0.0)),
        source=attributes.get("source", "sampler"),
        note=attributes.get("reason", ""),
    )


def _notes(job: Job, materials: Materials) -> Iterable[str]:
    splits = materials.splits
    yield (
        f"{len(splits.train):,} images to train on, {len(splits.val):,} cut from them to select on, "
        f"{len(splits.test):,} to test on, once."
    )
    if job.trained_elsewhere:
        yield (
            "The teacher was trained elsewhere and may have seen the validation images: they rank the students, but "
            "accuracies on them are not quoted."
        )


def _environment(job: Job) -> tuple[tuple[str, str], ...]:
    names: list[tuple[str, Callable[[], str]]] = [
        ("nas_kd", lambda: __version__),
        ("torch", lambda: torch.__version__),
        ("timm", lambda: timm.__version__),
        ("optuna", lambda: optuna.__version__),
        ("python", platform.python_version),
        ("machine", lambda: f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"),
        ("device", lambda: torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "cpu"),
    ]
    return tuple((name, read()) for name, read in names)
