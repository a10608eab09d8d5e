"""Training images as they came, before they are cropped to the network's size: what photos are augmented from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from torch import Tensor

from nas_kd.errors import DataError
from nas_kd.training.arrays import Array

DETAIL = 2  # times the network's side is what the short side of an original keeps: crops of a quarter stay sharp


@dataclass(frozen=True, slots=True, eq=False)
class Originals:
    """N images of their own sizes: `values` holds the pixels of all of them one after another (uint8, H×W×C each; may
    be memory-mapped), `sizes` N×2 int64 their heights and widths, `starts` N int64 where each begins.

    Raises DataError when they do not fit together.
    """

    values: Array
    sizes: Array
    starts: Array
    channels: int

    def __post_init__(self) -> None:
        ends = self.starts + self.sizes.prod(axis=1) * self.channels if len(self.sizes) else np.zeros(1)
        if self.sizes.shape != (len(self.starts), 2) or ends.max() > len(self.values) or self.values.dtype != np.uint8:
            raise DataError(f"{len(self.starts)} originals of sizes {self.sizes.shape} in {self.values.shape} values")

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, indices: Tensor | slice) -> Originals:
        chosen = indices if isinstance(indices, slice) else indices.cpu().numpy()
        return replace(self, sizes=self.sizes[chosen], starts=self.starts[chosen])

    def picture(self, index: int) -> Image.Image:
        """One image, of mode L or RGB."""
        height, width = (int(length) for length in self.sizes[index])
        start = int(self.starts[index])
        pixels = self.values[start : start + height * width * self.channels]
        return to_picture(pixels.reshape(height, width, self.channels))


def from_arrays(values: Array, sizes: Array, channels: int) -> Originals:
    """Originals that lie one after another in the order of `sizes`."""
    lengths = sizes.prod(axis=1) * channels
    return Originals(values, sizes, np.cumsum(lengths) - lengths, channels)


def to_picture(pixels: Array) -> Image.Image:
    """H×W×C uint8, with 1 or 3 channels, as a picture of mode L or RGB."""
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))


def tensor_to_picture(pixels: Tensor) -> Image.Image:
    """C×H×W uint8, with 1 or 3 channels, as a picture of mode L or RGB."""
    return to_picture(pixels.permute(1, 2, 0).numpy())


def keep_detail(image: Image.Image, side: int) -> Image.Image:
    """The whole image, shrunk until its short side has `side` pixels; a smaller one as it is.

    >>> keep_detail(Image.new("L", (400, 200)), 100).size
    (200, 100)
    """
    short = min(image.size)
    if short <= side:
        return image
    size = tuple(max(1, round(length * side / short)) for length in image.size)
    return image.resize((size[0], size[1]), Image.Resampling.BICUBIC, reducing_gap=3.0)


def stack(pictures: list[Image.Image]) -> Originals:
    """Pictures of mode L or RGB, all of one mode, as originals in memory."""
    arrays = [np.atleast_3d(np.asarray(picture)) for picture in pictures]
    sizes = np.array([array.shape[:2] for array in arrays], dtype=np.int64)
    return from_arrays(np.concatenate([array.ravel() for array in arrays]), sizes, arrays[0].shape[2])
