"""torch-pruning, given its best: a network pruned down to a budget, for studies/pruning.py and studies/versus.py.

Iteratively, as in torch-pruning's own examples: `STEPS` rounds that each remove a little everywhere, importances
computed anew in every round. Close to the budget groups go one by one, so that what is left lies just within it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn
from torch_pruning.pruner import importance as importances

from nas_kd.budget import Budget, Cost
from nas_kd.costs.verification import measure
from nas_kd.data.images import Images, normalise
from nas_kd.networks.cifar import _PadShortcut

STEPS = 50
MOST = 0.9  # of a layer's channels may go: a global ranking else empties whole layers
GRADIENT_IMAGES, BATCH = 256, 128  # per round, for the importances that need gradients

IMPORTANCES: dict[str, Callable[[], importances.Importance]] = {
    "l1": lambda: importances.GroupMagnitudeImportance(p=1),
    "l2": lambda: importances.GroupMagnitudeImportance(p=2),
    "bn": importances.BNScaleImportance,
    "lamp": importances.LAMPImportance,  # locally the same order as l2
    "taylor": importances.GroupTaylorImportance,  # the Hessian one keeps the gradients of its last image only
}


@dataclass(frozen=True, slots=True)
class Method:
    """`ranking` is local (the same share of every layer), or global; `part` is `inner` (residual streams stay) or
    `whole`; `importance` one of `IMPORTANCES`. What stays are multiples of so many channels: runtimes compute 8 or 16
    at once, so that 24 channels may be faster than 23."""

    ranking: str
    importance: str
    part: str
    multiple: int = 1

    def __str__(self) -> str:
        rounded = f", multiples of {self.multiple}" if self.multiple > 1 else ""
        return f"torch-pruning {self.ranking} {self.importance} {self.part}{rounded}"


METHODS = tuple(
    Method(ranking, name, part)
    for ranking, names in (("local", ("l1", "l2", "bn", "taylor")), ("global", ("l1", "l2", "bn", "lamp", "taylor")))
    for name in names
    for part in ("inner", "whole")
)


class Pick(nn.Module):
    """The shortcut without parameters of a CIFAR ResNet, with any channels: every second pixel; output channel i is
    input channel `source[i]`, or zero where that is −1. Costs no MACs, like the zero padding that it stands for."""

    def __init__(self, inputs: int, pad: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.register_buffer("source", F.pad(torch.arange(inputs), (pad, pad), value=-1))

    def forward(self, x: Tensor) -> Tensor:
        kept = (self.source >= 0).to(x.dtype)
        return x[:, :, ::2, ::2].index_select(1, self.source.clamp(min=0)) * kept[:, None, None]


class PickPruner(torch_pruning.BasePruningFunc):
    """Tells torch-pruning how a `Pick` loses channels: its outputs are independent of its inputs."""

    def prune_out_channels(self, layer: Pick, idxs: Sequence[int]) -> Pick:
        kept = [channel for channel in range(len(layer.source)) if channel not in set(idxs)]
        layer.source = layer.source[kept]
        return layer

    def prune_in_channels(self, layer: Pick, idxs: Sequence[int]) -> Pick:
        place = torch.full((layer.inputs + 1,), -1)  # the last is that of −1
        kept = [channel for channel in range(layer.inputs) if channel not in set(idxs)]
        place[kept] = torch.arange(len(kept))
        layer.source, layer.inputs = place[layer.source], len(kept)
        return layer

    def get_out_channels(self, layer: Pick) -> int:
        return len(layer.source)

    def get_in_channels(self, layer: Pick) -> int:
        return layer.inputs


def prune(
    base: nn.Module,
    method: Method,
    budget: Budget,
    images: Images,
    cost: Callable[[nn.Module], Cost] | None = None,
) -> nn.Module | None:
    """A pruned copy of `base` within the budget, in training form; None when the method cannot get there.

    `images` (N×C×H×W) give the size and, for Taylor importances, the gradients. `cost` is what a network costs, by
    default what can be counted; a latency is to be measured by it.
    """
    size = images.pixels.shape[1:]
    cost = cost or (lambda network: measure(network, size))
    network = copy.deepcopy(base).cpu()
    if method.part == "whole":
        _replace_shortcuts(network)
    pruner = _pruner(network, method, images)
    for _ in range(STEPS):
        if method.importance == "taylor":
            _accumulate_gradients(network, images)
        closely = budget.scaled(1.25).admits(cost(network))
        for group in pruner.step(interactive=True):
            group.prune()
            if closely and budget.admits(cost(network)):
                break
        if budget.admits(cost(network)):
            network.zero_grad()
            return network
    return None


def _pruner(network: nn.Module, method: Method, images: Images) -> torch_pruning.BasePruner:
    image = torch.zeros(2, *images.pixels.shape[1:])
    graph = torch_pruning.DependencyGraph().build_dependency(network, image, customized_pruners={Pick: PickPruner()})
    last = [module for module in network.modules() if isinstance(module, nn.Linear)]
    streams = _stream_layers(graph) if method.part == "inner" else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch_pruning.BasePruner(
            network,
            image,
            importance=IMPORTANCES[method.importance](),
            global_pruning=method.ranking == "global",
            pruning_ratio=1.0,
            max_pruning_ratio=MOST,
            iterative_steps=STEPS,
            round_to=method.multiple if method.multiple > 1 else None,
            ignored_layers=[*last, *streams],
            customized_pruners={Pick: PickPruner()},
        )


def _stream_layers(graph: torch_pruning.DependencyGraph) -> list[nn.Module]:
    """The layers that write into a residual sum."""
    layers = []
    for group in graph.get_all_groups():
        if any("AddBackward" in dependency.target.name for dependency, _ in group):
            layers += [dependency.target.module for dependency, _ in group if _writes(graph, dependency)]
    return layers


def _writes(graph: torch_pruning.DependencyGraph, dependency: torch_pruning.Dependency) -> bool:
    return graph.is_out_channel_pruning_fn(dependency.handler) and isinstance(dependency.target.module, nn.Conv2d)


def _replace_shortcuts(network: nn.Module) -> None:
    """torch-pruning narrows the stream but not a number in a module's constructor: option A's padding fails."""
    for name, module in list(network.named_modules()):
        if isinstance(module, _PadShortcut):
            block = network.get_submodule(name.rpartition(".")[0])
            block.shortcut = Pick(block.conv1.in_channels, module.pad)


def _accumulate_gradients(network: nn.Module, images: Images) -> None:
    """Those of the labels' cross-entropy: towards the teacher's logits an unpruned copy of the teacher has none."""
    network.train().zero_grad()
    for start in range(0, GRADIENT_IMAGES, BATCH):
        part = images[start : start + BATCH]
        pixels = normalise(part.pixels, images.mean, images.std, torch.device("cpu"))
        F.cross_entropy(network(pixels), part.labels).backward()
