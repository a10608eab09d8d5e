"""Which operators an interpreter of int8 files runs on a device, and which tensors it keeps for them.

These are the operators that `nas_kd.networks.tflite` writes for a network: norms are folded into their convolution,
what bounds an activation is fused into what makes it, each other operator makes a tensor of its own. A padding that
TensorFlow has no word for is an operator of its own too.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from nas_kd.analysis.schedule import Activations, Moment
from nas_kd.networks.windows import Window, as_needed

LAYERS = ("CONV_2D", "FULLY_CONNECTED")  # depthwise ones are the former here
_BOUNDS = ("relu", "relu6", "hardtanh", "clamp", "clamp_min")
_COPIES = ("clone", "contiguous", "_to_copy", "dropout", "native_dropout")  # bytes stay as they are
_OPERATORS = {
    "convolution": ("CONV_2D",),
    "add": ("ADD",),
    "mul": ("MUL",),
    "sigmoid": ("LOGISTIC",),
    "silu": ("LOGISTIC", "MUL"),
    "hardswish": ("HARD_SWISH",),
    "hardsigmoid": ("ADD_CONSTANT", "MUL_CONSTANT"),
    "mean": ("MEAN",),
    "_adaptive_avg_pool2d": ("MEAN",),
    "avg_pool2d": ("AVERAGE_POOL_2D",),
    "max_pool2d_with_indices": ("MAX_POOL_2D",),
    "slice": ("MAX_POOL_2D",),
    "constant_pad_nd": ("PAD",),
    "relu": ("RELU",),
    "relu6": ("RELU6",),
    "hardtanh": ("RELU6",),
    "cat": ("CONCATENATION",),
}
_SUM_BYTES = 4  # that a mean keeps beside each byte of its result


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTensor:
    """A tensor in the arena: so many times as long as an activation of the network, by its number."""

    number: int
    times: int = 1
    by: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operator on the device, the module that calls it, and the tensors that it reads and makes, by position; of
    a layer the shape of its weights, of what slides over an image the `window`, what is padded apart from it left out.
    """

    module: str
    kind: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    shape: tuple[int, ...] = ()
    window: Window | None = None

    @property
    def weights(self) -> int:
        """How many weights a layer has."""
        return math.prod(self.shape) if self.shape else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceGraph:
    """The operations of a network in order, its tensors, the first of which is the image, and its outputs."""

    operations: tuple[Operation, ...]
    tensors: tuple[DeviceTensor, ...]
    outputs: tuple[int, ...]

    @property
    def lives(self) -> list[tuple[int, int]]:
        """The first and the last operation of each tensor's life."""
        first, last = {0: 0}, dict.fromkeys(range(len(self.tensors)), 0)
        for index, operation in enumerate(self.operations):
            first.update((tensor, index) for tensor in operation.makes)
            last.update((tensor, index) for tensor in (*operation.reads, *operation.makes))
        last.update((tensor, len(self.operations) - 1) for tensor in self.outputs)
        return [(first[tensor], last[tensor]) for tensor in range(len(self.tensors))]


def device_graph(activations: Activations, outputs: Iterable[int]) -> DeviceGraph:
    """What a device runs of a forward pass that was followed, whose outputs have these numbers."""
    builder = _Builder(activations)
    for moment in activations.moments:
        builder.add(moment)
    ends = tuple(dict.fromkeys(builder.places[number] for number in outputs))
    return _ordered(DeviceGraph(operations=tuple(builder.operations), tensors=tuple(builder.tensors), outputs=ends))


def _ordered(graph: DeviceGraph) -> DeviceGraph:
    """The operations in the order in which the file has them, the tensors in that in which they are made."""
    makers = {tensor: number for number, own in enumerate(graph.operations) for tensor in own.makes}
    needs = [[makers[tensor] for tensor in own.reads if tensor in makers] for own in graph.operations]
    ends = [makers[tensor] for tensor in graph.outputs if tensor in makers]
    operations = [graph.operations[number] for number in as_needed(needs, ends)]
    tensors = dict.fromkeys((0, *(tensor for own in operations for tensor in own.makes)))
    place = {tensor: number for number, tensor in enumerate(tensors)}

    def renumbered(numbers: Iterable[int]) -> tuple[int, ...]:
        return tuple(place[number] for number in numbers)

    return DeviceGraph(
        operations=tuple(replace(own, reads=renumbered(own.reads), makes=renumbered(own.makes)) for own in operations),
        tensors=tuple(graph.tensors[tensor] for tensor in tensors),
        outputs=renumbered(graph.outputs),
    )


class _Builder:
    """Turns the moments of a forward pass into operations, one after the other."""

    def __init__(self, activations: Activations) -> None:
        self.operations: list[Operation] = []
        self.tensors = [DeviceTensor(number=0)]
        self.places = {0: 0}  # by number: its tensor
        self._made = activations.made
        self._padded: dict[int, Window] = {}  # by number: zeros that its readers fold
        self._readers: defaultdict[tuple[int, int], list[Moment]] = defaultdict(list)  # by number and version
        self._versions: Counter[int] = Counter()  # by number: how often it was written over
        for moment in activations.moments:
            for number in moment.reads:
                self._readers_of(number).append(moment)
            self._versions.update(_written_over(moment))
        self._versions.clear()

    def add(self, moment: Moment) -> None:
        """Add the operations of one moment."""
        reads = [self.places[number] for number in moment.reads]
        is_the_same = self._is_the_same(moment)
        self._versions.update(_written_over(moment))
        made = [number for number in moment.makes if number == moment.makes[0] or self._readers_of(number)]
        made += _written_over(moment)
        if is_the_same or not made:
            self.places.update(dict.fromkeys(made, reads[0]))
            return
        reads[0], window = self._padding(moment, reads[0])
        kinds = _kinds(moment)
        if moment.operator == "cat":  # each part is rounded to one scale
            parts = [self._operation(moment, "QUANTIZE", [read], [self.tensors[read]]) for read in reads]
            reads = [part for (part,) in parts]
        for kind in kinds[:-1]:
            between = self._operation(moment, kind, reads, [DeviceTensor(number=made[0])])
            reads = [*between, *(reads if moment.operator == "silu" else [])]
        tensors = self._operation(moment, kinds[-1], reads, [DeviceTensor(number=number) for number in made], window)
        self.places.update(zip(made, tensors, strict=True))

    def _is_the_same(self, moment: Moment) -> bool:
        """Whether what a moment makes is what it reads, as the device sees it."""
        read, made = moment.reads[0], (*moment.makes, *moment.reads)[0]
        readers = self._readers_of(made)
        if moment.kind in ("norm", "reshape") or moment.operator in _COPIES:
            return True
        if moment.operator == "slice":  # rows, then columns
            everything = self._made[read].numel() == self._made[made].numel()
            return everything or {reader.operator for reader in readers} == {"slice"}
        if moment.kind == "pad" and moment.window is not None and {reader.kind for reader in readers} == {"product"}:
            self._padded[made] = moment.window
            return True
        return moment.operator in _BOUNDS and len(self._readers_of(read)) == 1 and read != 0

    def _readers_of(self, number: int) -> list[Moment]:
        """What reads a tensor before it is written over."""
        return self._readers[number, self._versions[number]]

    def _padding(self, moment: Moment, read: int) -> tuple[int, Window | None]:
        """The tensor that a moment's window slides over, a padded copy where it has to be, and that window."""
        if moment.window is None or moment.kind == "pad":
            return read, moment.window
        number = moment.reads[0]
        window = moment.window.around(self._padded[number]) if number in self._padded else moment.window
        if not window.padded:
            return read, window
        height, width = window.size
        tensor = self.tensors[read]
        copy = replace(tensor, times=tensor.times * window.padded, by=tensor.by * height * width)
        padding = Window(size=window.size, pads=window.pads)
        return self._operation(moment, "PAD", [read], [copy], padding)[0], window.after_padding

    def _operation(
        self,
        moment: Moment,
        kind: str,
        reads: Sequence[int],
        makes: Sequence[DeviceTensor],
        window: Window | None = None,
    ) -> tuple[int, ...]:
        made = tuple(range(len(self.tensors), len(self.tensors) + len(makes)))
        self.tensors += makes
        beside: tuple[int, ...] = ()
        if kind == "MEAN":
            beside = (len(self.tensors),)
            self.tensors.append(replace(makes[0], times=_SUM_BYTES))
        operation = Operation(
            module=moment.module,
            kind=kind,
            reads=tuple(reads),
            makes=(*made, *beside),
            shape=moment.weights if kind in LAYERS else (),
            window=window,
        )
        self.operations.append(operation)
        return made


def _written_over(moment: Moment) -> tuple[int, ...]:
    """The tensor that an operator in place writes over."""
    return () if moment.makes or moment.kind == "reshape" else moment.reads[:1]


def _kinds(moment: Moment) -> tuple[str, ...]:
    if moment.operator in ("add", "mul") and len(moment.reads) == 1:
        return (f"{moment.operator.upper()}_CONSTANT",)
    known = _OPERATORS.get(moment.operator)
    return known or ("FULLY_CONNECTED" if moment.kind == "product" else moment.operator.upper(),)
