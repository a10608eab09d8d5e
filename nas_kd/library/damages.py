"""What an entry of a library does to the logits: the network's tail behind its block is run on what it writes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nas_kd.analysis.structure import Analysis
from nas_kd.costs.forward_time import forward_seconds, module_seconds
from nas_kd.library.frame_training import run_in_parts
from nas_kd.library.recorder import Recorder
from nas_kd.students.frames import Frame, Recording, disjoint, replaying
from nas_kd.training.losses import distillation_loss
from nas_kd.training.small_maps import reached_taps

_TEMPERATURE = 4.0  # of the KL, as in the distillation that follows
_SECONDS = 0.4  # of one pass through the base, by prediction: so many images does a damage see
_LEAST_IMAGES = 64


class Damages:
    """Measures T²·KL of a base's logits on held out images with one frame's module changed.

    What runs before the frame is not run again: zeros stand for it where two images show that nothing behind reads it.
    `images` is how many are looked at."""

    def __init__(self, base: nn.Module, analysis: Analysis, recorder: Recorder) -> None:
        self.base, self.recorder = base, recorder
        quick = int(_SECONDS / max(1e-9, forward_seconds(base, analysis)))
        self.images = min(recorder.holdout, max(_LEAST_IMAGES, quick))
        self._calls = [call.module for call in analysis.trace.calls]
        self._seconds = module_seconds(base, analysis)
        self._pixels = recorder.pixels(recorder.held_out(self.images))
        self._part = min(recorder.part(name) for name in recorder.frames)
        self._logits = self._run({}, slice(None))
        self._blanks: dict[str, list[Frame]] = {}
        self._names = {frame: name for name, frame in recorder.frames.items()}

    @torch.no_grad()
    def kl(self, name: str, module: nn.Module, held: Recording) -> float:
        """The damage of a module in place of the frame of block `name`; `held` is what passes there for the held out
        images."""
        held = held[: self.images]
        outputs = run_in_parts(module.eval(), held, self.recorder.part(name))
        frame = self.recorder.frames[name]
        if frame.is_whole:
            logits = outputs[0]
        else:
            if name not in self._blanks:
                self._blanks[name] = self._skipped(frame, held[:2])
            logits = self._run({frame: outputs}, slice(None), self._blanks[name])
        return float(distillation_loss(logits.float(), self._logits.float(), temperature=_TEMPERATURE))

    def seconds(self, name: str) -> float:
        """What one damage of a block takes, by prediction."""
        frame = self.recorder.frames[name]
        begin = min((self._calls.index(path) for path in frame.paths(self.base) if path in self._calls), default=0)
        return self.images * sum(self._seconds[path] for path in dict.fromkeys(self._calls[begin:]))

    def _skipped(self, frame: Frame, held: Recording) -> list[Frame]:
        """The frames before this one that need not run when its outputs are given."""
        earlier = self._earlier(frame)
        with_blanks = self._run({frame: held.outputs}, slice(0, 2), earlier)
        return earlier if torch.allclose(with_blanks, self._logits[:2], rtol=1e-4, atol=1e-4) else []

    def _earlier(self, frame: Frame) -> list[Frame]:
        """The frames that end before this one begins and share nothing with each other."""
        order = {path: index for index, path in enumerate(self._calls)}
        begin = min((order[path] for path in frame.paths(self.base) if path in order), default=0)
        ends = {
            other: max((order[path] for path in other.paths(self.base) if path in order), default=len(order))
            for other in self._names
        }
        return disjoint(other for other in sorted(ends, key=ends.__getitem__) if ends[other] < begin)

    @torch.no_grad()
    def _run(self, given: dict[Frame, tuple[Tensor, ...]], part: slice, blanks: list[Frame] | None = None) -> Tensor:
        """The base's logits for held out images when some frames write what is given, and some zeros."""
        pixels, logits = self._pixels[part], []
        zero = pixels.new_zeros(())
        shapes = {frame: self.recorder.shapes[self._names[frame]] for frame in blanks or ()}
        with reached_taps(self.base):
            for at in torch.split(torch.arange(len(pixels)), self._part):
                now = {frame: tuple(zero.expand(len(at), *shape) for shape in own) for frame, own in shapes.items()}
                now |= {frame: tuple(tensor[at] for tensor in tensors) for frame, tensors in given.items()}
                with replaying(self.base, now):
                    logits.append(self.base(pixels[at]))
        return torch.cat(logits)
