"""What each step of building a library takes, predicted, so that what is left of it can be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nas_kd.analysis.structure import Block
from nas_kd.costs.forward_time import STEP
from nas_kd.library.damages import Damages
from nas_kd.library.library import made_choices
from nas_kd.library.recorder import Recorder

ENTRY = 0.06  # seconds to build a student of a mobile network and to keep its tensors
PASSES = 5  # of a frame for an entry: up to the layers that are fitted, batch norms recalibrated, errors measured
UNBEATEN = 0.4  # of a block's entries
_PREPARED = 512  # images that pass the base while its frames are found and its batch norms looked at
_RATE = 20e9  # multiply-accumulates a second of linear algebra
_ROWS = 6  # samples per unknown of a fit


class Step(str):
    """What was done, in words; `share` is its part (0 to 1) of all the work that was predicted."""

    share: float

    def __new__(cls, words: str, share: float) -> Step:
        """Words with a share."""
        step = super().__new__(cls, words)
        step.share = share
        return step


class LibraryEffort:
    """Predicted seconds of every step of a library, by stage (`prepare`, `rank`, `inherit`, `train`, `measure`) and
    block. `widest` has by block the unknowns of its largest fit, `trained` how many images an entry is trained on, of
    the blocks where that is done."""

    def __init__(
        self,
        blocks: Sequence[Block],
        recorder: Recorder,
        damages: Damages,
        widest: Mapping[str, int],
        trained: Mapping[str, int],
    ) -> None:
        passes = _PREPARED * sum(recorder.seconds[name] for name in recorder.frames) / 2
        self.seconds = {("prepare", ""): 2 * ENTRY * len(blocks) + passes}
        for block in blocks:
            name, entries = block.name, len(made_choices(block))
            once = recorder.seconds[name] * recorder.fitted(name)
            fit = _ROWS * widest[name] ** 3 / _RATE
            self.seconds["rank", name] = 2 * once + fit
            self.seconds["inherit", name] = once + entries * (ENTRY + PASSES * once + 0.3 * fit)
            self.seconds["train", name] = UNBEATEN * entries * STEP * recorder.seconds[name] * trained.get(name, 0)
            self.seconds["measure", name] = UNBEATEN * entries * (ENTRY + damages.seconds(name))

    @property
    def total(self) -> float:
        """The predicted seconds of it all."""
        return sum(self.seconds.values())

    def step(self, stage: str, name: str, words: str) -> Step:
        """A step that has been done."""
        return Step(f"{name}: {words}" if name else words, self.seconds[stage, name] / max(1e-9, self.total))
