"""What a rank check found, as plain values with a JSON form, and in one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nas_kd.errors import OutputError

VERSION = 2
FILE = "rank_check.json"  # in the output folder of a study


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """One score: its `name`, the weights that it `start`s from ("" where it needs none), and after how many `steps`.

    `values` has one number per genotype, NaN where there is none, and higher is better unless `lower`. `tau` is
    Kendall's τ-b with the truth, `low` to `high` its interval; `over_params` the interval of how far τ is above that of
    the number of params, from the same resamples. `regrets` are those of the top 1 and the top 3, as fractions of
    accuracy. `seconds` is what one candidate costs, what is paid once left out.
    """

    name: str
    start: str
    steps: int
    lower: bool
    values: tuple[float, ...]
    tau: float
    low: float
    high: float
    over_params: tuple[float, float]
    regrets: tuple[float, ...]
    seconds: float

    @property
    def title(self) -> str:
        """The score in a few words."""
        steps = f" after {self.steps} steps" if self.steps else ""
        article = "" if self.start.endswith("weights") else "the "
        return self.name + steps + (f" from {article}{self.start}" if self.start else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRows:
    """Genotypes that were drawn alike, `random` or `near` the optimum: their digests, JSON forms, costs and truths
    (accuracies), what one truth costs on average, and every score's row, the best first."""

    name: str
    digests: tuple[str, ...]
    genotypes: tuple[str, ...]
    params: tuple[int, ...]
    macs: tuple[int, ...]
    truth: tuple[float, ...]
    truth_seconds: float
    scores: tuple[ScoreRow, ...]

    def row(self, name: str, start: str, steps: int) -> ScoreRow | None:
        """The row of one score, if it is there."""
        return next((row for row in self.scores if (row.name, row.start, row.steps) == (name, start, steps)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCheck:
    """A whole rank check. `space` holds the arguments that decide it, `default` the (name, start, steps) of the score
    by which a study ranks; `library_seconds` is what the library cost."""

    model: str
    teacher: str
    data: str
    space: Mapping[str, Any]
    budget: str
    band: float
    seed: int
    command: str
    truth_steps: int
    truth_images: int
    library_seconds: float | None
    default: tuple[str, str, int]
    groups: tuple[GroupRows, ...]
    environment: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> str:
        """A JSON object; numbers that are not finite become null."""
        return json.dumps(_finite({"version": VERSION, **asdict(self)}), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RankCheck:
        """Reads what `to_json` wrote. Raises OutputError for anything else."""
        try:
            fields = json.loads(text)
            if fields.pop("version") != VERSION:
                raise ValueError("it has another version")
            groups = tuple(_group(group) for group in fields.pop("groups"))
            default, environment = tuple(fields.pop("default")), tuple(map(tuple, fields.pop("environment")))
            return cls(groups=groups, default=default, environment=environment, **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(f"not a rank check: {error}; run it again") from error

    def sentence(self) -> str:
        """How far the ranking of a study can be trusted."""
        group = self.groups[0]
        row, params = group.row(*self.default), group.row("params", "", 0)
        kind = "random students" if group.name == "random" else "students near the optimum"
        many = f"{len(group.truth)} {kind} at {1 - self.band:.2f} to {1 + self.band:.2f} of {self.budget}"
        if row is None or params is None:
            return f"Measured on {many}, without the score that the study ranks by."
        alone = f"the number of params alone {interval(params)}"
        return (
            f"Measured on {many}: the {row.title} has Kendall's τ {interval(row)} with the accuracy after "
            f"{self.truth_steps:,} steps; {alone}. The student that the score puts first is "
            f"{100 * row.regrets[0]:.1f} points below the best. A candidate takes {share(row.seconds, group)} of the "
            "long training's time."
        )


def read_check(path: Path) -> RankCheck | None:
    """The rank check in a file, None where there is no file. Raises OutputError for one that cannot be read."""
    try:
        return RankCheck.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"cannot read {path}: {error}") from error


def interval(row: ScoreRow) -> str:
    """A score's τ and its interval."""
    return "undefined" if math.isnan(row.tau) else f"{row.tau:.2f} [{row.low:.2f}, {row.high:.2f}]"


def share(seconds: float, group: GroupRows) -> str:
    """Seconds as a share of those of a truth of the same genotypes."""
    return f"{seconds / group.truth_seconds:.1%}" if group.truth_seconds > 0 else "an unknown part"


def _group(fields: dict[str, Any]) -> GroupRows:
    scores = tuple(_row(row) for row in fields.pop("scores"))
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return GroupRows(scores=scores, **plain)


def _row(fields: dict[str, Any]) -> ScoreRow:
    numbers: dict[str, Any] = {name: _number(fields.pop(name)) for name in ("tau", "low", "high", "seconds")}
    for name in ("values", "over_params", "regrets"):
        numbers[name] = tuple(map(_number, fields.pop(name)))
    return ScoreRow(**numbers, **fields)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
