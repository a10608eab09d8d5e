from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from torch import nn

from nas_kd.costs.verification import analyse
from nas_kd.errors import ModelError, NasKdError
from nas_kd.genotype import Genotype
from nas_kd.networks.onnx import difference, need, run_onnx, write_model, write_onnx
from nas_kd.students.building import build_student

SIZE = (3, 32, 32)


@cache
def mixed_student() -> nn.Module:
    """Every kind of convolution, one block after the other."""
    torch.manual_seed(0)
    base = timm.create_model("test_resnet", num_classes=10)
    analysis = analyse(base, SIZE)
    kinds = ["shift", "depthwise", "group4", "blueprint", "standard"]
    chosen = {}
    for block in analysis.blocks:
        fitting = [choice for kind in kinds for choice in block.choices if choice.conv == kind and choice.width < 1]
        chosen[block.name] = fitting[0] if fitting else block.default
        if fitting:
            kinds.append(kinds.pop(kinds.index(str(fitting[0].conv))))
    return build_student(base, analysis, Genotype.of(chosen)).eval()


def test_students_of_all_kinds_give_the_same_outputs_for_any_number_of_images(tmp_path: Path) -> None:
    student = mixed_student()
    write_model(student, SIZE, tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx"]  # the weights are inside
    assert difference(student, SIZE, tmp_path / "model.onnx") == pytest.approx(0, abs=1e-4)
    for count in (1, 5):
        images = torch.randn(count, *SIZE)
        with torch.no_grad():
            assert torch.allclose(run_onnx(tmp_path / "model.onnx", images), student(images), atol=1e-4)


class Counting(nn.Module):
    """Its trace holds the number of images that it was made with."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        count = int(images.shape[0]) if torch.jit.is_tracing() else -1
        return images.flatten(1).sum(1).reshape(count, 1)


def exporters(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each export from now on is by the newer exporter."""
    used, export = [], torch.onnx.export

    def watched(*arguments: Any, dynamo: bool, **options: Any) -> Any:
        used.append(dynamo)
        return export(*arguments, dynamo=dynamo, **options)

    monkeypatch.setattr(torch.onnx, "export", watched)
    return used


def test_the_quicker_exporter_writes_what_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = exporters(monkeypatch)
    write_model(mixed_student(), SIZE, tmp_path / "model.onnx")
    assert used == [False]
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [opset.domain for opset in model.opset_import] == [""]  # nothing of one runtime's own
    kinds = {node.op_type for node in model.graph.node}
    assert "Conv" in kinds
    assert not kinds & {"Identity", "Constant", "BatchNormalization", "Shape"}  # the graph is folded
    assert not kinds & {"Slice", "Split", "Gather", "Equal", "OneHot"}  # a shift is one convolution
    used.clear()
    write_model(Counting(), SIZE, tmp_path / "counting.onnx")
    assert used == [False, True]
    assert difference(Counting(), SIZE, tmp_path / "counting.onnx") == pytest.approx(0, abs=1e-4)


def test_without_a_runtime_to_compare_the_newer_exporter_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, used = importlib.util.find_spec, exporters(monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    write_model(Counting(), SIZE, tmp_path / "model.onnx")
    assert used == [True]


def test_what_is_timed_is_written_without_onnxscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, find = mixed_student(), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    write_onnx(student, (torch.randn(1, *SIZE),), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size > 1000


def test_a_missing_package_says_how_to_get_it() -> None:
    with pytest.raises(NasKdError, match=r"ONNX needs no_such_package: pip install no_such_package"):
        need("no_such_package")


def test_a_file_that_refuses_other_images_is_named(tmp_path: Path) -> None:
    student = mixed_student()
    write_model(student, SIZE, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="ONNX Runtime cannot run a network: "):
        difference(student, (3, 16, 16), tmp_path / "model.onnx")


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("this one refuses")

    with pytest.raises(ModelError, match="Odd cannot be written as ONNX"):
        write_model(Odd(), SIZE, tmp_path / "model.onnx")
