"""How timm builds a student again: one entry point, registered by importing `nas_kd.models`.

An exported folder names it as its architecture, with the base, the base's own arguments and the plan, so that
`timm.create_model("local-dir:FOLDER", pretrained=True)` works as for any timm model. Neither tracing nor training code
is needed.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.layers import get_act_layer, get_norm_layer
from timm.models import (
    FeatureDictNet,
    FeatureGraphNet,
    FeatureHookNet,
    FeatureListNet,
    build_model_with_cfg,
    get_model_args,
    register_model,
)
from timm.models._features import FeatureGetterNet
from torch import nn

from nas_kd.errors import ModelError, NasKdError, PlanError, nearest
from nas_kd.networks.plan import Plan, apply_plan, plan_of
from nas_kd.networks.weights import weights_at_hand

ENTRY_POINT = "nas_kd_student"
# not arguments of the base: timm's, for the loading itself
_REARRANGED = 16  # channels: a first convolution that reads as many does not read an image as it is
_LOADING = (
    "cache_dir",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
    "out_indices",
    "feature_cls",
)

# what timm and torch raise for arguments, configs and weights that are none
_FAILURES = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    AssertionError,
    OSError,
    SafetensorError,
)

_SHARED = ("num_classes", "in_chans", "global_pool")  # timm has defaults of its own for these

# timm's names of what `act_layer` and `norm_layer` may be given as classes
_ACTIVATIONS = (
    "relu relu6 silu leaky_relu elu celu selu gelu gelu_tanh quick_gelu mish prelu sigmoid tanh hard_sigmoid"
    " hard_swish hard_mish"
).split()
_NORMS = ("batchnorm2d", "groupnorm", "groupnorm1", "layernorm", "layernorm2d")

# timm's names of what `feature_cls` may be
_FEATURES = {
    "getter": FeatureGetterNet,
    "hook": FeatureHookNet,
    "list": FeatureListNet,
    "dict": FeatureDictNet,
    "fx": FeatureGraphNet,
}

default_cfgs: dict[str, Any] = {ENTRY_POINT: {}}  # every export brings its own


@register_model  # type: ignore[untyped-decorator]
def nas_kd_student(
    pretrained: bool = False,
    *,
    base: str = "",
    plan: Mapping[str, Any] | None = None,
    base_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A timm model `base`, created with `base_args`, after a plan in its JSON form; used through `timm.create_model`.

    The other arguments are timm's. Raises ModelError for an unknown base, PlanError for a plan that does not fit it or
    weights that do not fit the two.
    """
    if not isinstance(base, str) or base == ENTRY_POINT or not timm.is_model(base):
        raise ModelError(
            f"the exported config names an unknown timm model {base!r}: it is damaged, or needs a newer timm"
        )
    try:
        given = dict(base_args or {})
        build = functools.partial(_build, base=base, base_args=given, plan=Plan.from_json(plan))
        wrap = functools.partial(_wrap_features, base=base, base_args=given, cls=kwargs.pop("feature_cls", None))
        kwargs = {name: given[name] for name in _SHARED if name in given} | kwargs
        features = {"feature_cls": wrap}
        model: nn.Module = build_model_with_cfg(build, ENTRY_POINT, pretrained, feature_cfg=features, **kwargs)
    except NasKdError:
        raise
    except _FAILURES as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise PlanError(
            f"this student of {base} cannot be built: {text[:200]}; unless an argument of yours is to blame, the "
            "export is damaged: export the model again"
        ) from error
    return model


def _build(*, base: str, base_args: Mapping[str, Any], plan: Plan, **kwargs: Any) -> nn.Module:
    headless = kwargs.get("num_classes") == 0  # the plan may resize the classifier, so that goes last
    args = {**base_args, **kwargs, **({"num_classes": 1} if headless else {})}
    model: Any = timm.create_model(base, pretrained=False, **args)
    apply_plan(model, plan)
    if headless:
        model.reset_classifier(0)
    model.nas_kd_plan = plan
    return model  # type: ignore[no-any-return]


def _wrap_features(model: nn.Module, *, base: str, base_args: Mapping[str, Any], cls: Any, **config: Any) -> nn.Module:
    """What `features_only=True` gives: the levels that timm gives for the base, unless others were asked for; `cls` is
    timm's `feature_cls`, where the user gave one."""
    levels = len(model.feature_info)  # type: ignore[arg-type]
    if tuple(config["out_indices"]) == (0, 1, 2, 3, 4):  # timm's default, which some bases replace by their own
        with torch.device("meta"):
            reference = timm.create_model(base, features_only=True, **base_args)
        config["out_indices"] = tuple(index for index in reference.feature_info.out_indices if index < levels)
    default = FeatureGetterNet if hasattr(model, "forward_intermediates") else FeatureHookNet
    wrapper = default if cls is None else _FEATURES.get(cls, cls)
    if isinstance(wrapper, str):
        raise ModelError(f"timm has no feature_cls {cls!r}: use {', '.join(_FEATURES)}, or leave it out")
    return wrapper(model, **config)  # type: ignore[no-any-return]


def base_of(network: nn.Module) -> tuple[str, dict[str, Any]]:
    """The timm name of the base that a network was made of, and the arguments that it was created with.

    Raises ModelError for a network that timm did not create: its export could not be loaded.
    """
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    name = config.get("architecture", "")
    args = get_model_args(network) if name else {}
    if name == ENTRY_POINT:
        name, args = args["base"], {**args.get("base_args", {}), **_without(args, ("base", "plan", "base_args"))}
    if not name or not timm.is_model(name):
        raise ModelError(
            f"{type(network).__name__} is no model of timm.create_model: register it with timm.models.register_model "
            "and create it there, so that its students can be loaded again"
        )
    args = {**args, **_replaced_head(network, args)}
    return name, {key: _named(value) for key, value in _without(args, _LOADING).items()}


def _replaced_head(network: Any, args: Mapping[str, Any]) -> dict[str, int]:
    """The classes of a classifier that someone put in by hand, the usual way to fine-tune: timm is asked for these."""
    head = network.get_classifier() if hasattr(network, "get_classifier") else None
    classes = 0 if isinstance(head, nn.Identity) else getattr(head, "out_features", args.get("num_classes"))
    return {"num_classes": classes} if isinstance(classes, int) and classes != args.get("num_classes", classes) else {}


def _named(value: Any) -> Any:
    """An argument as it can be written: activations and norms, which may be given as classes, by timm's names."""
    if isinstance(value, Mapping):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, type):
        known = itertools.chain(((n, get_act_layer(n)) for n in _ACTIVATIONS), ((n, get_norm_layer(n)) for n in _NORMS))
        return next((name for name, kind in known if kind is value), value)
    return value


def input_channels(network: nn.Module) -> int | None:
    """The channels of the images for which timm created a network; None where it does not say."""
    channels = get_model_args(network).get("in_chans") if hasattr(network, "pretrained_cfg") else None
    return channels if isinstance(channels, int) else None


def input_size_of(network: nn.Module, img_size: int | None) -> tuple[int, int, int]:
    """The images (C, H, W) that a network takes: its first convolution's channels, the given or its own size.

    Some networks rearrange an image before they convolve it (TResNet: 3 channels to 48): then it is what timm was asked
    for that counts.
    """
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, 224, 224))
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    asked = input_channels(network)
    if first is not None and (asked is None or first.in_channels < _REARRANGED):
        channels = first.in_channels
    elif asked is not None:
        channels = asked
    return (channels, img_size or height, img_size or width)


def _without(args: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in args.items() if name not in names}


def student_args(network: nn.Module) -> dict[str, Any]:
    """The arguments by which `timm.create_model("nas_kd_student", …)` builds a network of this shape."""
    base, base_args = base_of(network)
    for name, value in base_args.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"{base} was created with {name}={value!r}, which no export can hold: give timm.create_model its name, "
                "as a text, or register a model that has it with timm.models.register_model"
            ) from error
    try:
        plan = json.loads(json.dumps(plan_of(network).to_json()))
    except (TypeError, ValueError) as error:
        raise PlanError(f"the plan of {base} cannot be written: {error}") from error
    return {"base": base, "base_args": base_args, "plan": plan}


def create_base(name: str, **kwargs: Any) -> nn.Module:
    """A model of timm, with errors that a person understands.

    Args:
        name: As `timm.create_model` takes it: `resnet18`, `local-dir:FOLDER`, `hf-hub:USER/MODEL`.
        kwargs: Those of `timm.create_model`.

    Returns:
        The network.

    Raises:
        ModelError: When there is no such model, or it cannot be made with these arguments; it names the nearest.

    Example:
        >>> from nas_kd import create_base
        >>> create_base("test_resnet", num_classes=10).num_classes
        10
    """
    name = name.removeprefix("timm/")  # as the hub calls timm's own
    if ":" not in name and os.path.isdir(name):
        raise ModelError(f"{name} is a folder, but not of an exported model, which has a config.json")
    stem = name.split(".")[0]
    if ":" not in name and not timm.is_model(stem):
        raise ModelError(f"timm knows no model {name!r}{nearest(stem, timm.list_models())}; see timm.list_models()")
    try:
        with weights_at_hand(name) if kwargs.get("pretrained") else nullcontext():
            model: nn.Module = timm.create_model(name, **kwargs)
    except NasKdError:
        raise
    except _FAILURES as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"timm cannot create {name!r}: {text[0]}") from error
    return model
