"""Forward and backward passes recorded once and replayed: a small network leaves a GPU waiting for Python otherwise."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nas_kd.data.images import Batch

Backward = Callable[[Batch], Tensor]  # fills the gradients of a batch of normalised images; its mean loss
EAGER = 3  # steps come first as they are: libraries choose their kernels then
_logger = logging.getLogger(__name__)


class StepGraph:
    """One forward and backward pass on the GPU of `batch`, as a CUDA graph for batches of that shape.

    `backward` may not wait for the device. Recording runs nothing: batch norms and gradients change at `replay`.
    """

    def __init__(self, backward: Backward, batch: Batch, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        logits = None if batch.logits is None else batch.logits.clone()
        self.batch = Batch(batch.pixels.clone(memory_format=torch.preserve_format), batch.labels.clone(), logits)
        self.device, self.graph = batch.pixels.device, torch.cuda.CUDAGraph()
        for parameter in parameters:  # the recorded pass makes gradients of its own, and writes these at each replay
            parameter.grad = None
        with _recording(self.device), torch.cuda.graph(self.graph):
            self.loss = backward(self.batch)
        self.gradients = [parameter.grad for parameter in parameters]

    def replay(self, batch: Batch) -> Tensor:
        """The mean loss of another batch, whose gradients the parameters hold then."""
        self.batch.pixels.copy_(batch.pixels)
        self.batch.labels.copy_(batch.labels)
        if self.batch.logits is not None and batch.logits is not None:
            self.batch.logits.copy_(batch.logits)
        with torch.cuda.device(self.device):
            self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss.clone()


class StepGraphs:
    """The graphs of one training, one for each shape of its batches; `backward` itself on a CPU, where the network has
    hooks (Python that a graph would not run again), and once a recording has failed."""

    def __init__(self, backward: Backward, network: nn.Module, device: torch.device) -> None:
        self.backward = backward
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.usable = device.type == "cuda" and not any(map(_has_hooks, network.modules()))
        self.graphs: dict[tuple[object, ...], StepGraph] = {}
        self.seen = 0

    def __call__(self, batch: Batch) -> Tensor:
        """The mean loss of a batch of normalised images on the device; its gradients are filled then."""
        self.seen += 1
        if not self.usable or self.seen <= EAGER:
            return self._eager(batch)
        key = (batch.pixels.shape, batch.labels.shape, batch.labels.dtype, batch.logits is None)
        if key not in self.graphs:
            try:
                self.graphs[key] = StepGraph(self.backward, batch, self.parameters)
            except RuntimeError as error:  # what waits for the device cannot be recorded; nor what does not fit
                _logger.info("steps are not recorded: %s", str(error).partition("\n")[0])
                self.give_up()
                return self._eager(batch)
        return self.graphs[key].replay(batch)

    def give_up(self) -> None:
        """Goes on without graphs, and gives their memory back."""
        self.usable = False
        self.graphs.clear()

    def _eager(self, batch: Batch) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        return self.backward(batch)


@contextmanager
def _recording(device: torch.device) -> Iterator[None]:
    """No garbage is collected meanwhile: a graph that is freed while another is recorded spoils it. One that fails
    leaves a random generator that nothing can draw from any more: it is put back."""
    generator = torch.cuda.default_generators[device.index or 0]
    before, collects = generator.clone_state(), gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.device(device):
            yield
    except BaseException:
        generator.graphsafe_set_state(before)
        raise
    finally:
        if collects:
            gc.enable()


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
