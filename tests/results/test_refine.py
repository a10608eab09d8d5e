from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from nas_kd.data.augment import Augmentation
from nas_kd.data.images import AugmentedImages
from nas_kd.data.splits import DataSpec, Splits, load_splits
from nas_kd.files.tensors import read_tensors
from nas_kd.results.refine import Candidate, Refined, Refinement, refine
from nas_kd.training.evaluation import evaluate
from nas_kd.training.recipe import Recipe


def build(number: int) -> nn.Module:
    torch.manual_seed(number)
    network: nn.Module = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    return network


CANDIDATE = Candidate(role="front", digest="0123456789ab", build=build)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return load_splits(DataSpec(img_size=16, in_chans=1, train_images=120), tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module", params=[0, 2], ids=["alone", "together"])
def first(
    splits: Splits, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Refinement, Refined]:
    """A refinement, and what comes out; it is in its folder."""
    data = AugmentedImages(splits.train, Augmentation(flip=False), 0)
    recipe = Recipe(epochs=2, batch_size=32, lr=0.03, distill_weight=0.0, eval_epochs=(1, 2))
    how = {"data": data, "splits": splits, "recipe": recipe, "key": "digits", "peers": request.param}
    refinement = Refinement(folder=tmp_path_factory.mktemp("first"), **how)
    torch.manual_seed(0)
    return refinement, refine(CANDIDATE, refinement)


@pytest.fixture
def refinement(first: tuple[Refinement, Refined], tmp_path: Path) -> Refinement:
    """The same in an empty folder."""
    return replace(first[0], folder=tmp_path / "refined")


@pytest.fixture
def done(first: tuple[Refinement, Refined], refinement: Refinement) -> Refined:
    """What came out, which is put into the folder as well."""
    shutil.copytree(first[0].folder, refinement.folder)
    return first[1]


@pytest.fixture
def candidate() -> Candidate:
    return CANDIDATE


@pytest.fixture
def reports() -> list[tuple[int, float]]:
    return []


@pytest.fixture
def report(reports: list[tuple[int, float]]) -> Callable[[int, float], None]:
    return lambda epoch, accuracy: reports.append((epoch, accuracy))


Report = Callable[[int, float], None]


def test_it_trains_and_measures(
    candidate: Candidate, refinement: Refinement, report: Report, reports: list[tuple[int, float]]
) -> None:
    refined = refine(candidate, refinement, report=report)
    assert not refined.network.training
    assert refined.val_accuracy == evaluate(refined.network, refinement.splits.val)
    assert refined.test_accuracy == evaluate(refined.network, refinement.splits.test)
    assert [epoch for epoch, _ in reports] == [1, 2]
    assert [path.suffix for path in refinement.folder.iterdir()] == [".safetensors"]
    assert len(refined.peers) == (refinement.peers + 1 if refinement.peers else 0)  # and their teacher
    if refined.peers:
        best = max(refined.peers[:-1], key=lambda peer: peer.val)
        assert (refined.val_accuracy, refined.test_accuracy) == (best.val, best.test)


def test_what_was_trained_is_not_trained_again(
    candidate: Candidate, done: Refined, refinement: Refinement, report: Report, reports: list[tuple[int, float]]
) -> None:
    again = refine(candidate, refinement, report=report)
    assert reports == []
    assert (again.val_accuracy, again.test_accuracy) == (done.val_accuracy, done.test_accuracy)
    assert again.peers == done.peers
    assert not again.network.training
    for one, two in zip(done.network.state_dict().values(), again.network.state_dict().values(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.usefixtures("done")
@pytest.mark.parametrize("what", ["role", "digest", "recipe", "key", "peers"])
def test_anything_else_is_trained_anew(
    candidate: Candidate, refinement: Refinement, report: Report, reports: list[tuple[int, float]], what: str
) -> None:
    if what in ("role", "digest"):
        candidate = replace(candidate, **{what: "uniform"})  # type: ignore[arg-type]
    else:
        other = {"recipe": replace(refinement.recipe, seed=1), "key": "other", "peers": 3}[what]
        refinement = replace(refinement, **{what: other})  # type: ignore[arg-type]
    refine(candidate, refinement, report=report)
    assert len(reports) == 2


@pytest.mark.parametrize("share", [0.0, 0.5, 1])
def test_a_damaged_file_is_trained_again_with_a_warning(
    candidate: Candidate, done: Refined, refinement: Refinement, caplog: pytest.LogCaptureFixture, share: float
) -> None:
    (path,) = refinement.folder.iterdir()
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))] if share < 1 else data[:-9] + b"\1" + data[-8:])  # or one byte
    with caplog.at_level(logging.WARNING):
        again = refine(candidate, refinement)
    assert "is damaged" in caplog.text
    assert again.test_accuracy == done.test_accuracy
    tensors, facts = read_tensors(path)
    assert json.loads(facts["accuracies"])["val_accuracy"] == done.val_accuracy
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in done.network.state_dict().items())


def test_a_killed_training_goes_on(
    candidate: Candidate,
    first: tuple[Refinement, Refined],
    refinement: Refinement,
    report: Report,
    reports: list[tuple[int, float]],
) -> None:
    def die(epoch: int, accuracy: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refine(candidate, refinement, report=die)
    resumed = refine(candidate, refinement, report=report)
    assert [epoch for epoch, _ in reports] in ([1, 2], [2])
    assert resumed.test_accuracy == first[1].test_accuracy


def test_only_what_is_trained_is_settled(refinement: Refinement) -> None:
    settled: list[bool] = []
    candidate = replace(CANDIDATE, settle=lambda network: settled.append(network.training))
    refined = [refine(candidate, refinement) for _ in range(2)]
    assert len(settled) == (refinement.peers == 0)
    assert refined[0].val_accuracy == refined[1].val_accuracy
