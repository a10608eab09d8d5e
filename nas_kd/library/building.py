"""Building a block library: every choice of every block distilled once, on its own, against the teacher's block.

An entry is inherited in closed form, fitted by least squares (`library.refit`), then, if no cheaper choice is better
already, trained for some steps to write what the teacher's block writes when it reads what the teacher's block reads.
Nothing here looks at labels.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nas_kd.analysis.structure import Analysis, Block
from nas_kd.data.augment import derive_seed
from nas_kd.data.images import Images
from nas_kd.data.memory import give_back
from nas_kd.errors import DataError
from nas_kd.files.atomic import write_text
from nas_kd.library.bench import Bench
from nas_kd.library.damages import Damages
from nas_kd.library.effort import LibraryEffort
from nas_kd.library.entries import Entry, EntryFile, as_kept
from nas_kd.library.frame_training import FrameRecipe, distil_frame
from nas_kd.library.importance import rank_block
from nas_kd.library.inputs import check_base
from nas_kd.library.library import Library, made_choices
from nas_kd.library.recorder import Recorder
from nas_kd.library.refit import LARGEST as LARGEST_FIT
from nas_kd.library.refit import Reference, reference_of, refit
from nas_kd.library.spec import LibrarySpec as LibrarySpec
from nas_kd.library.spec import plan_library as plan_library
from nas_kd.networks.plain import plain
from nas_kd.students.frames import Recording
from nas_kd.students.unit_importance import unit_importance
from nas_kd.training.anchoring import anchor_where_foreign
from nas_kd.training.evaluation import CALIBRATION
from nas_kd.training.views import weights_digest

_VERSION = 4  # of what the entries hold
_MODULES_BYTES = 128 << 20  # of a block's entries that stay in memory until their damages are measured

_OF_A_BLOCK = "inherit", "train", "measure"  # stages

Report = Callable[[str], None]
Make = Callable[[str, Report], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenBlocks:
    """Blocks of the library in `folder` that lack something, the dearest first: the predicted share of each in all the
    work, what makes one, and whom to tell."""

    folder: Path
    shares: Mapping[str, float]
    make: Make
    report: Report


Share = Callable[[OpenBlocks], Collection[str]]


def pass_over(words: str) -> None:
    """The report that tells nobody."""


def build_library(
    base: nn.Module,
    analysis: Analysis,
    images: Images,
    spec: LibrarySpec,
    folder: Path,
    report: Report = pass_over,
) -> Library:
    """The library of a trained base; entries that `folder` has already are taken from there, damaged ones made again.

    The base's batch norms are anchored to the images first, in place, where they have the statistics of others.

    Args:
        base: Trained; each choice of each of its blocks is fitted to what the block does.
        analysis: Its blocks: `space.analysis`, or that of `nas_kd.analyse`.
        images: They went through the training augmentation; `spec.images + spec.holdout` of them are used.
        spec: How much it learns.
        folder: Where it is kept.
        report: Called after each block of each stage with a `library.effort.Step`: words that know their share of the
            work.

    Returns:
        The library, for `space.with_library`.

    Raises:
        DataError: For images that are too few or do not fit the base.
        TrainingError: When the base's logits are not finite.

    Example:
        >>> import tempfile, timm, torch
        >>> from pathlib import Path
        >>> from nas_kd import Images, LibrarySpec, Space, build_library, parse_options
        >>> options = parse_options("width=1/0.5,conv=standard/depthwise")
        >>> space = Space(timm.create_model("test_resnet"), budget="params=50%", img_size=32, options=options)
        >>> pixels = torch.randint(256, (48, 3, 32, 32), dtype=torch.uint8)
        >>> images = Images(pixels, torch.arange(48), (0.5,) * 3, (0.5,) * 3)
        >>> spec = LibrarySpec(images=32, holdout=16, rounds=())
        >>> library = build_library(space.base, space.analysis, images, spec, Path(tempfile.mkdtemp()))
        >>> student = space.with_library(library).student(space.starts(1)[0])
    """
    return open_builder(base, analysis, images, spec, folder).build(report)


def open_builder(base: nn.Module, analysis: Analysis, images: Images, spec: LibrarySpec, folder: Path) -> Builder:
    """What builds a library, as `build_library` does."""
    base = plain(base)
    check_base(base, images)
    if spec.anchor:
        anchor_where_foreign(base, images[:CALIBRATION])
    return Builder(base, analysis, images, spec, folder)


class Builder:
    """The state of a library that is being built."""

    def __init__(self, base: nn.Module, analysis: Analysis, images: Images, spec: LibrarySpec, folder: Path) -> None:
        self.base, self.analysis = base.eval(), analysis
        holdout = min(spec.holdout, len(images) // 3)
        if holdout < 2:
            raise DataError(f"a library needs at least 6 images, got {len(images)}")
        self.spec = replace(spec, images=min(spec.images, len(images) - holdout))
        self.images = images[: self.spec.images + holdout]
        self.recorder = Recorder(base, analysis, self.images, holdout)
        self.damages = Damages(base, analysis, self.recorder)
        self.folder = folder / f"library-{self._digest()}"
        self.spec = replace(self.spec, rounds=self._rounds())
        self.bench = Bench(base, analysis, self.recorder, self.folder)
        self.held_out = {
            name: self.recorder.held_out(max(self.damages.images, self.recorder.fitted(name)))
            for name in self.recorder.frames
        }
        trainable = {block.name for block in analysis.blocks if self._is_trainable(block)}
        self.trained = trainable if self.spec.rounds else set[str]()
        self.effort = LibraryEffort(
            analysis.blocks, self.recorder, self.damages, self._unknowns(), self._trained_images()
        )

    def _digest(self) -> str:
        spec = replace(self.spec, rounds=())
        teacher = f"{weights_digest(self.base)} {self.analysis.input_size}"
        choices = [(block.name, block.choices) for block in self.analysis.blocks]
        facts = f"{_VERSION} {teacher} {spec} {self.images.mean} {self.images.std} {choices}"
        digest = hashlib.sha256(facts.encode())
        digest.update(np.ascontiguousarray(self.images.pixels.cpu().numpy()).data)
        return digest.hexdigest()[:16]

    def _rounds(self) -> tuple[int, ...]:
        """The rounds with which this library was begun: it stays the same when more is spent on its study later."""
        plan = self.folder / "rounds.json"
        try:
            return tuple(int(steps) for steps in json.loads(plan.read_text()))
        except (OSError, ValueError, TypeError):
            write_text(plan, json.dumps(self.spec.rounds))
            return self.spec.rounds

    def _unknowns(self) -> dict[str, int]:
        """By block the most unknowns that an output of its dense layers has, of those that can be fitted."""
        layers = {name: map(self.base.get_submodule, frame.edited) for name, frame in self.recorder.frames.items()}
        sizes = {
            name: [layer.weight[0].numel() for layer in own if isinstance(layer, nn.Conv2d | nn.Linear)]
            for name, own in layers.items()
        }
        return {name: max((size for size in own if size <= LARGEST_FIT), default=0) for name, own in sizes.items()}

    def _trained_images(self) -> dict[str, int]:
        """By block the images that an entry of it is trained on, one after the other."""
        steps, frames = sum(self.spec.rounds), self.recorder.frames
        return {name: steps * self.spec.batch_size for name in frames if name in self.trained}

    def _groups(self, counts: Mapping[str, int]) -> Iterator[list[str]]:
        """Blocks, in this order, whose recordings for so many images, and those held out, fit the memory."""
        together = {name: count + self.damages.images for name, count in counts.items()}
        return self.recorder.groups(together, self.spec.max_bytes)

    def _record(self, counts: Mapping[str, int], names: Sequence[str]) -> dict[str, Recording]:
        """What passes through frames for so many images."""
        most = max(counts[name] for name in names)
        seen = self.recorder.record(names, slice(0, min(most, self.spec.images)))
        return {name: recorded.first(counts[name]) for name, recorded in seen.items()}

    def _record_held(self, names: Sequence[str]) -> dict[str, Recording]:
        """What passes through frames for held out images."""
        return self.recorder.record(names, max((self.held_out[name] for name in names), key=lambda part: part.stop))

    def build(self, report: Report, share: Share | None = None) -> Library:
        """Makes what is missing, and returns the library. `share` is given the blocks that lack something: it may leave
        some to other processes, whose entries come into the library's folder, and returns those; what they lack in
        the end is made here."""
        report(self.effort.step("prepare", "", "frames found"))
        self.rank(report)
        names: Collection[str] = list(self.recorder.frames)
        left = {} if share is None else self.left(names)
        if share is not None and left:
            self.make([name for name in names if name not in left], report)
            names = share(OpenBlocks(folder=self.folder, shares=left, make=self._make_one, report=report))
            report = pass_over
            self.bench.forget(names)
        self.make(names, report)
        return Library(self.base, self.analysis, self.folder, self.bench.order, self.bench.entries)

    # which channels matter

    def rank(self, report: Report) -> None:
        """The order of the channels."""
        file = EntryFile(self.folder / "importance.safetensors")
        kept = file.read()
        if kept is not None:
            self.bench.order = kept[1]["order"].numpy()
        order = unit_importance(self.base, self.analysis) if kept is None else self.bench.order
        fitted = {name: self.recorder.fitted(name) for name in self.recorder.frames}
        for names in self._groups(fitted):
            seen = self._record(fitted, names) if kept is None else {}
            for name in names:
                if kept is None:
                    block = self.analysis.block(name)
                    rank_block(order, self.base, self.analysis, block, self.recorder.frames[name], seen.pop(name))
                report(self.effort.step("rank", name, "channels ranked by importance"))
        if kept is None:
            self.bench.order = order
            file.write(Entry(), {"order": torch.from_numpy(order)})
        give_back()

    # entries

    def left(self, names: Collection[str]) -> dict[str, float]:
        """The blocks of which something is still to be made, with the predicted share of each in all the work; the
        dearest first."""
        blocks = [self.analysis.block(name) for name in names]
        left = [block.name for block in blocks if self._missing(block) or self._due(block) or self._unmeasured(block)]
        shares = {name: sum(self.effort.step(stage, name, "").share for stage in _OF_A_BLOCK) for name in left}
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def _make_one(self, name: str, report: Report) -> None:
        self.make([name], report)

    def make(self, names: Collection[str], report: Report) -> None:
        """What is still to be made of some blocks: every entry in closed form, trained where that is worth it, with
        its damage."""
        counts = {name: self._images_of(name) for name in self.left(names)}
        for name in names:
            if name not in counts:
                trained = ["train"] if name in self.trained else []
                self._tell(self.analysis.block(name), report, "inherit", *trained, "measure")
        for group in self._groups(counts):
            seen, held = self._record(counts, group), self._record_held(group)
            for name in group:
                give_back()  # the block before was as large
                self._make(self.analysis.block(name), seen.pop(name), held.pop(name), report)
            give_back()

    def _images_of(self, name: str) -> int:
        """How many images pass through a block's frame for its entries."""
        return max(self.recorder.fitted(name), self._trained_on(name) if name in self.trained else 0)

    def _make(self, block: Block, seen: Recording, held: Recording, report: Report) -> None:
        modules = self._inherit_block(block, seen[: self.recorder.fitted(block.name)], held)
        self._tell(block, report, "inherit")
        if block.name in self.trained:
            for number in range(len(self.spec.rounds)):
                self._round(block, number, seen[: self._trained_on(block.name)], held)
            self._tell(block, report, "train")
        self._measure(block, held, modules)
        self._tell(block, report, "measure")

    def _tell(self, block: Block, report: Report, *stages: str) -> None:
        words = {"inherit": f"{len(made_choices(block))} choices inherited", "train": "choices trained"}
        for stage in stages:
            report(self.effort.step(stage, block.name, words.get(stage, "damages measured")))

    # closed forms

    def _missing(self, block: Block) -> list[int]:
        """The entries that there are none of; what is known of the others is noted."""
        found = {(block.name, index): self.bench.read(block, index) for index in self._unknown(block)}
        self.bench.entries |= {key: entry for key, entry in found.items() if entry is not None}
        return [index for (_, index), entry in found.items() if entry is None]

    def _unknown(self, block: Block) -> list[int]:
        return [index for index in made_choices(block) if (block.name, index) not in self.bench.entries]

    def _inherit_block(self, block: Block, seen: Recording, held: Recording) -> dict[int, nn.Module]:
        """Makes the entries of a block that there are none of; their frames, where memory allows to keep them."""
        missing = self._unknown(block)
        if not missing:
            return {}
        reference = reference_of(self.base, self.analysis, self.recorder.frames[block.name], seen)
        modules = {}
        fits = self.bench.entry_bytes(block) <= _MODULES_BYTES and block.name not in self.trained
        for index in missing:
            module = self._inherit(block, index, reference, held)
            if fits:
                modules[index] = module
        return modules

    def _inherit(self, block: Block, index: int, reference: Reference, held: Recording) -> nn.Module:
        started = time.monotonic()
        student = self.bench.student(block, index)
        module = self.bench.inside(student, block)
        if block.choices[index].keep:
            refit(student, self.bench.mask(block, index), reference)
            self.bench.recalibrate(module, block, reference.recorded)
        tensors = self.bench.own_tensors(module, block)
        entry = Entry(block=block.name, errors=((0, self.bench.nmse(module, block, held)),))
        if not self._fits_disk(block):
            entry, tensors = replace(entry, kl=self.damages.kl(block.name, module, held)), {}
        self.bench.keep(block, index, replace(entry, seconds=time.monotonic() - started), tensors)
        student.load_state_dict(as_kept(tensors), strict=False)
        return module

    def _fits_disk(self, block: Block) -> bool:
        """Whether the weights of a block's entries may be kept; else they are measured and inherited again."""
        return self.bench.entry_bytes(block) <= 2 * self.spec.max_block_bytes

    # training

    def _trained_on(self, name: str) -> int:
        """How many images a block's entries may be trained on: as many as its memory holds, or at least two batches."""
        room = self.spec.max_bytes // max(1, self.recorder.bytes[name]) - self.damages.images
        return min(self.spec.images, max(room, 2 * self.spec.batch_size))

    def _is_trainable(self, block: Block) -> bool:
        """Whether what runs in a frame is small enough to be trained on its own."""
        paths, calls = self.recorder.frames[block.name].paths(self.base), self.analysis.trace.calls
        macs = [call.factor * math.prod(map(len, call.axes)) for call in calls]
        inside = sum(own for own, call in zip(macs, calls, strict=True) if call.module in paths)
        return self._fits_disk(block) and inside <= self.spec.largest * sum(macs)

    def _due(self, block: Block) -> bool:
        """Whether some entry of a block is still to be trained."""
        rounds = range(len(self.spec.rounds) if block.name in self.trained else 0)
        return any(self._left(block, number) for number in rounds)

    def _left(self, block: Block, number: int) -> list[int]:
        """The entries that a round still has to train; who is in it was decided by the errors before it."""
        before, after = sum(self.spec.rounds[:number]), sum(self.spec.rounds[: number + 1])
        return [
            index
            for index in self.bench.unbeaten(block, before)
            if block.choices[index].keep and self.bench.entries[block.name, index].steps < after
        ]

    def _round(self, block: Block, number: int, seen: Recording, held: Recording) -> None:
        steps = sum(self.spec.rounds[: number + 1])
        for index in self._left(block, number):
            old, started = self.bench.entries[block.name, index], time.monotonic()
            module = self.bench.restored(block, index)
            before = copy.deepcopy(self.bench.own_tensors(module, block))
            self._distil(module, block, index, number, seen)
            self.bench.recalibrate(module, block, seen[: self.recorder.fitted(block.name)])
            error, tensors = self.bench.nmse(module, block, held), self.bench.own_tensors(module, block)
            if not error < old.nmse:  # what was nearly perfect may get worse
                error, tensors = old.nmse, before
            seconds = old.seconds + time.monotonic() - started
            entry = replace(old, errors=(*old.errors, (steps, error)), seconds=seconds, kl=None)
            self.bench.keep(block, index, entry, tensors)

    def _distil(self, module: nn.Module, block: Block, index: int, number: int, seen: Recording) -> None:
        """Trains what an entry has of its own; a shift has nothing."""
        prefix, names = self.recorder.frames[block.name].prefix, self.bench.own_tensors(module, block)
        own = [parameter for name, parameter in module.named_parameters() if f"{prefix}{name}" in names]
        seed = derive_seed(self.spec.seed, f"{block.name} {index}", number)
        if own:
            recipe = FrameRecipe(
                steps=self.spec.rounds[number], batch_size=self.spec.batch_size, lr=self.spec.lr, seed=seed
            )
            distil_frame(module, own, seen, recipe)

    # damages

    def _unmeasured(self, block: Block) -> list[int]:
        """The unbeaten entries whose damage is not known yet: the KL of the logits with each swapped in."""
        unbeaten = self.bench.unbeaten(block, sum(self.spec.rounds))
        return [index for index in unbeaten if self.bench.entries[block.name, index].kl is None]

    def _measure(self, block: Block, held: Recording, modules: Mapping[int, nn.Module]) -> None:
        for index in self._unmeasured(block):
            started = time.monotonic()
            module = modules[index] if index in modules else self.bench.restored(block, index)
            kl = self.damages.kl(block.name, module, held)
            self.bench.note_damage(block, index, module, kl, time.monotonic() - started)
