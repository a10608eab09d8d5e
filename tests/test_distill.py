"""The distill command, end to end: real digits, timm's own small test ResNet."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from injection import exit_code
from safetensors.torch import load_file, save_file

import nas_kd
from nas_kd.__main__ import main as nas_kd_main
from nas_kd.costs.verification import measure
from nas_kd.data.splits import DataSpec, load_splits
from nas_kd.distill import main
from nas_kd.training.evaluation import evaluate

SMALL = "test_resnet --img-size 32 --train-images 120 --epochs 2 --batch-size 32 -q"


def command(out: Path, *more: str) -> list[str]:
    return [*SMALL.split(), "--out", str(out), *more]


def record(out: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((out / "distill.json").read_text())
    return read


def exported(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / record(out)["path"] / "model.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, in a process of its own as a user's."""
    out = tmp_path_factory.mktemp("distill") / "online"
    arguments = [sys.executable, "-m", "nas_kd.distill", *command(out, "--online", "--peers", "3")]
    done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "local-dir:" in done.stdout
    return out


def killed_after_two_states(arguments: list[str]) -> int:
    """The exit code of a command in a process that is killed as soon as the state after its second epoch is written."""
    replace, states = os.replace, []

    def replaced(draft: Any, path: Any) -> None:
        replace(draft, path)
        if str(path).endswith(".resume"):
            states.append(path)
            if len(states) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    def run() -> int:
        os.replace = replaced
        return main(arguments)

    return exit_code(run)


class TestOnline:
    def test_the_peer_that_is_best_on_validation_images_is_exported(self, online: Path) -> None:
        found = record(online)
        best = max(found["peers"], key=lambda peer: peer["val accuracy"])
        assert len(found["peers"]) == 3
        assert found["val accuracy"] == round(best["val accuracy"], 4)
        assert found["test accuracy"] == round(best["test accuracy"], 4)
        splits = load_splits(DataSpec(img_size=32, in_chans=1, train_images=120), online / "cache")
        model = nas_kd.load(online / found["path"])
        assert evaluate(model, splits.val) == pytest.approx(best["val accuracy"])
        assert evaluate(model, splits.test) == pytest.approx(best["test accuracy"])
        cost = measure(model, (1, 32, 32))
        assert (found["params"], found["macs"]) == (cost.params, cost.macs)

    def test_the_folder_is_one_of_timms(self, online: Path) -> None:
        folder = online / record(online)["path"]
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert model.num_classes == 10
        assert "trained by nas_kd by online distillation" in (folder / "README.md").read_text()
        assert not list(online.rglob("*.resume"))

    def test_the_same_command_trains_nothing_anew_and_prints_every_peer(
        self, online: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        again = Path(shutil.copytree(online, tmp_path / "copy"))
        before = {p: p.stat().st_mtime_ns for p in (again / "cache").rglob("*")}
        weights = exported(again)
        assert main(command(again, "--online", "--peers", "3")) == 0
        assert {p: p.stat().st_mtime_ns for p in (again / "cache").rglob("*")} == before
        assert same(exported(again), weights)
        printed = capsys.readouterr().out
        assert [f"peer {number}" in printed for number in (1, 2, 3, 4)] == [True, True, True, False]
        assert printed.count("(chosen by val)") == 1
        for peer in record(again)["peers"]:
            assert f"{100 * peer['test accuracy']:.1f}" in printed

    def test_the_seed_decides_everything(self, online: Path, tmp_path: Path) -> None:
        for name, seed in (("same", "0"), ("other", "1")):
            assert main(command(tmp_path / name, "--online", "--peers", "3", "--seed", seed)) == 0
        assert same(exported(tmp_path / "same"), exported(online))
        assert not same(exported(tmp_path / "other"), exported(online))

    @pytest.mark.parametrize("switch", ["--teacher-gradient", "--class-mean", "--loss=dkd", "--temperature=2"])
    def test_each_switch_trains_another_student(self, online: Path, tmp_path: Path, switch: str) -> None:
        again = Path(shutil.copytree(online, tmp_path / "copy"))
        assert main(command(again, "--online", "--peers", "3", switch)) == 0
        assert len(list((again / "cache").glob("refined-*"))) == 2

    def test_a_killed_run_goes_on_to_the_same_weights(self, tmp_path: Path) -> None:
        arguments, killed = ["--online", "--peers", "2", "--epochs", "3"], tmp_path / "killed"
        assert killed_after_two_states(command(killed, *arguments)) == -signal.SIGKILL
        assert list(killed.glob("cache/*.resume"))
        assert main(command(killed, *arguments)) == 0
        assert main(command(tmp_path / "whole", *arguments)) == 0
        assert same(exported(killed), exported(tmp_path / "whole"))
        assert record(killed)["peers"] == record(tmp_path / "whole")["peers"]


class TestOthers:
    @pytest.mark.parametrize("loss", ["kd", "dkd"])
    @pytest.mark.parametrize("views", ["2", "0"])
    def test_beside_a_teacher_that_is_trained_here(self, tmp_path: Path, loss: str, views: str) -> None:
        arguments = ["--teacher", "test_resnet", "--teacher-epochs", "1", "--loss", loss, "--views", views]
        assert main(command(tmp_path, *arguments)) == 0
        assert (record(tmp_path)["distillation"], record(tmp_path)["peers"]) == ("offline", [])
        assert len(list((tmp_path / "cache").glob("teacher-*.safetensors"))) == 1
        assert len(list((tmp_path / "cache").glob("views-*"))) == (views != "0")

    def test_beside_an_exported_teacher_validation_is_not_quoted(
        self, online: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        teacher = online / record(online)["path"]
        assert main(command(tmp_path, "--teacher", str(teacher))) == 0
        assert "val accuracy" not in record(tmp_path)
        assert re.search(r"M-\d+\.\d +- +\d", capsys.readouterr().out)

    def test_plain_training_of_a_cheap_form(self, tmp_path: Path) -> None:
        assert main(command(tmp_path, "--no-teacher", "--conv", "depthwise")) == 0
        model = nas_kd.load(tmp_path / record(tmp_path)["path"])
        assert sum(p.numel() for p in model.parameters()) == record(tmp_path)["params"] < 100_000
        assert "test_resnet-depthwise" in record(tmp_path)["path"]

    def test_an_exported_model_goes_on_from_its_weights(self, online: Path, tmp_path: Path) -> None:
        folder = str(online / record(online)["path"])
        outs = []
        for name, more in (("on", []), ("scratch", ["--from-scratch"]), ("online", ["--online", "--peers", "2"])):
            how = more if "--online" in more else ["--no-teacher", *more]
            arguments = [*SMALL.split()[1:], "--out", str(tmp_path / name), "--lr", "1e-6", *how]
            assert main([folder, *arguments]) == 0
            outs.append(exported(tmp_path / name)["conv1.0.weight"])
            assert re.fullmatch(r"test_resnet-0\.37M-\d+\.\d", record(tmp_path / name)["path"])
        own = exported(online)["conv1.0.weight"]
        assert torch.allclose(outs[0], own, atol=1e-3)
        assert not any(torch.allclose(new, own, atol=1e-2) for new in outs[1:])

    def test_weights_that_are_given_are_inherited_by_a_cheap_form(self, online: Path, tmp_path: Path) -> None:
        weights = tmp_path / "weights.safetensors"
        save_file(exported(online), weights)
        arguments = ["--initial-checkpoint", str(weights), "--conv", "depthwise", "--no-teacher", "--lr", "1e-6"]
        assert main(command(tmp_path / "cheap", *arguments)) == 0
        own, cheap = exported(online), exported(tmp_path / "cheap")
        assert torch.allclose(cheap["fc.weight"], own["fc.weight"], atol=1e-3)

    def test_weights_taken_out_of_an_export_leave_its_normalisation_behind_and_a_line_says_so(
        self, online: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (weights,) = online.glob("*/model.safetensors")
        arguments = [word for word in command(tmp_path / "bare", "--no-teacher") if word != "-q"]
        assert main([*arguments, "--initial-checkpoint", str(weights)]) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert said.count("the weights alone of an exported model") == 1

    def test_the_papers_network_has_its_counts(self, tmp_path: Path) -> None:
        arguments = "cifar_resnet20_cheap --model-kwargs conv=shift --in-chans 3 --img-size 32 --online --peers 2 -q"
        more = ["--train-images", "10", "--epochs", "1", "--out", str(tmp_path)]
        assert main([*arguments.split(), *more]) == 0
        assert (record(tmp_path)["params"], record(tmp_path)["macs"]) == (34_906, 5_948_032)
        assert record(tmp_path)["path"].startswith("cifar_resnet20_cheap-shift-0.03M")

    def test_it_is_a_command_of_nas_kd(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="0"):
            nas_kd_main(["distill", "--help"])
        assert "--online" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("test_resnet", "one of the arguments --online --teacher --no-teacher is required"),
        ("test_resnet --online --no-teacher", "not allowed with argument --online"),
        ("test_resnet --online --peers 1", "must be at least 2, got 1"),
        ("test_resnt --online", "timm knows no model 'test_resnt'; did you mean 'test_resnet'"),
        ("test_resnet --online --pretrained", "--pretrained does not go with --online"),
        ("test_resnet --online --teacher-epochs 2", "--teacher-epochs speaks of a teacher: name one by --teacher"),
        ("test_resnet --no-teacher --class-mean", "--class-mean is a switch of --online"),
        ("test_resnet --no-teacher --pretrained --from-scratch", "--pretrained does not go with --from-scratch"),
        ("test_resnet --online --model-kwargs conv", "write key=value"),
        ("test_resnet --online --model-kwargs conv=shift", "timm cannot create 'test_resnet'"),
        ("cifar_resnet20_cheap --online --model-kwargs conv=grop4", "unknown convolution conv='grop4': use standard"),
        ("mobilenetv2_050 --online --conv depthwise --img-size 32", "can become 'depthwise': it offers shift"),
        ("test_resnet --online --conv group3", "can become 'group3': it offers blueprint, depthwise"),
        ("test_resnet --teacher resnet99", "timm knows no model 'resnet99'"),
        ("test_resnet --teacher test_resnet --teacher-checkpoint none.pth", "there is no checkpoint file none.pth"),
        ("test_resnet --online --dataset folder --data-dir /nowhere", "/nowhere"),
        ("local-dir:/nowhere --online", "/nowhere"),
        ("inception_v3 --online --img-size 32", "InceptionV3 cannot run on 1×32×32 images"),
        ("vit_tiny_patch16_224 --online --img-size 32", "VisionTransformer cannot run on 1×32×32 images"),
        ("test_resnet --teacher vit_tiny_patch16_224 --img-size 32", "VisionTransformer cannot run on 1×32×32"),
        ("test_resnet --online --device cuda:99", "there is no device 'cuda:99'"),
        ("test_resnet --online --img-size 32 --train-images 60 --epochs 2 --lr 1e30", "the loss became"),
    ],
)
def test_mistakes_are_one_line(arguments: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments.split(), "-q", "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("nas_kd: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err
    assert printed.out == ""
