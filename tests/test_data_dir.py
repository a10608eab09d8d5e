"""The data that a person points at is the data that is used, in every command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nas_kd import distill, rank_check, structure, study
from nas_kd.arguments.distill import parse_distill
from nas_kd.arguments.study import parse_study
from nas_kd.data.splits import DataSpec, load_splits
from nas_kd.errors import DataError
from nas_kd.learnt_widths.arguments import parse_structure
from nas_kd.rank_check.arguments import parse_rank_check

Main = Callable[[Sequence[str]], int]
COMMANDS: dict[str, tuple[Main, Callable[[Sequence[str]], object], list[str]]] = {
    "study": (study.main, parse_study, ["--model", "test_resnet", "--budget", "params=50%"]),
    "structure": (structure.main, lambda argv: parse_structure(argv).study, ["--budget", "params=50%"]),
    "rank_check": (rank_check.main, lambda argv: parse_rank_check(argv).study, ["--budget", "params=50%"]),
    "distill": (distill.main, parse_distill, ["test_resnet", "--no-teacher"]),
}


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_folder_alone_holds_image_folders(command: str) -> None:
    _, parse, arguments = COMMANDS[command]
    settings = parse([*arguments, "--data-dir", "my_images"])
    assert (settings.data.dataset, settings.data.data_dir) == ("folder", "my_images")


def test_without_a_folder_there_are_the_digits(command: str) -> None:
    _, parse, arguments = COMMANDS[command]
    assert parse(arguments).data.dataset == "digits"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--data-dir", "no/such/place"], "there is no data folder no/such/place"),
        (["--data-dir", "empty"], "no images"),
        (["--data-dir", ""], "--data-dir is empty"),
        (["--data-memory", "lots"], "'lots' is no amount of memory: write it like 4G or 500M"),
        (["--dataset", "folder"], "give its folder with --data-dir"),
        (["--dataset", "digits", "--data-dir", "empty"], "--dataset digits reads no folder"),
        (["--dataset", "Digits", "--data-dir", "empty"], "--dataset digits reads no folder"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    command: str,
    given: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    main, _, arguments = COMMANDS[command]
    assert main([*arguments, *given, "--out", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nas_kd: ")
    assert said in line
    assert not list(tmp_path.glob("out/*"))  # nothing was trained


def test_a_spec_of_ones_own_with_a_folder_reads_it(tmp_path: Path) -> None:
    for name, value in (("dark", 10), ("light", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(4):
            Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(tmp_path / "images" / name / f"{index}.png")
    splits = load_splits(DataSpec(data_dir=str(tmp_path / "images"), img_size=8), tmp_path / "cache")
    assert splits.class_names == ("dark", "light")
    with pytest.raises(DataError, match="reads no folder"):
        DataSpec(dataset="digits", data_dir=str(tmp_path))
