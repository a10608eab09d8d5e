"""studies/versus.py: what it compares with keeps to the bound and learns, and its smoke run gives every row."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import nas_kd.models  # noqa: F401 (the CIFAR bases)
from nas_kd.budget import LATENCY, Budget, Cost
from nas_kd.costs.verification import measure
from nas_kd.data.images import Images

ROOT = Path(__file__).resolve().parents[1]
SIZE, CLASSES = (1, 16, 16), 10
PARAMS = {
    **{f"type{stage}": kind for stage, kind in enumerate(("er", "ir", "ir"))},
    **{f"depth{stage}": 1 for stage in range(3)},
    **{f"expand{stage}": 3 for stage in range(3)},
    **{"kernel": 5, "growth": 1.7, "head": 2, "lr": 0.2},
}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    import plain_optuna

    return plain_optuna


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).reshape(-1, 1, 8, 8).mul(15).byte()
    return pixels.repeat_interleave(2, 2).repeat_interleave(2, 3), torch.from_numpy(labels).long()


def test_the_plain_search_is_as_wide_as_the_bound_allows(plain: Any) -> None:
    bound = 1_000_000
    width = plain.widest(PARAMS, bound, SIZE, CLASSES)
    counted = [measure(plain.make(PARAMS, width + more, SIZE, CLASSES), SIZE).macs for more in (0, 4)]
    assert counted[0] <= bound < counted[1]
    assert plain.macs_of(plain.make(PARAMS, width, SIZE, CLASSES), SIZE) == counted[0]
    assert plain.widest(PARAMS, 100, SIZE, CLASSES) is None


def test_the_plain_search_learns_from_the_teacher(plain: Any) -> None:
    pixels, labels = digits()
    known = torch.nn.functional.one_hot(labels, CLASSES).float() * 10  # a teacher that is always right
    how = (pixels[:1400][None], labels[:1400], known[:1400][None], pixels[1400:], labels[1400:], (0.3,), (0.4,))
    data = plain.Data(*how)
    found = plain.Search(300_000.0, 1.0, plain.Training(640, 0.1)).run(data)
    network = plain.build(found, SIZE, CLASSES, seed=0)
    assert measure(network, SIZE).macs <= 300_000
    plain.distil(network, data, plain.Training(5600, 0.1))
    assert plain.accuracy(network, data, 1000) > 0.5  # a tenth by chance


def test_torch_pruning_keeps_to_a_cost_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    from pruned import Method, prune

    base = timm.create_model("cifar_resnet20", num_classes=CLASSES, in_chans=1)

    def cost(network: torch.nn.Module) -> Cost:  # as if a MAC took a nanosecond
        counted = measure(network, SIZE)
        return dataclasses.replace(counted, latency=counted.macs)

    images = Images(*digits(), mean=(0.5,), std=(0.5,))[:512]
    bound = cost(base).latency // 2
    pruned = prune(base, Method("local", "l2", "whole"), Budget(((LATENCY, bound),)), images, cost)
    assert pruned is not None
    assert 0.9 * bound < measure(pruned, SIZE).macs <= bound


@pytest.mark.slow
def test_the_smoke_run_gives_every_row(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(ROOT / "studies" / "versus.py"), "smoke", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    page = (tmp_path / "versus.md").read_text()
    for arm in ("knapsack, small", "search, small", "torch-pruning local l2 inner", "timm tinynet_e/16"):
        assert f"| {arm} |" in page
    assert "At equal compute: 20 CPU seconds" in page
    assert (tmp_path / "versus.svg").exists()


@pytest.mark.parametrize("importance", ["l2", "taylor"])
def test_torch_pruning_keeps_multiples(monkeypatch: pytest.MonkeyPatch, importance: str) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    from pruned import Method, prune

    base = timm.create_model("cifar_resnet20", num_classes=CLASSES, in_chans=1)
    images = Images(*digits(), mean=(0.5,), std=(0.5,))[:256]
    budget = Budget((("macs", measure(base, SIZE).macs // 2),))
    pruned = prune(base, Method("local", importance, "whole", multiple=8), budget, images)
    assert pruned is not None
    widths = [module.out_channels for module in pruned.modules() if isinstance(module, torch.nn.Conv2d)]
    assert min(widths) < 16
    assert all(width % 8 == 0 for width in widths)


@pytest.mark.mcu
def test_the_yardstick_of_microcontrollers_gives_every_row(tmp_path: Path) -> None:
    script = str(ROOT / "studies" / "mlperf_tiny.py")
    command = [sys.executable, "-W", "ignore", script, "--smoke", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    rows = [json.loads(line)["record"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["ours", "torch-pruning local l2 inner", "ResNet-8, distilled"]
    assert all(row["ram"] < 40_000 and row["cycles"] < 300_000 and row["flash"] < 210_000 for row in rows)
    assert "| ResNet-8, distilled | 1 |" in (tmp_path / "page.md").read_text()
