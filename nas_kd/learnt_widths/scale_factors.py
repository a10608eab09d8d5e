"""How strong each channel is by the scale factors of its norms: what structure learning makes small.

A unit's scale is the Euclidean norm of all its scale factors γ, |γ| where there is one: channels that several batch
norms scale (both norms of an inverted residual, a residual stream) can only go together, and the norm of the group is
what drives them to nothing together (group lasso). Where no norm scales a block's channels (a LayerNorm network's
inner width, a squeeze-and-excitation bottleneck), the norm of the filters that write them takes its place.

Its strength is its scale times a constant, by which it begins as the unit's importance (`unit_importance`): norms of
a network that was trained for short are all near 1 and tell nothing of its channels, and γ is no measure by itself,
since the weights behind it may be large or small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nas_kd.analysis.labels import Labels
from nas_kd.analysis.structure import Analysis
from nas_kd.learnt_widths.channel_cost import Segment, segments_of
from nas_kd.students.unit_importance import unit_importance

NORMS, FILTERS = "norm scales", "filter norms"
_TINY = 1e-16  # the square of what counts as nothing: |γ| stays differentiable at 0


class ScaleFactors:
    """The strengths of all units of a network, as functions of its parameters as they are at the time.

    `sources` says for each segment what its strengths are made of, `NORMS` or `FILTERS`. The order of the units is
    that of `segments_of`, one segment after the other; there are U in all. `segment` (U) is the segment of each,
    `weights` (U) what its scale is multiplied by.
    """

    def __init__(self, network: nn.Module, analysis: Analysis) -> None:
        segments = segments_of(analysis)
        scales = dict(_scales(network, analysis))
        self.sources = tuple(_source(segment, scales) for segment in segments)
        filters = dict(_filters(network, analysis, segments, self.sources))
        units = np.concatenate([segment.units for segment in segments])
        place = np.full(analysis.labels, len(units), dtype=np.int64)  # of each label; the last is for all others
        place[units] = np.arange(len(units))
        device = next(network.parameters()).device
        self._scales, self._filters = list(scales), list(filters)
        self._scale_places = _places(scales.values(), place, segments, self.sources, NORMS).to(device)
        self._filter_places = _places(filters.values(), place, segments, self.sources, FILTERS).to(device)
        self.units = len(units)
        self.segment = torch.repeat_interleave(
            torch.arange(len(segments)), torch.tensor([len(segment.units) for segment in segments])
        ).to(device)
        importance = torch.from_numpy(unit_importance(network, analysis)[units]).to(device)
        with torch.no_grad():
            self.weights = importance / self.scales()

    def strengths(self) -> Tensor:
        """The strength of every unit (U, float64); differentiable."""
        return self.scales() * self.weights

    def scales(self) -> Tensor:
        """The scale of every unit (U, float64); differentiable."""
        squares = torch.zeros(self.units + 1, dtype=torch.float64, device=self.segment.device)
        if self._scales:
            scales = torch.cat([parameter.flatten() for parameter in self._scales])
            squares = squares.index_add(0, self._scale_places, scales.double().square())
        if self._filters:
            rows = torch.cat([weight.flatten(1).square().sum(1) for weight in self._filters])
            squares = squares.index_add(0, self._filter_places, rows.double())
        return (squares[:-1] + _TINY).sqrt()

    def per_segment(self, values: Tensor) -> Tensor:
        """Sums over the units of each segment: U → S."""
        sums = torch.zeros(len(self.sources), dtype=values.dtype, device=values.device)
        return sums.index_add(0, self.segment, values)


def _scales(network: nn.Module, analysis: Analysis) -> Iterator[tuple[nn.Parameter, Labels]]:
    """The scale factors of every norm that has labels, with these."""
    for name, module in network.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, _BatchNorm | nn.GroupNorm | nn.LayerNorm) or not isinstance(weight, nn.Parameter):
            continue
        labels = analysis.trace.axes.get(f"{name}.weight", (None,))[0]
        if labels is not None and weight.ndim == 1 and weight.detach().any():
            yield weight, labels


def _source(segment: Segment, scales: dict[nn.Parameter, Labels]) -> str:
    seen = np.concatenate([np.zeros(0, dtype=np.int64), *scales.values()])
    return NORMS if np.isin(segment.units, seen).all() else FILTERS


def _filters(
    network: nn.Module, analysis: Analysis, segments: Sequence[Segment], sources: Sequence[str]
) -> Iterator[tuple[nn.Parameter, Labels]]:
    """The weights that write the units which no norm scales, with the labels of their filters."""
    for segment, source in zip(segments, sources, strict=True):
        for producer in segment.producers if source == FILTERS else ():
            weight = getattr(network.get_submodule(producer), "weight", None)
            labels = analysis.trace.axes.get(f"{producer}.weight", (None,))[0]
            if isinstance(weight, nn.Parameter) and labels is not None:
                yield weight, labels


def _places(
    all_labels: Sequence[Labels] | object,
    place: Labels,
    segments: Sequence[Segment],
    sources: Sequence[str],
    source: str,
) -> Tensor:
    """Where the squares of these factors go: units of segments of this source, and the last place for the others."""
    mine = np.full(len(place), place.max(initial=0), dtype=np.int64)
    for segment, own in zip(segments, sources, strict=True):
        if own == source:
            mine[segment.units] = place[segment.units]
    labels = [np.zeros(0, dtype=np.int64), *all_labels]  # type: ignore[misc]
    return torch.from_numpy(mine[np.concatenate(labels)])
