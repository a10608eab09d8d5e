"""Training data in portions, so that a training can be looked at after any number of images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nas_kd.data.augment import derive_seed
from nas_kd.data.images import Batch, Images
from nas_kd.errors import DataError
from nas_kd.training.views import OnlineViews, Views


@dataclass(frozen=True, slots=True, eq=False)
class Portions:
    """The same images as `views`, but an epoch of the training loop is the next `count` of them.

    The images are walked through in an order that `seed` decides and that is drawn anew for each pass over all of them;
    a pass sees the next view. So trainings walk through the same images, those on portions of one size in the same
    batches. Raises DataError for a count below 2.
    """

    views: Views | OnlineViews
    count: int
    seed: int = 0
    _orders: dict[int, Tensor] = field(default_factory=dict, repr=False)  # of the current pass

    def __post_init__(self) -> None:
        if self.count < 2:
            raise DataError(f"a portion needs at least 2 images, got {self.count}")

    def __len__(self) -> int:
        return self.count

    def steps(self, batch_size: int) -> int:
        """Of one portion."""
        return math.ceil(self.count / batch_size)

    @property
    def mean(self) -> tuple[float, ...]:
        return self.views.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.views.std

    @property
    def bytes(self) -> int:
        return self.views.bytes

    def to(self, device: torch.device) -> Portions:
        """The same portions on `device`."""
        return replace(self, views=self.views.to(device))

    def batch(self, epoch: int, indices: Tensor) -> Batch:
        """The images `indices` (B int64, 0 to `count` − 1) of portion `epoch`; those of an earlier pass first."""
        positions = epoch * self.count + indices.cpu()
        passes = positions // len(self.views)
        return _join([self._of_pass(number, positions[passes == number]) for number in sorted(set(passes.tolist()))])

    def batches(self, epoch: int, order: Sequence[Tensor]) -> Iterator[Batch]:
        """The `batch` of each of these indices; of images that stream ahead of time, within a pass."""
        first = epoch * self.count
        number = first // len(self.views)
        if (first + self.count - 1) // len(self.views) != number:
            return (self.batch(epoch, indices) for indices in order)
        return self.views.batches(number, [self._places(number, first + indices.cpu()) for indices in order])

    def sample(self, count: int) -> Images:
        """The first `count` images of the first pass, e.g. to recalibrate batch norms; where images are mixed, those of
        the views, unmixed."""
        batch = self._of_pass(0, torch.arange(min(count, len(self.views))))
        if batch.labels.ndim > 1:
            return self.views.sample(count)
        return Images(batch.pixels, batch.labels, self.mean, self.std)

    def _of_pass(self, number: int, positions: Tensor) -> Batch:
        return self.views.batch(number, self._places(number, positions))

    def _places(self, number: int, positions: Tensor) -> Tensor:
        """Which images stand at these positions of a pass."""
        if number not in self._orders:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "portions", number))
            self._orders.clear()
            self._orders[number] = torch.randperm(len(self.views), generator=generator)
        return self._orders[number][positions % len(self.views)]


def _join(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    logits = [batch.logits for batch in batches if batch.logits is not None]
    return Batch(
        torch.cat([batch.pixels for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        torch.cat(logits) if logits else None,
    )
