"""What makes a network's params, MACs and size: one polynomial for each, of the numbers that choices of blocks set.

The number of channels that a tensor keeps is a constant plus one number per segment of a block that narrows it, so that
the product of two such numbers, a convolution's weights, is a sum over segments and pairs of segments.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from nas_kd.analysis.labels import Labels
from nas_kd.analysis.schedule import FLOAT_BYTES, bytes_of
from nas_kd.analysis.structure import Analysis, Block, Site, Widths, is_replaced
from nas_kd.costs.polynomial import Polynomial, Variables
from nas_kd.genotype import Choice, group_count

SUMS = ("params", "macs", "size")  # the counted costs that are sums; `peak_memory` is a maximum
_ORDER_BYTES = 8  # a shift saves for each channel which one it is

_Amount = tuple[str, str, Polynomial[int]]  # its kind, the module or tensor that it is of, and how much
_Terms = dict[tuple[str, ...], int]
_Sites = Mapping[str, tuple[int, Site]]  # by module: the position of its block, and the site


class Counts:
    """Turns labelled dimensions into polynomials. The first of the `variables` are the units that are kept of each
    segment, in the order of `channel_cost.segments_of`; `keeps` and `drops` are 1 where a block is kept, or is not."""

    def __init__(self, analysis: Analysis) -> None:
        self.variables, self._axes = Variables(), analysis.trace.axes
        self._widths = Widths({block.name: block.channels for block in analysis.blocks}, analysis.trace.labels)
        self._counted: dict[bytes, Polynomial[int]] = {}
        for index, block in enumerate(analysis.blocks):
            for channels in block.channels:
                for kept in zip(*(channels.kept(choice.width) for choice in block.choices), strict=True):
                    self.variables.add(index, kept)
        droppable = {i: block for i, block in enumerate(analysis.blocks) if not all(c.keep for c in block.choices)}
        self._prefixes = [(f"{block.name}.", index) for index, block in droppable.items()]
        self.keeps = {i: self.variables.of(i, [c.keep for c in block.choices]) for i, block in droppable.items()}
        self.drops = {i: self.variables.of(i, [not c.keep for c in block.choices]) for i, block in droppable.items()}

    def count(self, labels: Labels) -> Polynomial[int]:
        """Return how many channels of a dimension stay."""
        key = labels.tobytes()
        if key not in self._counted:
            held = self._widths.held(labels)
            parts = [self._share(*of_segment) for of_segment in held]
            self._counted[key] = Polynomial.sum(parts) + (len(labels) - sum(entries for _, entries, _ in held))
        return self._counted[key]

    def _share(self, number: int, entries: int, units: int) -> Polynomial[int]:
        """What stays of a dimension's entries that are of a segment of so many units."""
        if entries % units == 0:
            return Polynomial({(number,): entries // units})
        values = self.variables.values[number] * entries // units  # an activation may repeat some of the units
        return self.variables.of(self.variables.owners[number], values.tolist())

    def group(self, labels: Labels, groups: int) -> Polynomial[int]:
        """Return how many channels of a dimension stay in each of so many groups."""
        whole = self.variables.by_choices(self.count(labels))
        parts = (self.variables.of(block, (vector // groups).tolist()) for block, vector in whole.single.items())
        return Polynomial.sum(parts) + whole.constant // groups

    def product(self, axes: Iterable[Labels]) -> Polynomial[int]:
        """Return the product of the lengths of labelled dimensions."""
        return math.prod(map(self.count, axes), start=Polynomial({(): 1}))

    def entries(self, name: str, tensor: Tensor) -> Polynomial[int]:
        """Return the number of entries of the parameter or buffer of this name."""
        axes = self._axes.get(name, (None,) * tensor.ndim)
        plain = math.prod(length for labels, length in zip(axes, tensor.shape, strict=True) if labels is None)
        return plain * self.product(labels for labels in axes if labels is not None)

    def around(self, path: str) -> int | None:
        """Return the position of the block around a module or tensor that may be dropped."""
        return next((index for prefix, index in self._prefixes if f"{path}.".startswith(prefix)), None)

    def kept(self, path: str, amount: Polynomial[int]) -> Polynomial[int]:
        """Return `amount` where the block around `path` is not dropped, else nothing."""
        index = self.around(path)
        return amount if index is None else self.keeps[index] * amount


def cost_polynomials(analysis: Analysis, network: nn.Module, counts: Counts) -> dict[str, Polynomial[int]]:
    """Return each of `SUMS` for the students of an analysed base."""
    sites = {site.module: (index, site) for index, block in enumerate(analysis.blocks) for site in block.sites}
    amounts: defaultdict[str, list[Polynomial[int]]] = defaultdict(list)
    for kind, path, amount in (
        *_of_sites(analysis, sites, counts),
        *_of_parameters(analysis, network, sites, counts),
        *_of_calls(analysis, sites, counts),
        *_of_buffers(network, counts),
    ):
        amounts[kind].append(counts.kept(path, amount))
    sums = {kind: Polynomial.sum(amounts[kind]) for kind in SUMS}
    return {**sums, "size": sums["size"] + FLOAT_BYTES * sums["params"]}


def _of_sites(analysis: Analysis, sites: _Sites, counts: Counts) -> Iterator[_Amount]:
    """Yield params (bias apart), MACs and the bytes of saved orders of each convolution that its block chooses."""
    for path, (index, site) in sites.items():
        choices, values = analysis.blocks[index].choices, site_values(analysis.blocks[index], site, counts)
        costs = [site_cost(site, choice) for choice in choices]
        orders = [Polynomial({("inputs",): _ORDER_BYTES} if choice.conv == "shift" else {}) for choice in choices]
        for kind, options in zip(SUMS, (*zip(*costs, strict=True), orders), strict=True):
            yield kind, path, counts.variables.chosen(index, options, values)


def site_values(block: Block, site: Site, counts: Counts) -> dict[str, Polynomial[int]]:
    """Return the variables of `conv_cost` for a convolution that a block chooses."""
    values = {"inputs": counts.count(site.inputs), "outputs": counts.count(site.outputs)}
    for groups in filter(None, map(group_count, block.convs)):
        values[f"inputs/{groups}"] = counts.group(site.inputs, groups)
    return values


def site_cost(site: Site, choice: Choice) -> tuple[Polynomial[str], Polynomial[str]]:
    """Return params (bias apart) and MACs of what `choice` makes of the convolution at `site`."""
    channelwise = site.spec.channelwise
    kind = "depthwise" if channelwise and choice.conv != "shift" else choice.conv or "standard"
    return conv_cost(kind, choice.kernel_size or site.spec.kernel_size, site.positions, channelwise=channelwise)


def _of_parameters(analysis: Analysis, network: nn.Module, sites: _Sites, counts: Counts) -> Iterator[_Amount]:
    """Yield the length of every parameter but the weights of sites."""
    for name, parameter in network.named_parameters():
        module, _, tensor = name.rpartition(".")
        if module in sites and tensor == "weight":
            continue
        length = counts.entries(name, parameter)
        if module in sites and tensor != "bias":  # the gain of a weight-standardised convolution goes with it
            index, site = sites[module]
            own = (not is_replaced(site, choice) for choice in analysis.blocks[index].choices)
            length *= counts.variables.of(index, own)
        yield "params", name, length


def _of_calls(analysis: Analysis, sites: _Sites, counts: Counts) -> Iterator[_Amount]:
    """Yield the MACs of every call but those of sites."""
    for call in analysis.trace.calls:
        if call.module not in sites:
            yield "macs", call.module, call.factor * counts.product(call.axes)


def _of_buffers(network: nn.Module, counts: Counts) -> Iterator[_Amount]:
    """Yield the bytes of every saved buffer."""
    saved = network.state_dict().keys()
    for name, buffer in network.named_buffers():
        if name in saved:
            yield "size", name, bytes_of(buffer) * counts.entries(name, buffer)


@functools.lru_cache(maxsize=4096)
def conv_cost(
    kind: str, kernel_size: int, positions: tuple[int, int], *, channelwise: bool
) -> tuple[Polynomial[str], Polynomial[str]]:
    """Return params (bias apart) and MACs of a convolution that reads `positions[0]` pixels and writes `positions[1]`.

    Their variables are `inputs` and `outputs`, its channels, and `inputs/G`, those that each of G groups reads.
    """
    taps, groups, (read, written) = kernel_size**2, group_count(kind), positions
    depthwise: _Terms = {("inputs",): taps}
    pointwise: _Terms = {("inputs", "outputs"): 1}
    weights: dict[str, _Terms] = {
        "standard": {("inputs", "outputs"): taps},
        "shift": pointwise,
        "depthwise": depthwise | pointwise,
        "blueprint": {("outputs",): taps},
        f"group{groups}": pointwise | {("inputs", f"inputs/{groups}"): taps},
    }
    if channelwise:  # the pointwise one is the base's own
        weights = {"shift": {}, "depthwise": depthwise}
    before, after = Polynomial(pointwise if kind == "blueprint" else {}), Polynomial(weights[kind])
    return before + after, read * before + written * after
