"""Records in an append-only file, and what a kill leaves of it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from nas_kd.errors import OutputError
from nas_kd.files.records import Records


def test_what_was_written_is_there_again(tmp_path: Path) -> None:
    records = Records(tmp_path / "records.jsonl")
    records["a"] = {"accuracy": 0.5, "list": [1, 2]}
    records["b"] = {"failed": "größer\nthan"}
    again = Records(tmp_path / "records.jsonl")
    assert again["a"] == {"accuracy": 0.5, "list": [1, 2]}
    assert again["b"] == {"failed": "größer\nthan"}
    assert "c" not in again


def test_a_torn_line_costs_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "records.jsonl"
    records = Records(path)
    records["a"], records["b"] = {"n": 1}, {"n": 2}
    path.write_bytes(path.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING):
        torn = Records(path)
    assert "line 2" in caplog.text
    assert "a" in torn
    assert "b" not in torn
    torn["b"] = {"n": 3}
    torn["c"] = {"n": 4}
    again = Records(path)
    assert [again[key]["n"] for key in "abc"] == [1, 3, 4]


def test_two_writers_share_a_file(tmp_path: Path) -> None:
    one, other = Records(tmp_path / "records.jsonl"), Records(tmp_path / "records.jsonl")
    one["a"], other["b"] = {"n": 1}, {"n": 2}
    again = Records(tmp_path / "records.jsonl")
    assert (again["a"]["n"], again["b"]["n"]) == (1, 2)


def test_what_another_process_wrote_is_found_and_the_first_counts(tmp_path: Path) -> None:
    one, other = Records(tmp_path / "records.jsonl"), Records(tmp_path / "records.jsonl")
    one["a"] = {"n": 1}
    assert "a" in other
    assert other["a"] == {"n": 1}
    one["b"] = {"n": 2}
    other["b"] = {"n": 3}
    assert other["b"] == {"n": 2}
    assert "c" not in one
    (tmp_path / "records.jsonl").write_bytes((tmp_path / "records.jsonl").read_bytes() + b'{"key": "d", "rec')
    assert "d" not in one  # not written to its end yet
    again = Records(tmp_path / "records.jsonl")
    again["d"] = {"n": 4}
    assert [Records(tmp_path / "records.jsonl")[key]["n"] for key in "abd"] == [1, 2, 4]
    assert "d" in other


def test_the_latest_counts_where_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    for number in (1, 2):
        records = Records(path, latest=True)
        records["a"], records["b"] = {"n": number}, {"n": 0}
        records["a"] = {"n": 10 * number}
        assert "c" not in records  # reads what it wrote itself
        assert records["a"] == {"n": 10 * number}
    assert [record["n"] for record in Records(path, latest=True).values()] == [20, 0]
    assert Records(path)["a"] == {"n": 1}


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"cannot read .*folder"):
        Records(tmp_path / "folder")
    records = Records(tmp_path / "missing" / "records.jsonl")
    with pytest.raises(OutputError, match=r"cannot write .*missing"):
        records["a"] = {}
