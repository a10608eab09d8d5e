"""Images that are too many for arrays: each is read and decoded when it is looked at, ahead of time by processes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from nas_kd.data.decoding import Chosen, ImageForm, transform_for
from nas_kd.data.images import Images
from nas_kd.data.originals import shrunk
from nas_kd.data.prefetching import work_ahead
from nas_kd.errors import DataError
from nas_kd.files.arrays import Array

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True, slots=True, eq=False)
class StreamedImages:
    """The images of one split in the form that a network wants, N of them, none of which is kept.

    To the bit what `decoding.decode` writes of the same split. `labels` N int64, `mean` and `std` one value per channel
    on the scale 0–1, `source` where they are, in words. Looking at one raises DataError when its file vanished or broke
    since all of them were looked through.
    """

    chosen: Chosen
    form: ImageForm
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor | slice) -> StreamedImages:
        some: Array = self.chosen.indices[indices if isinstance(indices, slice) else indices.cpu().numpy()]
        return replace(self, chosen=replace(self.chosen, indices=some), labels=self.labels[indices])

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of an image."""
        return self.form.row

    @property
    def bytes(self) -> int:
        """What the pixels would take if they were kept."""
        return len(self) * self.form.bytes

    def to(self, device: torch.device) -> StreamedImages:
        """The same images: they come from the CPU."""
        return self

    def picture(self, index: int) -> Image.Image:
        """One image as a picture of mode L or RGB: before it was cropped and resized, where photos are augmented."""
        if self.form.original_side is None:
            pixels = self._decode(index).permute(1, 2, 0).numpy()
        else:
            pixels = shrunk(self._open(index), self.form.original_side)
        return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)

    def take(self, indices: Tensor) -> Tensor:
        """The pixels of the images `indices` (B int64), B×C×H×W uint8."""
        return torch.stack([self._decode(index) for index in indices.tolist()])

    def ahead(self, work: Callable[[In], Out], items: Sequence[In]) -> Iterator[Out]:
        """What `work`, which looks at images, makes of each item, made ahead of time by `form.workers` processes."""
        return work_ahead(work, items, processes=self.form.workers, source=self.source)

    def chunks(self, size: int) -> Iterator[Tensor]:
        """The pixels of all images in order, so many at a time."""
        return self.ahead(self.take, torch.split(torch.arange(len(self)), size))

    def decoded(self) -> Images:
        """The same images in memory, without originals: for a few."""
        return Images(torch.cat(list(self.chunks(64))), self.labels, self.mean, self.std)

    def _decode(self, index: int) -> Tensor:
        pixels: Tensor = _transform(self.form)(self._open(index))
        return pixels

    def _open(self, index: int) -> Image.Image:
        try:
            return self.form.open(self.chosen.part, int(self.chosen.indices[index]))
        except DataError as error:
            raise DataError(
                f"{error}; it could be read when the data was looked through: put it back, and the same command goes on"
            ) from error


@functools.lru_cache(maxsize=8)  # in each process
def _transform(form: ImageForm) -> Callable[[Image.Image], Tensor]:
    return transform_for(form)
