"""Where the entries of a library are made: students of one changed block, their own tensors, their files."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nas_kd.analysis.structure import Analysis, Block
from nas_kd.budget import KINDS
from nas_kd.costs.cost_table import cost_table
from nas_kd.library.entries import Entry, Tensors
from nas_kd.library.frame_training import frame_error, recalibrate_frame, run_in_parts, variances
from nas_kd.library.library import entry_file, made_choices
from nas_kd.library.recorder import Recorder
from nas_kd.students.frames import Recording, swapped
from nas_kd.students.inheritance import inherit_student


class Bench:
    """Makes, measures and keeps the entries of a library in `folder`; `order` ranks the channels that widths keep.

    `entries` has what is known of each by now, by block and position of the choice."""

    def __init__(self, base: nn.Module, analysis: Analysis, recorder: Recorder, folder: Path) -> None:
        self.base, self.analysis, self.recorder, self.folder = base, analysis, recorder, folder
        self.order: NDArray[np.float64] = np.zeros(analysis.labels)
        self.entries: dict[tuple[str, int], Entry] = {}
        self._table = cost_table(analysis, base)
        self._outside = {name: frame.outside(base) for name, frame in recorder.frames.items()}
        self._shell: tuple[str, nn.Module] | None = None  # of the block that is at work
        self._prefixes = {block.name: self._own_modules(block) for block in analysis.blocks}

    def student(self, block: Block, index: int) -> nn.Module:
        """The base with one block changed, in closed form, for its frame alone: what lies outside is not copied, and
        may not even be there."""
        genotype = swapped(self.analysis, block, block.choices[index])
        if self.recorder.frames[block.name].skips:  # frames inside it are run over, and so have to be there
            shared = self._outside[block.name]
            return inherit_student(self.base, self.analysis, genotype, importance=self.order, shared=shared)
        return inherit_student(self.shell(block), self.analysis, genotype, importance=self.order)

    def shell(self, block: Block) -> nn.Module:
        """The base with nothing in it but the frame of a block: of that, students are made in a fraction of the time
        that looking through all modules takes."""
        if self._shell is None or self._shell[0] != block.name:
            nothing = {id(module): nn.Identity() for module in self._outside[block.name]}
            self._shell = block.name, copy.deepcopy(self.base, nothing)
        return self._shell[1]

    def inside(self, student: nn.Module, block: Block) -> nn.Module:
        """The frame of a block in a student, as a module."""
        return self.recorder.frames[block.name].inside(student)

    def restored(self, block: Block, index: int) -> nn.Module:
        """The frame of an entry as a module, with its tensors as they are on disk."""
        student = self.student(block, index)
        kept = entry_file(self.folder, block, index).read()
        if kept is not None:
            student.load_state_dict(dict(kept[1]), strict=False)
        return self.inside(student, block)

    def mask(self, block: Block, index: int) -> NDArray[np.bool_]:
        """The labels that a choice of a block keeps."""
        return self.analysis.keep_mask(swapped(self.analysis, block, block.choices[index]), self.order)

    def recalibrate(self, module: nn.Module, block: Block, recorded: Recording) -> None:
        """Gives the batch norms that an entry has of its own the statistics of a recording; the others keep the base's,
        within the frame too: so do those of a student."""
        spared = [part for outside in self._outside[block.name] for part in outside.modules()]
        prefix, own = self.recorder.frames[block.name].prefix, self._prefixes[block.name]
        theirs = {name: tensor for name, tensor in module.named_buffers() if not f"{prefix}{name}".startswith(own)}
        before = {name: tensor.clone() for name, tensor in theirs.items()}
        recalibrate_frame(module, recorded, 2 * self.recorder.part(block.name), spared=spared)
        for name, tensor in before.items():
            theirs[name].copy_(tensor)

    @torch.no_grad()
    def nmse(self, module: nn.Module, block: Block, held: Recording) -> float:
        """How far the outputs of a frame are from the base's on held out images."""
        few = held[: self.recorder.fitted(block.name)]
        outputs = run_in_parts(module.eval(), few, self.recorder.part(block.name))
        return float(frame_error(outputs, few.outputs, variances(few)))

    def read(self, block: Block, index: int) -> Entry | None:
        """What is known of an entry that an earlier run has made."""
        kept = entry_file(self.folder, block, index).read()
        return None if kept is None else kept[0]

    def forget(self, names: Collection[str]) -> None:
        """What is known of some blocks' entries: others have made more of them since."""
        self.entries = {key: entry for key, entry in self.entries.items() if key[0] not in names}

    def keep(self, block: Block, index: int, entry: Entry, tensors: Tensors) -> None:
        """Writes an entry and notes what is known of it."""
        entry_file(self.folder, block, index).write(entry, tensors)
        self.entries[block.name, index] = entry

    def note_damage(self, block: Block, index: int, module: nn.Module, kl: float, seconds: float) -> None:
        """Writes an entry again with its damage, which took so long to measure."""
        entry = self.entries[block.name, index]
        measured = replace(entry, kl=kl, seconds=entry.seconds + seconds)
        self.keep(block, index, measured, self.own_tensors(module, block))

    def own_tensors(self, module: nn.Module, block: Block) -> Tensors:
        """The tensors of a frame that may differ from the base's in the entries of its block."""
        prefix = self.recorder.frames[block.name].prefix
        state = {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}
        return {name: tensor for name, tensor in state.items() if name.startswith(self._prefixes[block.name])}

    def entry_bytes(self, block: Block) -> int:
        """The bytes of all entries of a block in memory, at most."""
        tensors = self.own_tensors(self.inside(self.base, block), block)
        return 4 * sum(tensor.numel() for tensor in tensors.values()) * len(made_choices(block))

    def _own_modules(self, block: Block) -> tuple[str, ...]:
        """What the names of tensors begin with that may differ from the base's in the entries of a block."""
        norms = self.analysis.trace.norms
        modules = {block.name, *self.recorder.frames[block.name].edited}
        modules |= {norms[path] for path in modules if path in norms}
        return tuple(f"{path}." for path in sorted(modules))

    def unbeaten(self, block: Block, steps: int) -> list[int]:
        """The choices that no other one beats after so many steps: none is cheaper in params and MACs and closer to the
        base."""
        made = made_choices(block)
        rows = np.tile(self._table.indices(self.analysis.identity), (len(made) + 1, 1))
        rows[1:, self.analysis.blocks.index(block)] = made
        totals: Mapping[str, NDArray[np.int64]] = self._table.many(rows, KINDS)
        damage = [0.0, *(self.entries[block.name, index].nmse_after(steps) for index in made)]
        values = np.column_stack([*(totals[kind] for kind in KINDS), damage])
        no_worse, better = values[None] <= values[:, None], values[None] < values[:, None]
        beaten = np.any(no_worse.all(axis=2) & better.any(axis=2), axis=1)
        return [index for index, is_beaten in zip(made, beaten[1:], strict=True) if not is_beaten]
