"""The main command, end to end: real digits and images, timm's own small test ResNet."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import timm
import torch
from injection import exit_code
from optuna.trial import TrialState
from PIL import Image
from safetensors.torch import load_file, save_file

import nas_kd
from nas_kd.study import main

SMALL = (
    "--model test_resnet --img-size 32 --teacher-epochs 1 --proxy-epochs 1 --refine-epochs 1 --train-images 120"
    " --no-onnx --space width=0.25/0.5/1,kernel,conv=standard/depthwise --no-search-stages"  # a library of few entries
    " --no-base-bounds"  # nothing is timed before the search: a seed decides everything
)
BUDGET = "params=100K,macs=30%"


def command(out: Path, *more: str) -> list[str]:
    return [*SMALL.split(), "--budget", BUDGET, "--trials", "3", "--out", str(out), *more]


def trials(out: Path) -> list[optuna.trial.FrozenTrial]:
    url = f"sqlite:///{out / 'study.db'}"
    (name,) = optuna.get_all_study_names(url)
    return optuna.load_study(study_name=name, storage=url).get_trials()


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((out / "front.csv").read_text())))


def lasting(out: Path) -> list[dict[str, str]]:
    """The rows of front.csv but for the latency, which is measured anew."""
    return [{name: value for name, value in row.items() if name != "latency_ms"} for row in rows(out)]


@dataclass(frozen=True)
class Finished:
    out: Path
    stdout: str
    stderr: str
    code: int


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished run, as a user sees it: in a process of its own, its output in pipes."""
    out = tmp_path_factory.mktemp("runs") / "first"
    done = run(command(out))
    return Finished(out=out, stdout=done.stdout, stderr=done.stderr, code=done.returncode)


def run(arguments: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "nas_kd.study", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        **more,
    )


def killed_at_the_second_trial(arguments: list[str]) -> int:
    """The exit code of a command in a process that is killed as soon as the second trial's genotype is noted."""
    note = optuna.Trial.set_user_attr

    def noted(trial: optuna.Trial, key: str, value: Any) -> None:
        note(trial, key, value)
        if trial.number == 1 and "digest" in trial.user_attrs:
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> int:
        optuna.Trial.set_user_attr = noted  # type: ignore[method-assign]
        return main(arguments)

    return exit_code(run)


class TestResults:
    def test_it_ends_well_and_without_warnings_of_others(self, finished: Finished) -> None:
        assert finished.code == 0
        assert not re.search(r"Traceback|UserWarning|FutureWarning|ExperimentalWarning", finished.stderr)

    def test_everything_is_in_the_output_folder(self, finished: Finished) -> None:
        names = {path.name for path in finished.out.iterdir()}
        models = {row["path"] for row in rows(finished.out)}
        assert {"study.db", "front.csv", "report.html", "cache"} | models <= names
        assert not [name for name in names if name.startswith(".") or name.endswith(".partial")]

    def test_front_csv_has_its_columns_and_every_role(self, finished: Finished) -> None:
        table = rows(finished.out)
        assert set(table[0]) >= set("model digest val_accuracy test_accuracy params macs latency_ms path".split())
        assert {row["role"] for row in table} == {"teacher", "front", "uniform", "no teacher", "random"}
        for row in table:
            assert float(row["latency_ms"]) > 0
            assert 0 <= float(row["test_accuracy"]) <= 1
            assert re.fullmatch(r"test_resnet-\d\.\d\dM-\d+\.\d(-\w+)*", row["model"])

    def test_every_student_is_within_the_budget_by_its_own_count(self, finished: Finished) -> None:
        table = rows(finished.out)
        (teacher,) = (row for row in table if row["role"] == "teacher")
        for row in table:
            model = nas_kd.load(finished.out / row["path"])
            params = sum(p.numel() for p in model.parameters())
            assert params == int(row["params"])
            if row["role"] != "teacher":
                assert params <= 100_000
                assert int(row["macs"]) <= 0.3 * int(teacher["macs"])

    def test_an_export_has_the_accuracy_that_is_quoted(self, finished: Finished) -> None:
        from nas_kd.data.splits import DataSpec, load_splits
        from nas_kd.training.evaluation import evaluate

        spec = DataSpec(img_size=32, in_chans=1, train_images=120)
        splits = load_splits(spec, finished.out / "cache")
        for row in rows(finished.out):
            model = nas_kd.load(finished.out / row["path"])
            assert round(evaluate(model, splits.test), 4) == float(row["test_accuracy"])
            assert round(evaluate(model, splits.val), 4) == float(row["val_accuracy"])
            facts = json.loads((finished.out / row["path"] / "config.json").read_text())["nas_kd"]
            assert (facts["digest"], facts["params"], facts["seed"]) == (row["digest"], int(row["params"]), 0)
            assert facts["command"].startswith("python -m nas_kd.study --model test_resnet")

    def test_the_database_holds_the_trials(self, finished: Finished) -> None:
        complete = [trial for trial in trials(finished.out) if trial.state == TrialState.COMPLETE]
        assert len(complete) == 3
        assert all(set(trial.constraints) == {"params", "macs", "rung"} for trial in complete)

    def test_the_report_is_one_file_that_shows_every_model(self, finished: Finished) -> None:
        report = (finished.out / "report.html").read_text()
        assert all(row["model"] in report for row in rows(finished.out))
        assert not re.search(r"<script[^>]+src=", report)

    def test_the_result_goes_to_standard_output_and_says_what_next(self, finished: Finished) -> None:
        assert all(row["model"] in finished.stdout for row in rows(finished.out))
        assert f"optuna-dashboard sqlite:///{finished.out / 'study.db'}" in finished.stdout
        assert "local-dir:" in finished.stdout
        assert "report.html" in finished.stdout

    def test_a_pipe_gets_plain_lines_that_name_each_stage(self, finished: Finished) -> None:
        assert "\x1b" not in finished.stdout + finished.stderr
        assert "\r" not in finished.stderr
        for stage in ("data", "teacher", "views", "search", "refine", "latency", "export"):
            assert re.search(rf"^{stage}: \d+ step", finished.stderr, re.MULTILINE)
            assert re.search(rf"^{stage}: done in", finished.stderr, re.MULTILINE)


class TestResume:
    @pytest.fixture
    def again(self, finished: Finished, tmp_path: Path) -> Path:
        """A copy of the finished run, of which nothing knows where it lies."""
        return Path(shutil.copytree(finished.out, tmp_path / "copy"))

    def test_the_same_command_trains_nothing_anew(self, again: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before, cached = lasting(again), {p: p.stat().st_mtime_ns for p in (again / "cache").rglob("*")}
        numbers = [(trial.number, trial.state) for trial in trials(again)]
        assert main(command(again)) == 0
        assert lasting(again) == before
        assert [(trial.number, trial.state) for trial in trials(again) if not trial.state == TrialState.WAITING] == [
            pair for pair in numbers if pair[1] != TrialState.WAITING
        ]
        assert {p: p.stat().st_mtime_ns for p in (again / "cache").rglob("*")} == cached
        assert "refine: 1/" not in capsys.readouterr().err

    def test_a_finished_study_goes_on_with_int8(
        self, finished: Finished, again: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(command(again, "--int8", "--front", "1", "--no-baselines", "-q")) == 0
        assert "int8 %" in capsys.readouterr().out
        assert "ONNX int8" in (again / "report.html").read_text()
        known = {(row["role"], row["digest"]): row["test_accuracy"] for row in rows(finished.out)}
        quantised = [row for row in rows(again) if row["deploy"]]
        assert [row["role"] for row in quantised] == ["front", "teacher"]
        for row in quantised:
            folder = again / row["path"]
            assert row["test_accuracy"] == known[row["role"], row["digest"]]
            assert int(row["int8_bytes"]) == (folder / "model.int8.onnx").stat().st_size < int(row["float_bytes"])
            assert (folder / row["deploy"]).is_file()
            assert "| int8 test accuracy |" in (folder / "README.md").read_text()

    def test_more_trials_run_only_the_missing_ones(self, again: Path) -> None:
        before = [trial for trial in trials(again) if trial.state.is_finished()]
        assert main([*command(again), "--trials", "5", "--front", "1", "--no-baselines", "-q"]) == 0
        after = [trial for trial in trials(again) if trial.state.is_finished()]
        assert after[: len(before)] == before
        assert sum(trial.state == TrialState.COMPLETE for trial in after) == 5

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (["--proxy-epochs", "2"], "was begun with proxy"),
            (["--proxy-lr", "0.01"], "was begun with proxy"),
            (["--space", "width"], "was begun with space"),
            (["--pin", "layer1.*:conv=standard"], "was begun with pin"),
            (["--teacher-epochs", "2"], "was begun with teacher"),
            (["--train-images", "100"], "was begun with data"),
        ],
    )
    def test_another_configuration_is_refused(
        self, again: Path, change: list[str], words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*command(again, "-q"), *change]) == 2
        assert words in only_line(capsys.readouterr().err)

    @pytest.mark.parametrize("how", [["dkd"], ["online", "--peers", "2", "--no-baselines"]])
    def test_another_distillation_refines_anew_what_was_found(self, again: Path, how: list[str]) -> None:
        found = digests(again)
        arguments = command(again, "-q", "--front", "1", "--distill", *how)
        assert main(arguments) == 0
        assert digests(again) == found  # nothing is searched again
        facts = [json.loads((again / row["path"] / "config.json").read_text())["nas_kd"] for row in rows(again)]
        baselines = {"no teacher": None, "uniform": how[0], "random": how[0]} if "--no-baselines" not in how else {}
        assert {fact["role"]: fact.get("distillation") for fact in facts} == {
            "teacher": None,
            "front": how[0],
            **baselines,
        }
        assert ("learnt online" in (again / "report.html").read_text()) is (how[0] == "online")
        before = {path.name for path in (again / "cache").glob("refined-*")}
        assert len(before) > len(rows(again))
        assert main(arguments) == 0
        assert {path.name for path in (again / "cache").glob("refined-*")} == before

    def test_another_budget_begins_with_what_is_there(self, again: Path) -> None:
        """A smaller budget with levels, of the same study: teacher, cache and finished trials are kept."""
        found, cached = digests(again), {path.name for path in (again / "cache").iterdir()}
        name = optuna.get_all_study_names(f"sqlite:///{again / 'study.db'}")[0]
        smaller = ["--study-name", name, "--budget", "params=60K,macs=20%", "--levels", "0.7"]
        assert main([*command(again, "-q"), *smaller, "--trials", "2", "--onnx", "--no-baselines"]) == 0
        assert digests(again)[: len(found)] == found
        kept = [row for row in rows(again) if row["role"] == "front"]
        assert all(int(row["params"]) <= 60_000 for row in kept)
        assert sorted(level for row in kept for level in row["best_at"].split()) == ["0.7", "1"]
        assert all((again / row["path"] / "model.onnx").is_file() for row in kept)
        assert "best within" in (again / "report.html").read_text()
        new = {path.name for path in (again / "cache").iterdir()} - cached
        assert all(name.startswith(("refined-", "trials-")) for name in new)

    def test_a_budget_of_other_kinds_is_another_study(self, again: Path, capsys: pytest.CaptureFixture[str]) -> None:
        name = optuna.get_all_study_names(f"sqlite:///{again / 'study.db'}")[0]
        assert main([*command(again, "-q"), "--study-name", name, "--budget", "params=60K,size=1M"]) == 2
        assert "was begun with objectives ['accuracy', 'params', 'macs'], not" in only_line(capsys.readouterr().err)

    def test_a_kill_during_the_search_loses_nothing_but_the_running_trial(self, tmp_path: Path) -> None:
        out = tmp_path / "killed"
        whole = ["--space", "width,kernel,conv", "--library-budget", "0"]  # the space that a user has
        arguments = command(out, *whole, "--views", "1", "--trials", "2", "--no-baselines")
        assert killed_at_the_second_trial(arguments) == -signal.SIGKILL
        left = trials(out)
        (finished_before,) = [trial for trial in left if trial.state.is_finished()]
        (running,) = [trial for trial in left if trial.state == TrialState.RUNNING]
        assert main([*arguments, "-q"]) == 0
        after = trials(out)
        assert after[0] == finished_before
        assert after[running.number].state == TrialState.FAIL
        (retry,) = [trial for trial in after if trial.user_attrs.get("retry of") == running.number]
        assert retry.system_attrs["fixed_params"].items() >= running.params.items()
        assert sum(trial.state == TrialState.COMPLETE or "rung/1" in trial.user_attrs for trial in after) >= 2
        assert (out / "front.csv").exists()


def test_one_seed_decides_everything(finished: Finished, tmp_path: Path) -> None:
    """In another folder, and in this process instead of its own."""
    assert main(command(tmp_path / "second", "-q")) == 0
    assert digests(tmp_path / "second") == digests(finished.out)
    names = "digest role params macs val_accuracy test_accuracy".split()
    assert [[row[n] for n in names] for row in rows(tmp_path / "second")] == [
        [row[n] for n in names] for row in rows(finished.out)
    ]


def test_another_seed_has_another_teacher(finished: Finished, tmp_path: Path) -> None:
    out, more = tmp_path / "other", ["--trials", "1", "--front", "1", "--library-budget", "0", "--no-baselines"]
    assert main(command(out, "-q", "--seed", "1", *more)) == 0
    mine, first = (load_file(next((folder / "cache").glob("teacher-*.safetensors"))) for folder in (out, finished.out))
    assert mine.keys() == first.keys()
    assert not torch.equal(mine["fc.weight"], first["fc.weight"])
    seeds = {json.loads((out / row["path"] / "config.json").read_text())["nas_kd"]["seed"] for row in rows(out)}
    assert seeds == {1}


def test_a_bound_on_latency(tmp_path: Path) -> None:
    """Measured for real; the bound is so wide that only the bookkeeping is tested."""
    arguments = [*command(tmp_path, "-q", "--library-budget", "0"), "--budget", "params=130K,latency=10s"]
    arguments += ["--space", "width=0.5/1,conv=standard", "--trials", "2", "--latency-batch", "2", "--no-baselines"]
    assert main(arguments) == 0
    done = [trial for trial in trials(tmp_path) if trial.state == TrialState.COMPLETE]
    assert len(done) == 2
    assert all(trial.user_attrs["measured"] and trial.user_attrs["latency"] > 0 for trial in done)
    assert all(trial.constraints["latency"] < 0 for trial in done)
    latencies = {row["digest"]: float(row["latency_ms"]) for row in rows(tmp_path)}
    for trial in done:
        assert latencies[trial.user_attrs["digest"]] == pytest.approx(trial.user_attrs["latency"] / 1e6, abs=1e-3)
    config = json.loads((tmp_path / rows(tmp_path)[0]["path"] / "config.json").read_text())
    assert "ONNX Runtime on cpu, 2 images, 1 thread" in config["nas_kd"]["latency"]
    before = (tmp_path / "front.csv").read_text()
    assert main(arguments) == 0
    assert (tmp_path / "front.csv").read_text() == before  # nothing is measured anew


def test_nothing_is_worse_than_the_base_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--model test_resnet --img-size 32 --teacher-epochs 1 --proxy-epochs 1 --refine-epochs 1 --front 2"
    arguments += f" --train-images 60 --no-onnx --library-budget 0 --budget params=60% --trials 3 --out {tmp_path}"
    assert main([*arguments.split(), "-q"]) == 0
    assert "and no worse than the base in anything" in capsys.readouterr().out
    (teacher,) = (row for row in rows(tmp_path) if row["role"] == "teacher")
    for row in (row for row in rows(tmp_path) if row["role"] in ("front", "uniform", "random")):
        for kind in ("params", "macs", "peak_memory", "latency_ms"):
            assert float(row[kind]) <= float(teacher[kind]), (row["model"], kind)
    names = {name for trial in trials(tmp_path) for name in trial.params}
    assert any(name.endswith("stream.width") for name in names)
    assert any(name.endswith(".keep") for name in names)
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert study.user_attrs["nas_kd"]["base bounds"] is True
    assert set(study.user_attrs["nas_kd latency"]["facts"]) >= {"what", "machine"}
    before = (tmp_path / "front.csv").read_text()
    assert main([*arguments.split(), "-q"]) == 0
    assert (tmp_path / "front.csv").read_text() == before  # nothing is measured anew


def digests(out: Path) -> list[tuple[Any, ...]]:
    done = [trial for trial in trials(out) if trial.state.is_finished()]
    return [(trial.user_attrs["digest"], *(trial.values or ())) for trial in done]


# what a user may do wrong


def only_line(text: str) -> str:
    assert text.startswith("nas_kd: ")
    assert text.count("\n") == 1
    return text


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of six real images; one file is none."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(6):
            pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    (tmp_path / "images" / "dog" / "3.png").write_bytes(b"no image")
    return tmp_path / "images"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder with files that are wrong in every way; the study goes into its `out`."""
    (tmp_path / "file").write_text("mine")
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "three.safetensors")
    torch.save({"state_dict": {"a": 1}}, tmp_path / "odd.pth")
    yield tmp_path
    assert (tmp_path / "file").read_text() == "mine"


MISTAKES: dict[str, tuple[str, str]] = {
    "unknown model": ("--model resnet81", r"timm knows no model 'resnet81'; did you mean 'resnet"),
    "no convolutions": (
        "--model vit_tiny_patch16_224 --img-size 224",
        "vit_tiny_patch16_224 has no spatial convolutions: only convolutional networks can be searched",
    ),
    "no convolutions, small images": (
        "--model vit_tiny_patch16_224",
        "vit_tiny_patch16_224 has no spatial convolutions",
    ),
    "malformed budget": ("--budget params=1X", r"cannot read the budget 'params=1X': write it like"),
    "unknown cost": ("--budget parms=1M", r"cannot bound 'parms'.*did you mean 'params'"),
    "empty budget": ("--budget=", "the budget is empty"),
    "impossible budget": ("--budget params=100", r"the smallest reachable is params=\d[\d.]*K"),
    "impossible share": ("--budget macs=0.1%", r"the smallest reachable is macs=\d[\d.]*K"),
    "odd time": ("--budget latency=4M", r"cannot read the budget 'latency=4M': write it like latency=4ms"),
    "odd level": ("--levels 2", r"the level 2 is no share of the budget"),
    "impossible level": ("--levels 0.001", r"no student of test_resnet is within .*: the smallest reachable is"),
    "odd runtime": ("--latency-runtime tvm", r"argument --latency-runtime: invalid choice: 'tvm'"),
    "no such command": ("--budget latency=1ms --latency-command /nowhere/to", r"'/nowhere/to' cannot be run"),
    "no data folder": ("--dataset folder --data-dir {place}/nowhere", r"there is no data folder .*nowhere"),
    "no folder given": ("--dataset torch/cifar10", r"give its folder with --data-dir"),
    "not in the folder": (
        "--dataset torch/fashion_mnist --data-dir {place}",
        r"is not in .* \(nothing is downloaded\)",
    ),
    "unknown dataset": ("--dataset torch/cifar11", r"unknown dataset 'torch/cifar11'.*did you mean 'torch/cifar10'"),
    "no checkpoint": ("--initial-checkpoint {place}/nowhere.pth", r"there is no checkpoint file"),
    "foreign checkpoint": ("--initial-checkpoint {place}/three.safetensors", r"does not fit the model ResNet"),
    "odd checkpoint": ("--initial-checkpoint {place}/odd.pth", r"holds no state dict of tensors"),
    "file in the way": ("--out {place}/file", r"cannot write the output folder .*file: "),
    "file on the way": ("--out {place}/file/out", r"cannot write the output folder .*file/out: "),
    "read-only place": ("--out /proc/nowhere", r"cannot write the output folder /proc/nowhere: "),
    "unknown device": ("--device gpu", r"there is no device 'gpu' on this machine"),
    "useless device": ("--device meta", r"there is no device 'meta' on this machine"),
    "no such storage": ("--storage sqlite:////nowhere/study.db", r"cannot open the storage sqlite:////nowhere"),
    "odd storage": ("--storage nonsense", r"cannot open the storage nonsense"),
    "pin of nothing": ("--pin layer9:conv=standard", r"'layer9:conv=standard' fits no block"),
    "odd pin": ("--pin layer1", r"cannot read the pin 'layer1'"),
    "odd space": ("--space widht", r"unknown dimension 'widht'.*did you mean 'width'"),
    "odd reduction": ("--reduction 7", r"--reduction 7 does not divide the total stride 32"),
    "no trials": ("--trials 0", r"argument --trials: must be at least 1, got 0; see .* --help"),
    "no number": ("--trials many", r"'many' is no number"),
    "huge seed": ("--seed 5000000000", r"argument --seed: must be at least 0 and below"),
    "infinite rate": ("--lr inf", r"argument --lr: must be at least"),
    "unknown option": ("--trails 3", r"unrecognized arguments: --trails"),
    "unknown sampler": ("--sampler best", r"argument --sampler: unknown sampler 'best': use knapsack"),
    "nameless study": ("--study-name ///", r"--study-name '///' needs a letter or digit"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_one_line_before_any_training(
    mistake: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = MISTAKES[mistake]
    code = main([*command(place / "out"), *arguments.format(place=place).split()])
    printed = capsys.readouterr()
    assert code == 2
    assert re.search(words, only_line(printed.err))
    assert printed.out == ""
    assert not list((place / "out").glob("cache/*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "--device", "cuda")) == 2
    assert "there is no device 'cuda' on this machine" in only_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"junk", "it is none, or"),
        (b"hello\n", "it is none, or"),
        (pickle.dumps(Path()), "holds other objects"),
        (b"", ""),
    ],
)
def test_a_checkpoint_that_is_none_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, why: str
) -> None:
    (tmp_path / "junk.pth").write_bytes(content)
    assert main(command(tmp_path / "out", "--initial-checkpoint", str(tmp_path / "junk.pth"))) == 2
    assert re.search(rf"cannot read the checkpoint .*{why}.*\)$", only_line(capsys.readouterr().err).strip())


def test_an_unreadable_image_is_named_before_any_training(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--dataset", "folder", "--data-dir", str(images), "-q"]
    assert main([*command(tmp_path / "out"), *arguments]) == 2
    line = only_line(capsys.readouterr().err)
    assert f"cannot read the image {images / 'dog' / '3.png'}" in line
    assert not list((tmp_path / "out").glob("cache/*"))


def test_image_folders_of_other_sizes_and_channels_work(images: Path, tmp_path: Path) -> None:
    (images / "dog" / "3.png").unlink()
    Image.new("L", (50, 40), 7).save(images / "dog" / "3.png")
    arguments = ["--dataset", "folder", "--data-dir", str(images), "--train-images", "6", "-q", "--trials", "1"]
    arguments += ["--library-budget", "0", "--no-baselines"]
    assert main([*command(tmp_path / "out"), *arguments]) == 0
    config = json.loads((tmp_path / "out" / rows(tmp_path / "out")[0]["path"] / "config.json").read_text())
    assert (config["num_classes"], config["pretrained_cfg"]["input_size"]) == (2, [3, 32, 32])
    assert config["label_names"] == ["cat", "dog"]


def test_a_search_in_which_nothing_can_be_trained_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command(tmp_path / "out", "-q", "--lr", "1e20", "--trials", "2", "--library-budget", "0")
    assert main(arguments) == 2
    assert "came to its end: lower --lr" in only_line(capsys.readouterr().err)


def test_debug_shows_where_it_happened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "--debug", "--model", "resnet81")) == 2
    assert "Traceback" in capsys.readouterr().err


# before torch is loaded


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["--budget", "params=1X"], 2),
        (["--budget", "params=1M", "--nope"], 2),
        ([], 2),
    ],
)
def test_help_and_bad_arguments_answer_without_torch(arguments: list[str], code: int) -> None:
    program = (
        "import sys\n"
        "from nas_kd.study import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as exit: code = exit.code\n"
        "assert not {'torch', 'timm', 'optuna', 'numpy'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)
    if code:
        only_line(done.stderr)


def test_help_groups_every_option() -> None:
    text = run(["--help"]).stdout
    for group in ("base and teacher", "data", "search", "training", "output"):
        assert re.search(rf"^{group}.*:$", text, re.MULTILINE)
    for option in (
        "model pretrained initial-checkpoint reduction img-size in-chans num-classes dataset data-dir budget trials "
        "space pin sampler proxy-epochs refine-epochs device amp workers seed out study-name storage"
    ).split():
        assert f"--{option}" in text


def test_the_installed_command_hands_over(capsys: pytest.CaptureFixture[str]) -> None:
    from nas_kd.__main__ import main as command

    assert command(["study", "--budget", "params=1X"]) == 2
    assert command(["rank-check", "--budget", "params=1X"]) == 2
    assert command(["stdy"]) == 2
    assert command(["--version"]) == 0
    told = capsys.readouterr()
    assert told.err.endswith("nas_kd: there is no command 'stdy'; did you mean 'study'?\n")
    assert told.out == f"nas_kd {nas_kd.__version__}\n"


def test_every_public_name_is_there_and_has_a_docstring() -> None:
    for name in nas_kd.__all__:
        assert getattr(nas_kd, name).__doc__
    assert set(nas_kd.__all__) <= set(dir(nas_kd))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        nas_kd.nothing  # noqa: B018
