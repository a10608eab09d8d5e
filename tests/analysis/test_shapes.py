from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nas_kd.analysis.labels import tensors
from nas_kd.analysis.shapes import run_on_meta

aten = torch.ops.aten


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


PLAIN = image(2, 6, 4, 4)
LAST = PLAIN.contiguous(memory_format=torch.channels_last)
ROWS = PLAIN.permute(0, 2, 3, 1)
NUMBERS = image(6)
CASES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "activation": (aten.relu.default, (PLAIN,)),
    "activation, channels last": (aten.hardswish.default, (LAST,)),
    "half an activation": (aten.silu.default, (PLAIN.half(),)),
    "sum": (aten.add.Tensor, (PLAIN, PLAIN)),
    "sum with a number": (aten.add.Tensor, (PLAIN, 1)),
    "product with an image of numbers": (aten.mul.Tensor, (PLAIN, image(2, 6, 1, 1))),
    "product with channels": (aten.mul.Tensor, (PLAIN, image(6, 1, 1))),
    "product that is larger than its first": (aten.mul.Tensor, (image(6, 1, 1), PLAIN)),
    "product of mixed layouts": (aten.mul.Tensor, (PLAIN, LAST)),
    "product of mixed precisions": (aten.mul.Tensor, (PLAIN.half(), PLAIN)),
    "quotient of a cut": (aten.div.Tensor, (PLAIN[:, :3], 2.0)),
    "difference of cuts": (aten.sub.Tensor, (PLAIN[:, :3], PLAIN[:, 3:])),
    "layer norm": (aten.native_layer_norm.default, (image(2, 4, 4, 6), [6], NUMBERS, NUMBERS, 1e-5)),
    "layer norm of a turned image": (aten.native_layer_norm.default, (ROWS, [6], NUMBERS, NUMBERS, 1e-5)),
    "batch norm": (aten.native_batch_norm.default, (PLAIN, *[NUMBERS] * 4, False, 0.1, 1e-5)),
    "batch norm of the images at hand": (aten.native_batch_norm.default, (PLAIN, *[NUMBERS] * 4, True, 0.1, 1e-5)),
    "standardised weights": (aten.native_batch_norm.default, (PLAIN, *[None] * 4, True, 0.0, 1e-6)),
    "batch norm, channels last": (aten.native_batch_norm.default, (LAST, *[NUMBERS] * 4, False, 0.1, 1e-5)),
    "half a batch norm": (aten.native_batch_norm.default, (PLAIN.half(), *[NUMBERS] * 4, False, 0.1, 1e-5)),
}


@pytest.mark.parametrize("case", CASES)
def test_short_cuts_give_what_torch_gives(case: str) -> None:
    operator, arguments = CASES[case]
    assert forms(run_on_meta(operator, arguments, {})) == forms(operator(*arguments))


def forms(output: Any) -> list[Any]:
    return [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors(output)]


def test_what_changes_in_place_is_the_same_tensor() -> None:
    assert run_on_meta(aten.relu_.default, (PLAIN,), {}) is PLAIN
