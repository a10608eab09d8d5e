"""A study that is ready to run: everything that can be checked before an image is decoded or a network trained."""

from __future__ import annotations

import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from optuna.storages import BaseStorage
from torch import nn

from nas_kd import __version__
from nas_kd.analysis.stride_reduction import reduce_stride
from nas_kd.analysis.trace import meta_image, without_storage
from nas_kd.arguments.network import NetworkSettings
from nas_kd.arguments.parsing import LOCAL
from nas_kd.arguments.search import SAMPLERS
from nas_kd.arguments.sharing import SharingSettings
from nas_kd.arguments.study import Settings
from nas_kd.arguments.teacher import TeacherSettings
from nas_kd.budget import DEVICE, Budget
from nas_kd.costs.device import RULE as DEVICE_RULE
from nas_kd.costs.peak_memory import RULE
from nas_kd.data.augment import derive_seed
from nas_kd.data.images import ImageSet
from nas_kd.data.sources import Source, open_source
from nas_kd.data.splits import DataSpec
from nas_kd.errors import DeviceError, ModelError, NasKdError, OutputError
from nas_kd.library.library import Library
from nas_kd.networks.hub import create_base
from nas_kd.networks.onnx import need
from nas_kd.preparation.cycles import cycle_facts
from nas_kd.preparation.effort import Effort, choose_effort, training_images, with_effort
from nas_kd.preparation.image_form import beside_gpu, data_spec, in_chans_of, warn_of_other_order
from nas_kd.preparation.latency import latency_facts
from nas_kd.preparation.opening import as_begun, bound_space, bounds_of, open_space, read_start, space_of
from nas_kd.progress import Stages
from nas_kd.search.own_sampler import check_own_sampler
from nas_kd.search.space import Space
from nas_kd.search.storage import (
    begun_study,
    check_study,
    close_storage,
    open_storage,
    set_aside,
    sqlite_url,
)
from nas_kd.search.trials import objectives
from nas_kd.training.checkpoint import load_checkpoint
from nas_kd.training.evaluation import LOOK_CALIBRATION
from nas_kd.training.ranks import current, gpu
from nas_kd.training.recipe import Recipe
from nas_kd.training.transfer import HeadOrigin

# by default: images that a training sees on a CPU, and the most epochs; a GPU affords ten times as many
TEACHER, REFINE = (60_000, 20), (60_000, 15)
_GPU = 10
TEACHER_LR = 0.03
# of a teacher whose weights come from elsewhere: more epochs were no better, nor AdamW at 3e-4
TRANSFER, TRANSFER_LR = (60_000, 4), 0.005
_FEW, _MORE = 4000, 20  # images that a small data set is seen for, in at most so many epochs
_PROXY_RATE = 0.4  # of the refinement's: gentler short trainings rank better, docs/results/rank_check.md
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """A study that is ready to run: checked settings, the base and its space. Nothing is trained yet.

    The base's weights come from elsewhere when it is `transferred`, its classifier too when `trained_elsewhere`: then
    it can teach as it is. `other_teacher` teaches instead of the base; `other_head` is the origin of its classifier
    where its weights come from elsewhere."""

    settings: Settings
    device: torch.device
    out: Path
    space: Space[nn.Module]
    budget: Budget
    data: DataSpec
    transferred: bool
    trained_elsewhere: bool
    storage: BaseStorage
    effort: Effort
    train_images: int  # about: more is known when they are decoded
    other_teacher: nn.Module | None = None
    other_head: HeadOrigin | None = None

    @property
    def val_is_seen(self) -> bool:
        """Whether what teaches or is begun with may have been trained on the validation images."""
        return self.trained_elsewhere or self.other_head == "own"

    @property
    def head_origin(self) -> HeadOrigin | None:
        """Of a base whose weights come from elsewhere."""
        if not self.transferred:
            return None
        return "better" if self.trained_elsewhere else "new"

    def with_library(self, library: Library) -> Job:
        """The job once its library is there: students start from it."""
        return dataclasses.replace(self, space=self.space.with_library(library))

    @property
    def cache(self) -> Path:
        """Where content-addressed files are kept."""
        return self.out / "cache"


def prepare(settings: Settings, storage: BaseStorage | None = None, stages: Stages | None = None) -> Job:
    """Checks everything that can be checked before an image is decoded or a network trained.

    `storage` holds the study instead of the one that the settings name; `stages` shows what takes long, the measuring
    of latencies. What the settings leave open is decided here, or as the study began.
    Raises a NasKdError for each mistake that a user can make.
    """
    if settings.output.int8:
        need("onnx", "onnxruntime")
    device = training_device(settings.training.device, amp=settings.training.amp)
    out = open_folder(Path(settings.output.out or Path("results") / settings.name))
    source = open_source(settings.data.dataset, settings.data.data_dir, settings.data.class_map)
    images = training_images(source, settings.data)
    storage = storage or open_storage(storage_url(settings.sharing, out), grace=settings.sharing.grace_period)
    try:
        begun = None if settings.sharing.new_study else begun_study(storage, settings.name)
        settings = as_begun(settings, begun)
        networks = _networks(settings, settings.data.num_classes or len(source.class_names))
        space = open_space(settings, networks.base)
        if networks.other is not None:
            try_out(networks.other, space.input_size)
        data = beside_gpu(_data(settings, source, space, networks), device)
        space = space.with_given(read_start(Path(file), space) for file in settings.search.start_from)
        space = bound_space(space, settings, stages, begun)  # last, since latencies take their time
        assert space.budget is not None
        _check_beginning(space, settings)
        if settings.sharing.new_study and (kept := set_aside(storage, settings.name)):
            _logger.warning("the study that was %r is now %r", settings.name, kept)
        effort = choose_effort(settings, networks.base, space.analysis, images, storage, gpu=device.type != "cpu")
        settings = with_effort(settings, effort)
        check_study(storage, settings.name, choices_made(settings, space.budget))
    except NasKdError:
        close_storage(storage)
        raise
    return Job(
        settings=settings,
        device=device,
        out=out,
        space=space,
        budget=space.budget,
        data=data,
        transferred=settings.network.is_weighted,
        trained_elsewhere=networks.whole,
        storage=storage,
        effort=effort,
        train_images=images,
        other_teacher=networks.other,
        other_head=networks.other_head,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Networks:
    """The base, `whole` when its weights came with a head for these classes; and another teacher, with the origin of
    its head where it has weights."""

    base: nn.Module
    whole: bool
    other: nn.Module | None
    other_head: HeadOrigin | None


def _networks(settings: Settings, classes: int) -> _Networks:
    network, channels = settings.network, in_chans_of(settings.network, settings.data)
    base = make_base(network, classes, channels, settings.seed)
    other, other_head = make_teacher(settings.teacher, network.reduction, classes, channels, settings.seed)
    whole = brings_head(base) if settings.network.pretrained else False
    if settings.network.initial_checkpoint:
        whole = load_checkpoint(base, Path(settings.network.initial_checkpoint))
    return _Networks(base=base, whole=whole, other=other, other_head=other_head)


def _check_beginning(space: Space[nn.Module], settings: Settings) -> None:
    """Warns of genotypes that the search cannot begin with. Raises a NasKdError for a sampler that cannot propose for
    the space."""
    if space.budget is None:
        return
    for file, genotype in zip(settings.search.start_from, space.given, strict=True):
        if words := space.budget.explain(space.cost(genotype)):
            _logger.warning("the genotype in %s is left out, it is %s", file, words)
    if settings.search.sampler not in SAMPLERS:
        directions = list(objectives(space.budget, settings.search.maximize).values())
        check_own_sampler(settings.search.sampler, settings.seed, directions, space.distributions)


def _data(settings: Settings, source: Source, space: Space[nn.Module], networks: _Networks) -> DataSpec:
    """The images, in the form that the network wants that brings weights; warns of classes in another order."""
    if settings.network.is_weighted:
        weights = settings.network.initial_checkpoint or f"timm's {settings.network.model}"
        warn_of_other_order(source, settings.data, networks.base, weights)
        return data_spec(settings.data, space.input_size, source, networks.base, weighted=True)
    other = networks.other if networks.other_head is not None else None
    return data_spec(settings.data, space.input_size, source, other or networks.base, weighted=other is not None)


def storage_url(sharing: SharingSettings, out: Path) -> str:
    """Where the study lives: as given, or a file in the output folder."""
    return sharing.storage or sqlite_url(out / "study.db")


def brings_head(pretrained: nn.Module) -> bool:
    """Whether a network with timm's weights has their classifier: timm drops one that has other classes."""
    config: Any = getattr(pretrained, "pretrained_cfg", None) or {}
    return bool(config.get("num_classes") == getattr(pretrained, "num_classes", None))


def training_device(name: str | None, *, amp: bool) -> torch.device:
    """The device of this name (`choose_device`). Warns of mixed precision where it is slower: a processor without
    AVX-512 computes bfloat16 step by step (docs/decisions.md)."""
    device = choose_device(name)
    if amp and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        _logger.warning(
            "this processor has no fast bfloat16: trainings are several times slower with --amp, not faster"
        )
    return device


def choose_device(name: str | None) -> torch.device:
    """The device of this name, by default a GPU where there is one, of torchrun's processes each its own. Raises
    DeviceError when it is not there."""
    place = current().place
    if place is not None and name is not None and name.startswith("cuda:"):
        raise DeviceError(
            f"torchrun's processes have a GPU each: leave out --device {name}, or set CUDA_VISIBLE_DEVICES"
        )
    if name in (None, "cuda") and torch.cuda.is_available() and place is not None:
        return gpu(place)
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device makes tensors, but holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        text = str(error).splitlines()[0][:120]
        raise DeviceError(f"there is no device {name!r} on this machine ({text}): use --device cpu") from error
    return device


def open_folder(folder: Path, option: str = "--out") -> Path:
    """Creates the output folder that `option` names. Raises OutputError when it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"cannot write the output folder {folder}: {reason}; choose another {option}") from error
    return folder


def make_base(network: NetworkSettings, classes: int, in_chans: int, seed: int) -> nn.Module:
    """The base from timm, its strides reduced where asked for; the same initial weights for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "weights"))
        base = create_base(network.model, pretrained=network.pretrained, num_classes=classes, in_chans=in_chans)
    return base if network.reduction is None else reduce_stride(base, network.reduction, in_chans)


def make_teacher(
    asked: TeacherSettings, reduction: int | None, classes: int, in_chans: int, seed: int
) -> tuple[nn.Module | None, HeadOrigin | None]:
    """The teacher, and the origin of its head where its weights come from elsewhere; without one nothing."""
    if asked.model is None:
        return None, None
    pretrained = asked.is_weighted and asked.checkpoint is None
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "teacher"))
        teacher = create_base(asked.model, pretrained=pretrained, num_classes=classes, in_chans=in_chans)
    whole = brings_head(teacher)
    if asked.checkpoint is not None:
        whole = load_checkpoint(teacher, Path(asked.checkpoint))
    if reduction is not None and not asked.model.startswith(LOCAL):
        reduce_stride(teacher, reduction, in_chans)
    return teacher, ("own" if whole else "new") if asked.is_weighted else None


def try_out(network: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Raises ModelError when the network does not run on such images."""
    meta = without_storage(network).eval()
    try:
        meta(meta_image(meta, input_size))
    except Exception as error:  # whatever a model's own code raises
        size, text = "×".join(map(str, input_size)), (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{type(network).__name__} cannot run on {size} images: {text[:200]}; choose another --img-size"
        ) from error


def choices_made(settings: Settings, budget: Budget) -> dict[str, Any]:
    """The part of the configuration that is known before anything is trained."""
    return {
        "model": settings.network.model,
        "maximize": settings.search.maximize,
        "objectives": list(objectives(budget, settings.search.maximize)),
        **({"peak memory": RULE} if "peak_memory" in budget else {}),
        **({"device": DEVICE_RULE} if set(DEVICE) & set(budget) else {}),
        **latency_facts(settings.latency, budget),
        **cycle_facts(settings, budget),
        **space_of(settings.choices),
        **bounds_of(settings),
        "augmentation": settings.data.augment.text,
        "proxy": repr(proxy_recipe_of(settings)),
        "score": f"accuracy after batch norms see {LOOK_CALIBRATION} images",
        "version": __version__,
    }


def recipe_of(settings: Settings, epochs: int) -> Recipe:
    """How students are trained for so many epochs."""
    return Recipe(
        epochs=epochs,
        batch_size=settings.training.batch_size,
        lr=settings.training.lr,
        amp=settings.training.amp,
        seed=settings.seed,
    )


def proxy_recipe_of(settings: Settings) -> Recipe:
    """How the short trainings are done that a search ranks students by."""
    return dataclasses.replace(
        recipe_of(settings, settings.proxy.epochs), lr=settings.proxy.lr or _PROXY_RATE * settings.training.lr
    )


def transfer_epochs(given: int | None, images: int, device: torch.device) -> int:
    """The epochs of a teacher whose weights come from elsewhere: as given, or few, and more of small data."""
    most = max(TRANSFER[1], min(_MORE, round(_FEW / images)))
    return given or max(1, min(most, round(TRANSFER[0] * (1 if device.type == "cpu" else _GPU) / images)))


def epochs_of(given: int | None, default: tuple[int, int], images: int, device: torch.device) -> int:
    """The epochs of a training on so many images: as given, or by their number and the device."""
    seen, most = default
    if device.type != "cpu":
        seen, most = _GPU * seen, _GPU * most
    return given or max(1, min(most, round(seen / images)))


def refine_epochs(job: Job, images: ImageSet | int) -> int:
    """The epochs that a model of the results is trained for on these images, or on so many."""
    count = images if isinstance(images, int) else len(images)
    return epochs_of(job.settings.refinement.epochs, (job.effort.refine_images, REFINE[1]), count, job.device)
