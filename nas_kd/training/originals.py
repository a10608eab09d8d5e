"""Training images as they were before they were cropped to the network's size, so that augmentation has more pixels to
crop from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from torch import Tensor

from nas_kd.training.arrays import Array


@dataclass(frozen=True, slots=True, eq=False)
class Originals:
    """N images of different sizes, whole and upright, in the order of the training images.

    `pixels` has those of all in one row (uint8, each image H×W×C), usually memory-mapped; `sizes` N×2 int64 (H, W).
    """

    pixels: Array
    sizes: Array
    starts: Array
    channels: int

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, indices: Tensor | slice) -> Originals:
        chosen = indices if isinstance(indices, slice) else indices.cpu().numpy()
        return replace(self, sizes=self.sizes[chosen], starts=self.starts[chosen])

    def image(self, index: int) -> Image.Image:
        """Training image `index` of mode L or RGB, as timm's transforms take it."""
        height, width = (int(side) for side in self.sizes[index])
        start = int(self.starts[index])
        values = np.array(self.pixels[start : start + height * width * self.channels])  # a copy of its own
        shape = (height, width) if self.channels == 1 else (height, width, self.channels)
        return Image.fromarray(values.reshape(shape))
