"""A training step that keeps less for its way back: what batch norms write is computed once more there, to the bit."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

_PLAIN = (nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Hardswish, nn.GELU)  # the same each time


@dataclass(slots=True, eq=False)
class _Made:
    """A tensor that is what `work` makes of `source`: computed at its first use, and kept from then on."""

    source: Tensor | _Made
    work: Callable[[Tensor], Tensor]
    again: Tensor | None = None

    def value(self) -> Tensor:
        """The tensor."""
        if self.again is None:
            with torch.no_grad():
                self.again = self.work(_value(self.source))
        return self.again


def _value(tensor: Tensor | _Made) -> Tensor:
    return tensor if isinstance(tensor, Tensor) else tensor.value()


@dataclass(slots=True, eq=False)
class _Kept:
    """What autograd keeps of a tensor: itself, or how it was made."""

    tensor: Tensor | _Made


@dataclass(slots=True, eq=False)
class _PassNotes:
    """Of one forward pass, by memory: how tensors that still exist were made, at which version of theirs, and what
    autograd keeps as it is."""

    made: dict[int, tuple[weakref.ref[Tensor], int, _Made]] = field(default_factory=dict)
    kept: dict[int, list[_Kept]] = field(default_factory=dict)

    def keep(self, tensor: Tensor) -> _Kept:
        """What autograd is to keep in place of a tensor."""
        kept = _Kept(self.find(tensor) or tensor)
        if isinstance(kept.tensor, Tensor):
            self.kept.setdefault(_place(tensor), []).append(kept)
        return kept

    def find(self, tensor: Tensor, changes: int = 0) -> _Made | None:
        """How a tensor was made, when it was changed in place just so many times since then."""
        reference, version, made = self.made.get(_place(tensor), (None, 0, None))
        output = None if reference is None else reference()
        if output is None or output._version != version + changes or _form(output) != _form(tensor):
            return None
        return made

    def note(self, output: Tensor, made: _Made) -> None:
        """Remembers how an output was made; an activation that works in place has kept it by now."""
        self.made[_place(output)] = weakref.ref(output), output._version, made
        for kept in self.kept.pop(_place(output), ()):
            if isinstance(kept.tensor, Tensor) and _form(kept.tensor) == _form(output):
                kept.tensor = made

    def normalise(self, norm: nn.BatchNorm2d, source: Tensor, output: Tensor) -> None:
        """What a batch norm made of `source`."""
        if norm.training:
            self.note(output, _Made(self.find(source) or source.detach(), functools.partial(_normalised, norm)))

    def activate(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """The hook of a module that has neither weights nor chance."""
        changes = output is inputs[0] and not isinstance(module, nn.Identity)
        if made := self.find(inputs[0], changes):
            self.note(output, _Made(made, functools.partial(_activated, module)))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def _normalised(norm: nn.BatchNorm2d, inputs: Tensor) -> Tensor:
    return F.batch_norm(inputs, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)


def _activated(module: nn.Module, inputs: Tensor) -> Tensor:
    """What a module makes of inputs, which stay as they are; past its hooks."""
    made: Tensor = type(module).forward(module, inputs.clone() if getattr(module, "inplace", False) else inputs)
    return made


@contextmanager
def _noted(module: nn.Module, notes: _PassNotes) -> Iterator[None]:
    """Inside the block what a module makes is noted, where it is a norm or an activation."""
    with ExitStack() as stack:
        if type(module) is nn.BatchNorm2d:
            hook = module.register_forward_hook(lambda norm, inputs, output: notes.normalise(norm, inputs[0], output))
            stack.callback(hook.remove)
        elif type(module) is BatchNormAct2d and type(module.drop) is nn.Identity:
            read: list[Tensor] = []
            hook = module.register_forward_pre_hook(lambda norm, inputs: read.append(inputs[0]))
            stack.callback(hook.remove)
            hook = module.drop.register_forward_hook(
                lambda _, inputs, output, norm=module: notes.normalise(norm, read.pop(), output)
            )
            stack.callback(hook.remove)
            act: Any = module.act
            if getattr(act, "inplace", False):  # in place some activations keep a copy of what they read
                act.inplace = False
                stack.callback(setattr, act, "inplace", True)
        elif type(module) in _PLAIN:
            stack.callback(module.register_forward_hook(notes.activate).remove)
        yield


@contextmanager
def recomputing(network: nn.Module) -> Iterator[None]:
    """Inside the block a forward pass of `network` keeps of batch norms in training mode what they read, not what they
    and the activations right behind them write: where the way back needs that, it is computed once more.

    Outputs and gradients are the same to the bit. Not for norms that several processes share.
    """
    notes = _PassNotes()
    with ExitStack() as stack:
        for module in network.modules():
            stack.enter_context(_noted(module, notes))
        stack.callback(notes.made.clear)  # what is left hangs on the graph
        stack.callback(notes.kept.clear)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(notes.keep, lambda kept: _value(kept.tensor)))
        yield
