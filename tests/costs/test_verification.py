from __future__ import annotations

import logging

import pytest
import torch
from families import kinds
from torch import Tensor, nn

from nas_kd.costs.cost_table import cost_table
from nas_kd.costs.verification import analyse, measure
from nas_kd.errors import ModelError
from nas_kd.students.building import build_student


class _Block(nn.Module):
    """A bottleneck whose inner number of channels may be kept where no tensor shows it."""

    def __init__(self, hides: bool) -> None:
        super().__init__()
        self.reduce, self.spatial = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, padding=1)
        self.expand = nn.Conv2d(32, 16, 1)
        self.secret = 32 if hides else None

    def forward(self, x: Tensor) -> Tensor:
        inner = self.spatial(self.reduce(x).relu())
        if self.secret is not None:
            inner = inner.view(len(inner), self.secret, *inner.shape[2:])
        return x + self.expand(inner.relu())


def _network(*hides: bool) -> nn.Module:
    blocks = [_Block(hidden) for hidden in hides]
    return nn.Sequential(nn.Conv2d(3, 16, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()


def test_what_fails_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        analysis = analyse(_network(False, True, False), (3, 8, 8), name="secretive")
    assert {block.name: len(block.widths) > 1 for block in analysis.blocks} == {"1": True, "2": False, "3": True}
    assert len(analysis.block("2").convs) == 5  # the kinds are fine
    ((block, reason),) = [entry for entry in analysis.left_alone if "stays" in entry[1]]
    assert block == "2"
    assert reason.startswith("its width stays: a student fails: ")
    assert "secretive: left alone because students fail" in caplog.text


def test_many_that_fail_are_told_in_few_words(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        analysis = analyse(_network(True, True, True, False), (3, 8, 8), name="secretive")
    assert "secretive: left alone because students fail: 1, 2 and 1 more: its width stays: a student" in caplog.text
    assert [block for block, reason in analysis.left_alone if "stays" in reason] == ["1", "2", "3"]


def test_what_is_left_is_right() -> None:
    network = _network(True, False)
    analysis = analyse(network, (3, 8, 8))
    table = cost_table(analysis, network)
    for index in range(10):
        genotype = table.genotype([index % len(block.choices) for block in table.blocks])
        student = build_student(network, analysis, genotype)
        assert student(torch.randn(1, 3, 8, 8)).shape == (1, 4)
        assert measure(student, (3, 8, 8)) == table.cost(genotype)


class _Windows(nn.Module):
    """Convolves four windows of the image apart from each other, as window attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        batch, channels, height, width = x.shape
        x = x.view(batch, channels, 2, height // 2, 2, width // 2).permute(0, 2, 4, 1, 3, 5)
        x = self.second(x.reshape(batch * 4, channels, height // 2, width // 2)).relu()
        return self.head(x).mean((2, 3)).view(batch, 4, 4).mean(1)


def test_windows_in_the_batch_are_counted() -> None:
    network = _Windows()
    analysis = analyse(network, (3, 8, 8))
    table = cost_table(analysis, network)
    for index in range(12):
        genotype = table.genotype([index % len(block.choices) for block in table.blocks])
        student = build_student(network, analysis, genotype)
        assert kinds(measure(student, (3, 8, 8))) == kinds(table.cost(genotype))


class _Fickle(nn.Module):
    """Runs another layer when its first one is not as it was: no student costs what a trace can say."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.second(self.first(x))
        if sum(parameter.numel() for parameter in self.parameters()) != 10276:
            inner = self.second(inner)
        return self.head(inner).mean((2, 3))


def test_a_hopeless_network_is_refused() -> None:
    with pytest.raises(ModelError, match="fickle is not supported: its students do not run or cost something else"):
        analyse(_Fickle(), (3, 8, 8), name="fickle")
