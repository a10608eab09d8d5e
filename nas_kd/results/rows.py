"""What a finished study hands to its tables, files and report: frozen rows that need neither torch nor Optuna."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Literal, get_args

from nas_kd.budget import KINDS, LATENCY, Budget, Cost, kinds_of
from nas_kd.genotype import Genotype

Role = Literal["teacher", "front", "uniform", "no teacher", "random"]
State = Literal["trained", "stopped", "over budget", "failed"]
ROLES: tuple[Role, ...] = get_args(Role)  # in the order of every table: the teacher, the front, the baselines
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Row:
    """The ONNX files of a model in int8 and in float as ONNX Runtime runs them: what int8 scores on the test images (a
    fraction), bytes, milliseconds of one image; and the name of the file to `deploy`."""

    test_accuracy: float
    bytes: int
    latency_ms: float
    float_bytes: int
    float_latency_ms: float
    deploy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """One model of the result: the teacher, a member of the front, or a baseline.

    Accuracies are fractions 0–1, None where they were not measured or must not be quoted; `latency_ms` is the median of
    batch-1 runs in milliseconds; `path` is the model's folder relative to the output folder, with forward slashes, None
    for a model that is not exported; `genotype` is None for a model that is no student of the base; `best_at` are the
    levels, shares of the budget, within which no other member of the front is better; `int8` is None where a model was
    not quantised.
    Raises ValueError for a value outside its range.
    """

    name: str
    role: Role
    digest: str
    cost: Cost
    val_accuracy: float | None = None
    test_accuracy: float | None = None
    latency_ms: float | None = None
    path: str | None = None
    genotype: Genotype | None = None
    best_at: tuple[float, ...] = ()
    int8: Int8Row | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"unknown role {self.role!r}: use one of {', '.join(ROLES)}")
        for field, accuracy in (("val_accuracy", self.val_accuracy), ("test_accuracy", self.test_accuracy)):
            if accuracy is not None and not 0 <= accuracy <= 1:
                raise ValueError(f"{field} of {self.name!r} must be a fraction 0–1 or None, got {accuracy!r}")
        if self.latency_ms is not None and not 0 < self.latency_ms < math.inf:
            raise ValueError(
                f"latency_ms of {self.name!r} must be positive and finite or None, got {self.latency_ms!r}"
            )
        if self.path is not None and PurePosixPath(self.path).is_absolute():
            raise ValueError(f"path of {self.name!r} must be relative to the output folder, got {self.path!r}")

    @property
    def accuracy(self) -> float | None:
        """The accuracy to quote: on the test split where it was measured, else on the validation split."""
        return self.val_accuracy if self.test_accuracy is None else self.test_accuracy


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow:
    """One trial of the study.

    `score` is what the search maximised (None where nothing was trained); `rungs` holds (epoch, score) pairs in the
    order of training; `seconds` is the trial's wall time; `source` says who proposed the genotype ("warm start",
    "sampler"); `note` says in plain words why it was stopped, refused or failed.
    Raises ValueError for an unknown state.
    """

    number: int
    state: State
    digest: str
    cost: Cost | None = None
    score: float | None = None
    rungs: tuple[tuple[int, float], ...] = ()
    seconds: float = 0.0
    source: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"unknown state {self.state!r}: use one of {', '.join(STATES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySummary:
    """All that a report says about a study.

    `base` is the model's name; `importances` maps a parameter to its share (0–1) of the score's variance; `stages` maps
    a stage to its seconds, in the order in which they ran; `notes` are warnings to show; `environment` holds versions
    and hardware; `command` is the command line that reproduces the study; `trust` says what a rank check found of its
    ranking, empty without one.
    """

    study_name: str
    command: str
    seed: int
    base: str
    dataset: str
    budget: Budget
    models: tuple[ModelRow, ...]
    trials: tuple[TrialRow, ...] = ()
    importances: tuple[tuple[str, float], ...] = ()
    stages: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    trust: str = ""

    @property
    def teacher(self) -> ModelRow | None:
        """The teacher's row, None when there is none."""
        return next((model for model in self.models if model.role == "teacher"), None)

    @property
    def best(self) -> ModelRow | None:
        """The front's most accurate model, None for an empty front.

        Chosen by validation accuracy, so that its test accuracy stays an honest number; by the accuracy to quote only
        where no front model has one. Ties go to fewer MACs, then to fewer parameters.
        """
        return best_of([model for model in self.models if model.role == "front"])

    @property
    def beaten(self) -> tuple[tuple[ModelRow, ModelRow], ...]:
        """Members of the front that another row beats in everything, each with the most accurate row that does."""
        kinds = kinds_of(self.budget)
        pairs = (
            (member, best_of([other for other in self.models if better_in(other, member, kinds)]))
            for member in self.models
            if member.role == "front"
        )
        return tuple((member, winner) for member, winner in pairs if winner is not None)

    @property
    def levels(self) -> tuple[float, ...]:
        """The levels for which some model is the best, from the smallest."""
        return tuple(sorted({level for model in self.models for level in model.best_at}))


def best_of(models: Sequence[ModelRow]) -> ModelRow | None:
    """The most accurate model, as `StudySummary.best` says; None of none."""
    by_val = any(model.val_accuracy is not None for model in models)

    def rank(model: ModelRow) -> tuple[float, int, int]:
        accuracy = model.val_accuracy if by_val else model.accuracy
        return -1.0 if accuracy is None else accuracy, -model.cost.macs, -model.cost.params

    return max(models, key=rank, default=None)


def better_in(one: ModelRow, other: ModelRow, kinds: Sequence[str] = KINDS) -> tuple[str, ...]:
    """In what `one` is better where it is worse in nothing that both have: accuracies, latency, and costs of `kinds`.

    Empty where it is worse in anything, equal in all, or no accuracy is known of both.
    """
    pairs = [
        (name, mine, theirs)
        for (name, mine), (_, theirs) in zip(_losses(one, kinds), _losses(other, kinds), strict=True)
        if mine and theirs
    ]
    known = any(name.endswith("accuracy") for name, _, _ in pairs)
    worse = any(mine > theirs for _, mine, theirs in pairs)
    return tuple(name for name, mine, theirs in pairs if mine < theirs) if known and not worse else ()


def _losses(model: ModelRow, kinds: Sequence[str]) -> list[tuple[str, float | None]]:
    """What is better the smaller it is, with its name; None or 0 where it is not known."""
    accuracies = (("validation accuracy", model.val_accuracy), ("test accuracy", model.test_accuracy))
    costs = [
        ("MACs" if kind == "macs" else kind.replace("_", " "), model.cost[kind]) for kind in kinds if kind != LATENCY
    ]
    return [
        *((name, None if known is None else 2 - known) for name, known in accuracies),
        *costs,
        (LATENCY, model.latency_ms),
    ]


def mark_levels(models: Sequence[ModelRow], budget: Budget, levels: Sequence[float]) -> list[ModelRow]:
    """The models, each of the front with the levels, shares of `budget`, within which it is the best."""
    members = [model for model in models if model.role == "front"]
    within = {level: [m for m in members if budget.scaled(level).admits(m.cost)] for level in levels}
    best = {level: best_of(inside) for level, inside in within.items()}
    return [replace(model, best_at=tuple(level for level in levels if best[level] is model)) for model in models]


def sort_models(models: tuple[ModelRow, ...] | list[ModelRow], roles: tuple[Role, ...] = ROLES) -> list[ModelRow]:
    """`models` in the order of `roles`; within a role the dearest first: by MACs, params, then the name.

    Models of a role that is not in `roles` are left out.
    """
    chosen = [model for model in models if model.role in roles]
    return sorted(chosen, key=lambda m: (roles.index(m.role), -m.cost.macs, -m.cost.params, m.name))
