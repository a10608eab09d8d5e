"""The teacher: trained here and cached, or taken from outside; and protected from further training."""

from __future__ import annotations

import copy
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nas_kd.errors import CheckpointError, DataError
from nas_kd.training.augment import AnyAugmentation
from nas_kd.training.checkpoint import load_checkpoint, load_exactly
from nas_kd.training.data import Splits
from nas_kd.training.images import AugmentedImages, Images
from nas_kd.training.loop import Run, evaluate, ignore, predict_logits, train
from nas_kd.training.recipe import Recipe
from nas_kd.training.tensor_files import read_tensors, write_tensors
from nas_kd.training.views import weights_digest

__all__ = ["Teacher", "TeacherCache", "TeacherResult", "adopt_teacher", "load_checkpoint", "prepare_teacher"]

_NEAR_CHANCE = 0.1  # a teacher less than this share of the way from chance to certainty, and than twice chance, warns
_STATES = 10  # times the state of a running training is written; each costs about as much as 10 steps
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


def adopt_teacher(network: nn.Module, splits: Splits) -> TeacherResult:
    """Takes a network that was trained elsewhere as it is, and measures it.

    Warns when it is near chance. Raises DataError when its number of outputs does not fit the data.
    """
    _check_outputs(network, splits)
    return _result(network.eval(), splits, trained_here=False, seconds=0.0)


def prepare_teacher(
    network: nn.Module,
    splits: Splits,
    *,
    recipe: Recipe,
    augmentation: AnyAugmentation,
    cache: TeacherCache,
    report: Callable[[int, float], None] = ignore,
) -> TeacherResult:
    """Trains `network` in place on the training split, or fetches what an earlier run had trained with all the same.

    The weights are cached as safetensors by digest; a killed training loses at most a tenth of its epochs. Validation
    images are only looked at. Warns when the result is near chance. Raises DataError when the network does not fit the
    data, TrainingError and OutputError as `train` does.
    """
    _check_outputs(network, splits)
    started = time.monotonic()
    path = cache.folder / f"teacher-{_key(network, splits, recipe, augmentation, cache.key)}.safetensors"
    if not _fetch(network, path):
        state = path.with_suffix(".resume")
        often = replace(recipe, eval_epochs=tuple(range(1, recipe.epochs + 1, max(1, recipe.epochs // _STATES))))
        data = AugmentedImages(splits.train, augmentation, recipe.seed)
        train(network, data, often, val=splits.val, report=report, run=Run(checkpoint=state))
        write_tensors(path, network.state_dict())
        state.unlink(missing_ok=True)
    return _result(network.eval(), splits, trained_here=True, seconds=time.monotonic() - started)


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


def _key(network: nn.Module, splits: Splits, recipe: Recipe, augmentation: AnyAugmentation, key: str) -> str:
    shapes = [(name, tuple(tensor.shape)) for name, tensor in network.state_dict().items()]
    text = f"1 {key} {network!r} {shapes} {splits.digest} {recipe} {augmentation}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


def _chance(images: Images) -> float:
    """The accuracy of always guessing the most frequent class."""
    return int(images.labels.bincount().max()) / len(images)


def _check_outputs(network: nn.Module, splits: Splits) -> None:
    logits = predict_logits(network, splits.val[:2])
    if logits.ndim != 2 or logits.shape[1] < len(splits.class_names):
        raise DataError(
            f"the network gives {tuple(logits.shape)[1:]} outputs for {len(splits.class_names)} classes: create it "
            f"with num_classes={splits.num_classes}"
        )
