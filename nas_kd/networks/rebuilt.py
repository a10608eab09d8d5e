"""Whether a network is what its arguments and plan build: module by module, by what each has and what it is set to."""

from __future__ import annotations

import functools
import logging
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from timm.layers import DropBlock2d, DropPath
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from nas_kd.errors import ModelError, PlanError
from nas_kd.networks.hub import ENTRY_POINT, student_args

_logger = logging.getLogger(__name__)
_MOMENTUM = re.compile(r"momentum=[^,]*,? ?")
_NOTHING = (nn.Identity, _DropoutNd, DropPath, DropBlock2d)  # in evaluation; timm's configs say nothing of them either
# how a network is trained and run, not what it computes; and what its classifier tells better
_INCIDENTAL = frozenset(
    "training momentum inplace p drop_prob drop_rate drop_path_rate grad_checkpointing num_classes".split()
)
_PLAIN = (bool, int, float, str, type(None), torch.dtype)


def check_exportable(network: nn.Module) -> None:
    """Raises ModelError when exports of a network of timm, or of what is made of it, could not be loaded with its
    outputs; warns of a network that is not timm's, and of what an export does not keep."""
    if not hasattr(network, "pretrained_cfg"):
        _logger.warning(
            "%s is no model of timm.create_model: its students can be trained, but not exported, unless it is "
            "registered with timm.models.register_model and created there",
            type(network).__name__,
        )
        return
    again = check_rebuilds(network, student_args(network))
    have, want = (dict(_momenta(each)) for each in (network, again))
    if path := next((path for path in have if have[path] != want.get(path, have[path])), None):
        _logger.warning(
            "exports do not keep momentum=%s of %s: it is %s in what they load", have[path], path, want[path]
        )


def _momenta(network: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from ((path, m.momentum) for path, m in network.named_modules() if isinstance(m, nn.BatchNorm2d))


def check_rebuilds(network: nn.Module, args: Mapping[str, Any]) -> nn.Module:
    """What `args` of `student_args` build, without weights where that can be. Raises ModelError, naming a module, when
    it is not the network.

    The network was changed by hand since timm created it: an export of it would not load, or compute something else.
    """
    again = _built(args)
    have, want = _layers(network), _layers(again)
    path = next((path for path in {**have, **want} if _differ(have.get(path), want.get(path))), None)
    if path is not None:
        known, new = (_shown(layers.get(path), default) for layers, default in ((want, "there"), (have, "gone")))
        raise ModelError(
            f"this {args['base']} was changed after timm created it ({path or 'the network'} is {new}, not {known}), "
            "so no export of it could be loaded: register the changed network with timm.models.register_model and "
            "create it there; for the strides of small images there is nas_kd.reduce_stride, for the inference form "
            "nas_kd.networks.fuse.fused"
        )
    _check_values(network, again, args["base"])
    return again


def _built(args: Mapping[str, Any]) -> nn.Module:
    try:
        try:
            with torch.device("meta"):
                return timm.create_model(ENTRY_POINT, **args)  # type: ignore[no-any-return]
        except PlanError:  # some networks compute with numbers while they are made
            return timm.create_model(ENTRY_POINT, **args)  # type: ignore[no-any-return]
    except PlanError as error:
        given = ", ".join(f"{name}={value!r}" for name, value in args["base_args"].items())
        raise ModelError(
            f"timm does not create {args['base']} from {given} again, so no export of it could be loaded: {error}"
        ) from error


_Layer = tuple[type[nn.Module], str, dict[str, tuple[int, ...]]]


def _layers(network: nn.Module) -> dict[str, _Layer]:
    """What every module is, by path, with what it says of itself and the shapes of its tensors; what only training
    needs is left out."""
    layers = {}
    for path, module in network.named_modules():
        if not isinstance(module, _NOTHING):
            own = {**module._parameters, **module._buffers}
            shapes = {name: tuple(tensor.shape) for name, tensor in own.items() if tensor is not None}
            says = "" if next(module.children(), None) is not None else _MOMENTUM.sub("", module.extra_repr())
            layers[path] = (type(module), re.sub(r"(, )?inplace(=True)?", "", says), shapes)
    return layers


def _differ(have: _Layer | None, want: _Layer | None) -> bool:
    if have is None or want is None:
        layer = have or want
        assert layer is not None
        return not (issubclass(layer[0], nn.Sequential | nn.ModuleList | nn.ModuleDict) and not layer[2])
    return have != want


def _shown(layer: _Layer | None, default: str) -> str:
    if layer is None:
        return default
    kind, says, shapes = layer
    return f"{kind.__name__}({says}) {shapes or ''}".rstrip()


def _check_values(network: nn.Module, again: nn.Module, base: str) -> None:
    """Raises ModelError when a module is set to something else than in `again`, or runs a function of its own."""
    modules = dict(again.named_modules())
    for path, module in network.named_modules():
        if isinstance(module, _NOTHING) or path not in modules:
            continue
        name, have, want = next(_changes(module, modules[path]), ("", None, None))
        if name:
            where = f"{path}.{name}" if path else name
            raise ModelError(
                f"this {base} was changed after timm created it ({where} is {reprlib.repr(have)}, not "
                f"{reprlib.repr(want)}), so no export of it could be loaded: register the changed network with "
                "timm.models.register_model and create it there"
            )


def _changes(module: nn.Module, like: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """The attributes, with both values, in which a module differs from another one."""
    own, others = vars(module), vars(like)
    for name in own.keys() - _INCIDENTAL:
        if name.startswith("_"):
            continue
        if name in others and _fact(own[name]) != _fact(others[name]):
            yield name, own[name], others[name]
        elif name not in others and callable(getattr(type(module), name, None)):
            yield name, own[name], getattr(type(module), name)


def _fact(value: Any) -> Any:
    """What of a value can be compared: numbers and words, functions by their names, of other things their types; what
    is kept in dictionaries describes a network and is not computed with."""
    if isinstance(value, functools.partial):
        return _fact(value.func), _fact(value.args), _fact(tuple(value.keywords.items()))
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_fact, value))
    return getattr(value, "__qualname__", type(value).__qualname__)
