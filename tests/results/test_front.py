from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas_kd.budget import COUNTED
from nas_kd.errors import OutputError
from nas_kd.results.front import COLUMNS, INT8_COLUMNS, front, read_front_csv, write_front_csv
from nas_kd.results.rows import Int8Row, ModelRow, StudySummary

# Few distinct numbers, so that ties and duplicates are common; NaN and infinities among them.
NUMBERS = st.sampled_from([0.0, -0.0, 1.0, 2.0, 3.0, math.inf, -math.inf, math.nan])
ROWS = st.integers(1, 4).flatmap(lambda width: st.lists(st.tuples(*[NUMBERS] * width), max_size=12))


def dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    nowhere_worse = one[0] >= other[0] and all(a <= b for a, b in zip(one[1:], other[1:], strict=True))
    return nowhere_worse and one != other


def brute_force(rows: list[tuple[float, ...]]) -> set[int]:
    whole = [index for index, row in enumerate(rows) if not any(map(math.isnan, row))]
    return {
        index
        for index in whole
        if not any(dominates(rows[rival], rows[index]) for rival in whole)
        and not any(rows[rival] == rows[index] for rival in whole if rival < index)
    }


@given(ROWS)
def test_front_equals_brute_force(rows: list[tuple[float, ...]]) -> None:
    members = front(list(range(len(rows))), rows)
    assert len(members) == len(set(members))
    assert set(members) == brute_force(rows)


@given(ROWS, st.randoms(use_true_random=False))
def test_front_values_ignore_the_order(rows: list[tuple[float, ...]], draw: object) -> None:
    shuffled = list(rows)
    draw.shuffle(shuffled)  # type: ignore[attr-defined]
    assert front(shuffled, shuffled) == front(rows, rows)


@given(ROWS)
def test_front_of_a_front_is_itself(rows: list[tuple[float, ...]]) -> None:
    once = front(rows, rows)
    assert front(once, once) == once


def test_front_takes_numpy_and_leaves_it_alone() -> None:
    values = np.array([[0.9, 100], [0.9, 90], [0.5, 95], [0.4, 10]])
    before = values.copy()
    assert front("abcd", values) == ["b", "d"]
    assert (values == before).all()


def test_front_keeps_the_first_of_equals() -> None:
    assert front(["worse", "first", "second"], [(0.8, 5), (0.9, 5), (0.9, 5)]) == ["first"]


def test_front_of_nothing() -> None:
    assert front([], []) == []
    assert front(["nan"], [(math.nan, 1)]) == []


@pytest.mark.parametrize("values", [[(1, 2)], [1, 2], [(), ()], []])
def test_front_refuses_values_that_do_not_fit(values: list[object]) -> None:
    with pytest.raises(ValueError, match="values must be 2 rows"):
        front(["a", "b"], values)  # type: ignore[arg-type]


def test_csv_round_trip(tmp_path: Path, summary: StudySummary) -> None:
    path = tmp_path / "new folder" / "front.csv"
    write_front_csv(path, summary.models)
    rows = read_front_csv(path)
    assert {row.digest: row.cost for row in rows} == {model.digest: model.cost for model in summary.models}
    for kind in COUNTED:  # costs compare by params and macs alone
        assert [row.cost[kind] for row in rows if row.role == "teacher"] == [summary.models[0].cost[kind]]
    for row in rows:
        model = next(m for m in summary.models if (m.digest, m.role) == (row.digest, row.role))
        assert (row.name, row.path, row.genotype) == (model.name, model.path, None)
        assert row.val_accuracy == pytest.approx(model.val_accuracy, abs=5e-5)
        assert row.latency_ms == pytest.approx(model.latency_ms, abs=5e-4)
    write_front_csv(path, rows)
    assert read_front_csv(path) == rows
    assert [file.name for file in path.parent.iterdir()] == ["front.csv"]


def test_csv_lists_the_front_first_and_the_dearest_of_it_on_top(tmp_path: Path, summary: StudySummary) -> None:
    write_front_csv(tmp_path / "front.csv", summary.models[::-1])
    lines = list(csv.DictReader((tmp_path / "front.csv").read_text(encoding="utf-8").splitlines()))
    assert tuple(lines[0]) == COLUMNS
    assert [line["role"] for line in lines] == ["front"] * 6 + ["teacher", "uniform", "no teacher", "random"]
    macs = [int(line["macs"]) for line in lines if line["role"] == "front"]
    assert macs == sorted(macs, reverse=True)
    assert lines[0]["val_accuracy"] == "0.9780"


def test_csv_keeps_awkward_names_and_missing_values(tmp_path: Path, summary: StudySummary) -> None:
    teacher = summary.models[0]
    row = ModelRow(name='a "b",\nö', role="random", digest="0" * 12, cost=teacher.cost)
    write_front_csv(tmp_path / "front.csv", [row])
    assert read_front_csv(tmp_path / "front.csv") == (row,)


def test_csv_has_columns_of_int8_where_models_were_quantised(tmp_path: Path, summary: StudySummary) -> None:
    int8 = Int8Row(
        test_accuracy=0.95, bytes=123, latency_ms=0.5, float_bytes=456, float_latency_ms=0.25, deploy="model.onnx"
    )
    first, second, *_ = (dataclasses.replace(row, genotype=None, best_at=()) for row in summary.models)
    write_front_csv(tmp_path / "front.csv", [second, dataclasses.replace(first, int8=int8)])
    lines = list(csv.DictReader((tmp_path / "front.csv").read_text(encoding="utf-8").splitlines()))
    assert tuple(lines[0]) == (*COLUMNS, *INT8_COLUMNS)
    assert [line["deploy"] for line in lines] == ["", "model.onnx"]
    assert [row.int8 for row in read_front_csv(tmp_path / "front.csv")] == [None, int8]


def test_a_csv_without_bytes_is_read(tmp_path: Path, summary: StudySummary) -> None:
    cost = summary.models[0].cost
    (tmp_path / "front.csv").write_text(
        "model,digest,role,val_accuracy,test_accuracy,params,macs,latency_ms,path\n"
        f"m,{'0' * 12},front,0.9000,0.8900,{cost.params},{cost.macs},1.000,m\n",
        encoding="utf-8",
    )
    (row,) = read_front_csv(tmp_path / "front.csv")
    assert row.cost == cost
    assert (row.cost.size, row.cost.peak_memory) == (0, 0)


def test_csv_errors(tmp_path: Path, summary: StudySummary) -> None:
    with pytest.raises(OutputError, match=r"cannot read .*No such file"):
        read_front_csv(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("model,digest\nx,y\n", encoding="utf-8")
    with pytest.raises(OutputError, match="no list of models"):
        read_front_csv(tmp_path / "other.csv")
    with pytest.raises(OutputError, match=r"cannot write .*--out"):
        write_front_csv(tmp_path / "other.csv" / "front.csv", summary.models)


def test_a_cut_off_csv_is_an_error(tmp_path: Path, summary: StudySummary) -> None:
    path = tmp_path / "front.csv"
    write_front_csv(path, summary.models)
    text = path.read_text(encoding="utf-8").rstrip()
    path.write_text(text[: text.rindex("\n") + 20], encoding="utf-8")
    with pytest.raises(OutputError, match="no list of models"):
        read_front_csv(path)


@pytest.mark.parametrize(
    "change",
    [{"val_accuracy": 97.2}, {"test_accuracy": math.nan}, {"latency_ms": 0.0}, {"path": "/x"}, {"role": "best"}],
)
def test_rows_refuse_values_out_of_range(summary: StudySummary, change: dict[str, object]) -> None:
    fields = {"name": "m", "role": "front", "digest": "d", "cost": summary.models[0].cost, **change}
    with pytest.raises(ValueError, match=next(iter(change))):
        ModelRow(**fields)  # type: ignore[arg-type]
