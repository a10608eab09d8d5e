"""Teacher, views, library, refinement and export, stopped before any file of theirs comes into being: they go on."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from injection import Count, die, ended_well, fork, watched_files
from torch import nn

import nas_kd
from nas_kd.data.augment import Augmentation
from nas_kd.data.images import AugmentedImages
from nas_kd.data.splits import DataSpec, Splits, load_splits
from nas_kd.library.building import LibrarySpec, build_library
from nas_kd.library.library import Library
from nas_kd.results.export import Card, export
from nas_kd.results.refine import Candidate, Refined, Refinement, refine
from nas_kd.search.options import parse_options
from nas_kd.search.space import Space
from nas_kd.training.recipe import Recipe
from nas_kd.training.teacher import TeacherCache, TeacherResult, Teaching, prepare_teacher
from nas_kd.training.views import Views, ViewSpec, build_views

PLAIN = Augmentation(flip=False)
EPOCHS = 3


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return load_splits(DataSpec(img_size=16, in_chans=1, train_images=64), tmp_path_factory.mktemp("digits"))


def make(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network: nn.Module = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    return network


def ask_to_stop() -> None:
    signal.raise_signal(signal.SIGINT)


def stopped_before_every_file(run: Callable[[], Any], patch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    """Runs something until Ctrl-C comes before its first file, then each time before the second one from where it was;
    returns what it gave in the end, and the files in the order in which they came."""
    files: list[str] = []
    for attempt in itertools.count():
        with watched_files(Count((min(attempt, 1) + 1,), ask_to_stop), patch) as written:
            try:
                return run(), [*files, *written]
            except KeyboardInterrupt:
                files += written
    raise AssertionError


def same(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in first.state_dict().items())


def left_in(folder: Path) -> set[str]:
    return {path.suffix for path in folder.rglob("*") if path.is_file()}


def test_a_teacher_trains_every_epoch_once(digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(epochs=EPOCHS, batch_size=32, lr=0.02, distill_weight=0)
    heard: list[int] = []

    def run(folder: str) -> TeacherResult:
        cache = TeacherCache(folder=tmp_path / folder, key="test_resnet")
        report: Any = lambda epoch, accuracy: heard.append(epoch)  # noqa: E731
        return prepare_teacher(make(), digits, Teaching(recipe=recipe, augmentation=PLAIN), cache=cache, report=report)

    whole = run("whole")
    heard.clear()
    stopped, files = stopped_before_every_file(lambda: run("stopped"), monkeypatch)
    assert same(stopped.network, whole.network)
    assert len(files) == len(set(heard)) + 1 == EPOCHS + 1
    assert left_in(tmp_path) == {".safetensors"}


def test_a_refinement_trains_every_epoch_once_and_is_tested_alike(
    digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(epochs=EPOCHS, batch_size=32, lr=0.02, distill_weight=0, eval_epochs=tuple(range(1, EPOCHS + 1)))
    data = AugmentedImages(digits.train, PLAIN, 0)

    def run(folder: str) -> Refined:
        wanted = Refinement(data=data, splits=digits, recipe=recipe, folder=tmp_path / folder, key="digits")
        return refine(Candidate(role="front", digest="0123456789ab", build=make), wanted)

    whole = run("whole")
    stopped, files = stopped_before_every_file(lambda: run("stopped"), monkeypatch)
    assert same(stopped.network, whole.network)
    assert (stopped.val_accuracy, stopped.test_accuracy) == (whole.val_accuracy, whole.test_accuracy)
    assert len(files) == EPOCHS + 1
    assert left_in(tmp_path) == {".safetensors"}


def test_a_library_makes_every_entry_once(digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make().eval()
    pins = [f"{block}:width=1" for block in ("conv1", "layer1.0", "layer2.0")]
    analysis = Space(base, img_size=16, options=parse_options("width=1/0.5", pins)).analysis
    images = AugmentedImages(digits.train, PLAIN, 0).sample(48)
    spec = LibrarySpec(images=32, holdout=16, rounds=(2, 2), batch_size=16, anchor=False)

    def run(folder: str) -> Library:
        return build_library(base, analysis, images, spec, tmp_path / folder)

    whole = run("whole")
    stopped, files = stopped_before_every_file(lambda: run("stopped"), monkeypatch)
    once: list[str] = []
    with watched_files(Count((), die), monkeypatch) as written:
        run("again")
        once += written
    assert files == once
    for one, other in zip(stopped.damages(), whole.damages(), strict=True):
        assert list(one) == list(other)
    assert left_in(tmp_path) == left_in(tmp_path / "whole")


def test_views_are_whole_or_not_there(digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = make().eval()

    def run(folder: str) -> Views:
        return build_views(digits.train, teacher, ViewSpec(count=2, augmentation=PLAIN), tmp_path / folder)

    def killed() -> None:
        with watched_files(Count((1,), die), monkeypatch):
            run("stopped")

    whole = run("whole")
    assert not ended_well(fork(killed))
    stopped, files = stopped_before_every_file(lambda: run("stopped"), monkeypatch)
    assert len(files) == 1
    assert whole.logits is not None
    assert torch.equal(stopped.pixels, whole.pixels)
    assert torch.equal(stopped.logits, whole.logits)


@pytest.fixture(scope="module")
def students() -> tuple[nn.Module, nn.Module]:
    return make(0).eval(), make(1).eval()


@pytest.mark.parametrize("move", [1, 2])
def test_an_export_that_is_interrupted_leaves_the_earlier_one(
    move: int, students: tuple[nn.Module, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, later = students
    target = export(earlier, tmp_path / "model", Card(title="a"))
    with pytest.raises(KeyboardInterrupt), watched_files(Count((move,), ask_to_stop), monkeypatch):
        export(later, target, Card(title="a"))
    assert same(nas_kd.load(target), earlier)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert same(nas_kd.load(export(later, target, Card(title="a"))), later)


@pytest.mark.parametrize("move", [1, 2])
def test_an_export_that_is_killed_is_whole_or_not_there_and_done_again(
    move: int, students: tuple[nn.Module, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, later = students
    target = export(earlier, tmp_path / "model", Card(title="a"))

    def killed() -> None:
        with watched_files(Count((move,), die), monkeypatch):
            export(later, target, Card(title="a"))

    assert not ended_well(fork(killed))
    assert same(nas_kd.load(target), earlier) if move == 1 else not target.exists()
    assert same(nas_kd.load(export(later, target, Card(title="a"))), later)
