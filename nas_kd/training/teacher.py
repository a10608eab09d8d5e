"""The teacher: trained here and cached, or taken from outside; and protected from further training."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nas_kd.data.augment import AnyAugmentation
from nas_kd.data.images import AugmentedImages, ImageSet
from nas_kd.data.splits import Splits
from nas_kd.errors import CheckpointError, DataError
from nas_kd.files.digests import digest_of
from nas_kd.files.tensors import read_tensors, write_tensors
from nas_kd.training.checkpoint import load_checkpoint, load_exactly
from nas_kd.training.evaluation import CALIBRATION, evaluate, is_below, predict_logits
from nas_kd.training.loop import Run, ignore, train
from nas_kd.training.recipe import Recipe
from nas_kd.training.transfer import HeadOrigin, settle_weights
from nas_kd.training.views import weights_digest

__all__ = [
    "Teacher",
    "TeacherCache",
    "TeacherResult",
    "Teaching",
    "adopt_teacher",
    "load_checkpoint",
    "prepare_teacher",
]

_NEAR_CHANCE = 0.1  # a teacher less than this share of the way from chance to certainty, and than twice chance, warns
_STATES = 10  # times the state of a running training is written; each costs about as much as 10 steps
Moments = tuple[tuple[float, ...], tuple[float, ...]]
_logger = logging.getLogger(__name__)


class Teacher(nn.Module):
    """A frozen copy of a network that cannot leave eval mode or learn: batch norms would drift otherwise."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode, whatever is asked for."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Teacher:
        """Stays without gradients, whatever is asked for."""
        return super().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits N×K for normalised images N×C×H×W, without gradients."""
        logits: Tensor = self.network(images)
        return logits


class Renormalised(nn.Module):
    """A network that wants other means and stds than the images come with, as (mean, std) per channel on the scale 0–1:
    it gets what it wants."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, given: Moments, wanted: Moments) -> None:
        super().__init__()
        self.network = network
        mean, std, own_mean, own_std = (torch.tensor(values).view(-1, 1, 1) for values in (*given, *wanted))
        self.register_buffer("scale", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)

    def forward(self, images: Tensor) -> Tensor:
        """What the network says of N×C×H×W images that are normalised as they come."""
        logits: Tensor = self.network(images * self.scale + self.shift)
        return logits


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherResult:
    """A network that is ready to teach, in eval mode. `val_accuracy` is a fraction; when `trained_here` is False the
    network may have seen the validation images, so that accuracy is not to be quoted. `seconds` were spent in this
    run: about 0 when it came from the cache."""

    network: nn.Module
    val_accuracy: float
    digest: str
    trained_here: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherCache:
    """Where trained teachers are kept, and a `key` that names the network (model, options, first weights)."""

    folder: Path
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Teaching:
    """How a teacher is trained, on augmented images; `head` is the origin of its classifier where its other weights
    come from elsewhere, None where all are drawn at random."""

    recipe: Recipe
    augmentation: AnyAugmentation
    head: HeadOrigin | None = None


def adopt_teacher(network: nn.Module, splits: Splits, *, augmentation: AnyAugmentation, seed: int = 0) -> TeacherResult:
    """Takes a network that was trained elsewhere for these classes: settles it (`transfer.settle`) and measures it.

    Its outputs stay what they were, but for the order of its classes. Warns when it is below a linear probe of its own
    features, or near chance. Raises DataError when its number of outputs does not fit the data.
    """
    _check_outputs(network, splits)
    started = time.monotonic()
    seen = AugmentedImages(splits.train, augmentation, seed).sample(CALIBRATION)
    found = settle_weights(network, splits, seen, head="own")
    if found.probe is not None and is_below(found.accuracy, found.probe, len(splits.val)):
        _logger.warning(
            "THE TEACHER IS BELOW ITS LINEAR PROBE: %.1f%% of the validation images, a logistic regression on its own "
            "features gives %.1f%%. Its classes may be others than those of the images, or the images normalised "
            "otherwise; --teacher-epochs 4 fits its head anew",
            100 * found.accuracy,
            100 * found.probe,
        )
    return _result(network.eval(), splits, trained_here=False, seconds=time.monotonic() - started)


def prepare_teacher(
    network: nn.Module,
    splits: Splits,
    teaching: Teaching,
    *,
    cache: TeacherCache,
    report: Callable[[int, float], None] = ignore,
) -> TeacherResult:
    """Trains `network` in place on the training split, or fetches what an earlier run had trained with all the same.

    One whose weights come from elsewhere is settled first (`transfer.settle`), which is reported as epoch 0, then
    trained, and is the better of the two by validation. The weights are cached as safetensors by digest; a killed
    training loses at most a tenth of its epochs. Otherwise validation images are only looked at. Warns when the result
    is near chance. Raises DataError when the network does not fit the data, TrainingError and OutputError as `train`
    does.
    """
    _check_outputs(network, splits)
    started, recipe = time.monotonic(), teaching.recipe
    path = cache.folder / f"teacher-{_key(network, splits, teaching, cache.key)}.safetensors"
    if not _fetch(network, path):
        state = path.with_suffix(".resume")
        often = replace(recipe, eval_epochs=tuple(range(1, recipe.epochs + 1, max(1, recipe.epochs // _STATES))))
        data = AugmentedImages(splits.train, teaching.augmentation, recipe.seed)
        task = _Task(network, splits, data, often, report, Run(checkpoint=state, shared=True))
        if teaching.head is None:
            _train(task)
        else:
            _transfer(task, teaching.head)
        write_tensors(path, network.state_dict())
        state.unlink(missing_ok=True)
    here = teaching.head in (None, "new")
    return _result(network.eval(), splits, trained_here=here, seconds=time.monotonic() - started)


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """A training of a teacher."""

    network: nn.Module
    splits: Splits
    data: AugmentedImages
    recipe: Recipe
    report: Callable[[int, float], None]
    run: Run


def _train(task: _Task) -> float:
    """The accuracy on validation images after it."""
    return train(task.network, task.data, task.recipe, val=task.splits.val, report=task.report, run=task.run).accuracy


def _transfer(task: _Task, head: HeadOrigin) -> None:
    """Settles the network, trains it, and takes the training back when it made it worse."""
    network = task.network
    found = settle_weights(network, task.splits, task.data.sample(CALIBRATION), head=head)
    task.report(0, found.accuracy)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    tuned = _train(task)
    _logger.info(
        "the teacher is right on %.1f%% of the validation images before its training, on %.1f%% after %d epochs",
        100 * found.accuracy,
        100 * tuned,
        task.recipe.epochs,
    )
    if tuned < found.accuracy:
        network.load_state_dict(before)


def _fetch(network: nn.Module, path: Path) -> bool:
    if not path.exists():
        return False
    try:
        load_exactly(network, read_tensors(path)[0], path)
    except (OSError, SafetensorError, CheckpointError) as error:
        _logger.warning("the cached teacher %s is damaged (%s): training it again", path, error)
        return False
    _logger.info("the teacher comes from %s", path)
    return True


def _key(network: nn.Module, splits: Splits, teaching: Teaching, key: str) -> str:
    shapes = [(name, tuple(tensor.shape)) for name, tensor in network.state_dict().items()]
    text = f"1 {key} {network!r} {shapes} {splits.digest} {teaching.recipe} {teaching.augmentation}"
    if teaching.head is not None:  # which weights these are no name says
        text += f" transfer 1 {teaching.head} {weights_digest(network)}"
    return digest_of(text)


def _result(network: nn.Module, splits: Splits, *, trained_here: bool, seconds: float) -> TeacherResult:
    accuracy, chance = evaluate(network, splits.val), _chance(splits.val)
    if accuracy < chance + min(chance, _NEAR_CHANCE * (1 - chance)):
        _logger.warning(
            "THE TEACHER IS NEAR CHANCE: %.1f%% of the validation images, the most frequent class alone gives %.1f%%. "
            "Students will learn little from it: give trained weights (--pretrained, --initial-checkpoint) or train it "
            "longer",
            100 * accuracy,
            100 * chance,
        )
    digest = weights_digest(network)[:16]
    return TeacherResult(
        network=network, val_accuracy=accuracy, digest=digest, trained_here=trained_here, seconds=seconds
    )


def _chance(images: ImageSet) -> float:
    """The accuracy of always guessing the most frequent class."""
    return int(images.labels.bincount().max()) / len(images)


def _check_outputs(network: nn.Module, splits: Splits) -> None:
    logits = predict_logits(network, splits.val[:2])
    if logits.ndim != 2 or logits.shape[1] < len(splits.class_names):
        raise DataError(
            f"the network gives {tuple(logits.shape)[1:]} outputs for {len(splits.class_names)} classes: create it "
            f"with num_classes={splits.num_classes}"
        )
