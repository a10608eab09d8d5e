from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nas_kd.costs.cost_terms import conv_cost
from nas_kd.costs.polynomial import Polynomial
from nas_kd.errors import PlanError
from nas_kd.networks.convolutions import ConvSpec, Shift2d, build_conv, tap_shares

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
        assert _at(macs, spec) == (counter.get_total_flops() - self.uncounted(spec, output)) // 2

    def uncounted(self, spec: ConvSpec, output: Tensor) -> int:
        """The flops that torch counts and we do not."""
        return 0

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

    def uncounted(self, spec: ConvSpec, output: Tensor) -> int:
        """The one-hot kernels multiply by one and zero alone."""
        return 2 * spec.kernel_size**2 * spec.in_channels * output.shape[2] * output.shape[3]

    @pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
    def test_channels_are_displaced_by_their_taps(self, geometry: dict[str, int | str]) -> None:
        """Against pixels that are read one tap at a time, from an image that is padded as TensorFlow or torch pads."""
        spec = self.spec(**geometry, channelwise=True, in_channels=20, out_channels=20)
        conv, image = build_conv(spec), torch.randn(2, 20, 11, 12)
        assert isinstance(conv, Shift2d)
        conv.taps.copy_(conv.taps[torch.randperm(20)])
        assert torch.equal(conv(image), _displaced(image, conv.taps, spec))

    @pytest.mark.parametrize("padding", ["same", 1])
    @pytest.mark.parametrize("stride", [1, 2])
    def test_every_way_to_write_a_network_down_understands_it(self, padding: int | str, stride: int) -> None:
        conv = build_conv(self.spec(padding=padding, stride=stride, bias=True)).eval()
        image, other = torch.randn(2, 2, self.channels[0], 9, 10)
        written = [torch.fx.symbolic_trace(conv), torch.export.export(conv, (image,)).module()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch would have us use torch.export
            written.append(torch.jit.script(conv))
        for again in written:
            torch.testing.assert_close(again(other), conv(other))

    def test_state_dicts_of_earlier_versions_load(self) -> None:
        """Those put the channels in the order of their taps, and so the 1×1 weights that read them."""
        channels = self.channels[0]
        spec = self.spec()
        shares = tap_shares(channels, 3)
        taps = torch.tensor([tap for tap, share in enumerate(shares) for _ in range(share)])
        order, weight, image = torch.randperm(channels), torch.randn(5, channels, 1, 1), torch.randn(1, channels, 6, 6)
        if self.channelwise:
            conv, state = build_conv(spec), {"order": order}
        else:
            conv = build_conv(self.spec(out_channels=5))
            state = {"spatial.order": order, "pointwise.weight": weight}
        conv.load_state_dict(state)
        moved = _displaced(image[:, order], taps, spec)
        expected = moved[:, order.argsort()] if self.channelwise else F.conv2d(moved, weight)
        torch.testing.assert_close(conv(image), expected)
        assert state.keys() & {"order", "spatial.order"}  # the caller's own is as it was


class TestFewChannelsShift(TestShift):
    channels = (3, 4)


class TestChannelwiseShift(TestShift):
    channels = (11, 11)
    channelwise = True

    def test_gradient_reaches_everything(self) -> None:
        conv, image = build_conv(self.spec(bias=True)), torch.randn(2, 11, 8, 8, requires_grad=True)
        conv(image).square().sum().backward()
        assert image.grad is not None
        assert conv.bias is not None
        assert conv.bias.grad is not None


def _displaced(image: Tensor, taps: Tensor, spec: ConvSpec) -> Tensor:
    """Each channel as its tap sees it, pixel by pixel."""
    outputs, reach = _standard(spec, image).shape[2:], spec.dilation * (spec.kernel_size - 1)
    before = [int(spec.padding)] * 2 if spec.padding != "same" else []
    if not before:
        spans = [(output - 1) * spec.stride + reach + 1 for output in outputs]
        before = [max(span - length, 0) // 2 for span, length in zip(spans, image.shape[2:], strict=True)]
    padded = F.pad(image, [before[1], 4 * reach, before[0], 4 * reach])
    channels = []
    for channel, tap in enumerate(taps.tolist()):
        steps = [spec.dilation * step for step in divmod(tap, spec.kernel_size)]
        rows, columns = (
            slice(step, step + spec.stride * (output - 1) + 1, spec.stride)
            for step, output in zip(steps, outputs, strict=True)
        )
        channels.append(padded[:, channel, rows, columns])
    return torch.stack(channels, dim=1)


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
