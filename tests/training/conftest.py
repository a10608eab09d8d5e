from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from nas_kd.training.data import DataSpec, Splits, load_splits


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    """160 training digits of 32×32 pixels (timm's test models need that much)."""
    spec = DataSpec(img_size=32, in_chans=1, train_images=160)
    return load_splits(spec, tmp_path_factory.mktemp("digits"))


MakeNetwork = Callable[..., nn.Module]


@pytest.fixture
def make_network() -> MakeNetwork:
    """Makes timm's own test ResNet by seed: real blocks, 0.5 M parameters."""

    def make(seed: int = 0, classes: int = 10) -> nn.Module:
        torch.manual_seed(seed)
        network: nn.Module = timm.create_model("test_resnet", in_chans=1, num_classes=classes)
        return network

    return make


@pytest.fixture
def network(make_network: MakeNetwork) -> nn.Module:
    return make_network()
