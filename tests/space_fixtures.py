"""Search spaces of real networks, and trials that train timm's own small test ResNet on digits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import timm
import torch
from torch import nn

from nas_kd.budget import Budget
from nas_kd.data.augment import Augmentation
from nas_kd.data.splits import DataSpec, Splits, load_splits
from nas_kd.genotype import Genotype
from nas_kd.search.space import Space
from nas_kd.search.trials import Proxy
from nas_kd.training.recipe import Recipe
from nas_kd.training.views import ViewSpec, build_views

BASES: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "mobilenetv2_100": {},
    "vgg11_bn": {"mlp_ratio": 1 / 32},  # else its head alone holds 100 M weights
}


@cache
def _space(name: str) -> Space[nn.Module]:
    torch.manual_seed(0)
    return Space(timm.create_model(name, num_classes=10, **BASES[name]), img_size=32, name=name)


@pytest.fixture(scope="session", params=BASES)
def space(request: pytest.FixtureRequest) -> Space[nn.Module]:
    """A space without a budget, of each base in turn."""
    return _space(request.param)


@pytest.fixture(scope="session")
def resnet() -> Space[nn.Module]:
    return _space("resnet18")


@pytest.fixture(scope="session")
def within() -> Callable[[Space[nn.Module], str | Budget], Space[nn.Module]]:
    """Gives the same space, within a budget: the base is not analysed again."""

    def limit(space: Space[nn.Module], budget: str | Budget) -> Space[nn.Module]:
        return space.with_budget(budget)

    return limit


@pytest.fixture(scope="session")
def draw() -> Callable[[Space[nn.Module], int], Genotype]:
    """Draws any genotype of a space by seed."""

    def genotype(space: Space[nn.Module], seed: int) -> Genotype:
        rng = np.random.default_rng(seed)
        return space.table.genotype([int(rng.integers(len(block.choices))) for block in space.blocks])

    return genotype


@pytest.fixture(autouse=True)
def quiet_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    spec = DataSpec(img_size=16, in_chans=1, train_images=120)
    return load_splits(spec, tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def small() -> Space[nn.Module]:
    """The space of timm's test ResNet for digits, within 60 % of its parameters."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    return Space(network, budget="params=60%", img_size=16)


@pytest.fixture(scope="session")
def make_proxy(
    digits: Splits, small: Space[nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Proxy]:
    """Makes a proxy of so many epochs; the views are built once."""
    folder: Path = tmp_path_factory.mktemp("views")

    def make(*, epochs: int = 1, lr: float = 0.015) -> Proxy:
        spec = ViewSpec(count=2, augmentation=Augmentation(flip=False), seed=0, key=digits.digest)
        views = build_views(digits.train, small.base, spec, folder)
        return Proxy(views=views, val=digits.val, recipe=Recipe(epochs=epochs, batch_size=32, lr=lr))

    return make
