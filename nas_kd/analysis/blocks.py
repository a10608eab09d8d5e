"""Finds the blocks of a base and the choices open to each, read off a trace of its channels.

A convolution belongs to the block named by its parent path, cut after the last component that holds a digit
(`layer1.0`, `blocks.2.1`). Channels whose producers all lie in one block are that block's `width`; channels that span
blocks, the residual stream, stay as they are unless `stages` is opened.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from timm.layers import Conv2dSame
from torch import nn

from nas_kd.analysis.labels import FROZEN, Call, Labels, Split
from nas_kd.analysis.structure import ROUND_TO, Widths, padding_for
from nas_kd.analysis.structure import Analysis as Analysis
from nas_kd.analysis.structure import Block as Block
from nas_kd.analysis.structure import Channels as Channels
from nas_kd.analysis.structure import Site as Site
from nas_kd.analysis.trace import Trace, ends_of_block, trace
from nas_kd.errors import ModelError
from nas_kd.genotype import Choice, group_count
from nas_kd.networks.convolutions import ConvSpec, Pair, Shift2d
from nas_kd.networks.plain import check_plain, unwrapped
from nas_kd.networks.plan import plan_of

WIDTHS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
KERNELS = (3, 5, 7)
CHEAP = ("depthwise", "blueprint", "group4", "shift")
ASPECTS = ("width", "kernel", "conv")  # what is open by default; also "stages" and "keep"


def unverified_analysis(
    network: nn.Module,
    input_size: Sequence[int],
    *,
    name: str = "",
    open: Collection[str] = ASPECTS,
    channel_multiple: int = ROUND_TO,
) -> Analysis:
    """Reads the blocks of `network` and what each may become off a trace, as `nas_kd.analyse` takes and documents them,
    before any student was built to check it."""
    network = unwrapped(network)
    name = name or type(network).__name__
    _check_searchable(network, name, open)
    traced = trace(network, input_size)
    blocks, left_alone = _find_blocks(network, traced, frozenset(open), channel_multiple)
    if not blocks and any(isinstance(module, Shift2d) for module in network.modules()):
        raise ModelError(
            f"{name} offers nothing to search, its shifts keep their channels: search a base with depthwise "
            "convolutions, each of which may become a shift"
        )
    if not _is_convolutional(blocks, traced):
        raise ModelError(
            f"{name} offers no convolutional block to search: it is a transformer or MLP, or not supported"
        )
    left_alone += [(module, f"{operator} is not understood") for module, operator in traced.unknown]
    size = tuple(int(length) for length in input_size)
    return Analysis(
        name=name, input_size=size, trace=traced, blocks=tuple(blocks), left_alone=tuple(dict.fromkeys(left_alone))
    )


def _check_searchable(network: nn.Module, name: str, open: Collection[str]) -> None:
    """Raise ModelError for what can be refused before the network runs."""
    if unknown := set(open) - {*ASPECTS, "stages", "keep"}:
        raise ModelError(f"cannot open {', '.join(sorted(unknown))}: use {', '.join((*ASPECTS, 'stages', 'keep'))}")
    check_plain(network, name)
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    # neighbouring outputs see common pixels: not so in a 1×1 convolution, nor in a patch embedding
    if not any(kernel > stride for conv in convs for kernel, stride in zip(conv.kernel_size, conv.stride, strict=True)):
        raise ModelError(f"{name} has no spatial convolutions: only convolutional networks can be searched")
    if plan_of(network).fused:
        raise ModelError(f"{name} is in its inference form, which nothing can be made of: search its training form")


def _find_blocks(
    network: nn.Module, traced: Trace, open: frozenset[str], multiple: int
) -> tuple[list[Block], list[tuple[str, str]]]:
    """Find every block with more than one choice, and what is left alone and why."""
    owners = {call.module: block_of(network, call.module) for call in traced.calls}
    found, left_alone = _find_channels(traced, owners, open, multiple)
    widths = Widths(found, traced.labels)
    sites = _find_sites(network, traced, owners) if open & {"kernel", "conv"} else {}
    blocks = []
    for block in (*dict.fromkeys(owners.values()), *(name for name in found if name not in owners.values())):
        own_sites = _changeable(sites.get(block, ()), block, widths)
        choices = list(_choices(block, own_sites, widths, found[block], open))
        if "keep" in open and _is_droppable(block, network, traced, owners, widths):
            choices.append(replace(choices[0], keep=False))
        if len(choices) > 1:
            blocks.append(Block(name=block, choices=tuple(choices), channels=tuple(found[block]), sites=own_sites))
    return blocks, left_alone


def _is_convolutional(blocks: Sequence[Block], traced: Trace) -> bool:
    """Say whether a choice changes a convolution: a transformer has a patch embedding, and inner widths of MLPs."""
    convs = {call.module for call in traced.calls if call.kind == "conv"}
    return any(
        block.sites
        or any(convs & set(channels.producers) for channels in block.channels)
        or any(not choice.keep and conv.startswith(f"{block.name}.") for choice in block.choices for conv in convs)
        for block in blocks
    )


def block_of(network: nn.Module, path: str) -> str:
    """Return the name of the block that a convolution or linear layer at `path` belongs to.

    Wrappers around a single layer (timm's ConvNormAct) and cheap convolutions do not count as blocks, though their
    names may hold a digit.
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
    module, parent = network.get_submodule(".".join(parts)), network.get_submodule(".".join(parts[:-1]))
    if isinstance(module, Pair):
        return True
    if parts[-1].isdigit() and not isinstance(parent, nn.ModuleList):
        return False  # an entry of a Sequential: a block that happens to hold one layer
    return sum(isinstance(part, nn.Conv2d | nn.Linear) for part in module.modules()) == 1


def _is_droppable(block: str, network: nn.Module, traced: Trace, owners: Mapping[str, str], widths: Widths) -> bool:
    """Say whether `block` is one module, run once, that adds something to its own input and nothing else.

    Of its tensors at most one other block sets a number of channels: see `_changeable`.
    """
    flow = traced.flows.get(block)
    if block not in traced.residual or flow is None or flow.in_shape != flow.out_shape:
        return False
    if ends_of_block(traced, block) is None:
        return False
    calls = [call.module for call in traced.calls if call.module.startswith(f"{block}.")]
    if len(set(calls)) < len(calls) or any(owners[module] != block for module in calls):
        return False
    tensors = [axes for name, axes in traced.axes.items() if name.startswith(f"{block}.")]
    tensors += [call.axes for call in traced.calls if call.module in calls]
    setters = [{name for labels in axes if labels is not None for name in widths.setters(labels)} for axes in tensors]
    return all(len(names - {block}) <= 1 for names in setters)


# widths


def _find_channels(
    traced: Trace, owners: Mapping[str, str], open: frozenset[str], multiple: int
) -> tuple[defaultdict[str, list[Channels]], list[tuple[str, str]]]:
    """Find per block the channels that its width narrows, and what cannot be narrowed with the reason."""
    found: defaultdict[str, list[Channels]] = defaultdict(list)
    left_alone: list[tuple[str, str]] = []
    candidates: list[tuple[str, Channels]] = []
    for calls in _components(traced.calls):
        producers = tuple(dict.fromkeys(call.module for call in calls))
        blocks = list(dict.fromkeys(owners[producer] for producer in producers))
        name = blocks[0] if len(blocks) == 1 else _stream_name(blocks[-1], {name for name, _ in candidates})
        if ("width" if len(blocks) == 1 else "stages") not in open:
            if len(blocks) > 1:
                left_alone.append((blocks[0], f"its output is shared with {len(blocks) - 1} more blocks"))
            continue
        outputs = np.concatenate([call.outputs for call in calls if call.outputs is not None])
        units = np.unique(outputs[outputs != FROZEN])
        first = next(call.outputs for call in calls if call.outputs is not None and (call.outputs != FROZEN).any())
        size = int(np.unique(first[first != FROZEN], return_counts=True)[1].max())
        segments = _segments(units, traced.splits)
        candidates.append((name, Channels(producers=producers, segments=segments, size=size, multiple=multiple)))
    even = _even(candidates, traced)
    for (name, channels), is_even in zip(candidates, even, strict=True):
        if is_even:
            found[name].append(channels)
        else:
            left_alone.append((name, "its channels are used unevenly"))
    return found, left_alone


def _stream_name(block: str, taken: Collection[str]) -> str:
    """Name channels that several blocks share, of which `block` is the last, by the stage that it is in."""
    stage = block.rpartition(".")[0] or block
    names = itertools.chain([f"{stage}.stream"], (f"{stage}.stream{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)


def _components(calls: Iterable[Call]) -> list[list[Call]]:
    """Group calls that produce channels in common."""
    members: dict[int, list[Call]] = {}
    for call in calls:
        if call.outputs is None or 1 < call.groups == len(call.outputs):
            continue  # a depthwise convolution has the channels that it reads
        units = np.unique(call.outputs[call.outputs != FROZEN]).tolist()
        groups = {id(members[unit]): members[unit] for unit in units if unit in members}.values()
        merged = [*itertools.chain.from_iterable(groups), call]
        touched = {unit for other in merged if other.outputs is not None for unit in other.outputs.tolist()}
        if groups:
            units = sorted(touched - {FROZEN})
        members.update(dict.fromkeys(units, merged))
    return list({id(group): group for group in members.values()}.values())


def _segments(units: Labels, splits: Iterable[Split]) -> tuple[Labels, ...]:
    """Cut `units` where the forward pass splits them, so that every part keeps the same share."""
    signature = np.zeros(len(units), dtype=np.int64)
    for split in splits:
        inside = np.stack([np.isin(units, part) for part in split.parts])
        if inside.any():
            signature = np.unique(np.stack([signature, inside.argmax(axis=0)]), axis=1, return_inverse=True)[1].ravel()
    return tuple(units[signature == value] for value in np.unique(signature))


def _even(candidates: Sequence[tuple[str, Channels]], traced: Trace) -> list[bool]:
    """Say for each candidate whether every tensor holds the units of a segment equally often, so that counts alone
    give its shape."""
    segments = [(number, s) for number, (_, channels) in enumerate(candidates) for s in channels.segments]
    owner = np.full(traced.labels, len(segments), dtype=np.int64)  # the segment of each label; the last is none
    for index, (_, units) in enumerate(segments):
        owner[units] = index
    lengths = np.array([*(len(units) for _, units in segments), 0])
    uneven = np.zeros(len(segments) + 1, dtype=bool)
    axes = [axis for axes in traced.axes.values() for axis in axes]
    axes += [axis for call in traced.calls for axis in (call.inputs, call.outputs, *call.axes)]
    for axis in {axis.tobytes(): axis for axis in axes if axis is not None}.values():
        units, counts = np.unique(axis, return_counts=True)
        of = owner[units]
        present, total, squares = (np.bincount(of, w, len(lengths)) for w in (None, counts, counts**2))
        # all equal: n·Σc² = (Σc)²
        uneven |= (present > 0) & ((present != lengths) | (present * squares != total**2))
    bad = {number for (number, _), is_uneven in zip(segments, uneven, strict=False) if is_uneven}
    return [number not in bad for number in range(len(candidates))]


# kernels and kinds


def _find_sites(network: nn.Module, traced: Trace, owners: Mapping[str, str]) -> defaultdict[str, list[Site]]:
    sites: defaultdict[str, list[Site]] = defaultdict(list)
    called = [call.module for call in traced.calls]
    for call in traced.calls:
        module = network.get_submodule(call.module)
        if called.count(call.module) > 1 or not isinstance(module, nn.Conv2d):
            continue
        spec = _spec_of(module)
        flow = traced.flows[call.module]
        if spec is None or call.inputs is None or call.outputs is None or flow.in_axes[0] is not None:
            continue
        if (call.inputs == FROZEN).all() and not spec.channelwise:
            continue  # it reads the image
        sites[owners[call.module]].append(
            Site(
                module=call.module,
                spec=spec,
                inputs=call.inputs,
                outputs=call.outputs,
                positions=(_positions(flow.in_shape), _positions(flow.out_shape)),
            )
        )
    return sites


def _positions(shape: Sequence[int]) -> int:
    """Count the pixels of all images in a batch: windows of one image may be folded into it."""
    return shape[0] * math.prod(shape[2:])


def _spec_of(conv: nn.Conv2d) -> ConvSpec | None:
    """Return what a convolution is now, or None where it is not a square one of a size that may change."""
    kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
    padding: int | str = "same"
    if not (isinstance(conv, Conv2dSame) or getattr(conv, "same_pad", False)):
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


def _changeable(sites: Sequence[Site], block: str, widths: Widths) -> tuple[Site, ...]:
    """Return the sites of a block of which at most one other block sets a number of channels.

    The cost of a network is a sum over blocks and pairs of blocks; a site between two other blocks would need triples.
    """

    def is_pairwise(site: Site) -> bool:
        readers, writers = (set(widths.setters(labels)) - {block} for labels in (site.inputs, site.outputs))
        return site.spec.channelwise or not (readers and writers) or len(readers | writers) == 1

    return tuple(site for site in sites if is_pairwise(site))


def _choices(
    block: str, sites: Sequence[Site], widths: Widths, channels: Sequence[Channels], open: frozenset[str]
) -> tuple[Choice, ...]:
    """Return every combination of width, kernel and kind that changes the block, the base's own first."""
    kernels: tuple[int | None, ...] = (None,)
    sizes = {site.spec.kernel_size for site in sites}
    if len(sizes) == 1:
        own = sizes.pop()
        padded = [site.spec for site in sites if site.spec.padding != "same"]  # without padding a network shrinks
        others = (k for k in KERNELS if abs(k - own) == 2 and all(padding_for(spec, k) >= 0 for spec in padded))
        kernels = (own, *(others if "kernel" in open else ()))
    convs = _convs(block, sites, widths)
    return tuple(
        Choice(width=width, kernel_size=kernel, conv=conv)
        for width, kernel, conv in itertools.product(
            _different_widths(channels), kernels, convs if "conv" in open else convs[:1]
        )
    )


def _different_widths(channels: Sequence[Channels]) -> tuple[float, ...]:
    """Return the widths that give different numbers of channels."""
    different: dict[tuple[tuple[int, ...], ...], float] = {}
    for width in WIDTHS:
        different.setdefault(tuple(c.kept(width) for c in channels), width)
    return tuple(different.values())


def _convs(block: str, sites: Sequence[Site], widths: Widths) -> tuple[str | None, ...]:
    dense = [site for site in sites if not site.spec.channelwise]
    if not sites:
        return (None,)
    if not dense:
        return ("depthwise", "shift")
    return ("standard", *(kind for kind in CHEAP if all(_suits(kind, site, block, widths) for site in dense)))


def _suits(kind: str, site: Site, block: str, widths: Widths) -> bool:
    """Say whether a kind can stand at `site`: a grouped one needs whole groups at every width of whatever it reads, and
    costs the square of that, so that it may read from one other block only."""
    groups = group_count(kind)
    if groups is None:
        return True
    setters = widths.setters(site.inputs)
    parts = [widths.kept(site.inputs, name, width) for name in setters for width in WIDTHS]
    fixed = len(site.inputs) - sum(setters.values())
    return len(setters.keys() - {block}) <= 1 and not any(count % groups for count in (*parts, fixed))
