"""A whole study of one objective, with a sampler of the user's own, by two workers."""

from __future__ import annotations

import csv
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from warm import warm_python

from nas_kd.study import main

SMALL = "--model test_resnet --img-size 32 --teacher-epochs 1 --refine-epochs 1 --train-images 120 --library-budget 0"
SMALL += " --no-base-bounds --no-baselines --no-search-stages --space width=0.25/0.5/1,conv=standard/depthwise"
# neither worker goes on before the other has come, however long it takes to start
MODULE = """
import os
import time
import optuna

def proposers(study):
    return [name for name in study.user_attrs if name.startswith("proposed by ")]

class Own(optuna.samplers.RandomSampler):
    def before_trial(self, study, trial):
        study.set_user_attr(f"proposed by {os.getpid()}", trial.number)
        deadline = time.monotonic() + 600 * (study.study_name == "s")  # not where the class is tried out
        while len(proposers(study)) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
"""


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")  # optuna: heartbeat
def test_the_most_accurate_within_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_objective.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", warm_python())  # of its workers
    out, url = tmp_path / "out", f"sqlite:///{tmp_path / 'out' / 'study.db'}"
    arguments = [*SMALL.split(), *f"--budget params=60% --out {out} --study-name s --no-onnx -q".split()]
    arguments += "--maximize accuracy --pruner median --sampler own_objective:Own --proxy-epochs 2 --trials 9".split()
    assert main([*arguments, "--jobs", "2"]) == 0
    study = optuna.load_study(study_name="s", storage=url)
    assert len([name for name in study.user_attrs if name.startswith("proposed by ")]) == 2
    assert study.metric_names == ["accuracy"]
    done = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert all(len(trial.values) == 1 for trial in done)
    assert all(trial.intermediate_values.keys() == {1, 2} for trial in done if "reused" not in trial.user_attrs)
    with (out / "front.csv").open(encoding="utf-8") as file:
        front = [row for row in csv.DictReader(file) if row["role"] == "front"]
    best = max(done, key=lambda trial: trial.values[0])
    assert max(float(row["params"]) for row in front) <= 0.6 * 373_448
    assert any(row["digest"] == best.user_attrs["digest"] for row in front)
    assert len({row["params"] for row in front}) == len(front) > 1  # a front over costs nevertheless
    capsys.readouterr()
    (several,) = [" ".join(arguments).replace("--maximize accuracy --pruner median", "").split()]
    assert main(several) == 2
    assert "was begun with maximize 'accuracy', not None" in capsys.readouterr().err
