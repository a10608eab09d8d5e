"""The models that a user takes home: trained for long, tested once, kept so that a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from nas_kd.errors import CheckpointError
from nas_kd.results.rows import Role
from nas_kd.training.checkpoint import load_exactly
from nas_kd.training.data import Splits
from nas_kd.training.images import TrainingData
from nas_kd.training.loop import Run, evaluate, ignore, train
from nas_kd.training.recipe import Recipe
from nas_kd.training.resume import replace_file

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidate:
    """A student to be trained for long: what it is for, the digest of its genotype, and how to build it."""

    role: Role
    digest: str
    build: Callable[[], nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Refinement:
    """What candidates are trained and measured on, and the folder that keeps them. `key` names what the result
    depends on besides recipe and candidate: data, teacher, views, device."""

    data: TrainingData
    splits: Splits
    recipe: Recipe
    folder: Path
    key: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Refined:
    """A trained student, in eval mode, and its accuracies (fractions); the test split was looked at once."""

    network: nn.Module
    val_accuracy: float
    test_accuracy: float


def refine(candidate: Candidate, refinement: Refinement, *, report: Callable[[int, float], None] = ignore) -> Refined:
    """Trains a candidate, or fetches what an earlier run had trained, and tells `report` after every epoch.

    Raises what `train` raises.
    """
    path = refinement.folder / f"refined-{_key(candidate, refinement)}.safetensors"
    network = candidate.build()
    kept = _fetch(network, path)
    if kept is not None:
        return Refined(network=network.eval(), **kept)
    state = path.with_suffix(".resume")
    result = train(
        network,
        refinement.data,
        refinement.recipe,
        val=refinement.splits.val,
        report=report,
        run=Run(checkpoint=state),
    )
    accuracies = {"val_accuracy": result.accuracy, "test_accuracy": evaluate(network, refinement.splits.test)}
    _keep(network, accuracies, path)
    state.unlink(missing_ok=True)
    return Refined(network=network, **accuracies)


def _keep(network: nn.Module, accuracies: Mapping[str, float], path: Path) -> None:
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in network.state_dict().items()}
    metadata = {"accuracies": json.dumps(accuracies)}
    replace_file(path, lambda draft: save_file(tensors, draft, metadata=metadata))


def _fetch(network: nn.Module, path: Path) -> dict[str, float] | None:
    if not path.exists():
        return None
    try:
        load_exactly(network, load_file(path), path)
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        accuracies: dict[str, float] = json.loads(header["__metadata__"]["accuracies"])
    except (OSError, SafetensorError, CheckpointError, ValueError, KeyError) as error:
        _logger.warning("the refined model %s is damaged (%s): training it again", path, error)
        return None
    return accuracies


def _key(candidate: Candidate, refinement: Refinement) -> str:
    text = f"1 {candidate.role} {candidate.digest} {refinement.recipe} {refinement.key}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
