"""The blocks of a base and the choices open to each, read off a trace of its channels.

A convolution belongs to the block named by its parent path, cut after the last component that holds a digit
(`layer1.0`, `blocks.2.1`). Channels whose producers all lie in one block are that block's `width`; channels that span
blocks, the residual stream, stay as they are.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from timm.layers import Conv2dSame
from torch import nn

from nas_kd.errors import GenotypeError, ModelError, nearest
from nas_kd.genotype import Choice, Genotype, group_count
from nas_kd.models.convs import ConvSpec
from nas_kd.models.trace import FROZEN, Call, Labels, Trace, trace

WIDTHS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
KERNELS = (3, 5, 7)
CHEAP = ("depthwise", "blueprint", "group4", "shift")
ROUND_TO = 8  # channels; what vector units and tensor cores like


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Site:
    """One spatial convolution whose kernel and kind may change: where it is, what it is now, what it reads and
    writes, and how many pixels (in, out)."""

    module: str
    spec: ConvSpec
    inputs: Labels
    outputs: Labels
    positions: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Channels:
    """Channels of one block that are narrowed by its width.

    `segments` are arrays of units, each narrowed by the same share; a network that splits these channels in its
    forward pass has several. `size` is how many channels of its producer a unit holds: 1, or a whole group.
    """

    producers: tuple[str, ...]
    segments: tuple[Labels, ...]
    size: int

    def kept(self, width: float) -> tuple[int, ...]:
        """How many units of each segment stay at this width: rounded to `ROUND_TO` channels where there are many."""
        return tuple(_kept(len(segment), self.size, width) for segment in self.segments)


def _kept(units: int, size: int, width: float) -> int:
    if width == 1:
        return units
    multiple = min(ROUND_TO, 2 ** max(0, (units * size // 4).bit_length() - 1))
    step = multiple // math.gcd(multiple, size)
    return min(units, max(step, round(units * width / step) * step))


_Widths = Mapping[str, Sequence[Channels]]  # per block, what its width narrows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """A named part of the base and every `Choice` open to it; the first one is what the base has."""

    name: str
    choices: tuple[Choice, ...]
    channels: tuple[Channels, ...]
    sites: tuple[Site, ...]

    @property
    def default(self) -> Choice:
        return self.choices[0]

    @property
    def widths(self) -> tuple[float, ...]:
        return tuple(dict.fromkeys(choice.width for choice in self.choices))

    @property
    def kernels(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(c.kernel_size for c in self.choices if c.kernel_size is not None))

    @property
    def convs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(choice.conv for choice in self.choices if choice.conv is not None))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Analysis:
    """What is known of a base: its blocks, the trace that they were read off, and what is left alone and why."""

    name: str
    input_size: tuple[int, ...]
    trace: Trace
    blocks: tuple[Block, ...]
    left_alone: tuple[tuple[str, str], ...]

    def block(self, name: str) -> Block:
        """The block of this name. Raises GenotypeError, with the nearest known name, when there is none."""
        for block in self.blocks:
            if block.name == name:
                return block
        names = [block.name for block in self.blocks]
        raise GenotypeError(f"{self.name} has no block {name!r}{nearest(name, names)}; it has {', '.join(names)}")

    @property
    def identity(self) -> Genotype:
        """The genotype of the base itself."""
        return Genotype.of({block.name: block.default for block in self.blocks})

    def check(self, genotype: Mapping[str, Choice]) -> None:
        """Raises GenotypeError unless `genotype` gives each block one of its choices."""
        for name in genotype:
            self.block(name)
        for block in self.blocks:
            if block.name not in genotype:
                raise GenotypeError(f"the genotype lacks block {block.name!r} of {self.name}")
            if genotype[block.name] not in block.choices:
                open_ = f"width {block.widths}, kernel_size {block.kernels}, conv {block.convs}"
                raise GenotypeError(f"{genotype[block.name]} is not open to block {block.name!r}: it offers {open_}")

    def keep_mask(self, genotype: Mapping[str, Choice], order: NDArray[np.float64] | None = None) -> NDArray[np.bool_]:
        """For each label, whether its channels stay. Of each segment the units highest in `order` stay (by label),
        without it the first ones."""
        mask = np.ones(self.labels, dtype=bool)
        for block in self.blocks:
            for channels in block.channels:
                counts = channels.kept(genotype[block.name].width)
                for segment, count in zip(channels.segments, counts, strict=True):
                    rank = np.arange(len(segment)) if order is None else np.argsort(-order[segment], kind="stable")
                    mask[segment[rank[count:]]] = False
        return mask

    @property
    def labels(self) -> int:
        """One more than the largest label."""
        arrays = [axis for axes in self.trace.axes.values() for axis in axes if axis is not None]
        arrays += [axis for call in self.trace.calls for axis in (call.inputs, call.outputs) if axis is not None]
        return 1 + max((int(axis.max()) for axis in arrays if axis.size), default=FROZEN)


def analyse(network: nn.Module, input_size: Sequence[int], *, name: str = "") -> Analysis:
    """Finds the blocks of `network` for images of `input_size` (C, H, W) and what each may become.

    Raises ModelError when the network cannot run at that size, has no convolution, or offers no choice.
    """
    name = name or type(network).__name__
    if not any(isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1 for module in network.modules()):
        raise ModelError(f"{name} has no spatial convolutions: only convolutional networks can be searched")
    traced = trace(network, input_size)
    owners = {call.module: block_of(network, call.module) for call in traced.calls}
    widths, left_alone = _find_channels(traced, owners)
    sites = _find_sites(network, traced, owners)
    blocks = []
    for block in dict.fromkeys(owners.values()):
        own_sites = _changeable(sites[block], block, widths)
        choices = _choices(block, own_sites, widths)
        if len(choices) > 1:
            blocks.append(Block(name=block, choices=choices, channels=tuple(widths[block]), sites=own_sites))
    if not _is_convolutional(blocks, traced):
        raise ModelError(
            f"{name} offers no convolutional block to search: it is a transformer or MLP, or not supported"
        )
    left_alone += [(module, f"{operator} is not understood") for module, operator in traced.unknown]
    size = tuple(int(length) for length in input_size)
    return Analysis(
        name=name, input_size=size, trace=traced, blocks=tuple(blocks), left_alone=tuple(dict.fromkeys(left_alone))
    )


def _is_convolutional(blocks: Sequence[Block], traced: Trace) -> bool:
    """Whether a choice changes a convolution: a transformer has a patch embedding, and inner widths of MLPs."""
    convs = {call.module for call in traced.calls if call.kind == "conv"}
    return any(block.sites or any(convs & set(c.producers) for c in block.channels) for block in blocks)


def block_of(network: nn.Module, path: str) -> str:
    """The name of the block that a convolution or linear layer at `path` belongs to.

    Wrappers around a single layer (timm's ConvNormAct) do not count as blocks, though their names may hold a digit.
    """
    parts = path.split(".")[:-1]
    wrapper = path
    while parts and _is_wrapper(network, parts):
        wrapper = ".".join(parts)
        parts.pop()
    while parts and not any(letter.isdigit() for letter in parts[-1]):
        parts.pop()
    return ".".join(parts) or wrapper


def _is_wrapper(network: nn.Module, parts: Sequence[str]) -> bool:
    parent = network.get_submodule(".".join(parts[:-1]))
    if parts[-1].isdigit() and not isinstance(parent, nn.ModuleList):
        return False  # an entry of a Sequential: a block that happens to hold one layer
    module = network.get_submodule(".".join(parts))
    return sum(isinstance(part, nn.Conv2d | nn.Linear) for part in module.modules()) == 1


# widths


def _is_depthwise(call: Call) -> bool:
    return call.outputs is not None and call.groups == len(call.outputs) and call.groups > 1


def _find_channels(
    traced: Trace, owners: Mapping[str, str]
) -> tuple[defaultdict[str, list[Channels]], list[tuple[str, str]]]:
    """Per block the channels that its width narrows, and what cannot be narrowed with the reason."""
    found: defaultdict[str, list[Channels]] = defaultdict(list)
    left_alone: list[tuple[str, str]] = []
    for calls in _components(traced.calls):
        producers = tuple(dict.fromkeys(call.module for call in calls))
        blocks = list(dict.fromkeys(owners[producer] for producer in producers))
        if len(blocks) > 1:
            left_alone.append((blocks[0], f"its output is shared with {len(blocks) - 1} more blocks"))
            continue
        outputs = next(call.outputs for call in calls if call.outputs is not None)
        units, counts = np.unique(outputs[outputs != FROZEN], return_counts=True)
        channels = Channels(producers=producers, segments=_segments(units, traced.splits), size=int(counts.max()))
        if not _is_even(channels, traced):
            left_alone.append((blocks[0], "its channels are used unevenly"))
            continue
        found[blocks[0]].append(channels)
    return found, left_alone


def _components(calls: Iterable[Call]) -> list[list[Call]]:
    """Groups of calls that produce channels in common."""
    members: dict[int, list[Call]] = {}
    for call in calls:
        if call.outputs is None or _is_depthwise(call):
            continue
        units = np.unique(call.outputs[call.outputs != FROZEN]).tolist()
        merged = [call]
        for group in {id(members[unit]): members[unit] for unit in units if unit in members}.values():
            merged = [*group, *merged]
        touched = {unit for other in merged if other.outputs is not None for unit in other.outputs.tolist()}
        for unit in touched - {FROZEN}:
            members[unit] = merged
    return list({id(group): group for group in members.values()}.values())


def _segments(units: Labels, splits: Iterable[tuple[Labels, ...]]) -> tuple[Labels, ...]:
    """Cuts `units` where the forward pass splits them, so that every part keeps the same share."""
    signature = np.zeros(len(units), dtype=np.int64)
    for parts in splits:
        inside = np.stack([np.isin(units, part) for part in parts])
        if inside.any():
            signature = np.unique(np.stack([signature, inside.argmax(axis=0)]), axis=1, return_inverse=True)[1].ravel()
    return tuple(units[signature == value] for value in np.unique(signature))


def _is_even(channels: Channels, traced: Trace) -> bool:
    """Whether every tensor holds the units of a segment equally often, so that counts alone give its shape."""
    arrays = [axis for axes in traced.axes.values() for axis in axes if axis is not None]
    arrays += [axis for call in traced.calls for axis in (call.inputs, call.outputs, *call.axes) if axis is not None]
    for segment in channels.segments:
        length = int(segment.max()) + 1
        for axis in arrays:
            counts = np.bincount(axis[axis < length], minlength=length)[segment]
            if (counts != counts[0]).any():
                return False
    return True


# kernels and kinds


def _find_sites(network: nn.Module, traced: Trace, owners: Mapping[str, str]) -> defaultdict[str, list[Site]]:
    sites: defaultdict[str, list[Site]] = defaultdict(list)
    called = [call.module for call in traced.calls]
    for call in traced.calls:
        module = network.get_submodule(call.module)
        if called.count(call.module) > 1 or not isinstance(module, nn.Conv2d):
            continue
        spec = _spec_of(module)
        if spec is None or call.inputs is None or call.outputs is None:
            continue
        if (call.inputs == FROZEN).all() and not spec.channelwise:
            continue  # it reads the image
        sites[owners[call.module]].append(
            Site(
                module=call.module,
                spec=spec,
                inputs=call.inputs,
                outputs=call.outputs,
                positions=(call.positions_in, call.positions_out),
            )
        )
    return sites


def _spec_of(conv: nn.Conv2d) -> ConvSpec | None:
    """What a convolution is now, or None where it is not a square one of a size that may change."""
    kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
    padding: int | str = "same"
    if not isinstance(conv, Conv2dSame):
        if isinstance(conv.padding, str) or len(set(conv.padding)) > 1 or conv.padding_mode != "zeros":
            return None
        padding = conv.padding[0]
    if any(len(set(pair)) > 1 for pair in (kernel, stride, dilation)) or kernel[0] not in KERNELS:
        return None
    channelwise = conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1
    if conv.groups > 1 and not channelwise:
        return None
    return ConvSpec(
        kind="shift" if channelwise else "standard",
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=kernel[0],
        stride=stride[0],
        padding=padding,
        dilation=dilation[0],
        bias=conv.bias is not None,
        channelwise=channelwise,
    )


def _changeable(sites: Sequence[Site], block: str, widths: _Widths) -> tuple[Site, ...]:
    """The sites of a block of which at most one other block sets a number of channels.

    The cost of a network is a sum over blocks and pairs of blocks; a site between two other blocks would need triples.
    """

    def is_pairwise(site: Site) -> bool:
        readers, writers = (_setters(labels, widths) - {block} for labels in (site.inputs, site.outputs))
        return site.spec.channelwise or not (readers and writers)

    return tuple(site for site in sites if is_pairwise(site))


def _setters(labels: Labels, widths: _Widths) -> set[str]:
    """The blocks whose widths set how many of these channels stay."""
    return {name for name, channels in widths.items() if any(count_kept(labels, channels, 1.0))}


def count_kept(labels: Labels, channels: Iterable[Channels], width: float) -> Iterator[int]:
    """For each segment of `channels`, how many of `labels` are of it and stay at this width."""
    for member in channels:
        for segment, kept in zip(member.segments, member.kept(width), strict=True):
            yield int(np.isin(labels, segment).sum()) * kept // len(segment)


def _choices(block: str, sites: Sequence[Site], widths: _Widths) -> tuple[Choice, ...]:
    """Every combination of width, kernel and kind that changes the block, the base's own first."""
    kernels: tuple[int | None, ...] = (None,)
    sizes = {site.spec.kernel_size for site in sites}
    if len(sizes) == 1:
        own = sizes.pop()
        kernels = (own, *(k for k in KERNELS if abs(k - own) == 2 and all(_fits(site, k) for site in sites)))
    convs = _convs(block, sites, widths)
    return tuple(
        Choice(width=width, kernel_size=kernel, conv=conv)
        for width, kernel, conv in itertools.product(_different_widths(widths[block]), kernels, convs)
    )


def _different_widths(channels: Sequence[Channels]) -> tuple[float, ...]:
    """The widths that give different numbers of channels."""
    different: dict[tuple[tuple[int, ...], ...], float] = {}
    for width in WIDTHS:
        different.setdefault(tuple(c.kept(width) for c in channels), width)
    return tuple(different.values())


def _fits(site: Site, kernel_size: int) -> bool:
    """Whether a kernel of this size leaves the output as large as it is: a network without padding shrinks."""
    return site.spec.padding == "same" or padding_for(site.spec, kernel_size) >= 0


def padding_for(spec: ConvSpec, kernel_size: int) -> int:
    """The padding in pixels that keeps the output's size when `spec` gets another kernel size."""
    return int(spec.padding) + spec.dilation * (kernel_size - spec.kernel_size) // 2


def _convs(block: str, sites: Sequence[Site], widths: _Widths) -> tuple[str | None, ...]:
    dense = [site for site in sites if not site.spec.channelwise]
    if not sites:
        return (None,)
    if not dense:
        return ("depthwise", "shift")
    return ("standard", *(kind for kind in CHEAP if all(_suits(kind, site, block, widths) for site in dense)))


def _suits(kind: str, site: Site, block: str, widths: _Widths) -> bool:
    """Whether a kind can stand at `site`: a grouped one needs whole groups at every width of whatever it reads, and
    costs the square of that, so that it may read from one other block only."""
    groups = group_count(kind)
    if groups is None:
        return True
    setters = _setters(site.inputs, widths)
    parts = [sum(count_kept(site.inputs, widths[name], width)) for name in setters for width in WIDTHS]
    fixed = len(site.inputs) - sum(sum(count_kept(site.inputs, widths[name], 1.0)) for name in setters)
    return len(setters - {block}) <= 1 and not any(count % groups for count in (*parts, fixed))


def replaced(site: Site, choice: Choice, in_channels: int, out_channels: int) -> ConvSpec:
    """What `choice` makes of the convolution at `site`, between these numbers of channels."""
    kernel = choice.kernel_size or site.spec.kernel_size
    padding = site.spec.padding if site.spec.padding == "same" else padding_for(site.spec, kernel)
    kind = choice.conv or "standard"
    return replace(
        site.spec,
        kind="shift" if site.spec.channelwise else kind,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=kernel,
        padding=padding,
    )


def is_replaced(site: Site, choice: Choice) -> bool:
    """Whether `choice` puts another kind of convolution at `site` (rather than the base's, perhaps resized)."""
    return choice.conv == "shift" if site.spec.channelwise else choice.conv not in (None, "standard")
