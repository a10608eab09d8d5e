from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

from nas_kd.networks.plain import copied


class Keeper(nn.Module):
    """Shares, counts and refers to itself; one tensor is kept outside its parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.twin = self.layer
        self.table: dict[str, Any] = {"tensors": [torch.ones(2), self.layer.weight], "none": {}}
        self.alias = self.table
        self.table["itself"] = self.table
        self.owner = [self]


class Stateful(nn.Linear):
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stored": True}


class Deep(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return nn.Identity()


def test_a_copy_shares_within_itself_what_its_original_does() -> None:
    network = Keeper()
    twin = copied(network)
    assert twin.twin is twin.layer
    assert twin.layer is not network.layer
    assert twin.alias is twin.table is twin.table["itself"]
    assert twin.table["tensors"][1] is twin.layer.weight
    assert twin.owner == [twin]
    assert torch.equal(twin.layer.weight, network.layer.weight)
    assert twin.layer.weight.data_ptr() != network.layer.weight.data_ptr()
    twin.table["none"]["new"] = 1
    assert not network.table["none"]


def test_a_copy_takes_what_the_memo_has() -> None:
    network = Keeper()
    twin = copied(network, {id(network.layer): network.layer})
    assert twin.layer is twin.twin is network.layer


def test_classes_that_copy_in_their_own_way_do() -> None:
    twin = copied(nn.Sequential(Stateful(1, 1), Deep(1, 1)))
    assert twin[0].stored is True
    assert type(twin[1]) is nn.Identity


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_nfnet"])
def test_it_is_deepcopy(name: str) -> None:
    network = timm.create_model(name)
    one, two = copied(network), copy.deepcopy(network)
    for ours, theirs in zip(one.modules(), two.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert vars(ours).keys() == vars(theirs).keys()
    assert one.state_dict().keys() == two.state_dict().keys()
    assert not {id(module) for module in one.modules()} & {id(module) for module in network.modules()}
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(one.eval()(image), two.eval()(image))
