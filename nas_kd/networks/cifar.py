"""Networks for 32×32 images, registered with timm like its own: `timm.create_model("cifar_resnet56")`.

`cifar_resnet20/32/44/56/110` are the ResNets of section 4.2 of "Deep residual learning" (arXiv 1512.03385): 16, 32
and 64 channels, and shortcuts without parameters (option A). `cifar_resnet56_cheap` is the form that "Compressing CNNs
with cheap convolutions and online distillation" (arXiv 1909.13063) takes its counts from, `cifar_resnet20_cheap` the
same with three blocks a stage. `cifar_vgg16_bn` is VGG-16 with global pooling in place of its large linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from nas_kd.errors import PlanError, nearest
from nas_kd.genotype import CONV_KINDS, is_conv_kind
from nas_kd.networks.convolutions import ConvSpec, build_conv

# those of ImageNet, not of CIFAR: the public weights were trained on images normalised with them
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RESNET_CHANNELS = (16, 32, 64)
_VGG_CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class _CifarNet(nn.Module):
    """What timm expects of a model; a subclass fills `levels`, whose last module gives each feature level.

    N×C×H×W → N×classes. `levels` names modules in the order in which they run.
    """

    levels: tuple[tuple[str, ...], ...]
    feature_info: list[dict[str, Any]]
    num_features: int
    fc: nn.Module

    def _finish(self, num_classes: int, drop_rate: float, global_pool: str) -> None:
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.head_hidden_size = self.num_features
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map (N×C×H×W)."""
        for level in self.levels:
            x = self._run(level, x)
        return x

    def _run(self, level: Sequence[str], x: Tensor) -> Tensor:
        for name in level:
            module = self.get_submodule(name)
            if self.grad_checkpointing and self.training and isinstance(module, nn.Sequential):
                x = checkpoint_seq(module, x)
            else:
                x = module(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the last feature map; with `pre_logits` what the classifier reads."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else cast("Tensor", self.fc(x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N×classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's way to feature maps: those of `indices`, and the last one unless `intermediates_only`."""
        taken, last = feature_take_indices(len(self.levels), indices)
        found = []
        for index, level in enumerate(self.levels[: last + 1] if stop_early else self.levels):
            x = self._run(level, x)
            if index in taken:
                found.append(x)
        return found if intermediates_only else (x, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's name for cutting off what the feature maps of `indices` do not need; gives the indices."""
        taken, last = feature_take_indices(len(self.levels), indices)
        self.levels = self.levels[: last + 1]
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head:
            self.reset_classifier(0, "")
        return cast("list[int]", taken)

    def get_classifier(self) -> nn.Module:
        """The linear layer that gives the logits."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of `num_classes` outputs, none for 0; `global_pool` stays when None."""
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory in training."""
        self.grad_checkpointing = enable


class _PadShortcut(nn.Module):
    """Option A: every second pixel, and zeros for the channels that are missing. N×C×H×W → N×(C+2·pad)×H/2×W/2."""

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut without parameters, and a ReLU after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity() if stride == 1 else _PadShortcut((outputs - inputs) // 2)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act1(self.bn1(self.conv1(x)))
        outer: Tensor = self.act2(self.bn2(self.conv2(inner)) + self.shortcut(x))
        return outer


class CheapBlock(nn.Module):
    """Two convolutions of one kind, each with batch norm and ReLU, and no ReLU after the sum (arXiv 1909.13063).

    Where a stage begins, the shortcut is a 1×1 convolution and a batch norm; a standard block strides in its first
    3×3, a cheap one in the 1×1 of its second pair, so that all before it runs at the higher resolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, conv: str) -> None:
        super().__init__()
        early, late = (stride, 1) if conv == "standard" else (1, stride)
        self.conv1 = _conv(conv, inputs, outputs, early)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = _conv(conv, outputs, outputs, late)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act1(self.bn1(self.conv1(x)))
        outer: Tensor = self.act2(self.bn2(self.conv2(inner))) + self.shortcut(x)
        return outer


def _conv(kind: str, inputs: int, outputs: int, stride: int) -> nn.Module:
    """A 3×3 convolution, or a cheap pair that strides in its 1×1."""
    if kind == "standard":
        return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    if not is_conv_kind(kind):
        known = (*CONV_KINDS, "group4")
        raise PlanError(f"unknown convolution conv={kind!r}: use {', '.join(known)}{nearest(kind, known)}")
    pair = build_conv(ConvSpec(kind=kind, in_channels=inputs, out_channels=outputs, kernel_size=3, padding=1))
    pair.pointwise = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
    return pair


class CifarResNet(_CifarNet):
    """A ResNet of 6n+2 layers for small images; `conv` None is the common form, else that of arXiv 1909.13063."""

    def __init__(
        self,
        depth: int,
        conv: str | None = None,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, _RESNET_CHANNELS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_RESNET_CHANNELS[0])
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info = [{"num_chs": _RESNET_CHANNELS[0], "reduction": 1, "module": "act1"}]
        inputs = _RESNET_CHANNELS[0]
        for stage, outputs in enumerate(_RESNET_CHANNELS, start=1):
            sizes = [(inputs, outputs, 1 if stage == 1 else 2), *[(outputs, outputs, 1)] * ((depth - 2) // 6 - 1)]
            blocks = [BasicBlock(*size) if conv is None else CheapBlock(*size, conv) for size in sizes]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": outputs, "reduction": 2 ** (stage - 1), "module": f"layer{stage}"})
            inputs = outputs
        self.num_features = inputs
        self.levels = (("conv1", "bn1", "act1"), ("layer1",), ("layer2",), ("layer3",))
        self._finish(num_classes, drop_rate, global_pool)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's groups of parameters, for learning rates that fall with depth."""
        return {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


class CifarVGG(_CifarNet):
    """Thirteen 3×3 convolutions with batch norm, global pooling, one linear layer."""

    def __init__(
        self, *, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0, global_pool: str = "avg"
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.feature_info, levels, inputs = [], [], in_chans
        for stage, widths in enumerate(_VGG_CHANNELS):
            begin = len(layers)
            layers += [nn.MaxPool2d(2)] if stage else []
            for outputs in widths:
                layers += [nn.Conv2d(inputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
                inputs = outputs
            levels.append(tuple(f"features.{index}" for index in range(begin, len(layers))))
            self.feature_info.append({"num_chs": inputs, "reduction": 2**stage, "module": levels[-1][-1]})
        self.features = nn.Sequential(*layers)
        self.levels, self.num_features = tuple(levels), inputs
        self._finish(num_classes, drop_rate, global_pool)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's groups of parameters, for learning rates that fall with depth."""
        return {"stem": r"^features\.0", "blocks": r"^features\.(\d+)"}


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Translates the keys of public weights (github.com/akamaster/pytorch_resnet_cifar10): `linear` is our `fc`."""
    return {key.replace("linear.", "fc.", 1) if key.startswith("linear.") else key: t for key, t in state_dict.items()}


def _cfg(first_conv: str = "conv1", pool: int = 8) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (pool, pool),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": _MEAN,
        "std": _STD,
        "first_conv": first_conv,
        "classifier": "fc",
    }


# our models: the class and the arguments that make it what its name says
FORMS: dict[str, tuple[type[_CifarNet], dict[str, Any]]] = {
    **{f"cifar_resnet{depth}": (CifarResNet, {"depth": depth}) for depth in (20, 32, 44, 56, 110)},
    **{f"cifar_resnet{depth}_cheap": (CifarResNet, {"depth": depth, "conv": "standard"}) for depth in (20, 56)},
    "cifar_vgg16_bn": (CifarVGG, {}),
}
# what the source of a class above needs beside itself, for `definition.py`
PARTS = (_CifarNet, _PadShortcut, BasicBlock, CheapBlock, _conv)
CONSTANTS = {"_RESNET_CHANNELS": _RESNET_CHANNELS, "_VGG_CHANNELS": _VGG_CHANNELS}
default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": _cfg("features.0", 2) if kind is CifarVGG else _cfg() for name, (kind, _) in FORMS.items()}
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    kind, fixed = FORMS[name]
    model: nn.Module = build_model_with_cfg(
        kind,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(5 if kind is CifarVGG else 4)), "feature_cls": "getter"},
        **{**fixed, **kwargs},
    )
    return model


@register_model  # type: ignore[untyped-decorator]
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20 for 32×32 images: 269,722 parameters with ten classes."""
    return _create("cifar_resnet20", pretrained, **kwargs)


@register_model  # type: ignore[untyped-decorator]
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-32 for 32×32 images: 464,154 parameters with ten classes."""
    return _create("cifar_resnet32", pretrained, **kwargs)


@register_model  # type: ignore[untyped-decorator]
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-44 for 32×32 images: 658,586 parameters with ten classes."""
    return _create("cifar_resnet44", pretrained, **kwargs)


@register_model  # type: ignore[untyped-decorator]
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56 for 32×32 images: 853,018 parameters with ten classes."""
    return _create("cifar_resnet56", pretrained, **kwargs)


@register_model  # type: ignore[untyped-decorator]
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-110 for 32×32 images: 1,727,962 parameters with ten classes."""
    return _create("cifar_resnet110", pretrained, **kwargs)


@register_model  # type: ignore[untyped-decorator]
def cifar_resnet20_cheap(pretrained: bool = False, conv: str = "standard", **kwargs: Any) -> nn.Module:
    """ResNet-20 in the form of arXiv 1909.13063; `conv` is standard, depthwise, shift or group4."""
    return _create("cifar_resnet20_cheap", pretrained, conv=conv, **kwargs)


@register_model  # type: ignore[untyped-decorator]
def cifar_resnet56_cheap(pretrained: bool = False, conv: str = "standard", **kwargs: Any) -> nn.Module:
    """ResNet-56 in the form of arXiv 1909.13063; `conv` is standard, depthwise, shift or group4."""
    return _create("cifar_resnet56_cheap", pretrained, conv=conv, **kwargs)


@register_model  # type: ignore[untyped-decorator]
def cifar_vgg16_bn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-16 with batch norm for 32×32 images: global pooling and one linear layer."""
    return _create("cifar_vgg16_bn", pretrained, **kwargs)
