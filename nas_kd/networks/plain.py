"""Networks as people bring them (wrapped, hooked, synchronised, re-parametrised) and the plain one inside."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import torch
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel

from nas_kd.errors import ModelError

Network = TypeVar("Network", bound=nn.Module)
_logger = logging.getLogger(__name__)
_AROUND = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel, ModelEmaV2, ModelEmaV3)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, float, int, str, type(None))  # what a copy has as it is
_UNDO = {  # what recomputes a weight before each forward pass, and how to make its result the weight
    "WeightNorm": 'torch.nn.utils.remove_weight_norm(module, "weight")',
    "SpectralNorm": 'torch.nn.utils.remove_spectral_norm(module, "weight")',
}


def unwrapped(network: Network) -> Network:
    """The network inside `torch.compile`, `DataParallel`, `DistributedDataParallel` or a moving average."""
    inside: Any = network
    while True:
        if "_orig_mod" in inside._modules:  # torch.compile; its class would take seconds to import
            inside = inside._orig_mod
        elif isinstance(inside, _AROUND):
            inside = inside.module
        elif isinstance(inside, ModelEma):
            inside = inside.ema
        else:
            return cast(Network, inside)


def plain(network: Network) -> Network:
    """The network itself, without what is wrapped around it. Where it has hooks or synchronised batch norms, a twin
    without those that has its very parameters and buffers. Raises ModelError as `check_plain`."""
    inside = unwrapped(network)
    check_plain(inside, type(inside).__name__)
    if not hooked(inside) and not any(isinstance(module, nn.SyncBatchNorm) for module in inside.modules()):
        return inside
    twin = copied(inside, {**{id(t): t for t in named_tensors(inside).values()}, **without_hooks(inside)})
    return _unsynchronised(twin)


def hooked(network: nn.Module) -> list[str]:
    """The modules that run code of the user's, by path."""
    return [path for path, module in network.named_modules() if any(getattr(module, hooks) for hooks in _HOOKS)]


def without_hooks(network: nn.Module) -> dict[int, Any]:
    """A memo by which `deepcopy` leaves the hooks out: they may hold anything, and belong to the network alone."""
    return {id(getattr(module, hooks)): OrderedDict() for module in network.modules() for hooks in _HOOKS}


def copied(network: Network, memo: dict[int, Any] | None = None) -> Network:
    """`copy.deepcopy(network, memo)` in a third of the time: of what a module holds, most is empty or a plain value."""
    memo = {} if memo is None else memo
    modules: list[Any] = [m for m in network.modules() if id(m) not in memo and _copies_as_usual(type(m))]
    memo |= {id(module): module.__class__.__new__(module.__class__) for module in modules}
    for module in modules:
        memo[id(module)].__setstate__({name: _copied(value, memo) for name, value in module.__getstate__().items()})
    return copy.deepcopy(network, memo)


def _copies_as_usual(kind: Any) -> bool:
    """Whether `deepcopy` makes an empty object and gives it a copy of the other's state."""
    usual: Any = nn.Module
    same = kind.__reduce_ex__ is usual.__reduce_ex__ and kind.__getstate__ is usual.__getstate__
    return same and not hasattr(kind, "__deepcopy__")


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind not in (dict, OrderedDict) or id(value) in memo:
        return copy.deepcopy(value, memo)
    memo[id(value)] = twin = kind()
    twin.update({key: _copied(item, memo) for key, item in value.items()})
    return twin


def _unsynchronised(network: Network) -> Network:
    """Puts batch norms in the places of synchronised ones, which train on GPUs alone."""
    if isinstance(network, nn.SyncBatchNorm):
        return cast(Network, _batch_norm(network))
    for path, module in list(network.named_modules()):
        if isinstance(module, nn.SyncBatchNorm):
            network.set_submodule(path, _batch_norm(module))
    return network


def _batch_norm(sync: nn.SyncBatchNorm) -> nn.Module:
    kind = BatchNormAct2d if isinstance(sync, SyncBatchNormAct) else nn.BatchNorm2d
    with torch.device("meta"):
        norm: nn.Module = kind(
            sync.num_features, sync.eps, sync.momentum, sync.affine, track_running_stats=sync.track_running_stats
        )
    for name in ("_parameters", "_buffers", "_modules"):  # timm's has its activation inside
        getattr(norm, name).update(getattr(sync, name))
    return norm.train(sync.training)


def check_plain(network: nn.Module, name: str) -> None:
    """Raises ModelError, with a way out, for a network whose students could not be what it computes."""
    if isinstance(network, torch.jit.ScriptModule):
        raise ModelError(f"{name} is a torch.jit module, of which no student can be made: give the network itself")
    if (getattr(network, "_model_args", None) or {}).get("features_only"):
        raise ModelError(
            f"{name} was created with features_only=True, which has no classifier to search with: search the whole "
            'model; of its exports timm.create_model("local-dir:FOLDER", features_only=True) makes feature extractors'
        )
    for path, module in network.named_modules():
        for what, undo in _recomputed(module):
            raise ModelError(f"{name} recomputes weights of {path or 'its own'} ({what}): make them final by {undo}")
    lazy = next((key for key, tensor in named_tensors(network).items() if is_lazy(tensor)), None)
    if lazy is not None:
        raise ModelError(f"{name} does not know the size of {lazy} yet: run it on a batch of images first")


def _recomputed(module: nn.Module) -> Iterator[tuple[str, str]]:
    """How the weights of a module are recomputed before each forward pass, and what would end that."""
    if parametrize.is_parametrized(module):
        tensor = next(iter(module.parametrizations))  # type: ignore[arg-type]
        yield "parametrized", f'torch.nn.utils.parametrize.remove_parametrizations(module, "{tensor}")'
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            yield "pruned", f'torch.nn.utils.prune.remove(module, "{hook._tensor_name}")'
        elif type(hook).__name__ in _UNDO and type(hook).__module__.startswith("torch.nn.utils."):
            yield type(hook).__name__, _UNDO[type(hook).__name__]


def tell_of_hooks(network: nn.Module) -> None:
    """Logs in one line that students of a hooked network have no hooks."""
    if paths := [path or "the network itself" for path in hooked(network)]:
        more = f" and {len(paths) - 2} more modules" if len(paths) > 2 else ""
        _logger.warning(
            "%s has hooks (%s%s): its students are made without them, and what hooks change is not seen",
            type(network).__name__,
            ", ".join(paths[:2]),
            more,
        )


def named_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a network by name; one that is shared under each of its names."""
    parameters: dict[str, Tensor] = dict(network.named_parameters(remove_duplicate=False))
    return parameters | dict(network.named_buffers(remove_duplicate=False))
