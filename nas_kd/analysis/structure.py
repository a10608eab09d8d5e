"""What is known of a base: its blocks, the choices open to each, and where in the network they act."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nas_kd.analysis.labels import Labels
from nas_kd.analysis.trace import Trace
from nas_kd.errors import GenotypeError, nearest
from nas_kd.genotype import Choice, Genotype
from nas_kd.networks.convolutions import ConvSpec

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
    forward pass has several. `size` is how many channels of its producer a unit holds: 1, or a whole group. What stays
    of many is a multiple of `multiple` channels.
    """

    producers: tuple[str, ...]
    segments: tuple[Labels, ...]
    size: int
    multiple: int = ROUND_TO

    def kept(self, width: float) -> tuple[int, ...]:
        """Count the units of each segment that stay at this width: of many, a multiple of `multiple` channels."""
        return tuple(self._kept(len(segment), width) for segment in self.segments)

    def _kept(self, units: int, width: float) -> int:
        if width == 1:
            return units
        multiple = min(self.multiple, 1 << max(0, (units * self.size // 4).bit_length() - 1))
        step = multiple // math.gcd(multiple, self.size)
        return min(units, max(step, round(units * width / step) * step))


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
    def narrowest(self) -> int:
        """The position of the first choice of the smallest width."""
        widths = [choice.width for choice in self.choices]
        return widths.index(min(widths))

    @property
    def is_stream(self) -> bool:
        """Whether this is a residual stream: channels that several blocks share, with a width and nothing else."""
        return self.name.rpartition(".")[2].startswith("stream") and not self.sites

    @property
    def widths(self) -> tuple[float, ...]:
        return tuple(dict.fromkeys(choice.width for choice in self.choices))

    @property
    def kernels(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(c.kernel_size for c in self.choices if c.kernel_size is not None))

    @property
    def convs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(choice.conv for choice in self.choices if choice.conv is not None))


def row_of(blocks: Sequence[Block], genotype: Mapping[str, Choice]) -> NDArray[np.int64]:
    """Return a genotype as a row: the position of each block's choice."""
    return np.array([block.choices.index(genotype[block.name]) for block in blocks], dtype=np.int64)


def genotype_of(blocks: Sequence[Block], row: Sequence[int] | NDArray[np.int64]) -> Genotype:
    """Return the genotype of a row of positions; the inverse of `row_of`."""
    return Genotype.of({block.name: block.choices[index] for block, index in zip(blocks, row, strict=True)})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Analysis:
    """What is known of a base: its blocks, the trace that they were read off, and what is left alone and why."""

    name: str
    input_size: tuple[int, ...]
    trace: Trace
    blocks: tuple[Block, ...]
    left_alone: tuple[tuple[str, str], ...]

    def block(self, name: str) -> Block:
        """Return the block of this name. Raises GenotypeError, with the nearest known name, when there is none."""
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
        """Raise GenotypeError unless `genotype` gives each block one of its choices."""
        for name in genotype:
            self.block(name)
        for block in self.blocks:
            if block.name not in genotype:
                raise GenotypeError(f"the genotype lacks block {block.name!r} of {self.name}")
            if genotype[block.name] not in block.choices:
                open_ = f"width {block.widths}, kernel_size {block.kernels}, conv {block.convs}"
                raise GenotypeError(f"{genotype[block.name]} is not open to block {block.name!r}: it offers {open_}")

    def keep_mask(self, genotype: Mapping[str, Choice], order: NDArray[np.float64] | None = None) -> NDArray[np.bool_]:
        """Say for each label whether its channels stay. Of each segment the units highest in `order` (by label) stay,
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
        return self.trace.labels


class Widths:
    """How many of some channels each block's width narrows: an index over the `Channels` of all blocks."""

    def __init__(self, channels: Mapping[str, Sequence[Channels]], labels: int) -> None:
        self._segments = [(name, c, i) for name, own in channels.items() for c in own for i in range(len(c.segments))]
        self._segment = np.full(labels, len(self._segments), dtype=np.int64)  # of each label; the last stands for none
        for number, (_, member, index) in enumerate(self._segments):
            self._segment[member.segments[index]] = number

    def held(self, labels: Labels) -> list[tuple[int, int, int]]:
        """Return (number of a segment, how many of `labels` are of it, its units) for every segment among them."""
        counts = np.bincount(self._segment[labels], minlength=len(self._segments) + 1)[:-1]
        numbers = np.flatnonzero(counts).tolist()
        return [(n, int(counts[n]), len(self._segments[n][1].segments[self._segments[n][2]])) for n in numbers]

    def setters(self, labels: Labels) -> dict[str, int]:
        """Return the blocks whose widths set how many of these channels stay, with how many each of them narrows."""
        found: dict[str, int] = {}
        for number, count, _ in self.held(labels):
            name = self._segments[number][0]
            found[name] = found.get(name, 0) + count
        return found

    def kept(self, labels: Labels, block: str, width: float) -> int:
        """Count those channels among `labels` that `block` narrows and that stay at this width."""
        total = 0
        for number, count, units in self.held(labels):
            name, member, index = self._segments[number]
            if name == block:
                total += count * member.kept(width)[index] // units
        return total


def padding_for(spec: ConvSpec, kernel_size: int) -> int:
    """Return the padding in pixels that keeps the output's size when `spec` gets another kernel size."""
    return int(spec.padding) + spec.dilation * (kernel_size - spec.kernel_size) // 2


def replaced(site: Site, choice: Choice, in_channels: int, out_channels: int) -> ConvSpec:
    """Return what `choice` makes of the convolution at `site`, between these numbers of channels."""
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
    """Say whether `choice` puts another kind of convolution at `site` (not the base's, perhaps resized)."""
    return choice.conv == "shift" if site.spec.channelwise else choice.conv not in (None, "standard")
