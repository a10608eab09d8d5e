"""Least squares: after channels were dropped or a convolution replaced by a cheap one, the layers that read what is
left are fitted once more to what the base's layers write (as ThiNet does after channel selection; Luo et al. 2017,
arXiv:1707.06342, section 3.2.2). One pass over some activations per layer, no gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nas_kd.analysis.structure import Analysis
from nas_kd.networks.convolutions import Pair
from nas_kd.students.frames import Frame, Recording, run_frame

Mask = NDArray[np.bool_]
_LINEAR = (nn.Conv2d, Conv2dSame, nn.Linear)  # weight-standardised layers are no linear functions of their weights
_ROWS = 6  # samples per unknown, at least
_LEAST_ROWS = 4096
LARGEST = 2304  # unknowns of one output; beyond it the closed form stays (the Gram matrix costs their square)
_RIDGE = 1e-3  # of the mean eigenvalue, towards the weights that are there
_SCARCE = 0.02  # and more of it for as many unknowns as samples


class _Reached(Exception):
    """Ends a forward pass at the layer that was waited for."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """What the layers of a frame are fitted to: what passes through it in the base, and what each of them writes."""

    base: nn.Module
    analysis: Analysis
    frame: Frame
    recorded: Recording
    targets: Mapping[str, Tensor]


@torch.no_grad()
def reference_of(base: nn.Module, analysis: Analysis, frame: Frame, recorded: Recording) -> Reference:
    """The reference of a frame: one pass of the base's for all its choices."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> object:
        def hook(module: nn.Module, arguments: object, output: Tensor) -> None:
            found[path] = output.clone()

        return hook

    with ExitStack() as stack:
        for path in _in_order(analysis, frame):
            module = base.get_submodule(path)
            if type(module) in _LINEAR and not _is_depthwise(module):
                stack.callback(module.register_forward_hook(keep(path)).remove)  # type: ignore[arg-type]
        run_frame(frame.inside(base), recorded)
    return Reference(base=base, analysis=analysis, frame=frame, recorded=recorded, targets=found)


@torch.no_grad()
def refit(student: nn.Module, mask: Mask, reference: Reference) -> None:
    """Fits, in the order in which they run, the layers of a frame that read dropped or replaced channels.

    `student` is the base with one block changed (or several) and `mask` its kept labels. Each layer sees what the
    student's layers before it write by now, and is fitted to what the base's layer writes there. Batch norms work on
    batch statistics: recalibrate afterwards.
    """
    base, analysis, frame = reference.base, reference.analysis, reference.frame
    changed = frame.inside(student)
    for path in _in_order(analysis, frame):
        reader = _reader(student, base, analysis, path, mask)
        if reader is None or path not in reference.targets:
            continue
        target, labels = reference.targets[path], analysis.trace.axes[f"{path}.weight"][0]
        if labels is not None and not mask[labels].all():
            kept = torch.from_numpy(np.flatnonzero(mask[labels])).to(target.device)
            target = target.index_select(-1 if isinstance(reader, nn.Linear) else 1, kept)
        with batch_statistics(changed):
            inputs = layer_inputs(changed, reader, reference.recorded)
        fit_layer(reader, inputs, target, centred=reader.bias is not None or path in analysis.trace.norms)


def _in_order(analysis: Analysis, frame: Frame) -> list[str]:
    edited = set(frame.edited)
    return list(dict.fromkeys(call.module for call in analysis.trace.calls if call.module in edited))


def _is_depthwise(layer: nn.Module) -> bool:
    """Whether each output reads one input: dropped inputs are dropped outputs then, and a shift has nothing to fit."""
    return isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels == layer.out_channels


def _reader(
    student: nn.Module, base: nn.Module, analysis: Analysis, path: str, mask: Mask
) -> nn.Conv2d | nn.Linear | None:
    """The layer at `path` of a student to be fitted: the last one of a replacement, or one that lost inputs."""
    if type(base.get_submodule(path)) not in _LINEAR:
        return None
    module = student.get_submodule(path)
    if isinstance(module, Pair):
        last = module[-1]
        return last if isinstance(last, nn.Conv2d) else None
    axes = analysis.trace.axes.get(f"{path}.weight")
    if not isinstance(module, nn.Conv2d | nn.Linear) or axes is None:
        return None
    dense = isinstance(module, nn.Linear) or module.groups == 1
    return module if dense and axes[1] is not None and not mask[axes[1]].all() else None


def layer_inputs(frame: nn.Module, layer: nn.Module, recorded: Recording) -> Tensor:
    """What a layer inside a frame reads for the inputs of a recording."""
    found: list[Tensor] = []

    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found.append(arguments[0].clone())
        raise _Reached

    handle = layer.register_forward_pre_hook(hook)
    try:
        run_frame(frame, recorded)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Inside the block every batch norm normalises by its batch; nothing is remembered."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    kept = [(norm, norm.training, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, training, momentum, counter in kept:
            norm.training, norm.momentum, norm.num_batches_tracked = training, momentum, counter


def fit_layer(layer: nn.Conv2d | nn.Linear, inputs: Tensor, target: Tensor, *, centred: bool) -> None:
    """Weights (and bias) of `layer` for which its outputs for `inputs` come closest to `target`, by ridge regression
    towards the weights that it has.

    Inputs N×I×H×W (…×I for a linear layer), targets its outputs' shape. `centred`: only deviations from the mean
    count, since a bias or a batch norm takes care of the mean. A layer with too many unknowns keeps its weights.
    """
    weight = layer.weight
    unknowns = weight[0].numel()
    if unknowns > LARGEST:
        return
    rows, wanted = _rows(layer, inputs, target, max(_LEAST_ROWS, _ROWS * unknowns))
    means = rows.mean(0), wanted.mean(0)
    if centred:
        rows, wanted = rows - means[0], wanted - means[1]
    flat = weight.flatten(1) if rows.ndim == 2 else weight.flatten(1)[:, :, None]  # O×d, or C×d×1 for a depthwise one
    weight.add_(_solve(rows, wanted, flat).view_as(weight))
    if layer.bias is not None and centred:
        fitted = weight.flatten(1)
        expected = fitted @ means[0] if rows.ndim == 2 else (fitted * means[0]).sum(1)
        layer.bias.copy_(means[1] - expected)


def _solve(rows: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """What to add to the weights: rows n×d with weight O×d and wanted n×O; or n×C×d with C×d×1 and n×C."""
    if rows.ndim == 3:
        gap = wanted - torch.einsum("ncd,cd->nc", rows, weight[:, :, 0])
        gram, cross = torch.einsum("ncd,nce->cde", rows, rows), torch.einsum("ncd,nc->cd", rows, gap)
        each: Tensor = torch.linalg.solve(_ridged(gram, len(rows)), cross[:, :, None])
        return each
    gap = wanted - rows @ weight.T
    if len(rows) < rows.shape[1]:  # few samples: the same solution by a matrix of their number
        dual: Tensor = rows.T @ torch.linalg.solve(_ridged(rows @ rows.T, len(rows), rows.shape[1]), gap)
        return dual.T
    change: Tensor = torch.linalg.solve(_ridged(rows.T @ rows, len(rows)), rows.T @ gap)
    return change.T


def _ridged(gram: Tensor, samples: int, unknowns: int | None = None) -> Tensor:
    """With the ridge on its diagonal; a stronger one when there are few samples for each unknown."""
    size = gram.shape[-1]
    unknowns = unknowns or size
    total = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    ridge = (_RIDGE + _SCARCE * unknowns / samples) * (total / unknowns).clamp_min(1e-12)
    return gram + ridge * torch.eye(size, dtype=gram.dtype, device=gram.device)


def _rows(layer: nn.Conv2d | nn.Linear, inputs: Tensor, target: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Samples of what one output of the layer sees (n×d, n×C×d for a depthwise layer) and should write (n×O)."""
    if isinstance(layer, nn.Linear):
        wanted = target.flatten(0, -2)
    else:
        wanted = target[: _images(target, count)].permute(0, 2, 3, 1).flatten(0, 2)
    seen = patch_rows(layer, inputs, count)
    wanted = wanted[_spread(len(wanted), count, wanted.device)]
    depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
    return (seen.view(len(seen), len(layer.weight), -1) if depthwise else seen), wanted


def patch_rows(layer: nn.Conv2d | nn.Linear, inputs: Tensor, count: int) -> Tensor:
    """What `layer` sees at up to `count` positions, spread over images and places (n×I·k²); always the same ones."""
    if isinstance(layer, nn.Linear):
        rows = inputs.flatten(0, -2)
        return rows[_spread(len(rows), count, rows.device)]
    patches = _patches(layer, inputs)
    height, width = patches.shape[2:4]
    images = min(len(inputs), _enough(height * width, count))
    chosen = _spread(images * height * width, count, inputs.device)
    image, place = chosen // (height * width), chosen % (height * width)
    return patches[image, :, place // width, place % width].flatten(1)


def _images(target: Tensor, count: int) -> int:
    return min(len(target), _enough(target.shape[-2] * target.shape[-1], count))


def _enough(positions: int, count: int) -> int:
    """How many images to take `count` positions from: four times as many as needed, so that places vary."""
    return -(-count // positions) * 4


def _spread(total: int, count: int, device: torch.device) -> Tensor:
    """At most `count` of `total` positions, everywhere alike."""
    if total <= count:
        return torch.arange(total, device=device)
    generator = torch.Generator().manual_seed(total)
    return torch.randperm(total, generator=generator)[:count].to(device)


def _patches(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """What each output position sees: N×I×H×W×k×k, a view of the padded inputs."""
    (rows, columns), stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if isinstance(layer, Conv2dSame):
        inputs = _padded_same(layer, inputs)
    else:
        below, beside = int(layer.padding[0]), int(layer.padding[1])
        inputs = F.pad(inputs, (beside, beside, below, below)) if below or beside else inputs
    seen = inputs.unfold(2, dilation[0] * (rows - 1) + 1, stride[0])
    seen = seen.unfold(3, dilation[1] * (columns - 1) + 1, stride[1])
    return seen[..., :: dilation[0], :: dilation[1]]


def _padded_same(layer: Conv2dSame, inputs: Tensor) -> Tensor:
    padded: Tensor = pad_same(inputs, layer.kernel_size, layer.stride, layer.dilation)
    return padded
