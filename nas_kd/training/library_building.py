"""Building a block library: every choice of every block distilled once, on its own, against the teacher's block.

An entry is inherited in closed form, fitted by least squares (`models.refit`), then, if no cheaper choice is better
already, trained for some steps to write what the teacher's block writes when it reads what the teacher's block reads.
Nothing here looks at labels.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nas_kd.budget import KINDS
from nas_kd.errors import DataError, TrainingError
from nas_kd.models.blocks import Block
from nas_kd.models.costs import cost_table
from nas_kd.models.frames import (
    Frame,
    Passage,
    disjoint,
    find_frames,
    joined,
    recording,
    replaying,
    swapped,
    with_skips,
)
from nas_kd.models.importance import reconstruction_importance
from nas_kd.models.inherit import inherit_student
from nas_kd.models.refit import Reference, reference_of, refit
from nas_kd.models.structure import Analysis
from nas_kd.training.anchoring import anchor_where_foreign
from nas_kd.training.augment import derive_seed
from nas_kd.training.entries import Entry, EntryFile, Tensors
from nas_kd.training.frame_training import (
    MOST_IMAGES,
    PART,
    FrameRecipe,
    distil_frame,
    frame_error,
    images_for,
    recalibrate_frame,
    run_in_parts,
    variances,
)
from nas_kd.training.images import Images, normalise
from nas_kd.training.library import Library, entry_file, made_choices
from nas_kd.training.loop import CALIBRATION, device_of, even_split, predict_logits
from nas_kd.training.losses import distillation_loss
from nas_kd.training.resume import replace_file
from nas_kd.training.views import weights_digest

_VERSION = 3  # of what the entries hold
_INHERIT_IMAGES = 600  # that a frame sees while an entry of it is fitted and measured, counted as forward passes
_UNBEATEN = 0.3  # of a block's choices
_LEAST_STEPS = 8  # that are worth while
_TEMPERATURE = 4.0  # of the KL that measures damage, as in the distillation that follows


@dataclass(frozen=True, slots=True, kw_only=True)
class LibrarySpec:
    """How much a library learns: from `images` augmented training images and measured on `holdout` others; entries are
    trained for `rounds` of steps with batches of `batch_size` at a peak learning rate `lr`, fewer entries each round.

    Frames with more than `largest` of the base's MACs are inherited and fitted but not trained. What passes through
    frames is kept in memory, at most `max_bytes` at once. Of a block whose entries would take more than
    `max_block_bytes` of disk only the damages are kept. `anchor` looks whether the base's batch norms have the
    statistics of other images, and anchors them then."""

    images: int = 2048
    holdout: int = 256
    rounds: tuple[int, ...] = (32, 64)
    batch_size: int = 64
    lr: float = 2e-3
    largest: float = 0.4
    max_bytes: int = 1 << 30
    max_block_bytes: int = 1 << 30
    seed: int = 0
    anchor: bool = field(default=True, repr=False)  # the base's weights name what came of it


def plan_library(spec: LibrarySpec, analysis: Analysis, images: float) -> LibrarySpec:
    """The library that costs at most about as much as `images` forward passes of the base: with fewer steps in each
    round than `spec`, or none at all. What it costs in closed form is the least that it can."""
    entries = float(np.mean([len(made_choices(block)) for block in analysis.blocks]))  # counted in whole networks
    left = images - entries * _INHERIT_IMAGES
    share = left / (entries * _UNBEATEN * 3 * spec.batch_size * max(1, sum(spec.rounds)))
    if share * sum(spec.rounds) < _LEAST_STEPS:
        return replace(spec, rounds=())
    return replace(spec, rounds=tuple(max(1, int(min(1.0, share) * steps)) for steps in spec.rounds))


def build_library(
    base: nn.Module,
    analysis: Analysis,
    images: Images,
    spec: LibrarySpec,
    folder: Path,
    report: Callable[[str], None] = lambda words: None,
) -> Library:
    """The library of a trained `base`; entries that `folder` has already are taken from there.

    The base's batch norms are anchored to the images first, in place, where they have the statistics of others.
    `images` went through the training augmentation; `spec.images + spec.holdout` of them are used. `report` is called
    after each block of each stage. A damaged file is made again with a warning. Raises DataError for images that are
    too few or do not fit the base, TrainingError when the base's logits are not finite.
    """
    _check_base(base, images)
    if spec.anchor:
        anchor_where_foreign(base, images[:CALIBRATION])
    builder = _Builder(base, analysis, images, spec, folder)
    builder.inherit(report)
    builder.train(report)
    builder.measure(report)
    return Library(base, analysis, builder.folder, builder.order, builder.entries)


def _check_base(base: nn.Module, images: Images) -> None:
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


class _Builder:
    """The state of a library that is being built."""

    def __init__(
        self,
        base: nn.Module,
        analysis: Analysis,
        images: Images,
        spec: LibrarySpec,
        folder: Path,
    ) -> None:
        self.base, self.analysis, self.table = base.eval(), analysis, cost_table(analysis, base)
        self.holdout = min(spec.holdout, len(images) // 3)
        if self.holdout < 2:
            raise DataError(f"a library needs at least 6 images, got {len(images)}")
        self.spec = replace(spec, images=min(spec.images, len(images) - self.holdout))
        self.images = images[: self.spec.images + self.holdout]
        self.device = device_of(base)
        two = self._pixels(slice(0, 2))
        self.frames = with_skips(base, analysis, find_frames(base, analysis, two), two)
        self.bytes = {name: passage.bytes // 2 for name, passage in self._record(list(self.frames), 2).items()}
        self.prefixes = {block.name: self._own_modules(block) for block in analysis.blocks}
        self.fits_disk = {block.name: self._fits_disk(block) for block in analysis.blocks}
        self.folder = folder / f"library-{self._digest()}"
        self.spec = replace(self.spec, rounds=self._rounds())
        self.entries: dict[tuple[str, int], Entry] = {}
        self.order = self._importance()
        self.logits = self._held_out_logits()

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
            replace_file(plan, lambda draft: draft.write_text(json.dumps(self.spec.rounds)))
            return self.spec.rounds

    def _pixels(self, part: slice) -> Tensor:
        images = self.images[part]
        return normalise(images.pixels, images.mean, images.std, self.device)

    def _held_out(self) -> slice:
        return slice(len(self.images) - self.holdout, None)

    @torch.no_grad()
    def _held_out_logits(self) -> Tensor:
        logits: Tensor = self.base(self._pixels(self._held_out()))
        return logits

    def _importance(self) -> NDArray[np.float64]:
        file = EntryFile(self.folder / "importance.safetensors")
        kept = file.read()
        if kept is not None:
            order: NDArray[np.float64] = kept[1]["order"].numpy()
            return order
        passages: dict[str, Passage] = {}
        for names, count in self._groups(MOST_IMAGES):
            passages |= {name: seen[: images_for(seen)] for name, seen in self._record(names, count).items()}
        order = reconstruction_importance(self.base, self.analysis, self.frames, passages)
        file.write(Entry(), {"order": torch.from_numpy(order)})
        return order

    def _groups(self, count: int) -> Iterator[tuple[list[str], int]]:
        """Blocks, in the base's order, whose frames' passages fit the memory together; of `count` images, or of fewer
        where those of a single frame would not."""
        group: list[str] = []
        for name in self.frames:
            needed = sum(self.bytes[other] for other in (*group, name)) * (count + self.holdout)
            if group and needed > self.spec.max_bytes:
                yield group, self._fitting(count, group)
                group = []
            group.append(name)
        yield group, self._fitting(count, group)

    def _fitting(self, count: int, group: Sequence[str]) -> int:
        room = self.spec.max_bytes // sum(self.bytes[name] for name in group) - self.holdout
        return min(count, self.spec.images, max(room, 2 * self.spec.batch_size))

    @torch.no_grad()
    def _record(self, names: Sequence[str], count: int, *, held_out: bool = False) -> dict[str, Passage]:
        """What passes through the frames of these blocks for the first `count` images (or the held out ones)."""
        images = self.images[self._held_out() if held_out else slice(0, count)]
        with recording(self.base, {name: self.frames[name] for name in names}) as passages:
            for pixels in torch.split(images.pixels, 256):
                self.base(normalise(pixels, images.mean, images.std, self.device))
        return {name: joined(parts) for name, parts in passages.items()}

    # closed forms

    def inherit(self, report: Callable[[str], None]) -> None:
        """Every entry in closed form, with its damage."""
        for names, count in self._groups(MOST_IMAGES):
            seen, held = self._record(names, count), self._record(names, 0, held_out=True)
            for name in names:
                block = self.analysis.block(name)
                few = seen[name][: images_for(seen[name])]
                reference = reference_of(self.base, self.analysis, self.frames[name], few)
                for index in made_choices(block):
                    kept = entry_file(self.folder, block, index).read()
                    if kept is not None:
                        self.entries[name, index] = kept[0]
                    else:
                        self._inherit(block, index, reference, held[name])
                report(f"{name}: {len(made_choices(block))} choices inherited")

    def _inherit(self, block: Block, index: int, reference: Reference, held: Passage) -> None:
        started = time.monotonic()
        student = self._student(block, index)
        module = self.frames[block.name].inside(student)
        if block.choices[index].keep:
            refit(student, self._mask(block, index), reference)
            recalibrate_frame(module, reference.passage)
        entry = Entry(block=block.name, errors=((0, self._nmse(module, held)),))
        tensors = self._own_tensors(module, block)
        if not self.fits_disk[block.name]:
            entry, tensors = replace(entry, kl=self._kl(module, self.frames[block.name], held, {})), {}
        self._keep(block, index, replace(entry, seconds=time.monotonic() - started), tensors)

    def _fits_disk(self, block: Block) -> bool:
        """Whether the weights of a block's entries may be kept; else they are measured and inherited again."""
        tensors = self._own_tensors(self.frames[block.name].inside(self.base), block)
        return (
            2 * sum(tensor.numel() for tensor in tensors.values()) * len(made_choices(block))
            <= self.spec.max_block_bytes
        )

    def _keep(self, block: Block, index: int, entry: Entry, tensors: Tensors) -> None:
        entry_file(self.folder, block, index).write(entry, tensors)
        self.entries[block.name, index] = entry

    def _student(self, block: Block, index: int) -> nn.Module:
        """The base with one block changed; what lies outside its frame is not copied."""
        genotype = swapped(self.analysis, block, block.choices[index])
        outside = self.frames[block.name].outside(self.base)
        return inherit_student(self.base, self.analysis, genotype, importance=self.order, shared=outside)

    def _mask(self, block: Block, index: int) -> NDArray[np.bool_]:
        return self.analysis.keep_mask(swapped(self.analysis, block, block.choices[index]), self.order)

    @torch.no_grad()
    def _nmse(self, module: nn.Module, held: Passage) -> float:
        """How far the outputs of a frame are from the base's on the held out images."""
        few = held[: images_for(held)]
        return float(frame_error(run_in_parts(module.eval(), few), few.outputs, variances(few)))

    def _own_tensors(self, module: nn.Module, block: Block) -> Tensors:
        """The tensors of a frame that may differ from the base's in the entries of its block."""
        prefix = self.frames[block.name].prefix
        state = {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}
        return {name: tensor for name, tensor in state.items() if name.startswith(self.prefixes[block.name])}

    def _own_modules(self, block: Block) -> tuple[str, ...]:
        """What the names of tensors begin with that may differ from the base's in the entries of a block."""
        norms = self.analysis.trace.norms
        modules = {block.name, *self.frames[block.name].edited}
        modules |= {norms[path] for path in modules if path in norms}
        return tuple(f"{path}." for path in sorted(modules))

    # training

    def train(self, report: Callable[[str], None]) -> None:
        """Trains the entries that are worth it, fewer of them in each round."""
        for names, count in self._groups(self.spec.images):
            due = [name for name in names if self._is_trainable(name) and self._due(self.analysis.block(name))]
            if not due:
                continue
            seen, held = self._record(due, count), self._record(due, 0, held_out=True)
            for name in due:
                block = self.analysis.block(name)
                for number in range(len(self.spec.rounds)):
                    self._round(block, number, seen[name], held[name])
                report(f"{name}: choices trained")

    def _is_trainable(self, name: str) -> bool:
        """Whether what runs in a frame is small enough to be trained on its own."""
        frame, calls = self.frames[name], self.analysis.trace.calls
        paths = frame.paths(self.base)
        macs = [call.factor * math.prod(map(len, call.axes)) for call in calls]
        inside = sum(own for own, call in zip(macs, calls, strict=True) if call.module in paths)
        return self.fits_disk[name] and inside <= self.spec.largest * sum(macs)

    def _due(self, block: Block) -> bool:
        """Whether some entry of a block is still to be trained."""
        return any(self._left(block, number) for number in range(len(self.spec.rounds)))

    def _left(self, block: Block, number: int) -> list[int]:
        """The entries that a round still has to train; who is in it was decided by the errors before it."""
        before, after = sum(self.spec.rounds[:number]), sum(self.spec.rounds[: number + 1])
        return [
            index
            for index in self._unbeaten(block, before)
            if block.choices[index].keep and self.entries[block.name, index].steps < after
        ]

    def _round(self, block: Block, number: int, seen: Passage, held: Passage) -> None:
        steps = sum(self.spec.rounds[: number + 1])
        for index in self._left(block, number):
            old = self.entries[block.name, index]
            started = time.monotonic()
            module = self._restored(block, index)
            before = copy.deepcopy(self._own_tensors(module, block))
            prefix = self.frames[block.name].prefix
            own = [parameter for name, parameter in module.named_parameters() if f"{prefix}{name}" in before]
            seed = derive_seed(self.spec.seed, f"{block.name} {index}", number)
            if own:  # a shift has nothing to train
                recipe = FrameRecipe(
                    steps=self.spec.rounds[number], batch_size=self.spec.batch_size, lr=self.spec.lr, seed=seed
                )
                distil_frame(module, own, seen, recipe)
            recalibrate_frame(module, seen[: images_for(seen)])
            error, tensors = self._nmse(module, held), self._own_tensors(module, block)
            if not error < old.nmse:  # what was nearly perfect may get worse
                error, tensors = old.nmse, before
            seconds = old.seconds + time.monotonic() - started
            entry = replace(old, errors=(*old.errors, (steps, error)), seconds=seconds, kl=None)
            self._keep(block, index, entry, tensors)

    def _restored(self, block: Block, index: int) -> nn.Module:
        """The frame of an entry as a module, with its tensors."""
        student = self._student(block, index)
        kept = entry_file(self.folder, block, index).read()
        if kept is not None:
            student.load_state_dict(dict(kept[1]), strict=False)
        return self.frames[block.name].inside(student)

    def _unbeaten(self, block: Block, steps: int) -> list[int]:
        """The choices that no other one beats after so many steps: none is cheaper in params and MACs and closer to the
        base."""
        made = made_choices(block)
        rows = np.tile(self.table.indices(self.analysis.identity), (len(made) + 1, 1))
        rows[1:, self.analysis.blocks.index(block)] = made
        totals = self.table.many(rows, KINDS)
        damage = [0.0, *(self.entries[block.name, index].nmse_after(steps) for index in made)]
        values = np.column_stack([*(totals[kind] for kind in KINDS), damage])
        no_worse, better = values[None] <= values[:, None], values[None] < values[:, None]
        beaten = np.any(no_worse.all(axis=2) & better.any(axis=2), axis=1)
        return [index for index, is_beaten in zip(made, beaten[1:], strict=True) if not is_beaten]

    # damages

    def measure(self, report: Callable[[str], None]) -> None:
        """The KL of the logits with each unbeaten entry swapped in."""
        for names, _ in self._groups(0):
            held = self._record(names, 0, held_out=True)
            for name in names:
                block = self.analysis.block(name)
                earlier = self._earlier(name, names)
                recorded = {frame: held[other].outputs for other, frame in earlier.items()}
                for index in self._unbeaten(block, sum(self.spec.rounds)):
                    entry = self.entries[name, index]
                    if entry.kl is None:
                        started = time.monotonic()
                        module = self._restored(block, index)
                        loss = self._kl(module, self.frames[name], held[name], recorded)
                        seconds = entry.seconds + time.monotonic() - started
                        measured = replace(entry, kl=loss, seconds=seconds)
                        self._keep(block, index, measured, self._own_tensors(module, block))
                report(f"{name}: damages measured")

    def _earlier(self, name: str, names: Sequence[str]) -> dict[str, Frame]:
        """The frames that run before a block's and share nothing with it or each other."""
        before = names[: names.index(name) + 1]
        kept = disjoint(self.frames[other] for other in before)
        return {other: self.frames[other] for other in before if self.frames[other] in kept and other != name}

    @torch.no_grad()
    def _kl(
        self, module: nn.Module, frame: Frame, held: Passage, recorded: Mapping[Frame, tuple[Tensor, ...]]
    ) -> float:
        """T²·KL of the base's logits with a frame's module in its place; `recorded` are outputs of earlier frames."""
        outputs = run_in_parts(module.eval(), held)
        logits = outputs[0] if frame.is_whole else self._logits({**recorded, frame: outputs})
        return float(distillation_loss(logits.float(), self.logits.float(), temperature=_TEMPERATURE))

    def _logits(self, outputs: Mapping[Frame, tuple[Tensor, ...]]) -> Tensor:
        """The base's logits of the held out images when these frames write that."""
        parts, pixels = [], self._pixels(self._held_out())
        for part in even_split(torch.arange(self.holdout), PART):
            with replaying(self.base, {frame: tuple(t[part] for t in own) for frame, own in outputs.items()}):
                parts.append(self.base(pixels[part]))
        return torch.cat(parts)
