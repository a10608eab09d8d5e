from __future__ import annotations

import argparse
import logging
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nas_kd.data.augment import Augmentation
from nas_kd.data.images import Images, normalise
from nas_kd.data.splits import Splits
from nas_kd.errors import CheckpointError, DataError
from nas_kd.training.loop import ignore
from nas_kd.training.recipe import Recipe
from nas_kd.training.teacher import (
    Teacher,
    TeacherCache,
    TeacherResult,
    Teaching,
    adopt_teacher,
    load_checkpoint,
    prepare_teacher,
)

MakeNetwork = Callable[..., nn.Module]
RECIPE = Recipe(epochs=2, batch_size=32, lr=0.02, distill_weight=0)
AUGMENTATION = Augmentation(flip=False)


def prepare(
    network: nn.Module,
    digits: Splits,
    folder: Path,
    recipe: Recipe = RECIPE,
    report: Callable[[int, float], None] = ignore,
) -> TeacherResult:
    cache = TeacherCache(folder=folder, key="test_resnet")
    teaching = Teaching(recipe=recipe, augmentation=AUGMENTATION)
    return prepare_teacher(network, digits, teaching, cache=cache, report=report)


def equal(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in first.state_dict().items())


def test_it_is_trained_once(make_network: MakeNetwork, digits: Splits, tmp_path: Path) -> None:
    first = prepare(make_network(0), digits, tmp_path)
    assert first.trained_here
    assert not first.network.training
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    second = prepare(make_network(1), digits, tmp_path)  # other first weights, same key: the cached ones replace them
    assert equal(first.network, second.network)
    assert (first.digest, first.val_accuracy) == (second.digest, second.val_accuracy)
    prepare(make_network(0), digits, tmp_path, Recipe(epochs=1, distill_weight=0))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: data[:-9] + b"\1" + data[-8:]])
def test_a_damaged_cache_is_trained_again(
    make_network: MakeNetwork,
    digits: Splits,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[bytes], bytes],
) -> None:
    """Also where it can be read, and one byte is another."""
    first = prepare(make_network(), digits, tmp_path)
    file = next(tmp_path.iterdir())
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        second = prepare(make_network(), digits, tmp_path)
    assert "is damaged" in caplog.text
    assert first.digest == second.digest


def test_a_killed_training_goes_on(
    make_network: MakeNetwork, digits: Splits, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = prepare(make_network(), digits, tmp_path / "whole")

    def kill(epoch: int, accuracy: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(make_network(), digits, tmp_path / "killed", report=kill)
    with caplog.at_level(logging.INFO):
        resumed = prepare(make_network(), digits, tmp_path / "killed")
    assert "after epoch 1 of 2" in caplog.text
    assert resumed.digest == expected.digest


def test_a_teacher_near_chance_is_a_loud_warning(
    network: nn.Module, digits: Splits, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.no_grad():
        network.fc.weight.zero_()
    with caplog.at_level(logging.WARNING):
        result = adopt_teacher(network, digits, augmentation=AUGMENTATION)
    assert not result.trained_here
    chance = 100 * int(digits.val.labels.bincount().max()) / len(digits.val)
    own = f"{100 * result.val_accuracy:.1f}% of the validation images"
    assert f"NEAR CHANCE: {own}, the most frequent class alone gives {chance:.1f}%" in caplog.text


def test_two_classes_are_not_near_chance_at_three_quarters(
    network: nn.Module, digits: Splits, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of two classes, however well balanced, is chance; twice that is perfection."""
    with torch.no_grad():
        said = (digits.val.labels < 5).long()
    images = replace(digits.val, labels=said)
    coarse = replace(digits, val=images, class_names=("low", "high"))
    with caplog.at_level(logging.WARNING):
        for share, warns in ((0.75, False), (0.52, True)):
            answers = said.clone()
            answers[: round((1 - share) * len(said))] = 1 - answers[: round((1 - share) * len(said))]
            caplog.clear()
            adopt_teacher(_Answering(images, answers), coarse, augmentation=AUGMENTATION)
            assert ("NEAR CHANCE" in caplog.text) is warns


class _Answering(nn.Module):
    """Answers what it is told of the images that it is told of: those that its input comes nearest to."""

    def __init__(self, images: Images, answers: Tensor) -> None:
        super().__init__()
        known = normalise(images.pixels, images.mean, images.std, torch.device("cpu"))
        self.known, self.answers, self.scale = known.flatten(1), answers, nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        nearest = torch.cdist(images.flatten(1), self.known).argmin(1)
        return nn.functional.one_hot(self.answers[nearest], 2) * self.scale


def test_too_few_outputs_are_refused(make_network: MakeNetwork, digits: Splits, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gives \(7,\) outputs for 10 classes: create it with num_classes=10"):
        adopt_teacher(make_network(classes=7), digits, augmentation=AUGMENTATION)
    with pytest.raises(DataError, match="outputs for 10 classes"):
        prepare(make_network(classes=7), digits, tmp_path)


def test_a_teacher_cannot_leave_eval_mode_or_learn(network: nn.Module) -> None:
    teacher, student = Teacher(network), nn.Linear(10, 10)
    both = nn.ModuleList([teacher, student])
    both.train().requires_grad_(True)
    teacher.requires_grad_(True)
    assert student.training
    assert not any(module.training for module in teacher.modules())
    logits = teacher(torch.randn(2, 1, 32, 32, requires_grad=True))
    assert not logits.requires_grad
    assert all(parameter.requires_grad for parameter in network.parameters())  # its own copy is frozen, not the base


@pytest.mark.parametrize("form", ["safetensors", "plain", "state_dict", "model", "module."])
def test_checkpoints_load_in_every_usual_form(make_network: MakeNetwork, tmp_path: Path, form: str) -> None:
    source, target = make_network(1), make_network(2)
    state, path = source.state_dict(), tmp_path / "w.pth"
    if form == "safetensors":
        path = tmp_path / "w.safetensors"
        save_file(state, path)
    elif form == "plain":
        torch.save(state, path)
    elif form == "module.":
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    else:
        torch.save({form: state, "epoch": 3, "args": argparse.Namespace(lr=1)}, path)
    load_checkpoint(target, path)
    assert equal(source, target)


def test_checkpoints_that_do_not_fit_name_what_differs(make_network: MakeNetwork, tmp_path: Path) -> None:
    network = make_network(0)
    before = make_network(0)
    wide = {key: torch.cat([tensor, tensor], 1) if key == "fc.weight" else tensor
            for key, tensor in network.state_dict().items()}  # fmt: skip
    cases = {
        r"fc.weight is \(10, \d+\) there and \(10, \d+\) in the model": wide,
        r"it lacks fc.bias; the model does not have fc.extra": {
            ("fc.extra" if key == "fc.bias" else key): value for key, value in network.state_dict().items()
        },
        "fc.bias holds values that are not finite": network.state_dict() | {"fc.bias": torch.full((10,), torch.nan)},
        r"these are weights of another architecture \(\d+ of its \d+ tensors are there\)": timm.create_model(
            "test_efficientnet", in_chans=1, num_classes=10
        ).state_dict(),
    }
    for message, state in cases.items():
        torch.save(dict(state), tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=f"does not fit the model ResNet: {message}") as caught:
            load_checkpoint(network, tmp_path / "w.pth")
        assert "\n" not in str(caught.value)
        assert equal(network, before)


def test_a_classifier_for_other_classes_is_left_out(make_network: MakeNetwork, tmp_path: Path) -> None:
    network, source = make_network(0), make_network(1, classes=7)
    own = network.fc.weight.clone()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    assert not load_checkpoint(network, tmp_path / "w.pth")
    assert torch.equal(network.fc.weight, own)
    assert torch.equal(network.conv1[0].weight, source.conv1[0].weight)
    torch.save(make_network(2).state_dict(), tmp_path / "w.pth")
    assert load_checkpoint(network, tmp_path / "w.pth")
    assert equal(network, make_network(2))


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return print, ("code ran",)


def test_unreadable_checkpoints_are_one_line(
    network: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "garbage.pth").write_bytes(b"garbage" * 100)
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage" * 100)
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Evil()))
    torch.save({"state_dict": {"fc.bias": Evil()}}, tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 1}, tmp_path / "nothing.pth")
    for path in (*tmp_path.iterdir(), tmp_path / "missing.pth", tmp_path):
        with pytest.raises(CheckpointError, match="checkpoint") as caught:
            load_checkpoint(network, path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
    assert capsys.readouterr().out == ""
