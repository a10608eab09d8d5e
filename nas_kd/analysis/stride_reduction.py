"""Small images need a smaller stride: the earliest strided layers of any base are made stride 1."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nas_kd.analysis.trace import Flow, trace
from nas_kd.errors import ModelError
from nas_kd.networks.plan import Edit, Number, Plan, apply_plan, plan_of

_PROBE = 256  # pixels: large enough for every stride to show


def reduce_stride(network: nn.Module, reduction: int, channels: int) -> nn.Module:
    """Makes the earliest strided layers stride 1, in place, until the network reduces images by `reduction`.

    A network for 224 pixels has nothing left to look at in images of 32. The change is recorded as the network's plan:
    exports have it.

    Args:
        network: Of timm.
        reduction: The side of images over that of the last feature map.
        channels: Of its images.

    Returns:
        The network.

    Raises:
        ModelError: When it cannot be brought to that reduction.

    Example:
        >>> import timm, torch
        >>> from nas_kd import reduce_stride
        >>> network = reduce_stride(timm.create_model("test_resnet"), 8, 3)
        >>> network.forward_features(torch.zeros(1, 3, 32, 32)).shape[-1]
        4
    """
    name = type(network).__name__
    size = (channels, _PROBE, _PROBE)
    flows = trace(network, size).flows
    have = _total_stride(flows, name)
    if reduction < 1 or have % reduction:
        raise ModelError(f"--reduction {reduction} does not divide the total stride {have} of {name}")
    plan = Plan(edits=_edits(network, flows, have // reduction))
    apply_plan(network, plan)
    if (now := _total_stride(trace(network, size).flows, name)) != reduction:
        raise ModelError(f"{name} cannot be given --reduction {reduction}: its strided layers allow {now} at the least")
    changed: Any = network
    changed.nas_kd_plan = plan_of(network).then(plan)
    return network


def _total_stride(flows: Mapping[str, Flow], name: str) -> int:
    """By how much the last feature map is smaller than the image, rounded."""
    for flow in (flows.get("forward_features"), *reversed(list(flows.values()))):
        if flow is not None and len(flow.out_shape) == 4 and min(flow.out_shape[2:]) > 1:
            return round(_PROBE / flow.out_shape[-1])
    raise ModelError(f"{name} has no feature maps: only convolutional networks can be searched")


def _edits(network: nn.Module, flows: Mapping[str, Flow], excess: int) -> dict[str, Edit]:
    """Edits that take a factor `excess` out of the strides, from the largest feature maps on."""
    levels: defaultdict[int, dict[str, int]] = defaultdict(dict)
    for path, flow in flows.items():
        module = network.get_submodule(path) if path not in ("forward_features", "pre_logits") else network
        stride = _stride_of(module)
        if stride > 1 and len(flow.in_shape) == 4:
            levels[flow.in_shape[-1]][path] = stride
    edits: dict[str, Edit] = {}
    for size in sorted(levels, reverse=True):
        factor = max(levels[size].values())
        taken = min(excess, factor)
        if taken == 1 or factor % taken:
            continue
        excess //= taken
        for path in levels[size]:
            edits[path] = Edit(sizes=_unstrided(network.get_submodule(path), factor // taken))
    return edits


def _stride_of(module: nn.Module) -> int:
    stride: Any = getattr(module, "stride", 1)
    if next(module.children(), None) is not None or not hasattr(module, "kernel_size"):
        return 1
    pair = stride if isinstance(stride, Sequence) else (stride,)
    return max(pair) if all(isinstance(number, int) for number in pair) else 1


def _unstrided(module: Any, stride: int) -> dict[str, Number]:
    """The sizes of a convolution or pooling with another stride, and padding that keeps the rest of its geometry."""

    def like(old: Any, number: int) -> Number:
        return (number,) * len(old) if isinstance(old, Sequence) else number

    kernel = module.kernel_size[0] if isinstance(module.kernel_size, Sequence) else module.kernel_size
    sizes: dict[str, Number] = {"stride": like(module.stride, stride)}
    if not isinstance(module, nn.Conv2d) and kernel % 2 == 0:
        sizes["kernel_size"] = like(module.kernel_size, 1)  # 2×2 pooling at stride 1 would shrink the image by one
        if hasattr(module, "padding"):
            sizes["padding"] = like(module.padding, 0)
    elif not isinstance(module, nn.Conv2d) and hasattr(module, "padding") and stride == 1:
        sizes["padding"] = like(module.padding, kernel // 2)
    return sizes
