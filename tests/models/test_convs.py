from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nas_kd.errors import PlanError
from nas_kd.models.convs import ConvSpec, Shift2d, build_conv, tap_shares
from nas_kd.models.cost_terms import conv_cost
from nas_kd.models.polynomial import Polynomial

GEOMETRIES = [
    {"kernel_size": kernel, "stride": stride, "dilation": dilation, "padding": padding}
    for kernel, stride, dilation in itertools.product((3, 5, 7), (1, 2), (1, 2))
    for padding in ("same", dilation * (kernel // 2), 0)
    if not (padding == 0 and dilation * (kernel - 1) >= 11)
]


class CheapConvContract:
    """What every kind of convolution promises. A subclass gives its kind."""

    kind = ""
    channels = (12, 20)
    channelwise = False

    def spec(self, **changes: int | str | bool) -> ConvSpec:
        inputs, outputs = self.channels
        fields = {"kind": self.kind, "in_channels": inputs, "out_channels": outputs, "kernel_size": 3, "padding": 1}
        return ConvSpec(**{**fields, "channelwise": self.channelwise, **changes})

    @pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
    def test_shape_is_the_standard_convolutions(self, geometry: dict[str, int | str]) -> None:
        spec = self.spec(**geometry)
        image = torch.randn(2, spec.in_channels, 11, 13)
        expected = _standard(spec, image)
        assert build_conv(spec)(image).shape == expected.shape

    @pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
    def test_cost_is_what_torch_counts(self, geometry: dict[str, int | str]) -> None:
        spec = self.spec(**geometry)
        conv, image = build_conv(spec), torch.randn(1, spec.in_channels, 11, 13)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            output = conv(image)
        positions = (11 * 13, output.shape[2] * output.shape[3])
        params, macs = conv_cost(self.kind, spec.kernel_size, positions, channelwise=self.channelwise)
        assert _at(params, spec) == sum(parameter.numel() for parameter in conv.parameters())
        assert _at(macs, spec) == counter.get_total_flops() // 2

    def test_gradient_reaches_everything(self) -> None:
        conv, image = build_conv(self.spec(bias=True)), torch.randn(2, self.channels[0], 8, 8, requires_grad=True)
        conv(image).square().sum().backward()
        for tensor in (image, *conv.parameters()):
            assert tensor.grad is not None
            assert tensor.grad.any()

    def test_channels_last(self) -> None:
        conv, image = build_conv(self.spec()), torch.randn(2, self.channels[0], 8, 8)
        last = conv.to(memory_format=torch.channels_last)(image.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, conv(image))

    def test_every_batch_alike(self) -> None:
        conv, image = build_conv(self.spec(stride=2)).eval(), torch.randn(3, self.channels[0], 9, 9)
        torch.testing.assert_close(conv(image)[1:2], conv(image[1:2]))

    def test_bias_is_optional(self) -> None:
        without, with_bias = (len(list(build_conv(self.spec(bias=bias)).parameters())) for bias in (False, True))
        assert with_bias == without + 1

    def test_state_dict_reloads(self) -> None:
        one, two, image = build_conv(self.spec()), build_conv(self.spec()), torch.randn(1, self.channels[0], 8, 8)
        two.load_state_dict(one.state_dict())
        assert torch.equal(one(image), two(image))


class TestDepthwise(CheapConvContract):
    kind = "depthwise"
    channels = (7, 5)


class TestBlueprint(CheapConvContract):
    kind = "blueprint"
    channels = (7, 5)


class TestGroup2(CheapConvContract):
    kind = "group2"
    channels = (6, 5)


class TestGroup4(CheapConvContract):
    kind = "group4"


class TestShift(CheapConvContract):
    kind = "shift"
    channels = (11, 5)


class TestFewChannelsShift(CheapConvContract):
    kind = "shift"
    channels = (3, 4)


class TestChannelwiseShift(CheapConvContract):
    kind = "shift"
    channels = (11, 11)
    channelwise = True

    def test_gradient_reaches_everything(self) -> None:
        conv, image = build_conv(self.spec(bias=True)), torch.randn(2, 11, 8, 8, requires_grad=True)
        conv(image).square().sum().backward()
        assert image.grad is not None
        assert conv.bias is not None
        assert conv.bias.grad is not None

    def test_channels_stay_in_place(self) -> None:
        """Whatever tap a channel has, it comes out where it came in, displaced by the tap."""
        conv = build_conv(self.spec())
        assert isinstance(conv, Shift2d)
        conv.order.copy_(torch.randperm(11))
        image = torch.randn(1, 11, 6, 6)
        taps = torch.repeat_interleave(torch.arange(9), torch.tensor(conv.shares))
        kernel = torch.zeros(11, 1, 9)
        kernel[conv.order, 0, taps] = 1
        expected = F.conv2d(image, kernel.view(11, 1, 3, 3), padding=1, groups=11)
        torch.testing.assert_close(conv(image), expected)


def _standard(spec: ConvSpec, image: Tensor) -> Tensor:
    weight = torch.zeros(spec.out_channels, spec.in_channels, spec.kernel_size, spec.kernel_size)
    if spec.padding != "same":
        return F.conv2d(image, weight, None, spec.stride, int(spec.padding), spec.dilation)
    outputs = [-(-length // spec.stride) for length in image.shape[2:]]  # TensorFlow's rule: ⌈length / stride⌉
    return image.new_zeros(len(image), spec.out_channels, *outputs)


def _at(cost: Polynomial[str], spec: ConvSpec) -> int:
    of_group = {f"inputs/{groups}": spec.in_channels // groups for groups in (2, 4)}
    return cost.at({"inputs": spec.in_channels, "outputs": spec.out_channels, **of_group})


def test_same_padding_is_tensorflows() -> None:
    """A 3×3 of stride 2 on an even image pads after it, not before: the first output sees the first 3 pixels."""
    spec = ConvSpec(kind="depthwise", in_channels=1, out_channels=1, kernel_size=3, stride=2, padding="same")
    conv = build_conv(spec).get_submodule("spatial")
    assert isinstance(conv, nn.Conv2d)
    nn.init.zeros_(conv.weight)
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] = 1
    image = torch.arange(36.0).view(1, 1, 6, 6)
    assert torch.equal(conv(image), image[:, :, ::2, ::2])


@pytest.mark.parametrize("channels", [1, 3, 9, 11, 64, 100])
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
def test_taps_share_the_channels(channels: int, kernel_size: int) -> None:
    shares = tap_shares(channels, kernel_size)
    assert sum(shares) == channels
    assert len(shares) == kernel_size**2
    assert max(shares) - min(shares) <= 1
    assert shares[kernel_size**2 // 2] == max(shares)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "magic"}, "not a convolution"),
        ({"in_channels": 0}, "not a convolution"),
        ({"stride": 1.5}, "not a convolution"),
        ({"kind": "group4", "in_channels": 6}, "6 channels cannot be cut into 4 groups"),
        ({"kind": "depthwise", "channelwise": True}, "replaced by shift alone, not by depthwise"),
    ],
)
def test_impossible_convolutions(changes: dict[str, object], message: str) -> None:
    fields = {"kind": "shift", "in_channels": 8, "out_channels": 8, "kernel_size": 3}
    with pytest.raises(PlanError, match=message):
        ConvSpec(**{**fields, **changes})
