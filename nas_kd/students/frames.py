"""The frame of a block: the smallest part of a base around it whose inputs and outputs keep their shape whatever the
block becomes. It can be run, compared and trained on its own."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nas_kd.analysis.structure import Analysis, Block
from nas_kd.genotype import Choice, Genotype
from nas_kd.students.building import build_student, student_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A module of the base (`path`), or of an `nn.Sequential` at `path` the children from `first` to `last`.

    `edited` are the modules inside that some choice of the block changes. The whole network has the path "". It may
    have `skips`: frames that are done before the first edited module runs, and of which the last one's outputs are all
    that is needed (`with_skips`)."""

    path: str
    first: str = ""
    last: str = ""
    edited: tuple[str, ...] = ()
    skips: tuple[Frame, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole network."""
        return not self.path and not self.first

    @property
    def prefix(self) -> str:
        """What stands before the names of its own tensors in the network's."""
        return f"{self.path}." if self.path else ""

    def inside(self, network: nn.Module) -> nn.Module:
        """The frame of a network, base or student, as a module that shares the network's."""
        module = network.get_submodule(self.path)
        if not self.first:
            return module
        names = [name for name, _ in module.named_children()]
        chosen = names[names.index(self.first) : names.index(self.last) + 1]
        return nn.Sequential(OrderedDict((name, module.get_submodule(name)) for name in chosen))

    def paths(self, network: nn.Module) -> frozenset[str]:
        """The modules of a network that run in the frame, the frame's own included."""
        inside = frozenset(f"{self.prefix}{name}".rstrip(".") for name, _ in self.inside(network).named_modules())
        return inside.difference(*(skipped.paths(network) for skipped in self.skips))

    def outside(self, network: nn.Module) -> list[nn.Module]:
        """The largest modules of a network that hold nothing of the frame, or only what it skips."""
        inside = {id(module) for module in self.inside(network).modules()}
        inside -= {id(module) for skipped in self.skips for module in skipped.inside(network).modules()}
        found, left = [], [network]
        while left:
            module = left.pop()
            if any(id(part) in inside for part in module.modules()):
                left += module.children()
            else:
                found.append(module)
        return found

    def ends(self, network: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The modules of a network that read the frame's input and write its output."""
        if not self.first:
            module = network.get_submodule(self.path)
            return module, module
        return network.get_submodule(f"{self.prefix}{self.first}"), network.get_submodule(f"{self.prefix}{self.last}")


def find_frames(base: nn.Module, analysis: Analysis, images: Tensor) -> dict[str, Frame]:
    """The frame of every block of `base`; `images` (a few, normalised, N×C×H×W) show which modules run just once."""
    once = _run_once(base, images)
    frames = {block.name: _frame(base, analysis, block, once) for block in analysis.blocks}
    with torch.no_grad(), recording(base, frames) as recordings:
        base(images)
    return {
        block.name: frame
        if _keeps_shapes(base, analysis, block, frame, recordings[block.name][0])
        else Frame(path="", edited=frame.edited)
        for block, frame in zip(analysis.blocks, frames.values(), strict=True)
    }


def with_skips(base: nn.Module, analysis: Analysis, frames: Mapping[str, Frame], images: Tensor) -> dict[str, Frame]:
    """The frames of `find_frames`, where those that are the whole network need not run from its first layer on."""
    modules = [call.module for call in analysis.trace.calls]
    last = {module: index for index, module in enumerate(modules)}
    ends = {frame: max((last.get(path, -1) for path in frame.paths(base)), default=-1) for frame in frames.values()}
    found = {}
    for name, frame in frames.items():
        begin = next((index for index, module in enumerate(modules) if module in frame.edited), 0)
        earlier = disjoint(other for other, end in ends.items() if 0 <= end < begin) if frame.is_whole else []
        found[name] = _checked(base, frame, sorted(earlier, key=ends.__getitem__), images) if earlier else frame
    return found


@torch.no_grad()
def _checked(base: nn.Module, frame: Frame, earlier: Iterable[Frame], images: Tensor) -> Frame:
    """The frame without the earlier ones that it may skip; as it is when it would then write something else."""
    candidate = replace(frame, skips=tuple(earlier))
    with recording(base, {"": candidate}) as recordings:
        base(images)
    recorded = recordings[""][0]
    outputs = run_frame(base, recorded)
    same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(outputs, recorded.outputs, strict=True))
    return candidate if same else frame


@torch.no_grad()
def _keeps_shapes(base: nn.Module, analysis: Analysis, block: Block, frame: Frame, recorded: Recording) -> bool:
    """Whether a frame's outputs are as before when its block is narrowed: not so where a network picks from lists of
    features what a layer outside reads."""
    if frame.is_whole:
        return True
    narrowest = min(block.choices, key=lambda choice: choice.width)
    outside = frame.outside(base)
    student = build_student(base, analysis, swapped(analysis, block, narrowest), shared=outside).eval()
    try:
        outputs = run_frame(frame.inside(student), recorded)
    except RuntimeError:
        return False
    return [output.shape for output in outputs] == [output.shape for output in recorded.outputs]


def _frame(base: nn.Module, analysis: Analysis, block: Block, once: frozenset[str]) -> Frame:
    edited = edited_modules(base, analysis, block)
    paths = [path.split(".") for path in edited]
    alike = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    shared = [parts[0] for parts in alike]
    while shared and ".".join(shared) not in once:
        shared.pop()
    path = ".".join(shared)
    parent = base.get_submodule(path)
    if type(parent) is nn.Sequential and path not in edited:
        touched = {parts[len(shared)] for parts in paths}
        names = [name for name, _ in parent.named_children()]
        run = [index for index, name in enumerate(names) if name in touched]
        first, last = names[run[0]], names[run[-1]]
        prefix = f"{path}." if path else ""
        if all(f"{prefix}{name}" in once for name in names[run[0] : run[-1] + 1]):
            return Frame(path=path, first=first, last=last, edited=edited)
    return Frame(path=path, edited=edited)


def edited_modules(base: nn.Module, analysis: Analysis, block: Block) -> tuple[str, ...]:
    """The modules that some choice of `block` resizes, replaces or drops, in the base's order."""
    found = set()
    for choice in _extremes(block):
        plan = student_plan(base, analysis, swapped(analysis, block, choice))
        found |= {path for path, edit in plan.edits.items() if edit.shapes or edit.conv is not None or edit.drop}
    return tuple(path for path, _ in base.named_modules() if path in found)


def _extremes(block: Block) -> list[Choice]:
    """Choices that together change all that any choice of the block changes."""
    default = block.default
    narrowest = min(block.choices, key=lambda choice: choice.width)
    others = [
        next((c for c in block.choices if c.keep and c.conv != default.conv), None),
        next((c for c in block.choices if c.keep and c.kernel_size != default.kernel_size), None),
        next((c for c in block.choices if not c.keep), None),
    ]
    return [narrowest, *(choice for choice in others if choice is not None)]


def swapped(analysis: Analysis, block: Block, choice: Choice) -> Genotype:
    """The base with one block changed."""
    return Genotype.of({**analysis.identity, block.name: choice})


def _run_once(base: nn.Module, images: Tensor) -> frozenset[str]:
    """The modules that run exactly once in a forward pass, and read and write tensors alone."""
    counts: dict[str, int] = {}

    def counter(name: str) -> object:
        def hook(module: nn.Module, arguments: object, keywords: object, output: object) -> None:
            known = all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((arguments, keywords, output)))
            counts[name] = counts.get(name, 0) + (1 if known else 2)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, module in base.named_modules():
            handle = module.register_forward_hook(counter(name), with_kwargs=True)
            stack.callback(handle.remove)
        base(images)
    return frozenset(name for name, count in counts.items() if count == 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recording:
    """What went into a frame and what came out for N images: tensors N×…, and the input's structure.

    Of a frame with `skips` also what the last of these wrote, `given`, and the shapes (without N) that the others
    write, `blanks`."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    structure: pytree.TreeSpec
    skips: tuple[Frame, ...] = ()
    given: tuple[Tensor, ...] = ()
    blanks: tuple[tuple[torch.Size, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.inputs[0])

    def __getitem__(self, part: slice | Tensor) -> Recording:
        return replace(
            self,
            inputs=tuple(tensor[part] for tensor in self.inputs),
            outputs=tuple(tensor[part] for tensor in self.outputs),
            given=tuple(tensor[part] for tensor in self.given),
        )

    def first(self, count: int) -> Recording:
        """The same of the first images, in memory of their own where there were more."""
        if count >= len(self):
            return self
        copied = [tuple(t[:count].clone() for t in tensors) for tensors in (self.inputs, self.outputs, self.given)]
        return replace(self, inputs=copied[0], outputs=copied[1], given=copied[2])

    @property
    def bytes(self) -> int:
        """The size of all tensors."""
        return sum(tensor.nbytes for tensor in (*self.inputs, *self.outputs, *self.given))

    def replayed(self) -> dict[Frame, tuple[Tensor, ...]]:
        """What the skipped frames give in place of running: zeros, and the last of them what it wrote."""
        if not self.skips:
            return {}
        zero = self.given[0].new_zeros(())
        blanks = [tuple(zero.expand(len(self), *shape) for shape in shapes) for shapes in self.blanks]
        return dict(zip(self.skips, [*blanks, self.given], strict=True))


def run_frame(frame: nn.Module, recorded: Recording) -> tuple[Tensor, ...]:
    """The outputs of a frame's module for the inputs of a recording, which stay as they are."""
    copies = [tensor.clone() for tensor in recorded.inputs]  # blocks begin with in-place activations now and then
    arguments, keywords = pytree.tree_unflatten(copies, recorded.structure)
    with replaying(frame, recorded.replayed()):
        return tuple(pytree.tree_leaves(frame(*arguments, **keywords)))


@contextmanager
def recording(base: nn.Module, frames: Mapping[str, Frame]) -> Iterator[dict[str, list[Recording]]]:
    """Keeps what passes through the frames of `base` while it runs inside the block: by name, one recording a batch."""
    recordings: dict[str, list[Recording]] = {name: [] for name in frames}
    entered: dict[str, tuple[tuple[Tensor, ...], pytree.TreeSpec]] = {}
    skipped: dict[Frame, tuple[Tensor, ...]] = {}

    def enter(name: str) -> object:
        def hook(module: nn.Module, arguments: object, keywords: object) -> None:
            leaves, structure = pytree.tree_flatten((arguments, keywords))
            entered[name] = (tuple(leaf.detach().clone() for leaf in leaves), structure)

        return hook

    def leave(name: str) -> object:
        def hook(module: nn.Module, arguments: object, output: object) -> None:
            inputs, structure = entered.pop(name)
            outputs = tuple(leaf.detach().clone() for leaf in pytree.tree_leaves(output))
            recorded = Recording(inputs=inputs, outputs=outputs, structure=structure)
            recordings[name].append(_begun_late(recorded, frames[name].skips, skipped))

        return hook

    def skip(frame: Frame) -> object:
        def hook(module: nn.Module, arguments: object, output: object) -> None:
            skipped[frame] = tuple(leaf.detach().clone() for leaf in pytree.tree_leaves(output))

        return hook

    with ExitStack() as stack:
        for frame in {skipped for own in frames.values() for skipped in own.skips}:
            stack.callback(frame.ends(base)[1].register_forward_hook(skip(frame)).remove)  # type: ignore[arg-type]
        for name, frame in frames.items():
            first, last = frame.ends(base)
            pre = first.register_forward_pre_hook(enter(name), with_kwargs=True)  # type: ignore[arg-type]
            stack.callback(pre.remove)
            stack.callback(last.register_forward_hook(leave(name)).remove)  # type: ignore[arg-type]
        yield recordings


def _begun_late(recorded: Recording, skips: tuple[Frame, ...], wrote: Mapping[Frame, tuple[Tensor, ...]]) -> Recording:
    """The recording of a frame with these skips, which have just run."""
    if not skips:
        return recorded
    blanks = tuple(tuple(tensor.shape[1:] for tensor in wrote[frame]) for frame in skips[:-1])
    return replace(recorded, skips=skips, given=wrote[skips[-1]], blanks=blanks)


@contextmanager
def replaying(base: nn.Module, outputs: Mapping[Frame, tuple[Tensor, ...]]) -> Iterator[None]:
    """Inside the block these frames of `base` do not run: each gives the tensors that are set down for it."""
    patched: list[tuple[nn.Module, object]] = []

    def patch(module: nn.Module, forward: object) -> None:
        patched.append((module, vars(module).get("forward")))
        module.forward = forward  # type: ignore[assignment]  # an instance's attribute hides the class's method

    def giver(tensors: tuple[Tensor, ...], structure: pytree.TreeSpec) -> object:
        return lambda *arguments, **keywords: pytree.tree_unflatten([t.clone() for t in tensors], structure)

    try:
        for frame, tensors in outputs.items():
            modules = list(frame.inside(base).children()) if frame.first else [base.get_submodule(frame.path)]
            patch(modules[0], giver(tensors, frame_structure(len(tensors))))
            for module in modules[1:]:
                patch(module, lambda tensor: tensor)
        yield
    finally:
        for module, before in reversed(patched):
            del module.forward
            if before is not None:  # it was hidden already
                module.forward = before  # type: ignore[assignment]


def frame_structure(tensors: int) -> pytree.TreeSpec:
    """How a frame's outputs hang together: a lone tensor, or a list of them."""
    structure: pytree.TreeSpec = pytree.tree_structure(0 if tensors == 1 else [0] * tensors)
    return structure


def disjoint(frames: Iterable[Frame]) -> list[Frame]:
    """Those of the frames that share no module with a later one, nor hold the whole network."""
    kept: list[Frame] = []
    for frame in reversed(list(frames)):
        if not frame.is_whole and not any(_overlap(frame, other) for other in kept):
            kept.append(frame)
    return kept[::-1]


def _overlap(frame: Frame, other: Frame) -> bool:
    """Whether one of two frames may hold a module of the other; runs of one Sequential are taken to."""
    return f"{other.path}.".startswith(f"{frame.path}.") or f"{frame.path}.".startswith(f"{other.path}.")


def join_batches(recordings: list[Recording]) -> Recording:
    """One recording of all batches."""
    return replace(
        recordings[0],
        inputs=tuple(torch.cat(parts) for parts in zip(*(p.inputs for p in recordings), strict=True)),
        outputs=tuple(torch.cat(parts) for parts in zip(*(p.outputs for p in recordings), strict=True)),
        given=tuple(torch.cat(parts) for parts in zip(*(p.given for p in recordings), strict=True)),
    )
