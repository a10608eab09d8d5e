"""A student as the backbone of a segmentation network: python backbone.py FOLDER [--steps 20]

Any detector or decoder that takes timm's `features_only` models takes a student; this one is a small FPN.
"""

import argparse

import timm
import torch
from torch import Tensor, nn

import nas_kd.models  # timm knows exported models from here on


class Segmenter(nn.Module):
    """Every level of the backbone to one width, added from coarse to fine, a class for each pixel."""

    def __init__(self, backbone: nn.Module, classes: int, width: int = 32) -> None:
        super().__init__()
        self.backbone = backbone
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in backbone.feature_info.channels())
        self.head = nn.Conv2d(width, classes, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        levels = [lateral(level) for lateral, level in zip(self.lateral, self.backbone(images), strict=True)]
        merged = levels[-1]
        for level in reversed(levels[:-1]):
            merged = level + nn.functional.interpolate(merged, size=level.shape[-2:])
        return nn.functional.interpolate(self.head(merged), size=images.shape[-2:], mode="bilinear")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    backbone = timm.create_model(f"local-dir:{arguments.folder}", pretrained=True, features_only=True)
    _, side, _ = backbone.pretrained_cfg["input_size"]
    network = Segmenter(backbone, classes=2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for step in range(arguments.steps):
        images = torch.rand(4, 3, side, side)
        masks = (images.mean(1) > 0.5).long()  # stands for your masks
        loss = nn.functional.cross_entropy(network(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
