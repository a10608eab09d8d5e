"""What passes through the frames of a base for some images, in pieces that fit the memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor, nn

from nas_kd.analysis.structure import Analysis
from nas_kd.costs.forward_time import module_seconds
from nas_kd.data.images import Images, normalise
from nas_kd.library.frame_training import MOST_IMAGES, PART, images_for
from nas_kd.students.frames import Frame, Recording, find_frames, join_batches, recording, with_skips
from nas_kd.training.evaluation import device_of, memory_layout, suits_channels_last
from nas_kd.training.small_maps import reached_taps

_PART_BYTES = 32 << 20  # of the largest activation, of images that run at once
_FIT_BYTES = 96 << 20  # of the largest activation, of images that a fit sees at once
_FIT_SECONDS = 0.04  # of one pass through a frame, by prediction: so many images does a fit see
_LEAST_IMAGES = 32  # and not fewer, where memory allows it
_LEAST_PART = 4


class _Enough(Exception):
    """Ends a forward pass when every frame that was waited for has run."""


class Recorder:
    """The frames of a base, what each costs an image, and what passes through them for the images of a library.

    By block: `frames`; `bytes`, what a recording of one image takes; `widest`, the largest activation of one image
    inside (bytes); `seconds`, a predicted pass of one image; `shapes`, what the frame writes without the number of
    images."""

    def __init__(self, base: nn.Module, analysis: Analysis, images: Images, holdout: int) -> None:
        self.base, self.images, self.holdout = base, images, holdout
        self.device, self.channels_last = device_of(base), suits_channels_last(base)
        two = self.pixels(slice(0, 2))
        self.frames = with_skips(base, analysis, find_frames(base, analysis, two), two)
        written = _written_bytes(base, two)
        recordings = self._run(list(self.frames), images[:2], len(two))
        seconds = module_seconds(base, analysis)
        paths = {name: frame.paths(base) for name, frame in self.frames.items()}
        self.bytes = {name: recorded.bytes // 2 for name, recorded in recordings.items()}
        self.shapes = {name: tuple(t.shape[1:] for t in recorded.outputs) for name, recorded in recordings.items()}
        self.widest = {name: max((written.get(path, 0) for path in own), default=1) for name, own in paths.items()}
        self.seconds = {name: sum(seconds.get(path, 0.0) for path in own) for name, own in paths.items()}
        self._fitted = {name: self._images_of_a_fit(name, recorded) for name, recorded in recordings.items()}

    def _images_of_a_fit(self, name: str, recorded: Recording) -> int:
        quick = max(_LEAST_IMAGES, int(_FIT_SECONDS / max(self.seconds[name], 1e-9)))
        return max(_LEAST_PART, min(images_for(recorded), quick, _FIT_BYTES // max(1, self.widest[name]), MOST_IMAGES))

    def fitted(self, name: str) -> int:
        """How many images a block's layers are fitted and compared on."""
        return self._fitted[name]

    def part(self, name: str) -> int:
        """How many images go through a block's frame at once where that does not matter."""
        return max(_LEAST_PART, min(PART, _PART_BYTES // max(1, self.widest[name])))

    def pixels(self, part: slice | Tensor) -> Tensor:
        """Some of the images as the base reads them."""
        return self._normalised(self.images[part])

    def _normalised(self, images: Images) -> Tensor:
        pixels = normalise(images.pixels, images.mean, images.std, self.device)
        return memory_layout(pixels, self.channels_last)

    def held_out(self, count: int) -> slice:
        """The first `count` of the held out images."""
        first = len(self.images) - self.holdout
        return slice(first, first + min(count, self.holdout))

    def groups(self, counts: Mapping[str, int], max_bytes: int) -> Iterator[list[str]]:
        """The blocks of `counts`, in their order, whose recordings of so many images each fit `max_bytes` together."""
        group: list[str] = []
        for name in counts:
            if group and sum(self.bytes[other] * counts[other] for other in (*group, name)) > max_bytes:
                yield group
                group = []
            group.append(name)
        if group:
            yield group

    def record(self, names: Sequence[str], part: slice) -> dict[str, Recording]:
        """What passes through the frames of these blocks for some of the images, the same to the bit beside whichever
        others: the base sees whole batches, whatever of the last one is asked for."""
        at_once = max(_LEAST_PART, min(256, _PART_BYTES // max(1, *self.widest.values())))
        count = part.stop - part.start
        seen = self._run(names, self.images[part.start : part.start + -(-count // at_once) * at_once], at_once)
        return {name: recorded[:count] for name, recorded in seen.items()}

    @torch.no_grad()
    def _run(self, names: Sequence[str], images: Images, at_once: int) -> dict[str, Recording]:
        wanted = {name: self.frames[name] for name in names}
        with recording(self.base, wanted) as recordings, _stopping(self.base, wanted), reached_taps(self.base):
            for start in range(0, len(images), at_once):
                with suppress(_Enough):
                    self.base(self._normalised(images[start : start + at_once]))
        return {name: join_batches(recordings.pop(name)) for name in names}


@contextmanager
def _stopping(base: nn.Module, frames: Mapping[str, Frame]) -> Iterator[None]:
    """Inside the block the base stops when each of the frames has run; entered after `recording`, whose hooks come
    first."""
    ended: set[str] = set()

    def hook(name: str) -> object:
        def leave(module: nn.Module, arguments: object, output: object) -> None:
            ended.add(name)
            if len(ended) == len(frames):
                raise _Enough

        return leave

    with ExitStack() as stack:
        stack.callback(base.register_forward_pre_hook(lambda module, arguments: ended.clear()).remove)
        for name, frame in frames.items():
            if not frame.is_whole:
                handle = frame.ends(base)[1].register_forward_hook(hook(name))  # type: ignore[arg-type]
                stack.callback(handle.remove)
        yield


@torch.no_grad()
def _written_bytes(base: nn.Module, pixels: Tensor) -> dict[str, int]:
    """The bytes of the tensor that each module writes for one image, where it writes one."""
    found: dict[str, int] = {}

    def hook(path: str) -> object:
        def leave(module: nn.Module, arguments: object, output: object) -> None:
            if isinstance(output, Tensor):
                found[path] = max(found.get(path, 0), output.nbytes // len(pixels))

        return leave

    with ExitStack() as stack:
        for path, module in base.named_modules():
            handle = module.register_forward_hook(hook(path))
            stack.callback(handle.remove)
        base(pixels)
    return found
