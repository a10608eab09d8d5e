"""The state of a killed training, kept in one file that is replaced in one step."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from nas_kd.files.atomic import replace_file
from nas_kd.files.digests import digest_of
from nas_kd.training.recipe import Recipe

_VERSION = 1
APART = 20.0  # then writing takes a twentieth of the time at most
_logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """A network, an optimiser, or anything else with torch's state dict."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Takes the state back."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is: finished epochs, (epoch, accuracy) pairs, the mean loss of each epoch."""

    epoch: int = 0
    accuracies: tuple[tuple[int, float], ...] = ()
    losses: tuple[float, ...] = ()

    def after_epoch(self, loss: float) -> Progress:
        """One epoch further, which had this mean loss."""
        return replace(self, epoch=self.epoch + 1, losses=(*self.losses, loss))

    def with_accuracy(self, accuracy: float) -> Progress:
        """With the accuracy after the current epoch."""
        return replace(self, accuracies=(*self.accuracies, (self.epoch, accuracy)))


class Keeper:
    """Keeps the state of a training, its `parts`, in a file; of None it keeps nothing. A `sparing` one passes states
    over: after the first it keeps one when `APART` times as long has passed as the last took to be written, and the
    last. An epoch of a small network on a GPU is over before its state is written (docs/results/gpu.md)."""

    def __init__(
        self, path: Path | None, parts: Mapping[str, Stateful], recipe: Recipe, images: int, *, sparing: bool = False
    ) -> None:
        self.path, self.parts, self.recipe, self.sparing = path, parts, recipe, sparing
        self.fingerprint = "" if path is None else _fingerprint(parts, recipe, images)
        self.next = 0.0

    def keep(self, progress: Progress) -> None:
        """Writes the state in one step, or passes it over. Raises OutputError when it cannot."""
        started = time.monotonic()
        if self.path is None:
            return
        if self.sparing and started < self.next and progress.epoch < self.recipe.epochs:
            return
        state = {
            "version": _VERSION,
            "fingerprint": self.fingerprint,
            "progress": {
                "epoch": progress.epoch,
                "accuracies": [list(pair) for pair in progress.accuracies],
                "losses": list(progress.losses),
            },
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        replace_file(self.path, lambda draft: torch.save(state, draft))
        ended = time.monotonic()
        self.next = ended + APART * (ended - started)

    def restore(self) -> Progress:
        """Puts the state of the file into the parts; where there is none that fits, warns and starts at epoch 0."""
        path = self.path
        if path is None or not path.exists():
            return Progress()
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["version"] != _VERSION or state["fingerprint"] != self.fingerprint:
                raise ValueError("it belongs to another recipe or other data")
            if state["parts"].keys() != self.parts.keys():
                raise ValueError("it holds other parts")
            progress = Progress(
                state["progress"]["epoch"],
                tuple((epoch, accuracy) for epoch, accuracy in state["progress"]["accuracies"]),
                tuple(state["progress"]["losses"]),
            )
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            _logger.warning("cannot resume from %s (%s): training from the start", path, str(error).splitlines()[0])
            return Progress()
        _logger.info("resumed %s after epoch %d of %d", path.name, progress.epoch, self.recipe.epochs)
        return progress


def _fingerprint(parts: Mapping[str, Stateful], recipe: Recipe, images: int) -> str:
    # shapes too: a state that does not fit must be refused before half of it is loaded
    shapes = [(name, tuple(tensor.shape)) for name, tensor in parts["network"].state_dict().items()]
    return digest_of(f"{recipe!r} {images} {shapes}", 64)
