"""Which activations are alive at each moment of a forward pass, by one stated schedule.

A *moment* is a call of one ATen operator on activations. A tensor is alive from the call that makes it to the last one
that reads it; the network's image and output are alive at the first and last moment. Views share the memory of what
they view, and operators in place make nothing. Weights, what is computed from weights alone, and tensors that nothing
reads (the statistics of a layer norm) do not count. Nothing is counted for what an operator uses inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT_BYTES = 4  # per element of a floating-point tensor, in whatever precision the network is


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One call: the module that made it, and the numbers of the tensors that it reads and makes."""

    module: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]


def bytes_of(tensor: Tensor) -> int:
    """The bytes of one element, floating-point ones counted as float32."""
    return FLOAT_BYTES if tensor.is_floating_point() else tensor.element_size()


def bytes_of_weights(network: torch.nn.Module) -> int:
    """The cost `size`: bytes of all parameters and saved buffers as an export's safetensors file holds them, floating
    point at float32 (batch norms also save a count of 8 bytes). The file's header, some 100 bytes a tensor, is not
    counted."""
    saved = {id(tensor): tensor for tensor in network.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * bytes_of(tensor) for tensor in saved.values())


class Activations:
    """Follows one forward pass: call `record` with each operator. Tensors are numbered as they are made; 0 is the
    image. Views have the number of what they view."""

    def __init__(self) -> None:
        self.moments: list[Moment] = []
        self.made: list[Tensor] = []  # held, so that no later tensor gets the address of an earlier one
        self._numbers: dict[int, int] = {}

    def begin(self, image: Tensor) -> None:
        """The forward pass starts on `image`."""
        self._number(image)

    def record(self, module: str, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> None:
        """`module` calls an operator that reads `inputs` and gives `outputs`."""
        reads = self.numbers(inputs)
        if not reads:
            return
        before = len(self.made)
        for tensor in outputs:
            self._number(tensor)
        self.moments.append(Moment(module=module, reads=reads, makes=tuple(range(before, len(self.made)))))

    def numbers(self, tensors: Iterable[Tensor]) -> tuple[int, ...]:
        """The numbers of those among `tensors` that are activations."""
        found = (self._numbers.get(_address(tensor)) for tensor in tensors)
        return tuple(dict.fromkeys(number for number in found if number is not None))

    def _number(self, tensor: Tensor) -> None:
        if self._numbers.setdefault(_address(tensor), len(self.made)) == len(self.made):
            self.made.append(tensor)

    def peak(self, outputs: Iterable[Tensor]) -> int:
        """The cost `peak_memory`: the largest sum of bytes alive at any moment."""
        alive = lifetimes(self.moments, self.numbers(outputs))
        totals = [0] * (len(self.moments) + 1)
        for number, (first, last) in alive.items():
            bytes_ = self.made[number].numel() * bytes_of(self.made[number])
            totals[first] += bytes_
            totals[last + 1] -= bytes_
        now = highest = 0
        for change in totals:
            now += change
            highest = max(highest, now)
        return highest


def lifetimes(moments: Sequence[Moment], outputs: Iterable[int]) -> dict[int, tuple[int, int]]:
    """By tensor the first and the last moment of its life, for those that are read."""
    first: dict[int, int] = {0: 0}
    last: dict[int, int] = {}
    for index, moment in enumerate(moments):
        first.update((number, index) for number in moment.makes)
        last.update((number, index) for number in moment.reads)
    last.update((number, len(moments) - 1) for number in outputs)
    return {number: (first[number], last[number]) for number in sorted(last) if number in first}


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
