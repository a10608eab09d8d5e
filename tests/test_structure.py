"""The structure command, end to end: real digits, timm's own small test ResNet."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest
import timm

from nas_kd.__main__ import main as nas_kd_main
from nas_kd.arguments.study import parse_study
from nas_kd.budget import parse_budget
from nas_kd.costs.verification import measure
from nas_kd.genotype import Genotype
from nas_kd.learnt_widths import learning as learnt_widths
from nas_kd.preparation.job import prepare
from nas_kd.results.front import read_front_csv
from nas_kd.results.rows import ModelRow
from nas_kd.structure import main

SMALL = "--model test_resnet --img-size 32 --train-images 120 --teacher-epochs 1 --refine-epochs 1 --learn-epochs 2"
SMALL += " --batch-size 32 --views 2 --no-onnx -q"


def command(out: Path, *more: str) -> list[str]:
    return [*SMALL.split(), "--out", str(out), *more]


def record(out: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((out / "structure.json").read_text())
    return read


def models(out: Path) -> dict[str, ModelRow]:
    return {row.role: row for row in read_front_csv(out / "front.csv")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run within half of the MACs, layer3 weighed, layer4 left as it is."""
    out = tmp_path_factory.mktemp("structure") / "half"
    more = ["--budget", "macs=50%", "--lambda", "layer3.*=4", "--pin", "layer4.*:width=1"]
    assert main(command(out, *more)) == 0
    return out


class TestFinished:
    def test_the_model_is_within_the_budget_and_one_of_timms(self, finished: Path) -> None:
        found = models(finished)
        assert set(found) == {"teacher", "front", "no teacher", "uniform"}
        network = timm.create_model(f"local-dir:{finished / str(found['front'].path)}", pretrained=True)
        cost = measure(network, (1, 32, 32))
        assert (cost.params, cost.macs) == (found["front"].cost.params, found["front"].cost.macs)
        assert cost.macs <= found["teacher"].cost.macs / 2
        assert parse_budget(record(finished)["budget"]).admits(cost)
        assert found["front"].test_accuracy is not None

    def test_what_was_learnt_is_told(self, finished: Path) -> None:
        found = record(finished)
        blocks = {block["name"]: block for block in found["blocks"]}
        assert (blocks["layer3.0"]["factor"], blocks["layer2.0"]["factor"]) == (4, 1)
        assert blocks["layer4.0"]["width"] == 1  # pinned
        assert 0 < found["in use"]["macs"] < 1
        assert found["lambda"]["macs"] > 0
        genotype = Genotype.from_json(json.dumps(found["genotype"]))
        assert genotype.digest == found["digest"] == models(finished)["front"].digest
        assert {name: genotype[name].width for name in blocks} == {n: b["width"] for n, b in blocks.items()}

    def test_the_same_command_trains_nothing_anew(
        self, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        again = Path(shutil.copytree(finished, tmp_path / "copy"))
        before = {p: p.stat().st_mtime_ns for p in (again / "cache").rglob("*")}
        assert main(["--budget=macs=50%", "--lambda=layer3.*=4", "--pin=layer4.*:width=1", *command(again)]) == 0
        assert {p: p.stat().st_mtime_ns for p in (again / "cache").rglob("*")} == before
        printed = capsys.readouterr()
        assert printed.err == ""
        assert "layer3.0" in printed.out
        assert "--start-from" in printed.out

    def test_it_may_go_without_its_baselines(self, finished: Path, tmp_path: Path) -> None:
        out = Path(shutil.copytree(finished, tmp_path / "copy"))
        more = ["--budget=macs=50%", "--lambda=layer3.*=4", "--pin=layer4.*:width=1", "--no-baselines"]
        assert main([*command(out), *more]) == 0
        assert models(out).keys() == {"teacher", "front"}
        assert models(out)["front"].test_accuracy == models(finished)["front"].test_accuracy

    def test_a_killed_learning_goes_on(
        self, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = Path(shutil.copytree(finished, tmp_path / "copy"))
        for kept in (*out.glob("cache/learnt-*"), out / "structure.json"):
            kept.unlink()
        evaluate, epochs = learnt_widths.evaluate, []

        def kill(*arguments: Any, **more: Any) -> float:
            epochs.append(1)
            if len(epochs) == 2:
                raise KeyboardInterrupt
            return evaluate(*arguments, **more)

        more = ["--budget=macs=50%", "--lambda=layer3.*=4", "--pin=layer4.*:width=1"]
        monkeypatch.setattr(learnt_widths, "evaluate", kill)
        assert main([*command(out), *more]) == 130
        assert len(list(out.glob("cache/learnt-*.resume"))) == 1
        assert main([*command(out), *more]) == 0
        assert len(epochs) == 3  # the first epoch was not done again
        assert record(out) | {"command": ""} == record(finished) | {"command": ""}
        assert not list(out.rglob("*.resume"))

    def test_a_study_begins_with_it(self, finished: Path, tmp_path: Path) -> None:
        genotype = Genotype.from_json(json.dumps(record(finished)["genotype"]))

        def enqueued(*more: str) -> list[Genotype]:
            base = "--model test_resnet --img-size 32 --library-budget 0 --no-base-bounds -q"
            settings = parse_study([*base.split(), "--out", str(tmp_path / "study"), *more])
            job = prepare(settings, optuna.storages.InMemoryStorage())
            study = optuna.create_study(directions=["maximize", "minimize", "minimize"])
            job.space.enqueue(study)
            found = [job.space.genotype(trial.system_attrs["fixed_params"]) for trial in study.trials]
            widths = [{name: choice for name, choice in one.items() if name in genotype} for one in found]
            return [Genotype.of(one) for one in widths]  # streams are open to a study too

        file = str(finished / "structure.json")
        assert enqueued("--budget", "macs=50%", "--start-from", file)[0] == genotype
        assert genotype not in enqueued("--budget", "macs=50%")
        assert genotype not in enqueued("--budget", "macs=30%", "--start-from", file)  # over the budget


def test_blocks_without_norms_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ConvNeXt's inner widths have no scale factors: filters stand in, and a line says so."""
    small = "--model test_convnext --img-size 32 --train-images 60 --teacher-epochs 1 --refine-epochs 1 --views 1"
    assert main([*small.split(), "--no-onnx", "--budget", "params=60%", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "no norm scales all channels of stages.0.blocks.0" in printed.err
    assert "filter norms" in printed.out
    found = models(tmp_path / "out")
    assert found["front"].cost.params <= 0.6 * found["teacher"].cost.params


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--budget latency=4ms", "structure learning bounds params or macs, not latency"),
        ("--budget size=1M", "not size"),
        ("--budget macs=0.001%", "no student of test_resnet is within macs"),
        ("--budget macs=5", "no student of test_resnet is within macs"),
        ("--lambda layer9.*=2", "--lambda layer9.*=2 fits no block"),
        ("--lambda layer3=2", "fits no block; did you mean 'layer3.0'"),
        ("--lambda layer3.*=-1", "a factor must be 0 or more"),
        ("--lambda layer3.*=inf", "a factor must be 0 or more"),
        ("--lambda layer3.*=much", "write it like 'layer2.*=2.0'"),
        ("--lambda layer3.*", "write it like 'layer2.*=2.0'"),
        ("--space width,conv", "learns widths, not 'conv'"),
        ("--pin layer3.*:conv=shift", "learns widths, not 'conv'"),
        ("--pin layer9.*:width=1", "fits no block"),
        ("--pin *:width=1", "there is no width to learn in test_resnet"),
        ("--space width=0.4", "offers width=0.4"),
        ("--learn-epochs 0", "must be at least 1, got 0"),
        ("--model vit_tiny_patch16_224 --img-size 224", "no spatial convolutions"),
    ],
)
def test_mistakes_are_one_line(arguments: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budget = [] if "--budget" in arguments else ["--budget", "macs=100%"]
    assert main([*command(tmp_path / "out"), *budget, *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("nas_kd: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot read --start-from"),
        ("{", "holds no genotype of this space"),
        ("[]", "holds no genotype of this space"),
        ('{"genotype": {"version": 1, "blocks": {"layer9.0": {}}}}', "has no block 'layer9.0'"),
        ('{"version": 1, "blocks": {}}', "the genotype lacks block"),
    ],
)
def test_a_file_that_no_study_can_start_from(
    text: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "structure.json"
    if text is not None:
        file.write_text(text)
    base = "study --model test_resnet --img-size 32 --budget macs=50% -q --out".split()
    assert nas_kd_main([*base, str(tmp_path / "out"), "--start-from", str(file)]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1


def test_it_is_a_command_of_nas_kd(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        nas_kd_main(["structure", "--help"])
    assert "--lambda" in capsys.readouterr().out
