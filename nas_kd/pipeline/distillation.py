"""One small model, trained online, offline or plainly: checked, trained, tested once, exported."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas_kd.analysis.stride_reduction import reduce_stride
from nas_kd.arguments.distill import DistillSettings
from nas_kd.budget import COUNTED, Cost
from nas_kd.costs.verification import analyse, measure
from nas_kd.data.augment import derive_seed
from nas_kd.data.images import AugmentedImages
from nas_kd.data.sources import open_source
from nas_kd.data.splits import DataSpec, Splits, load_splits
from nas_kd.files.atomic import write_text
from nas_kd.networks.hub import create_base, input_size_of
from nas_kd.preparation.augmenting import augmentation_of, fresh_images, images_key, taught_views
from nas_kd.preparation.image_form import beside_gpu, data_spec, img_size_of, in_chans_of, warn_of_other_order
from nas_kd.preparation.job import (
    TEACHER,
    TEACHER_LR,
    TRANSFER_LR,
    brings_head,
    epochs_of,
    make_teacher,
    open_folder,
    training_device,
    transfer_epochs,
    try_out,
)
from nas_kd.progress import Stages
from nas_kd.results.export import Card, export
from nas_kd.results.refine import Candidate, Refined, Refinement, refine
from nas_kd.students.building import build_student
from nas_kd.students.cheap import cheap_genotype
from nas_kd.students.inheritance import inherit_student
from nas_kd.training.checkpoint import load_checkpoint
from nas_kd.training.evaluation import CALIBRATION, recalibrate
from nas_kd.training.recipe import Recipe
from nas_kd.training.teacher import TeacherCache, TeacherResult, Teaching, adopt_teacher, prepare_teacher
from nas_kd.training.transfer import HeadOrigin, settle_weights
from nas_kd.training.views import OnlineViews, Views, weights_digest

FILE = "distill.json"
_STUDENT_LR = 0.005  # from given weights: larger steps destroy them
_REPORTS = 20  # times that a training is evaluated and its state kept


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DistillJob:
    """A training that is ready to run: checked settings, where, on which images of which size, and the teacher as it
    was created (None without one), with the origin of its head where its weights come from elsewhere."""

    settings: DistillSettings
    device: torch.device
    out: Path
    input_size: tuple[int, int, int]
    classes: int
    data: DataSpec
    teacher: nn.Module | None
    teacher_head: HeadOrigin | None

    @property
    def cache(self) -> Path:
        """Where content-addressed files are kept."""
        return Path(self.settings.cache or self.out / "cache")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Distilled:
    """What came of it: the exported `folder`, the student's cost and scores, and those of its finished teacher, whose
    accuracy on validation images is None where it may have seen them, as the student's then."""

    folder: Path
    cost: Cost
    refined: Refined
    quotes_val: bool


def distill(settings: DistillSettings, stages: Stages) -> Distilled:
    """The whole way from settings to an exported folder; what an earlier run had finished is not done again.

    Raises a NasKdError for each mistake that a user can make.
    """
    job = prepare_distillation(settings)
    with stages.stage("data"):
        splits = load_splits(job.data, job.cache)
    teacher = _teacher(job, splits, stages)
    refined = _train(job, splits, teacher, stages)
    with stages.stage("export"):
        return _export(job, splits, teacher, refined)


def prepare_distillation(settings: DistillSettings) -> DistillJob:
    """Checks everything that can be checked before an image is decoded or a network trained: the student is built once.

    Raises a NasKdError for each mistake that a user can make.
    """
    device = training_device(settings.device, amp=settings.amp)
    out = open_folder(Path(settings.out or Path("results") / _name(settings)))
    if settings.cache is not None:
        open_folder(Path(settings.cache), "--cache")
    source = open_source(settings.data.dataset, settings.data.data_dir, settings.data.class_map)
    classes = settings.data.num_classes or len(source.class_names)
    size = _input_size(settings)
    student = build(settings, classes, size, 0)
    teacher, head = make_teacher(settings.teacher, settings.network.reduction, classes, size[0], settings.data.seed)
    for network in filter(None, (student, teacher)):
        try_out(network, size)
    trained = teacher is not None and settings.teacher.is_weighted
    model = teacher if trained and teacher is not None else student
    data = beside_gpu(data_spec(settings.data, size, source, model, weighted=trained or settings.has_weights), device)
    if trained or settings.has_weights:
        warn_of_other_order(source, settings.data, model, _origin(settings, of_teacher=trained))
    return DistillJob(
        settings=settings,
        device=device,
        out=out,
        input_size=size,
        classes=classes,
        data=data,
        teacher=teacher,
        teacher_head=head,
    )


def _origin(settings: DistillSettings, *, of_teacher: bool) -> str:
    """Where weights come from, in words."""
    file = settings.teacher.checkpoint if of_teacher else settings.network.initial_checkpoint
    return file or f"timm's {settings.teacher.model if of_teacher else settings.network.model}"


def _name(settings: DistillSettings) -> str:
    """The name of the output folder: results of one base are told apart by their own."""
    model = settings.network.folder.resolve().name if settings.network.is_exported else settings.stem
    return f"distill-{model}-{settings.data.dataset.replace('/', '-')}-{settings.mode}"


def _input_size(settings: DistillSettings) -> tuple[int, int, int]:
    """C, H, W of the images: as given, as an exported model takes them, or by the dataset."""
    if settings.network.is_exported:
        channels, side, _ = input_size_of(create_base(settings.network.model), settings.network.img_size)
        return settings.network.in_chans or channels, side, side
    with torch.device("meta"):
        plain = create_base(settings.network.model, **dict(settings.model_kwargs))
    _, side, _ = input_size_of(plain, img_size_of(settings.network, settings.data))
    return in_chans_of(settings.network, settings.data), side, side


def build(
    settings: DistillSettings,
    classes: int,
    input_size: tuple[int, int, int],
    number: int,
    prepare: Callable[[nn.Module, HeadOrigin], None] | None = None,
) -> nn.Module:
    """The student, or peer `number` of online distillation, whose weights its number decides; on the CPU.

    `prepare` is given what starts from weights, with the origin of its head, before its convolutions are replaced."""
    seed = derive_seed(settings.data.seed, "peer", number)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = create_base(
            settings.network.model,
            pretrained=settings.has_weights and settings.network.initial_checkpoint is None,
            num_classes=classes,
            in_chans=input_size[0],
            **dict(settings.model_kwargs),
        )
        whole = brings_head(network)
        if settings.network.initial_checkpoint is not None:
            whole = load_checkpoint(network, Path(settings.network.initial_checkpoint))
        if settings.network.reduction is not None:
            reduce_stride(network, settings.network.reduction, input_size[0])
        if settings.has_weights and prepare is not None:
            prepare(network, "own" if whole else "new")
        if settings.conv is None:
            return network
        analysis = analyse(network, input_size, name=settings.network.model, open={"conv"})
        make = inherit_student if settings.has_weights else build_student
        return make(network, analysis, cheap_genotype(analysis, settings.conv))


def _recipe(settings: DistillSettings, epochs: int) -> Recipe:
    evaluations = min(epochs, _REPORTS)
    return Recipe(
        epochs=epochs,
        batch_size=settings.batch_size,
        lr=settings.lr or (_STUDENT_LR if settings.has_weights else TEACHER_LR),
        optimizer=settings.optimizer,
        schedule=settings.schedule,
        weight_decay=settings.weight_decay,
        distill=settings.loss,
        distill_weight=0.0 if settings.mode == "plain" else settings.distill_weight,
        temperature=settings.temperature,
        class_mean=settings.class_mean,
        teacher_gradient=settings.teacher_gradient,
        amp=settings.amp,
        seed=settings.data.seed,
        eval_epochs=tuple(epochs * (index + 1) // evaluations for index in range(evaluations)),
    )


def _teacher(job: DistillJob, splits: Splits, stages: Stages) -> TeacherResult | None:
    settings, head = job.settings, job.teacher_head
    if job.teacher is None:
        return None
    network, augmentation = job.teacher.to(job.device), augmentation_of(settings.data, job.input_size[1])
    epochs = _teacher_epochs(job, splits)
    with stages.stage("teacher", epochs + (head is not None)) as advance:
        if not epochs:
            return adopt_teacher(network, splits, augmentation=augmentation, seed=settings.data.seed)
        lr = settings.lr or TEACHER_LR if head is None else TRANSFER_LR
        recipe = dataclasses.replace(_recipe(settings, epochs), distill_weight=0.0, lr=lr)
        recipe = dataclasses.replace(recipe, distill="kd", temperature=4.0, eval_epochs=())
        return prepare_teacher(
            network,
            splits,
            Teaching(recipe=recipe, augmentation=augmentation, head="better" if head == "own" else head),
            cache=TeacherCache(folder=job.cache, key=f"{settings.teacher.model} {settings.data.seed}"),
            report=lambda _, accuracy: advance(f"val accuracy {100 * accuracy:.1f} %"),
        )


def _teacher_epochs(job: DistillJob, splits: Splits) -> int:
    """0 for a teacher that was trained for these classes, unless it is to be tuned."""
    given = job.settings.teacher.epochs
    if job.teacher_head == "own":
        return given or 0
    if job.teacher_head == "new":
        return transfer_epochs(given, len(splits.train), job.device)
    return epochs_of(given or job.settings.epochs, TEACHER, len(splits.train), job.device)


_Data = AugmentedImages | Views | OnlineViews


def _training_data(job: DistillJob, splits: Splits, teacher: TeacherResult | None, epochs: int) -> _Data:
    """Fresh views of the training images in every epoch; beside a teacher those of `taught_views`."""
    settings = job.settings
    fresh = fresh_images(settings.data, splits.train, splits.num_classes)
    return fresh if teacher is None else taught_views(fresh, splits, teacher, min(settings.views, epochs), job.cache)


def _train(job: DistillJob, splits: Splits, teacher: TeacherResult | None, stages: Stages) -> Refined:
    settings = job.settings
    epochs = epochs_of(settings.epochs, TEACHER, len(splits.train), job.device)
    data = _training_data(job, splits, teacher, epochs)
    recipe = _recipe(settings, epochs)

    def prepare(network: nn.Module, head: HeadOrigin) -> None:
        settle_weights(network.to(job.device), splits, data.sample(CALIBRATION), head=head)

    @functools.cache  # to make what starts from weights ready takes many forward passes
    def made(number: int) -> nn.Module:
        network = build(settings, job.classes, job.input_size, number, prepare).to(job.device)
        if settings.conv is not None and settings.has_weights:
            recalibrate(network, data.sample(CALIBRATION))
        return network

    def student(number: int) -> nn.Module:
        return copy.deepcopy(made(number))

    refinement = Refinement(
        data=data,
        splits=splits,
        recipe=recipe,
        folder=job.cache,
        key=f"{images_key(settings.data, splits)} {teacher.digest if teacher else ''} {settings.views}",
        peers=settings.peers if settings.mode == "online" else 0,
    )
    candidate = Candidate(role=settings.mode, digest=weights_digest(student(0))[:12], build=student)
    with stages.stage("train", len(recipe.eval_epochs)) as advance:
        return refine(
            candidate, refinement, report=lambda epoch, a: advance(f"epoch {epoch}: val accuracy {100 * a:.1f} %")
        )


def _export(job: DistillJob, splits: Splits, teacher: TeacherResult | None, refined: Refined) -> Distilled:
    settings = job.settings
    cost = measure(refined.network, job.input_size)
    quotes_val = not settings.has_weights and (teacher is None or teacher.trained_here)
    facts = _facts(settings, cost, refined, quotes_val)
    name = f"{settings.stem}-{cost.params / 1e6:.2f}M-{100 * refined.test_accuracy:.1f}"
    how = "without a teacher" if settings.mode == "plain" else f"by {settings.mode} distillation"
    card = Card(
        input_size=job.input_size,
        mean=splits.mean,
        std=splits.std,
        **dataclasses.asdict(splits.preprocessing),
        label_names=splits.class_names,
        facts=facts,
        title=name,
        summary=f"`{settings.stem}`, trained by nas_kd {how}.",
    )
    folder = export(refined.network, job.out / name, card)
    peers = [{"val accuracy": peer.val, "test accuracy": peer.test} for peer in refined.peers]
    record = {**facts, "path": name, "peers": peers[:-1], "online teacher": peers[-1] if peers else None}
    text = json.dumps(record, indent=2) + "\n"
    write_text(job.out / FILE, text)
    return Distilled(folder=folder, cost=cost, refined=refined, quotes_val=quotes_val)


def _facts(settings: DistillSettings, cost: Cost, refined: Refined, quotes_val: bool) -> dict[str, Any]:
    val = {"val accuracy": round(refined.val_accuracy, 4)} if quotes_val else {}
    return {
        "distillation": settings.mode,
        **{kind: cost[kind] for kind in COUNTED},
        **val,
        "test accuracy": round(refined.test_accuracy, 4),
        "dataset": settings.data.dataset,
        "command": settings.command,
        "seed": settings.data.seed,
    }
