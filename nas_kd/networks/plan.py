"""A plan: which modules of a base become what, to the last shape.

It is all that is needed to build a student again: no tracing, no weights, no training code. It changes only what
differs from the base, so the base may be built with other classes or input channels than when the plan was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nas_kd.errors import PlanError
from nas_kd.networks.convolutions import ConvSpec, build_conv
from nas_kd.networks.folding import fold

VERSION = 1  # of the JSON form; every older one stays readable
SETTABLE = frozenset(  # sizes that modules keep as plain numbers; nothing else is ever set from a file
    "in_channels out_channels groups num_features num_channels normalized_shape in_features out_features "
    "channels num_parameters kernel_size stride padding head_hidden_size in_chs out_chs expand_chs width "
    "hidden_features splits".split()
)
Number = int | tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """What happens to one module: replaced by `conv`, dropped (an identity takes its place), or resized.

    `shapes` maps a parameter or buffer to (dimension, new length) pairs, `sizes` an attribute to its new number.
    """

    shapes: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    sizes: Mapping[str, Number] = field(default_factory=dict)
    conv: ConvSpec | None = None
    drop: bool = False

    def then(self, later: Edit) -> Edit:
        """This edit and then a later one that resizes what this one made."""
        shapes = {
            name: tuple({**dict(self.shapes.get(name, ())), **dict(later.shapes.get(name, ()))}.items())
            for name in {**self.shapes, **later.shapes}
        }
        return replace(self, shapes=shapes, sizes={**self.sizes, **later.sizes})


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Edits by module path ("" is the network itself), the channels of timm's `feature_info` levels, and whether the
    network is in its inference form after that (`fuse.fused`)."""

    edits: Mapping[str, Edit] = field(default_factory=dict)
    features: tuple[int, ...] = ()
    fused: bool = False

    def then(self, later: Plan) -> Plan:
        """This plan and then `later`, as one plan. Raises PlanError when nothing can follow this one."""
        if self.fused and later != Plan():
            raise PlanError("a network in its inference form cannot be changed: begin with its training form")
        edits = dict(self.edits)
        for path, edit in later.edits.items():
            if edit.conv is not None or edit.drop:  # whatever was here, or below, is gone
                edits = {old: e for old, e in edits.items() if old != path and not old.startswith(f"{path}.")}
            edits[path] = edits[path].then(edit) if path in edits else edit
        return Plan(edits=edits, features=later.features or self.features, fused=self.fused or later.fused)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values, with a version."""
        edits = {path: _edit_to_json(edit) for path, edit in self.edits.items()}
        data = {"version": VERSION, "edits": edits, "features": list(self.features)}
        return {**data, "fused": True} if self.fused else data

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Reads what `to_json` gave. Raises PlanError for anything else."""
        try:
            if data["version"] != VERSION:
                raise PlanError(
                    f"this plan has version {data['version']!r}, this nas_kd reads up to {VERSION}: update it"
                )
            edits = {str(path): _edit_from_json(edit) for path, edit in data["edits"].items()}
            features = tuple(int(channels) for channels in data["features"])
            return cls(edits=edits, features=features, fused=bool(data.get("fused", False)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"the plan is damaged ({type(error).__name__}: {error}): export the model again") from error


def plan_of(network: nn.Module) -> Plan:
    """The plan by which a network differs from the timm model that it was made of; empty for timm's own."""
    plan = getattr(network, "nas_kd_plan", None)
    return plan if isinstance(plan, Plan) else Plan()


def _edit_to_json(edit: Edit) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if edit.conv is not None:
        data["conv"] = asdict(edit.conv)
    if edit.drop:
        data["drop"] = True
    if edit.shapes:
        data["shapes"] = {name: {str(dim): length for dim, length in dims} for name, dims in edit.shapes.items()}
    if edit.sizes:
        data["sizes"] = {name: list(size) if isinstance(size, tuple) else size for name, size in edit.sizes.items()}
    return data


def _edit_from_json(data: Any) -> Edit:
    shapes = {
        str(name): tuple((int(dim), _positive(length)) for dim, length in dims.items())
        for name, dims in data.get("shapes", {}).items()
    }
    sizes = {str(name): _number(name, value) for name, value in data.get("sizes", {}).items()}
    conv = ConvSpec(**data["conv"]) if "conv" in data else None
    return Edit(shapes=shapes, sizes=sizes, conv=conv, drop=bool(data.get("drop", False)))


def _number(name: str, value: Any) -> Number:
    if name not in SETTABLE:
        raise PlanError(f"the plan sets {name!r}, which is no size of a module: it is damaged, export the model again")
    return tuple(_whole(item) for item in value) if isinstance(value, list) else _whole(value)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise PlanError(f"the plan holds {value!r} where a whole number belongs: it is damaged, export the model again")
    return value


def _positive(value: Any) -> int:
    if _whole(value) == 0:
        raise PlanError("the plan makes a tensor empty: it is damaged, export the model again")
    return int(value)


def apply_plan(network: nn.Module, plan: Plan) -> nn.Module:
    """Changes `network` in place as the plan says, and returns it.

    Resized tensors keep their first entries (grown ones are zero-padded around the kernel's centre); the caller
    brings the weights. Raises PlanError when the plan names a module, tensor or size that the network lacks.
    """
    for path, edit in plan.edits.items():
        try:
            _apply_edit(network, path, edit)
        except (AttributeError, IndexError, RuntimeError) as error:
            raise PlanError(
                f"the plan does not fit {type(network).__name__} at {path or 'the network itself'}: {error}"
            ) from error
    if plan.features:
        _set_features(network, plan.features)
    if plan.fused:
        fold(network)
    return network


def _apply_edit(network: nn.Module, path: str, edit: Edit) -> None:
    module = network.get_submodule(path)
    if edit.conv is not None or edit.drop:
        first = next(module.parameters(), torch.empty(0))
        replacement = build_conv(edit.conv) if edit.conv is not None else nn.Identity()
        module = replacement.to(first.device, first.dtype).train(module.training)
        network.set_submodule(path, module)
    for name, value in edit.sizes.items():
        if not hasattr(module, name):
            raise AttributeError(f"{type(module).__name__} has no {name}")
        # `num_features` of some timm models is a read-only property over the module that was resized
        if not isinstance(getattr(type(module), name, None), property):
            setattr(module, name, value)
    for name, dims in edit.shapes.items():
        _resize(module, name, dims)


def _resize(module: nn.Module, name: str, dims: tuple[tuple[int, int], ...]) -> None:
    old = getattr(module, name, None)
    if name in module._parameters and old is not None:
        resized: Tensor = nn.Parameter(resize(old.detach(), dims), requires_grad=old.requires_grad)
    elif name in module._buffers and old is not None:
        resized = resize(old, dims)
    else:
        raise AttributeError(f"{type(module).__name__} has no tensor {name}")
    setattr(module, name, resized)


def resize(tensor: Tensor, dims: tuple[tuple[int, int], ...]) -> Tensor:
    """A copy with the given lengths: shorter dimensions keep their first entries, longer ones grow by zeros on both
    sides. Dimensions are (index, length) pairs."""
    for dim, length in dims:
        have = tensor.shape[dim]
        if length <= have:
            tensor = tensor.narrow(dim, 0, length)
        else:
            before = (length - have) // 2
            shape = [*tensor.shape]
            shape[dim] = length
            grown = tensor.new_zeros(shape)
            grown.narrow(dim, before, have).copy_(tensor)
            tensor = grown
    return tensor.clone()


def _set_features(network: nn.Module, channels: tuple[int, ...]) -> None:
    info: Any = getattr(network, "feature_info", None)
    levels = getattr(info, "info", info)
    if not isinstance(levels, list) or len(levels) != len(channels):
        raise PlanError(f"the plan names {len(channels)} feature levels, {type(network).__name__} has others")
    for level, count in zip(levels, channels, strict=True):
        level["num_chs"] = count
