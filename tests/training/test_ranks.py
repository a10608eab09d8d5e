"""Trainings that two processes share, beside the same ones in this process."""

from __future__ import annotations

import io
import signal
from pathlib import Path

import pytest
import shared_trainings
import torch
from processes import end_of, start_ranks
from safetensors.torch import load_file
from shared_trainings import RECIPE, SPEC, far, in_pieces, network, online, trained
from torch import Tensor, nn
from warm import warm_python

from nas_kd.data.originals import Originals
from nas_kd.data.splits import load_splits
from nas_kd.errors import TrainingError
from nas_kd.files import mapped
from nas_kd.training.ranks import packed

Weights = dict[str, Tensor]
ROUNDING = 5e-3  # as `far` has it: up to 1e-3, by the processor; with norms apart it is 0.03
ENDED = "another process of this training has ended: what is finished is kept, the same command goes on from there"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    load_splits(SPEC, folder)
    return folder


@pytest.fixture(scope="module")
def shared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    """What two processes made, in one run."""
    drafts = tmp_path_factory.mktemp("shared")
    command = [warm_python(), shared_trainings.__file__, str(data), str(drafts)]
    (first, code), second = map(end_of, start_ranks(command))
    assert (first, code) == ("", -signal.SIGKILL)
    assert second == (f"nas_kd: {ENDED}\n", 2)
    return {file.stem: load_file(file) for file in drafts.glob("*.safetensors")}


def test_two_processes_train_what_one_does(shared: dict[str, Weights], data: Path) -> None:
    assert 0 < far(trained(data), shared["whole"], network()) < ROUNDING


def test_peers_that_learn_together_too(shared: dict[str, Weights], data: Path) -> None:
    learnt, before = (
        nn.ModuleDict({"students": peers}) for peers in (online(data).students, nn.ModuleList(map(network, range(2))))
    )
    assert 0 < far(learnt, shared["online"], before) < ROUNDING


def test_pieces_of_a_batch_have_its_gradients(shared: dict[str, Weights], data: Path) -> None:
    assert 0 < far(in_pieces(data), shared["pieces"], network(norm="groupnorm1")) < ROUNDING


def test_the_same_seed_gives_the_same_bits(shared: dict[str, Weights]) -> None:
    assert all(torch.equal(shared["again"][name], tensor) for name, tensor in shared["whole"].items())


def test_what_was_killed_goes_on_as_if_it_had_not_been(shared: dict[str, Weights]) -> None:
    assert RECIPE.epochs == 2
    assert all(torch.equal(shared["resumed"][name], tensor) for name, tensor in shared["whole"].items())


def test_mapped_images_travel_as_the_names_of_their_files(data: Path) -> None:
    train = load_splits(SPEC, data).train
    originals = Originals(train.pixels.numpy(), train.labels.numpy()[None], train.labels.numpy(), 1)
    sent = io.BytesIO()
    torch.save((train[8:40], originals, torch.arange(3)), sent, pickle_module=mapped)
    assert sent.tell() < train.bytes / 10
    sent.seek(0)
    images, whole, small = torch.load(sent, weights_only=False)
    assert torch.equal(images.pixels, train.pixels[8:40])
    assert torch.equal(images.labels, train.labels[8:40])
    assert (whole.pixels == originals.pixels).all()
    assert torch.equal(small, torch.arange(3))


def test_what_cannot_be_sent_is_said() -> None:
    with pytest.raises(TrainingError, match=r"cannot be sent to other processes .* run it without torchrun"):
        packed(lambda: None)
