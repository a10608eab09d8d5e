"""The Pareto front, and the file that lists it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt

from nas_kd.budget import COUNTED, KINDS, ON_DEVICE, Cost
from nas_kd.errors import OutputError
from nas_kd.files.atomic import write_text
from nas_kd.results.rows import Int8Row, ModelRow, Role, sort_models

T = TypeVar("T")
INT8_COLUMNS = (
    "int8_test_accuracy",
    "int8_bytes",
    "int8_latency_ms",
    "float_bytes",
    "float_latency_ms",
    "deploy",
)  # last, where models were quantised
COLUMNS = (
    "model",
    "digest",
    "role",
    "val_accuracy",
    "test_accuracy",
    *COUNTED,
    *ON_DEVICE,
    "latency_ms",
    "best_at",
    "path",
)
_FILE_ORDER: tuple[Role, ...] = ("front", "teacher", "uniform", "no teacher", "random")


def front(items: Sequence[T], values: Sequence[Sequence[float]] | npt.NDArray[np.floating]) -> list[T]:
    """The items whose values no other item's values dominate.

    `values` is N x K, one row per item: the first value is maximised (a score), the others are minimised (costs). A row
    dominates another when it is nowhere worse and somewhere better. A row with a NaN never enters and never keeps
    another out. Of items with equal values only the first is kept. The result is sorted by falling score, then by
    rising costs, so its values do not depend on the order of `items`.
    Raises ValueError when `values` does not hold one row of at least one value per item.

    >>> front(["big", "small", "bad"], [(0.9, 100), (0.8, 10), (0.7, 50)])
    ['big', 'small']
    """
    if len(items) == 0 and len(values) == 0:
        return []
    table = np.array(values, dtype=float)  # a copy: the sign of the first column is turned
    if table.ndim != 2 or table.shape[0] != len(items) or table.shape[1] == 0:
        raise ValueError(f"values must be {len(items)} rows of at least one number each, got shape {table.shape}")
    table[:, 0] *= -1
    # A row can only be dominated by one that sorts before it; the sort is stable, so the first of equals stays.
    order = [row for row in np.lexsort(table.T[::-1]) if not np.isnan(table[row]).any()]
    kept: list[int] = []
    for row in order:
        if not (table[kept] <= table[row]).all(axis=1).any():
            kept.append(int(row))
    return [items[row] for row in kept]


def write_front_csv(path: Path, models: Sequence[ModelRow]) -> None:
    """Writes every model to `path`, atomically: the front first, then the teacher, then the baselines.

    Within a role the model with the most MACs comes first. Accuracies are fractions with four decimals, `latency_ms`
    has four too, costs are exact (`size` and `peak_memory` in bytes), `best_at` lists the levels (shares of the budget)
    that a model is the best of, a missing value is an empty cell; `path` is relative to the file's folder.
    Where models were quantised, `INT8_COLUMNS` follow. Raises OutputError when the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    quantised = any(model.int8 is not None for model in models)
    writer.writerow((*COLUMNS, *INT8_COLUMNS) if quantised else COLUMNS)
    ordered = sort_models(list(models), _FILE_ORDER)
    writer.writerows((*_cells(model), *(_int8_cells(model.int8) if quantised else ())) for model in ordered)
    write_text(path, text.getvalue())


def read_front_csv(path: Path) -> tuple[ModelRow, ...]:
    """Reads what `write_front_csv` wrote; the genotypes, which the file does not hold, are None.

    Raises OutputError when the file is missing or is not such a file.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return tuple(_row(cells) for cells in csv.DictReader(file, strict=True))
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror}; run the study again to write it") from error
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise OutputError(f"{path} is no list of models ({error}); delete it and run the study again") from error


def _cells(model: ModelRow) -> tuple[str | int, ...]:
    return (
        model.name,
        model.digest,
        model.role,
        _decimals(model.val_accuracy, 4),
        _decimals(model.test_accuracy, 4),
        *(model.cost[kind] if kind in KINDS else model.cost[kind] or "" for kind in (*COUNTED, *ON_DEVICE)),
        _decimals(model.latency_ms, 4),
        " ".join(f"{level:g}" for level in model.best_at),
        model.path or "",
    )


def _int8_cells(int8: Int8Row | None) -> tuple[str | int, ...]:
    if int8 is None:
        return ("",) * len(INT8_COLUMNS)
    return (
        _decimals(int8.test_accuracy, 4),
        int8.bytes,
        _decimals(int8.latency_ms, 3),
        int8.float_bytes,
        _decimals(int8.float_latency_ms, 3),
        int8.deploy,
    )


def _row(cells: dict[str, str]) -> ModelRow:
    return ModelRow(
        name=cells["model"],
        role=cast(Role, cells["role"]),  # checked by ModelRow
        digest=cells["digest"],
        cost=_cost(cells),
        val_accuracy=_number(cells["val_accuracy"]),
        test_accuracy=_number(cells["test_accuracy"]),
        latency_ms=_number(cells["latency_ms"]),
        best_at=tuple(float(level) for level in (cells.get("best_at") or "").split()),
        path=cells["path"] or None,
        int8=_int8(cells) if cells.get("deploy") else None,
    )


def _int8(cells: dict[str, str]) -> Int8Row:
    return Int8Row(
        test_accuracy=float(cells["int8_test_accuracy"]),
        bytes=int(cells["int8_bytes"]),
        latency_ms=float(cells["int8_latency_ms"]),
        float_bytes=int(cells["float_bytes"]),
        float_latency_ms=float(cells["float_latency_ms"]),
        deploy=cells["deploy"],
    )


def _cost(cells: dict[str, str]) -> Cost:
    """Bytes may be missing: an older file has no such columns, and no cost need count them."""
    others = {kind: int(cells[kind]) for kind in (*COUNTED, *ON_DEVICE) if kind not in KINDS and cells.get(kind)}
    return Cost(params=int(cells["params"]), macs=int(cells["macs"]), **others)


def _decimals(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _number(cell: str) -> float | None:
    return float(cell) if cell else None
