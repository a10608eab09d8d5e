"""What a library is made from, and the file in which other processes get it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas_kd.data.images import Images
from nas_kd.errors import DataError, TrainingError
from nas_kd.files.tensors import read_tensors, write_tensors
from nas_kd.library.spec import LibrarySpec
from nas_kd.training.checkpoint import load_exactly
from nas_kd.training.evaluation import predict_logits

_PIXELS = "pixels of the images"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LibraryInputs:
    """The trained `base` of a library, the `images` that it learns from, without labels, and how much it learns."""

    base: nn.Module
    images: Images
    spec: LibrarySpec

    @property
    def facts(self) -> dict[str, Any]:
        """What `read` needs beside the file (JSON values)."""
        return {"spec": dataclasses.asdict(self.spec), "mean": self.images.mean, "std": self.images.std}

    def write(self, path: Path) -> None:
        """Keeps the weights of the base and the images. Raises OutputError when that cannot be."""
        write_tensors(path, {**self.base.state_dict(), _PIXELS: self.images.pixels})

    @staticmethod
    def read(path: Path, base: nn.Module, facts: Mapping[str, Any]) -> LibraryInputs:
        """What was written: `base` gets its weights. Raises OSError or SafetensorError for a file that cannot be read,
        CheckpointError for one that was altered or does not fit."""
        tensors, _ = read_tensors(path)
        pixels = tensors.pop(_PIXELS)
        load_exactly(base, tensors, path)
        labels = torch.zeros(len(pixels), dtype=torch.int64)
        spec = LibrarySpec(**{**facts["spec"], "rounds": tuple(facts["spec"]["rounds"])})
        return LibraryInputs(
            base=base, images=Images(pixels, labels, tuple(facts["mean"]), tuple(facts["std"])), spec=spec
        )


def check_base(base: nn.Module, images: Images) -> None:
    """A look at two images: later the same mistakes would be errors of the linear algebra."""
    try:
        logits = predict_logits(base, images[:2])
    except RuntimeError as error:
        form = "×".join(map(str, images.pixels.shape[1:]))
        raise DataError(f"images of {form} do not fit the base: {str(error).splitlines()[0]}") from error
    if not logits.isfinite().all():
        raise TrainingError(
            "the logits of the base are not finite: its weights are damaged, or it was trained too fast"
        )
