from __future__ import annotations

from pathlib import Path

import pytest

from nas_kd.errors import OutputError
from nas_kd.files.atomic import replace_file, write_text


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")  # a lone surrogate is no UTF-8
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_line_ends_stay_as_they_are(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "file.txt", "a\r\nb\n")
    assert (tmp_path / "new" / "file.txt").read_bytes() == b"a\r\nb\n"


def test_where_nothing_can_be_written_the_error_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OutputError, match=r"cannot write .*file/x: .*; choose another folder with --out"):
        replace_file(tmp_path / "file" / "x", lambda draft: draft.touch())
