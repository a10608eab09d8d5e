"""Which channels matter: an order over the labels of a base, by which widths keep some and drop the rest.

By the weights alone (`unit_importance`), or by what the layers that read the channels lose without them, the rest being
fitted once more (`reconstruction_importance`). docs/results/importance.md compares them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nas_kd.analysis.structure import Analysis, Block
from nas_kd.library.refit import layer_inputs, patch_rows
from nas_kd.students.frames import Frame, Recording
from nas_kd.students.unit_importance import unit_importance

Scores = NDArray[np.float64]
_ROWS = 16_384  # positions on which a layer's inputs are correlated, at most
_LEAST_ROWS, _ROWS_EACH = 4096, 6  # and at least, or for each unknown where that is more
_RIDGE = 1e-3  # of the mean eigenvalue
_STEPS = 48  # an elimination takes one in so many of the channels that are left at a time, one of fewer
_CUT = 0.2  # of the channels; so many are eliminated before the matrices are made smaller
_LARGEST = 1200  # unknowns of a layer for an elimination, which costs their cube


@torch.no_grad()
def reconstruction_importance(
    base: nn.Module, analysis: Analysis, frames: Mapping[str, Frame], recordings: Mapping[str, Recording]
) -> Scores:
    """For each label how late a backward elimination drops it; by block, from what passed through its frame.

    Channels go one by one, each time the one whose loss hurts least the outputs of the layers that read it, when the
    channels that stay are fitted to make up for it by least squares: the structured form of Optimal Brain Surgeon
    (Hassibi and Stork 1993), with ThiNet's criterion (Luo et al. 2017, equation 6). Where a layer has too many unknowns
    for that, what a channel contributes by itself decides; where nothing dense reads it, `unit_importance`.
    """
    order = unit_importance(base, analysis)
    for block in analysis.blocks:
        if block.name in recordings:
            rank_block(order, base, analysis, block, frames[block.name], recordings[block.name])
    return order


@torch.no_grad()
def rank_block(
    order: Scores, base: nn.Module, analysis: Analysis, block: Block, frame: Frame, recorded: Recording
) -> None:
    """Replaces the order of a block's own channels as `reconstruction_importance` does."""
    readers, energies = [], np.zeros_like(order)
    for path in _dense_readers(base, analysis, frame):
        layer = base.get_submodule(path)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        labels = analysis.trace.axes[f"{path}.weight"][1]
        own = [segment for channels in block.channels for segment in channels.segments]
        if labels is not None and any(np.isin(segment, labels).any() for segment in own):
            count = min(_ROWS, max(_LEAST_ROWS, _ROWS_EACH * layer.weight[0].numel()))
            rows = patch_rows(layer, layer_inputs(frame.inside(base), layer, recorded), count)
            if rows.shape[1] <= min(_LARGEST, len(rows)):
                readers.append(_reader(layer, rows, labels))
            else:
                _add_energies(energies, layer, rows, labels)
    for channels in block.channels:
        for segment in channels.segments:
            mine = [reader for reader in readers if np.isin(segment, reader.labels).all()]
            if mine:
                order[segment] = eliminate(mine, segment)
            elif energies[segment].any():
                order[segment] = energies[segment]


def _add_energies(energies: Scores, layer: nn.Conv2d | nn.Linear, rows: Tensor, labels: NDArray[np.int64]) -> None:
    """What each input contributes to a layer's outputs by itself: its mean square times its weights' (Sun et al. 2023,
    Wanda, equation 1, for whole channels)."""
    each = (rows.square().mean(0) * layer.weight.detach().flatten(1).square().sum(0)).double().cpu().numpy()
    np.add.at(energies, labels, each.reshape(len(labels), -1).sum(1))


def _dense_readers(base: nn.Module, analysis: Analysis, frame: Frame) -> Iterable[str]:
    for path in frame.edited:
        layer = base.get_submodule(path)
        if isinstance(layer, nn.Conv2d | nn.Linear) and f"{path}.weight" in analysis.trace.axes:
            if isinstance(layer, nn.Linear) or layer.groups == 1:
                yield path


@dataclass(slots=True, kw_only=True, eq=False)
class Reader:
    """A layer that reads channels: its weights O×d, the inverse of its inputs' covariance d×d, the label of each of its
    I inputs (d = I·k²), and the energy of what it writes. The first two change while channels are eliminated."""

    weight: Tensor
    inverse: Tensor
    labels: NDArray[np.int64]
    energy: float

    def columns(self, label: int) -> Tensor:
        """The entries of d that belong to a label."""
        taps = self.weight.shape[1] // len(self.labels)
        first = torch.from_numpy(np.flatnonzero(self.labels == label)) * taps
        return (first[:, None] + torch.arange(taps)).flatten().to(self.weight.device)


def _reader(layer: nn.Conv2d | nn.Linear, rows: Tensor, labels: NDArray[np.int64]) -> Reader:
    rows = rows - rows.mean(0)
    covariance = rows.T @ rows / len(rows)
    weight = layer.weight.detach().flatten(1)
    ridge = _RIDGE * covariance.diagonal().mean().clamp_min(1e-12) * torch.eye(len(covariance), device=rows.device)
    energy = float((weight @ covariance * weight).sum())
    return Reader(
        weight=weight.clone(), inverse=torch.linalg.inv(covariance + ridge), labels=labels, energy=max(energy, 1e-12)
    )


def eliminate(readers: list[Reader], labels: NDArray[np.int64]) -> Scores:
    """The place at which a backward elimination over `labels` drops each of them, the last ones being worth most.

    While many are left some go at a time, those that cost the least, before the others make up for them. Dropping the
    inputs c costs a layer W_c·((H⁻¹)_cc)⁻¹·W_cᵀ of squared error, H the covariance of its inputs; the
    costs of several layers are added as shares of their energies. The readers are used up.
    """
    columns = [torch.stack([reader.columns(int(label)) for label in labels]) for reader in readers]
    places, done = np.zeros(len(labels)), 0
    left = np.arange(len(labels))  # what the rows of `columns` stand for
    gone = np.zeros(len(labels), dtype=bool)  # rows that were dropped and are not yet cut out
    while done < len(labels):
        if gone.sum() > _CUT * len(gone):
            columns = [_cut_out(reader, own, gone) for reader, own in zip(readers, columns, strict=True)]
            left, gone = left[~gone], gone[~gone]
        costs = sum(
            (_drop_costs(reader, own) / reader.energy for reader, own in zip(readers, columns, strict=True)),
            torch.zeros(()),
        )
        order = np.argsort(np.where(gone, np.inf, costs.double().cpu().numpy()), kind="stable")
        dropped = order[: max(1, (len(labels) - done) // _STEPS)]
        places[left[dropped]], gone[dropped] = np.arange(done, done + len(dropped)), True
        done += len(dropped)
        for reader, own in zip(readers, columns, strict=True):
            _drop(reader, own[torch.from_numpy(dropped).to(own.device)].flatten())
    return places


def _cut_out(reader: Reader, columns: Tensor, gone: NDArray[np.bool_]) -> Tensor:
    """Makes the matrices of a reader smaller by the rows of `columns` that are gone; the columns of the others then."""
    gone_rows = torch.from_numpy(gone).to(columns.device)
    stays = torch.ones(len(reader.inverse), dtype=torch.bool, device=columns.device)
    stays[columns[gone_rows].flatten()] = False
    reader.weight, reader.inverse = reader.weight[:, stays].contiguous(), reader.inverse[stays][:, stays].contiguous()
    return (stays.cumsum(0) - 1)[columns[~gone_rows]]


def _drop_costs(reader: Reader, columns: Tensor) -> Tensor:
    """What dropping each of C labels costs (C), their columns C×t given."""
    if columns.shape[1] == 1:
        single = columns[:, 0]
        return reader.weight.square().sum(0)[single] / reader.inverse.diagonal()[single].clamp_min(1e-30)
    blocks = reader.inverse[columns[:, :, None], columns[:, None, :]]  # C×t×t
    weights = reader.weight[:, columns].transpose(0, 1)  # C×O×t
    costs: Tensor = (weights @ torch.linalg.pinv(blocks, hermitian=True) * weights).sum((1, 2))
    return costs


def _drop(reader: Reader, columns: Tensor) -> None:
    """Takes inputs away, the others making up for them."""
    own = reader.inverse[columns][:, columns]
    inverted = 1 / own.clamp_min(1e-30) if len(columns) == 1 else torch.linalg.pinv(own, hermitian=True)
    kernel = inverted @ reader.inverse[columns]
    reader.weight.addmm_(reader.weight[:, columns], kernel, alpha=-1)
    reader.inverse.addmm_(reader.inverse[:, columns], kernel, alpha=-1)
    reader.weight[:, columns] = 0
    reader.inverse[columns] = 0
    reader.inverse[:, columns] = 0
