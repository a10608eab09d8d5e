"""Students: a base with some modules narrowed or replaced, still an instance of the base's own class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nas_kd.analysis.labels import Axes, Labels, Split, tensors
from nas_kd.analysis.structure import Analysis, Site, is_replaced, padding_for, replaced
from nas_kd.genotype import Choice
from nas_kd.networks.plain import copied, without_hooks
from nas_kd.networks.plan import SETTABLE, Edit, Number, Plan, apply_plan, plan_of

Network = TypeVar("Network", bound=nn.Module)
Mask = NDArray[np.bool_]
Shapes = Mapping[str, tuple[tuple[int, int], ...]]  # per tensor the dimensions that change, and their new lengths


@torch.inference_mode(False)
def build_student(
    base: Network, analysis: Analysis, genotype: Mapping[str, Choice], *, shared: Collection[nn.Module] = ()
) -> Network:
    """A copy of `base` in the shape of `genotype`: the base's class, its weights cut to their first channels.

    Modules in `shared`, which the genotype must leave alone, are not copied but the base's own. The identity genotype
    gives the base's own keys and outputs. `inherit` gives the others better weights. The plan that
    makes it is kept as `student.nas_kd_plan`. Raises GenotypeError when the genotype does not fit.
    """
    analysis.check(genotype)
    plan = student_plan(base, analysis, genotype)
    student: Any = _patched_copy(base, plan, shared)
    student.nas_kd_plan = plan_of(base).then(plan)
    return cast(Network, student)


def _patched_copy(base: nn.Module, plan: Plan, alike: Collection[nn.Module]) -> nn.Module:
    """A copy of `base` changed by `plan`, all of whose parameters learn and which has no hooks; a tensor that the plan
    cuts is never copied whole."""
    hidden = {id(part) for module in alike for part in module.modules()}
    modules = [module for module in base.modules() if id(module) not in hidden]
    copies: dict[int, Any] = without_hooks(base)  # what `deepcopy` takes for a copy of the object with this id
    views = {id(t): _view(t) for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))}
    shared = {id(view) for view in views.values()}
    for module in modules:  # what a module has computed and kept, as efficientformer its attention bias
        copies |= {id(t): t.detach().clone() for t in tensors(vars(module)) if not t.is_leaf}
    own = {id(module): module for module in alike}
    student = apply_plan(copied(base, {**copies, **views, **own}), plan)
    for tensor in (*student.parameters(), *student.buffers()):
        if id(tensor) in shared:
            tensor.data = tensor.detach().clone()
    return student


def _view(tensor: Tensor) -> Tensor:
    """The memory of a parameter or buffer under a version counter of its own (`detach` would share the tensor's, and
    autograd take every change of one student for one of the others); a parameter learns, whatever the base's does."""
    view = tensor.clone() if tensor.is_inference() else tensor.data
    if not isinstance(tensor, nn.Parameter):
        return view
    return nn.Parameter(view, requires_grad=view.is_floating_point() or view.is_complex())


def student_plan(base: nn.Module, analysis: Analysis, genotype: Mapping[str, Choice]) -> Plan:
    """The edits that turn `base` into the student of this genotype."""
    mask = analysis.keep_mask(genotype)
    sites = {site.module: (site, genotype[block.name]) for block in analysis.blocks for site in block.sites}
    dropped = tuple(name for name, choice in genotype.items() if not choice.keep)
    edits = {path: Edit(drop=True) for path in dropped}
    narrowed = _narrowed_tensors(analysis, mask)
    for path, module in base.named_modules():
        if path in dropped or path.startswith(tuple(f"{name}." for name in dropped)):
            continue
        edit = _edit(module, path, analysis, narrowed.get(path, {}), mask)
        edit = _site_edit(edit, *sites[path], mask) if path in sites else edit
        if edit != Edit():
            edits[path] = edit
    return Plan(edits=edits, features=_features(base, analysis, mask))


def _edit(module: nn.Module, path: str, analysis: Analysis, shapes: Shapes, mask: Mask) -> Edit:
    """What narrowing does to one module."""
    sizes = dict(_sizes(module, path, analysis, shapes, mask)) | dict(_split_sizes(module, path, analysis, mask))
    return Edit(shapes=shapes, sizes=sizes)


def _site_edit(edit: Edit, site: Site, choice: Choice, mask: Mask) -> Edit:
    """What `choice` does to the convolution at `site`, beside the narrowing in `edit`."""
    if is_replaced(site, choice):
        return Edit(conv=replaced(site, choice, _kept(site.inputs, mask), _kept(site.outputs, mask)))
    if choice.kernel_size not in (None, site.spec.kernel_size):
        return _grown(site, choice, edit)
    return edit


def _kept(labels: Labels, mask: Mask) -> int:
    return int(mask[labels].sum())


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


def _grown(site: Site, choice: Choice, edit: Edit) -> Edit:
    """`edit` of a convolution of the base's own kind, with another kernel size as well."""
    kernel = choice.kernel_size or site.spec.kernel_size
    weight = (*edit.shapes.get("weight", ()), (2, kernel), (3, kernel))
    sizes: dict[str, Number] = {**edit.sizes, "kernel_size": (kernel, kernel)}
    if site.spec.padding != "same":
        sizes["padding"] = (padding_for(site.spec, kernel),) * 2
    return Edit(shapes={**edit.shapes, "weight": weight}, sizes=sizes)


def _sizes(
    module: nn.Module, path: str, analysis: Analysis, shapes: Shapes, mask: Mask
) -> Iterator[tuple[str, Number]]:
    """The numbers that a module keeps beside its tensors, where they change."""
    weight = dict(shapes.get("weight", ()))
    if isinstance(module, nn.Conv2d):
        yield from _conv_sizes(module, path, analysis, weight, mask)
    elif isinstance(module, nn.Linear):
        names = {0: "out_features", 1: "in_features"}
        yield from ((names[dim], count) for dim, count in weight.items())
    elif isinstance(module, nn.LayerNorm) and weight:
        yield "normalized_shape", tuple(weight.get(dim, n) for dim, n in enumerate(module.normalized_shape))
    else:
        yield from _container_sizes(module, path, analysis, shapes, mask)


def _conv_sizes(
    conv: nn.Conv2d, path: str, analysis: Analysis, weight: Mapping[int, int], mask: Mask
) -> Iterator[tuple[str, Number]]:
    call = next((call for call in analysis.trace.calls if call.module == path), None)
    if call is None or call.inputs is None or call.outputs is None:
        return
    inputs, outputs = _kept(call.inputs, mask), _kept(call.outputs, mask)
    if inputs != conv.in_channels:  # else it may be the image's, which timm's in_chans changes
        yield "in_channels", inputs
    if outputs != conv.out_channels:
        yield "out_channels", outputs
    groups = inputs // weight.get(1, conv.in_channels // conv.groups)
    if groups != conv.groups:  # whole groups went; else each of them lost channels
        yield "groups", groups


def _split_sizes(module: nn.Module, path: str, analysis: Analysis, mask: Mask) -> Iterator[tuple[str, Number]]:
    """The numbers at which a module splits channels, where it keeps them as attributes."""
    for split in analysis.trace.splits:
        if split.module == path and not all(mask[part].all() for part in split.parts):
            yield from _following_split(module, split, mask)


def _following_split(module: nn.Module, split: Split, mask: Mask) -> Iterator[tuple[str, Number]]:
    old, new = [len(part) for part in split.parts], tuple(_kept(part, mask) for part in split.parts)
    for name, value in vars(module).items():
        if name in SETTABLE and isinstance(value, list | tuple) and list(value) == old:
            yield name, new
        elif name in SETTABLE and type(value) is int and value == old[0]:
            yield name, new[0]
        elif name in SETTABLE and type(value) is int and value == sum(old):
            yield name, sum(new)


_NORM_SIZES = ("num_features", "num_channels", "num_parameters", "channels")  # batch norm, group norm, PReLU, BlurPool
_INPUT_SIZES = ("in_features", "in_channels", "in_chs")
_OUTPUT_SIZES = ("num_features", "out_channels", "out_chs", "out_features")


def _container_sizes(
    module: nn.Module, path: str, analysis: Analysis, shapes: Shapes, mask: Mask
) -> Iterator[tuple[str, Number]]:
    """Norms by their own tensors; blocks and heads by what flows in and out of them; the network by its features."""
    if shapes:
        tensor, ((dim, length), *_) = next(iter(shapes.items()))
        old = getattr(module, tensor).shape[dim]
        yield from ((name, length) for name in _NORM_SIZES if getattr(module, name, None) == old)
        return
    flows = analysis.trace.flows
    sources: tuple[tuple[tuple[str, ...], str, bool], ...]
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
