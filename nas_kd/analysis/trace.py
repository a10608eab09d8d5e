"""Which channels of a network belong together, found by one forward pass on the meta device.

The pass runs below autograd on ATen operators, of which convolutional networks use some forty, so that functional
calls, custom layers and re-standardised weights need no rule of their own. `labels` says what is found out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_modules

from nas_kd.analysis.device import DeviceGraph, device_graph
from nas_kd.analysis.labels import FROZEN, Axes, Call, Labelling, Labels, Split, Stored, tensors
from nas_kd.analysis.labels import Flow as Flow
from nas_kd.analysis.operator_hook import OperatorHook
from nas_kd.analysis.operators import rule_of
from nas_kd.analysis.schedule import Moment, bytes_of
from nas_kd.errors import ModelError
from nas_kd.networks.convolutions import Shift2d
from nas_kd.networks.plain import copied, without_hooks
from nas_kd.networks.plain import named_tensors as named_tensors

SECONDS_LIMIT = 20.0  # no covered model takes 3 s; a network that loops over pixels in Python would never end

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What one forward pass tells: labels of every parameter and buffer, the calls, and where channels are split."""

    axes: dict[str, Axes]
    calls: tuple[Call, ...]
    splits: tuple[Split, ...]
    unknown: tuple[tuple[str, str], ...]  # (module, operator) that froze channels
    flows: dict[str, Flow]  # by module path; also "forward_features" and "pre_logits" of the whole network
    norms: dict[str, str]  # by the module of a convolution, the batch norm right behind it
    residual: tuple[str, ...]  # modules that add something to their own input
    moments: tuple[Moment, ...]  # the operators on activations, in order
    stored: tuple[Stored, ...]  # the activations by number
    lives: Mapping[int, tuple[int, int]]  # by number, of those that are read: the first and last moment of its life
    device: DeviceGraph  # what an interpreter of int8 runs of it; its tensors are of `stored`
    labels: int  # one more than the largest label


def ends_of_block(traced: Trace, block: str) -> tuple[int, int | None] | None:
    """Return the numbers of the one tensor that a block reads and of the one it leaves behind, None for that when it
    changes the first in place. None when there are more."""
    inside = [i for i, moment in enumerate(traced.moments) if f"{moment.module}.".startswith(f"{block}.")]
    made = {number for i in inside for number in traced.moments[i].makes}
    read = {number for i in inside for number in traced.moments[i].reads} - made
    left = {number for number in made if number in traced.lives and traced.lives[number][1] > inside[-1]}
    return (read.pop(), next(iter(left), None)) if len(read) == 1 and len(left) <= 1 else None


def without_storage(network: Network) -> Network:
    """Copy a network to the meta device: shapes alone, so that even a large one costs no memory; and no hooks, which
    may want to see numbers."""
    memo: dict[int, Any] = without_hooks(network)
    for module in network.modules():
        for tensor in tensors(vars(module)):
            if id(tensor) not in memo:
                memo[id(tensor)] = _shape_of(tensor)
    return copied(network, memo)


def meta_image(network: nn.Module, input_size: Sequence[int]) -> Tensor:
    """Return an image on the meta device for a network there: 1×C×H×W, in its own precision."""
    dtype = next((parameter.dtype for parameter in network.parameters()), None)
    return torch.empty((1, *input_size), device="meta", dtype=dtype)


def _shape_of(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def trace(network: nn.Module, input_size: Sequence[int], *, clock: Callable[[], float] = time.thread_time) -> Trace:
    """Label the channels of `network` for images of `input_size` (C, H, W). The network is not changed.

    Raises ModelError when the forward pass fails at this size or takes longer than `SECONDS_LIMIT` of processor time:
    on a busy machine a model is the same.
    """
    meta = without_storage(network).eval()
    shifts = {name for name, module in meta.named_modules() if isinstance(module, Shift2d)}
    labelling = Labelling(named_tensors(meta), uncounted=shifts)
    handles = list(_follow_modules(meta, labelling))
    image = meta_image(meta, input_size)
    labelling.set(image, (None, np.full(input_size[0], FROZEN), None, None))
    labelling.activations.begin(image)
    hook = _rules_hook(labelling, type(network).__name__, clock)
    try:
        with torch.no_grad(), hook:
            output = meta(image)
    except ModelError:
        raise
    except Exception as error:
        size, message = "×".join(map(str, input_size)), str(error).strip() or type(error).__name__
        raise ModelError(
            f"{type(network).__name__} cannot run on {size} images: {message.splitlines()[0][:200]}; {_way_out()}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    for tensor in tensors(output):
        labelling.freeze(labelling.get(tensor))
    schedule = labelling.activations.schedule(tensors(output))
    device = device_graph(labelling.activations, labelling.activations.numbers(tensors(output)))
    _trace_heads(meta, image, labelling, hook)
    return replace(_result(labelling, device), moments=schedule.moments, lives=schedule.lives)


def _way_out() -> str:
    if global_modules._global_forward_hooks or global_modules._global_forward_pre_hooks:
        return "a hook of all modules (register_module_forward_hook of torch.nn.modules.module) may be to blame"
    return "try a larger --img-size, or a smaller --reduction"


def _trace_heads(network: Any, image: Tensor, labelling: Labelling, hook: OperatorHook) -> None:
    """Label what timm's `forward_features` and `forward_head(pre_logits=True)` return, where a model has them."""
    if not (hasattr(network, "forward_features") and hasattr(network, "forward_head")):
        return
    calls = labelling.calls.copy()
    with torch.no_grad(), hook:
        features = network.forward_features(image)
        labelling.note("forward_features", image, features)
        labelling.note("pre_logits", features, network.forward_head(features, pre_logits=True))
    labelling.calls = calls


def _follow_modules(network: nn.Module, labelling: Labelling) -> Iterator[Any]:
    """Register hooks that tell `labelling` which module runs, and what goes in and out; yield their handles."""
    for name, module in network.named_modules():

        def enter(module: nn.Module, inputs: Any, name: str = name) -> None:
            labelling.enter(name, inputs)

        def leave(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            labelling.leave(name, inputs, output)

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave)


def _rules_hook(labelling: Labelling, name: str, clock: Callable[[], float]) -> OperatorHook:
    """Return the hook that passes the labels on behind each operator of the network of this name."""
    deadline = clock() + SECONDS_LIMIT

    def hook(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if clock() > deadline:
            raise ModelError(f"{name} takes longer than {SECONDS_LIMIT:.0f} s to analyse: it is not supported")
        declared = func._schema.arguments
        named = {argument.name: argument.default_value for argument in declared if argument.has_default_value()}
        arguments = {**named, **dict(zip((argument.name for argument in declared), args, strict=False)), **kwargs}
        inputs = list(tensors(list(arguments.values())))
        rule = rule_of(func)
        if rule is None:
            labelling.give_up(str(func), inputs)
        else:
            rule(labelling, arguments, output)
        labelling.activations.record(labelling.running, func, args, inputs, tensors(output))

    return OperatorHook(hook)


def _result(labelling: Labelling, device: DeviceGraph) -> Trace:
    def roots(labels: Labels | None) -> Labels | None:
        return None if labels is None else labelling.find(labels)

    def final(call: Call) -> Call:
        axes = tuple(labelling.find(labels) for labels in call.axes)
        return replace(call, axes=axes, inputs=roots(call.inputs), outputs=roots(call.outputs))

    def settled(flow: Flow) -> Flow:
        return replace(flow, in_axes=tuple(map(roots, flow.in_axes)), out_axes=tuple(map(roots, flow.out_axes)))

    def stored(tensor: Tensor) -> Stored:
        axes = labelling.get(tensor)
        plain = [length for length, labels in zip(tensor.shape, axes, strict=True) if labels is None]
        labelled = tuple(labelling.find(labels) for labels in axes if labels is not None)
        return Stored(factor=math.prod(plain) * bytes_of(tensor), axes=labelled)

    return Trace(
        axes={name: tuple(map(roots, axes)) for name, axes in labelling.named_axes().items()},
        calls=tuple(map(final, labelling.calls)),
        splits=tuple(replace(split, parts=tuple(map(labelling.find, split.parts))) for split in labelling.splits),
        unknown=tuple(labelling.unknown),
        flows={name: settled(flow) for name, flow in labelling.flows.items()},
        norms=dict(labelling.norms),
        residual=tuple(labelling.residual),
        moments=(),
        stored=tuple(map(stored, labelling.activations.made)),
        lives={},
        device=device,
        labels=labelling.count,
    )
