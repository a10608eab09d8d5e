"""What earlier versions wrote is still read: a study that stopped half-way goes on."""

from __future__ import annotations

import gzip
import re
import sqlite3
from pathlib import Path

import optuna
from rich.console import Console

from nas_kd.arguments.study import parse_study
from nas_kd.preparation.job import prepare
from nas_kd.preparation.materials import gather
from nas_kd.progress import Stages
from nas_kd.search.storage import close_storage
from nas_kd.study import main

GOLDEN = Path(__file__).parent / "golden" / "study.sql.gz"  # of 2 trials, by the version before 2026-11-26
STUDY_TEXT = gzip.decompress(GOLDEN.read_bytes()).decode()
ARGUMENTS = (
    "--model test_resnet --in-chans 1 --img-size 32 --budget params=60% --train-images 100 --teacher-epochs 1 "
    "--proxy-epochs 1 --refine-epochs 1 --front 1 --views 1 --library-budget 0 --no-onnx --no-baselines -q"
).split()


def trained(path: Path) -> dict[str, list[float]]:
    (name,) = optuna.get_all_study_names(f"sqlite:///{path}")
    trials = optuna.load_study(study_name=name, storage=f"sqlite:///{path}").get_trials(deepcopy=False)
    return {trial.user_attrs["digest"]: trial.values for trial in trials if trial.values}


def teacher_of(out: Path) -> str:
    """The digest of the teacher that these arguments train on this machine: another torch rounds otherwise."""
    job = prepare(parse_study([*ARGUMENTS, "--out", str(out)]))
    try:
        return gather(job, Stages(Console(stderr=True), quiet=True))[1].digest
    finally:
        close_storage(job.storage)


def test_a_study_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    here, (there,) = teacher_of(tmp_path / "another"), set(re.findall(r'"teacher": "(\w+)"', STUDY_TEXT))
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.executescript(STUDY_TEXT.replace(there, here))
    database.close()
    before = trained(tmp_path / "study.db")
    assert len(before) == 2
    assert main([*ARGUMENTS, "--trials", "3", "--out", str(tmp_path)]) == 0
    after = trained(tmp_path / "study.db")
    assert len(after) == 3
    assert {digest: after[digest] for digest in before} == before


def test_names_of_the_data_are_still_where_they_were() -> None:
    from nas_kd.data import images, sources, splits
    from nas_kd.training import data as old_splits
    from nas_kd.training import images as old_images
    from nas_kd.training import sources as old_sources

    assert old_splits.load_splits is splits.load_splits
    assert old_splits.DataSpec is splits.DataSpec
    assert old_sources.open_source is sources.open_source
    assert old_images.Images is images.Images
