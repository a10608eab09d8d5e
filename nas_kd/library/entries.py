"""The files of a block library: one for each entry, replaced in one step, checked when read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from nas_kd.files.tensors import read_tensors, write_tensors

Tensors = Mapping[str, Tensor]
_LARGEST = 60_000  # float16 ends at 65,504
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One choice of one block: `errors`, (steps trained, normalised squared error) pairs, the first in closed form;
    `kl`, T²·KL of the logits when it alone is swapped in, None where not measured; the seconds that all of it took."""

    block: str = ""
    errors: tuple[tuple[int, float], ...] = ((0, 0.0),)
    kl: float | None = None
    seconds: float = 0.0

    @property
    def nmse(self) -> float:
        """The error as it is now."""
        return self.errors[-1][1]

    @property
    def steps(self) -> int:
        """How many steps it was trained."""
        return self.errors[-1][0]

    def nmse_after(self, steps: int) -> float:
        """The error after at most so many steps."""
        return [error for own, error in self.errors if own <= steps][-1]


@dataclass(frozen=True, slots=True)
class EntryFile:
    """Where an entry is kept: safetensors, with what is known of it and a SHA-256 of the tensors in the header."""

    path: Path

    def write(self, entry: Entry, tensors: Tensors) -> None:
        """Keeps an entry and its tensors, by their names in the network; weights in half precision, to begin a training
        from. Raises OutputError when that cannot be."""
        own = {name: _halved(tensor.detach()) for name, tensor in tensors.items()}
        write_tensors(self.path, own, {"facts": json.dumps(asdict(entry))})

    def read(self) -> tuple[Entry, Tensors] | None:
        """The entry and its tensors, or None when there is none; a damaged one is as good as none, with a warning."""
        if not self.path.exists():
            return None
        try:
            tensors, metadata = read_tensors(self.path)
            facts = json.loads(metadata["facts"])
            facts["errors"] = tuple((int(steps), float(error)) for steps, error in facts["errors"])
            return Entry(**facts), {name: _whole(tensor) for name, tensor in tensors.items()}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            _logger.warning("the library's file %s is damaged (%s): it will be made again", self.path, error)
            return None


def as_kept(tensors: Tensors) -> dict[str, Tensor]:
    """Tensors as they are when they have been kept and read again."""
    return {name: _whole(_halved(tensor.detach())) for name, tensor in tensors.items()}


def _halved(tensor: Tensor) -> Tensor:
    """Weights as float16; vectors, such as variances, stay what they are."""
    fits = tensor.dtype == torch.float32 and tensor.ndim > 1 and tensor.abs().max() < _LARGEST
    return tensor.half() if fits else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor
