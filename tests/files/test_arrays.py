from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from nas_kd.errors import DataError, OutputError
from nas_kd.files.arrays import ArrayFile, finish, load_arrays, writing


def build(folder: Path, value: int = 1) -> None:
    with writing(folder, 100) as draft:
        with ArrayFile(draft / "x.npy", (4, 3), "<i8") as file:
            file.write(np.full((1, 3), value))
            file.write(np.full((3, 3), value))
        finish(draft, {"x": file}, {"note": "hello"})


def test_what_was_written_is_loaded(tmp_path: Path) -> None:
    build(tmp_path / "a", 7)
    loaded = load_arrays(tmp_path / "a")
    assert loaded is not None
    arrays, extra = loaded
    assert arrays["x"].tolist() == [[7] * 3] * 4
    assert isinstance(arrays["x"], np.memmap)
    assert extra == {"note": "hello"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_nothing_is_none(tmp_path: Path) -> None:
    assert load_arrays(tmp_path / "a") is None


@pytest.mark.parametrize("wound", ["flip", "truncate", "remove", "sidecar"])
def test_damage_is_found_and_cleared_away(tmp_path: Path, caplog: pytest.LogCaptureFixture, wound: str) -> None:
    build(tmp_path / "a")
    file = tmp_path / "a" / "x.npy"
    if wound == "flip":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif wound == "truncate":
        file.write_bytes(file.read_bytes()[:-8])
    elif wound == "remove":
        file.unlink()
    else:
        (tmp_path / "a" / "meta.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert load_arrays(tmp_path / "a") is None
    assert "building it again" in caplog.text
    assert list(tmp_path.iterdir()) == []
    build(tmp_path / "a")
    assert load_arrays(tmp_path / "a") is not None


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with writing(tmp_path / "a", 100) as draft:
            (draft / "half").write_text("x")
            raise KeyError("boom")

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_who_finishes_first_wins(tmp_path: Path) -> None:
    with writing(tmp_path / "a", 100) as draft:
        build(tmp_path / "a", 5)  # another process, meanwhile
        with ArrayFile(draft / "x.npy", (1,), "<i8") as file:
            file.write(np.zeros(1))
        finish(draft, {"x": file})
    loaded = load_arrays(tmp_path / "a")
    assert loaded is not None
    assert loaded[0]["x"].shape == (4, 3)


def test_a_full_disk_is_refused_before_writing(tmp_path: Path) -> None:
    needed = 2 * shutil.disk_usage(tmp_path).free
    with (
        pytest.raises(DataError, match=r"needs [\d,]+ MiB and \d+ MiB to spare, its disk has [\d,]+ MiB free"),
        writing(tmp_path / "a", needed),
    ):
        pass


def test_an_unwritable_place_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"), writing(tmp_path / "file" / "a", 1):
        pass
