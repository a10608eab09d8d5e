"""Students: a base with some modules narrowed or replaced, still an instance of the base's own class."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from nas_kd.genotype import Choice
from nas_kd.models.blocks import Analysis, Site, is_replaced, padding_for, replaced
from nas_kd.models.plan import Edit, Number, Plan, apply_plan
from nas_kd.models.trace import Axes, Labels

Network = TypeVar("Network", bound=nn.Module)
Mask = NDArray[np.bool_]


def build_student(base: Network, analysis: Analysis, genotype: Mapping[str, Choice]) -> Network:
    """A copy of `base` in the shape of `genotype`: the base's class, its weights cut to their first channels.

    The identity genotype gives the base's own keys and outputs. `inherit` gives the others better weights.
    The plan that makes it is kept as `student.nas_kd_plan`. Raises GenotypeError when the genotype does not fit.
    """
    analysis.check(genotype)
    plan = student_plan(base, analysis, genotype)
    student: Any = apply_plan(copy.deepcopy(base), plan)
    student.nas_kd_plan = plan_of(base).then(plan)
    return cast(Network, student)


def plan_of(network: nn.Module) -> Plan:
    """The plan by which a network differs from the timm model that it was made of; empty for timm's own."""
    plan = getattr(network, "nas_kd_plan", None)
    return plan if isinstance(plan, Plan) else Plan()


def student_plan(base: nn.Module, analysis: Analysis, genotype: Mapping[str, Choice]) -> Plan:
    """The edits that turn `base` into the student of this genotype."""
    mask = analysis.keep_mask(genotype)
    sites = {site.module: (site, genotype[block.name]) for block in analysis.blocks for site in block.sites}
    edits: dict[str, Edit] = {}
    narrowed = _narrowed_tensors(analysis, mask)
    for path, module in base.named_modules():
        site, choice = sites.get(path, (None, None))
        if site is not None and choice is not None and is_replaced(site, choice):
            spec = replaced(site, choice, _kept(site.inputs, mask), _kept(site.outputs, mask))
            edits[path] = Edit(conv=spec)
            continue
        shapes = narrowed.get(path, {})
        sizes = dict(_sizes(module, path, analysis, shapes, mask))
        if site is not None and choice is not None and choice.kernel_size != site.spec.kernel_size:
            shapes, sizes = _grown(site, choice, shapes, sizes)
        if shapes or sizes:
            edits[path] = Edit(shapes=shapes, sizes=sizes)
    return Plan(edits=edits, features=_features(base, analysis, mask))


def _kept(labels: Labels, mask: Mask) -> int:
    return int(mask[labels].sum())


Shapes = Mapping[str, tuple[tuple[int, int], ...]]


def _narrowed_tensors(analysis: Analysis, mask: Mask) -> dict[str, dict[str, tuple[tuple[int, int], ...]]]:
    """By module path and tensor name, the dimensions that lose channels and how many are left."""
    narrowed: dict[str, dict[str, tuple[tuple[int, int], ...]]] = defaultdict(dict)
    for name, axes in analysis.trace.axes.items():
        dims = tuple(
            (dim, _kept(labels, mask))
            for dim, labels in enumerate(axes)
            if labels is not None and not mask[labels].all()
        )
        if dims:
            module, _, tensor = name.rpartition(".")
            narrowed[module][tensor] = dims
    return narrowed


def _grown(site: Site, choice: Choice, shapes: Shapes, sizes: Mapping[str, Number]) -> tuple[Shapes, dict[str, Number]]:
    """The shapes and sizes of a convolution of the base's own kind with another kernel size."""
    kernel = choice.kernel_size or site.spec.kernel_size
    weight = (*shapes.get("weight", ()), (2, kernel), (3, kernel))
    grown: dict[str, Number] = {**sizes, "kernel_size": (kernel, kernel)}
    if site.spec.padding != "same":
        grown["padding"] = (padding_for(site.spec, kernel),) * 2
    return {**shapes, "weight": weight}, grown


def _sizes(
    module: nn.Module, path: str, analysis: Analysis, shapes: Shapes, mask: Mask
) -> Iterator[tuple[str, Number]]:
    """The numbers that a module keeps beside its tensors, where they change."""
    weight = dict(shapes.get("weight", ()))
    if isinstance(module, nn.Conv2d) and weight:
        yield from _conv_sizes(module, weight)
    elif isinstance(module, nn.Linear):
        names = {0: "out_features", 1: "in_features"}
        yield from ((names[dim], count) for dim, count in weight.items())
    elif isinstance(module, nn.LayerNorm) and weight:
        yield "normalized_shape", tuple(weight.get(dim, n) for dim, n in enumerate(module.normalized_shape))
    else:
        yield from _container_sizes(module, path, analysis, shapes, mask)


def _conv_sizes(conv: nn.Conv2d, weight: Mapping[int, int]) -> Iterator[tuple[str, Number]]:
    outputs = weight.get(0, conv.out_channels)
    if conv.groups == 1:
        inputs = weight.get(1, conv.in_channels)
    else:  # whole groups went
        groups = outputs * conv.groups // conv.out_channels
        inputs = groups * conv.in_channels // conv.groups
        yield "groups", groups
    if inputs != conv.in_channels:  # else it may be the image's, which timm's in_chans changes
        yield "in_channels", inputs
    yield "out_channels", outputs


_NORM_SIZES = ("num_features", "num_channels", "num_parameters")  # batch norm, group norm, PReLU
_INPUT_SIZES = ("in_features", "in_channels", "in_chs")
_OUTPUT_SIZES = ("num_features", "out_channels", "out_chs", "out_features")


def _container_sizes(
    module: nn.Module, path: str, analysis: Analysis, shapes: Shapes, mask: Mask
) -> Iterator[tuple[str, Number]]:
    """Norms by their own tensors; blocks and heads by what flows in and out of them; the network by its features."""
    if shapes:
        dims = next(iter(shapes.values()))
        yield from ((name, dims[0][1]) for name in _NORM_SIZES if hasattr(module, name))
        return
    flows = analysis.trace.flows
    if path == "":
        sources = ((("num_features",), "forward_features", False), (("head_hidden_size",), "pre_logits", False))
    elif path in flows and next(module.children(), None) is not None:
        sources = ((_INPUT_SIZES, path, True), (_OUTPUT_SIZES, path, False))
    else:
        return
    for names, flow_name, entering in sources:
        flow = flows.get(flow_name)
        if flow is None:
            continue
        axes = flow.in_axes if entering else flow.out_axes
        yield from _following(module, names, axes, mask)


def _following(module: nn.Module, names: tuple[str, ...], axes: Axes, mask: Mask) -> Iterator[tuple[str, Number]]:
    """The attributes among `names` that equal the channels of `axes`, with the number that stays."""
    labels = next((axis for axis in axes if axis is not None), None)
    if labels is None or mask[labels].all():
        return
    for name in names:
        if getattr(module, name, None) == len(labels):
            yield name, _kept(labels, mask)


def _features(base: nn.Module, analysis: Analysis, mask: Mask) -> tuple[int, ...]:
    """The channels of each level of timm's `feature_info`, empty when none changes."""
    info: Any = getattr(base, "feature_info", None)
    levels = getattr(info, "info", info) or []
    if not isinstance(levels, list):
        return ()
    old = tuple(int(level["num_chs"]) for level in levels)
    new = tuple(_level_channels(level, analysis, mask) for level in levels)
    return new if new != old else ()


def _level_channels(level: Mapping[str, Any], analysis: Analysis, mask: Mask) -> int:
    channels = int(level["num_chs"])
    flow = analysis.trace.flows.get(str(level.get("module", "")))
    if flow is None:
        return channels
    entering = level.get("hook_type") == "forward_pre"
    axes = flow.in_axes if entering else flow.out_axes
    labels = next((axis for axis in axes if axis is not None and len(axis) == channels), None)
    return channels if labels is None else _kept(labels, mask)
