"""The block library: initial weights and a damage for every choice of every block.

An entry is the base with one block changed, and its damage says how far the block is from the base's; a student is
assembled from the entries of its genotype. `library_building` makes them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nas_kd.analysis.labels import Axes, Labels
from nas_kd.analysis.structure import Analysis, Block, Site, is_replaced
from nas_kd.analysis.trace import named_tensors
from nas_kd.genotype import Choice, group_count
from nas_kd.library.entries import Entry, EntryFile, Tensors
from nas_kd.students.frames import swapped
from nas_kd.students.inheritance import drop_channels, inherit_student, resize_kernel

_LARGER_KERNEL = 1e-6  # of damage
_logger = logging.getLogger(__name__)


class Library:
    """Initial weights and damages for every choice of every block of a base. `build_library` makes one.

    Weights are read from the disk when they are needed.

    Args:
        base: The network whose blocks they stand in for.
        analysis: Its blocks and their choices.
        folder: Where the entries are.
        order: Per inner channel of the base its rank: widths keep the channels of the highest.
        entries: By block and position of the choice; the base's own are left out.
    """

    def __init__(
        self,
        base: nn.Module,
        analysis: Analysis,
        folder: Path,
        order: NDArray[np.float64],
        entries: Mapping[tuple[str, int], Entry],
    ) -> None:
        self.base, self.analysis, self.folder = base, analysis, folder
        self.order, self.entries = order, entries

    @property
    def seconds(self) -> float:
        """What building all entries took, whenever that was."""
        return sum(entry.seconds for entry in self.entries.values())

    def damages(self, measure: str = "kl") -> list[NDArray[np.float64]]:
        """How much each choice hurts, swapped in alone. What the base has damages nothing.

        Args:
            measure: `kl`, T²·KL of the logits, or `nmse`, the mean squared error of the block's outputs over their
                variance.

        Returns:
            Per block an array over its choices.
        """
        if measure == "nmse":
            return self._table(lambda entry: entry.nmse)
        sensitivity = {block.name: self._sensitivity(block) for block in self.analysis.blocks}
        return self._table(lambda entry: entry.nmse * sensitivity[entry.block] if entry.kl is None else entry.kl)

    def _table(self, damage: Callable[[Entry], float]) -> list[NDArray[np.float64]]:
        """Damages by block and choice; a larger kernel hurts as little more as it takes to prefer the smaller one."""
        tables = []
        for block in self.analysis.blocks:
            own = np.zeros(len(block.choices))
            for index in range(1, len(own)):
                like = made_like(block, index)
                own[index] = damage(self.entries[block.name, like]) if like else 0.0
                own[index] += _LARGER_KERNEL if like != index else 0.0
            tables.append(own)
        return tables

    def _sensitivity(self, block: Block) -> float:
        """What an nmse of 1 in this block is worth in KL: the median of the entries that were measured."""
        own = [self.entries[block.name, index] for index in made_choices(block)]
        ratios = [entry.kl / entry.nmse for entry in own if entry.kl is not None and entry.nmse > 0]
        return float(np.median(ratios)) if ratios else 1.0

    def student(self, genotype: Mapping[str, Choice]) -> nn.Module:
        """The student of a genotype, assembled from the entries of its blocks; recalibrate its batch norms.

        Args:
            genotype: A choice for each block.

        Returns:
            A network of the base's class.

        Raises:
            GenotypeError: When the genotype does not fit the base.
        """
        student = inherit_student(self.base, self.analysis, genotype, importance=self.order)
        mask = self.analysis.keep_mask(genotype, self.order)
        tensors = named_tensors(student)
        entries = list(self._entries_of(genotype))
        axes = {**self.analysis.trace.axes, **replaced_axes(self.analysis, genotype)}
        for is_own in (False, True):  # what two blocks' entries hold both comes from the block that it belongs to
            for block, kept, own in entries:
                chosen = {name: t for name, t in kept.items() if name.startswith(f"{block.name}.") == is_own}
                _overlay(tensors, chosen, axes, own, mask)
        return student

    def _entries_of(self, genotype: Mapping[str, Choice]) -> Iterator[tuple[Block, Tensors, NDArray[np.bool_]]]:
        """For each changed block of a genotype the tensors of its entry, and the labels that these kept."""
        for block in self.analysis.blocks:
            index = made_like(block, block.choices.index(genotype[block.name]))
            if not index or not genotype[block.name].keep:
                continue
            file = entry_file(self.folder, block, index)
            kept = file.read()
            if kept is not None:
                alone = swapped(self.analysis, block, genotype[block.name])
                yield block, kept[1], self.analysis.keep_mask(alone, self.order)
            elif not file.path.exists():  # of one that went bad it was said
                _logger.warning("%s is gone from the library: this block begins in closed form", file.path)


@torch.no_grad()
def _overlay(
    student: Mapping[str, Tensor],
    entry: Tensors,
    axes: Mapping[str, Axes],
    own: NDArray[np.bool_],
    mask: NDArray[np.bool_],
) -> None:
    """Copies the tensors of an entry, which kept the labels `own`, into a student that keeps fewer, `mask`.

    Where a neighbour narrows what groups of a replacement read, the whole replacement stays as it was inherited."""
    fitted = {
        name: drop_channels(tensor, axes.get(name, ()), mask, had=own)
        for name, tensor in entry.items()
        if name in student
    }
    fitted = {
        name: _grown(tensor, student[name].shape[-1]) if tensor.ndim == 4 else tensor for name, tensor in fitted.items()
    }
    misfits = {_layer(name) for name, tensor in fitted.items() if tensor.shape != student[name].shape}
    for name, tensor in fitted.items():
        if _layer(name) not in misfits:
            student[name].copy_(tensor)


def replaced_axes(analysis: Analysis, genotype: Mapping[str, Choice]) -> dict[str, Axes]:
    """The labels of the dimensions of what took the place of convolutions, by the names of its tensors. What groups
    read has none: their inputs are theirs only together."""
    axes: dict[str, Axes] = {}
    for block in analysis.blocks:
        for site in block.sites:
            if is_replaced(site, genotype[block.name]):
                parts = _parts(site, str(genotype[block.name].conv))
                axes |= {f"{site.module}.{name}": own for name, own in parts.items()}
    return axes


def _parts(site: Site, kind: str) -> dict[str, Axes]:
    if site.spec.channelwise:
        return {"taps": (site.outputs,), "bias": (site.outputs,)}
    spatial: Labels | None = site.outputs if kind == "blueprint" else site.inputs
    spatial = None if group_count(kind) else spatial
    return {
        "spatial.weight": (spatial,),
        "spatial.taps": (spatial,),
        "spatial.bias": (spatial,),
        "pointwise.weight": (site.outputs, site.inputs),
        "pointwise.bias": (site.outputs,),
    }


def _grown(weight: Tensor, kernel_size: int) -> Tensor:
    return weight if weight.shape[-1] >= kernel_size else resize_kernel(weight, kernel_size)


def _layer(tensor: str) -> str:
    """The convolution that a tensor of a replacement (`….conv1.spatial.weight`) stands for; of others what holds it."""
    parts = tensor.split(".")
    return ".".join(parts[:-2] if parts[-2:-1] in (["spatial"], ["pointwise"]) else parts)


def made_like(block: Block, index: int) -> int:
    """The choice whose entry stands for another one's. A kernel larger than the base's begins as the base's with zeros
    around it: dearer and no better, it is not made again."""
    choice, own = block.choices[index], block.default.kernel_size
    if not choice.keep or choice.conv == "shift" or own is None or (choice.kernel_size or own) <= own:
        return index
    return block.choices.index(replace(choice, kernel_size=own))


def made_choices(block: Block) -> list[int]:
    """The choices that have an entry of their own: all but the base's and what is made like another one."""
    return [index for index in range(1, len(block.choices)) if made_like(block, index) == index]


def entry_file(folder: Path, block: Block, index: int) -> EntryFile:
    """The file of a block's choice at a position."""
    return EntryFile(folder / f"{block.name}-{index:03d}.safetensors")
