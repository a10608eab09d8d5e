"""The models that a user takes home: trained for long, tested once, kept so that a killed run goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from nas_kd.data.images import TrainingData
from nas_kd.data.splits import Splits
from nas_kd.errors import CheckpointError
from nas_kd.files.digests import digest_of
from nas_kd.files.tensors import read_tensors, write_tensors
from nas_kd.training.checkpoint import load_exactly
from nas_kd.training.evaluation import evaluate
from nas_kd.training.loop import Run, ignore, train
from nas_kd.training.online import accuracies, train_online
from nas_kd.training.recipe import Recipe

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidate:
    """A student to be trained for long: what it is for, a digest that names it, and how to build it. The argument of
    `build` numbers students that learn together, whose weights must differ; one that learns alone is number 0, and is
    `settled` before it is trained (one that was trained before is not)."""

    role: str
    digest: str
    build: Callable[[int], nn.Module]
    settle: Callable[[nn.Module], object] = nn.Module.eval


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Refinement:
    """What candidates are trained and measured on, and the folder that keeps them. `key` names what the result
    depends on besides recipe and candidate: data, teacher, views, device. With `peers`, that many students learn
    together by online distillation (`training.online`) and the best one on the validation images is taken; 0 is one
    student alone, beside the teacher whose logits `data` brings."""

    data: TrainingData
    splits: Splits
    recipe: Recipe
    folder: Path
    key: str
    peers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracies:
    """What a network scored on the validation and on the test images (fractions)."""

    val: float
    test: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Refined:
    """A trained student, in eval mode, and its accuracies (fractions); the test split was looked at once.

    After online distillation `peers` holds what each student scored, and last their teacher.
    """

    network: nn.Module
    val_accuracy: float
    test_accuracy: float
    peers: tuple[Accuracies, ...] = ()

    @property
    def best(self) -> int:
        """The number of the peer that was taken: the first of those that were best on the validation images."""
        return max(range(len(self.peers) - 1), key=lambda number: self.peers[number].val)


def refine(candidate: Candidate, refinement: Refinement, *, report: Callable[[int, float], None] = ignore) -> Refined:
    """Trains a candidate, or fetches what an earlier run had trained, and tells `report` after every epoch.

    Raises what `train` raises, or `train_online`.
    """
    path = kept_at(candidate, refinement)
    kept = _fetch(candidate, path)
    if kept is not None:
        return kept
    state = path.with_suffix(".resume")
    refined = (_together if refinement.peers else _alone)(
        candidate, refinement, report, Run(checkpoint=state, sparing=True, shared=True)
    )
    _keep(refined, path)
    state.unlink(missing_ok=True)
    return refined


def kept_at(candidate: Candidate, refinement: Refinement) -> Path:
    """The file that keeps a candidate once it is trained."""
    return refinement.folder / f"refined-{_key(candidate, refinement)}.safetensors"


def _alone(candidate: Candidate, refinement: Refinement, report: Callable[[int, float], None], run: Run) -> Refined:
    network, splits = candidate.build(0), refinement.splits
    candidate.settle(network)
    result = train(network, refinement.data, refinement.recipe, val=splits.val, report=report, run=run)
    test = evaluate(network, splits.test)
    return Refined(network=network, val_accuracy=result.accuracy, test_accuracy=test)


def _together(candidate: Candidate, refinement: Refinement, report: Callable[[int, float], None], run: Run) -> Refined:
    students, splits = [candidate.build(number) for number in range(refinement.peers)], refinement.splits
    result = train_online(students, refinement.data, refinement.recipe, val=splits.val, report=report, run=run)
    scores = zip(result.accuracies, accuracies(result.ensemble, splits.test), strict=True)
    peers = tuple(Accuracies(val=val, test=test) for val, test in scores)
    best = peers[result.best]
    return Refined(network=result.student, val_accuracy=best.val, test_accuracy=best.test, peers=peers)


def _keep(refined: Refined, path: Path) -> None:
    scores: dict[str, Any] = {"val_accuracy": refined.val_accuracy, "test_accuracy": refined.test_accuracy}
    if refined.peers:
        scores["peers"] = [[peer.val, peer.test] for peer in refined.peers]
    write_tensors(path, refined.network.state_dict(), {"accuracies": json.dumps(scores)})


def _fetch(candidate: Candidate, path: Path) -> Refined | None:
    if not path.exists():
        return None
    network = candidate.build(0)
    try:
        tensors, facts = read_tensors(path)
        load_exactly(network, tensors, path)
        scores = json.loads(facts["accuracies"])
        peers = tuple(Accuracies(val=val, test=test) for val, test in scores.pop("peers", ()))
        return Refined(network=network.eval(), peers=peers, **scores)
    except (OSError, SafetensorError, CheckpointError, ValueError, KeyError, TypeError) as error:
        _logger.warning("the refined model %s is damaged (%s): training it again", path, error)
        return None


def _key(candidate: Candidate, refinement: Refinement) -> str:
    peers = f" {refinement.peers} peers" if refinement.peers else ""
    text = f"1 {candidate.role} {candidate.digest} {refinement.recipe} {refinement.key}{peers}"
    return digest_of(text)
