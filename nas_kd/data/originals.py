"""Training images as they were before they were cropped to the network's size, so that augmentation has more pixels to
crop from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from nas_kd.files.arrays import Array, ArrayFile, GrowingFile

_LONGEST = 2  # of the longer side over the shorter one: of a panorama the middle is kept
_USUAL = 4 / 3  # the same of a photo, by which the memory is estimated
_LEAST = 1.15  # times the network's size, below which an original has little to offer


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

    @property
    def bytes(self) -> int:
        """The size of the pixels."""
        return int(self.pixels.size)

    def image(self, index: int) -> Image.Image:
        """Training image `index` of mode L or RGB, as timm's transforms take it."""
        height, width = (int(side) for side in self.sizes[index])
        start = int(self.starts[index])
        values = np.array(self.pixels[start : start + height * width * self.channels])  # a copy of its own
        shape = (height, width) if self.channels == 1 else (height, width, self.channels)
        return Image.fromarray(values.reshape(shape))


def original_side(img_size: int, ratio: float, images: tuple[int, int], most_bytes: int) -> int | None:
    """The shorter side of stored originals: `ratio` times the network's size, or less where N images of C channels
    (`images`) would take more than `most_bytes`; None where that leaves too little to crop from."""
    count, channels = images
    affordable = (most_bytes / (count * channels * _USUAL)) ** 0.5
    side = int(min(round(ratio * img_size), affordable))
    return side if side >= _LEAST * img_size else None


def originals_bytes(count: int, channels: int, side: int) -> int:
    """What so many originals take, about."""
    return round(count * channels * side**2 * _USUAL)


def shrunk(image: Image.Image, side: int) -> Array:
    """A whole image H×W×C (uint8) with the shorter side `side`, or as large as it is; of a long one the middle."""
    width, height = image.size
    longest = _LONGEST * min(width, height)
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    image = image.crop((left, top, width - left, height - top)) if left or top else image
    scale = side / min(image.size)
    if scale < 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(image.height, image.width, -1)


class OriginalsWriter:
    """Writes originals one after the other beside the decoded images."""

    def __init__(self, draft: Path, count: int) -> None:
        self._draft, self._sizes = draft, np.zeros((count, 2), dtype=np.int64)
        self._written = 0
        self.file = GrowingFile(draft / "originals_pixels.npy", (0,), "|u1")

    def write(self, image: Array) -> None:
        """Appends one image H×W×C."""
        self._sizes[self._written] = image.shape[:2]
        self._written += 1
        self.file.write(image.reshape(-1))

    def finish(self) -> dict[str, ArrayFile]:
        """The files for the sidecar; `file` is closed by then."""
        with ArrayFile(self._draft / "originals_sizes.npy", self._sizes.shape, "<i8") as sizes:
            sizes.write(self._sizes)
        return {"originals_pixels": self.file, "originals_sizes": sizes}


def open_originals(arrays: dict[str, Any], channels: int) -> Originals | None:
    """The originals among the arrays of a cache folder; None where there are none."""
    if "originals_pixels" not in arrays:
        return None
    sizes = np.asarray(arrays["originals_sizes"])
    ends = np.cumsum(sizes.prod(axis=1) * channels)
    return Originals(arrays["originals_pixels"], sizes, np.concatenate([[0], ends[:-1]]), channels)
