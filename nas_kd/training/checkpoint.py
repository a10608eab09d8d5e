"""Weights from a file that a user names: safetensors or torch, never code."""

from __future__ import annotations

import functools
import logging
import pickle
import struct
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import Tensor, nn

from nas_kd.errors import CheckpointError

_logger = logging.getLogger(__name__)


def load_checkpoint(network: nn.Module, path: Path) -> bool:
    """Loads `path` into `network`: safetensors, or a torch file that holds tensors only (`weights_only=True`).

    As in timm, weights may be wrapped in 'state_dict' or 'model', carry the prefix 'module.', or have the keys of the
    model's original implementation. Returns whether they brought a classifier: one for another number of classes is
    left out, as timm does with its own weights. Raises CheckpointError, in one line, for a file that is missing,
    unreadable, holds pickled objects, or does not fit. Warns where the file is part of an exported model, which knows
    more than weights.
    """
    state, own = _translated(network, _read(path)), network.state_dict()
    other = [key for key in _classifier_keys(network) if _has_other_classes(own, state, key)]
    if other:
        _logger.info("%s knows %d classes, the data has %d: its classifier is left out",
                     path, len(state[other[0]]), len(own[other[0]]))  # fmt: skip
    load_exactly(network, {**state, **{key: own[key] for key in other}}, path)
    _say_what_stays_behind(path)
    return not other


def _classifier_keys(network: nn.Module) -> list[str]:
    """The tensors of a timm model's classifiers, by what its config says or else the model itself."""
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    names = [names] if isinstance(names, str) else list(names)
    get_classifier: Any = getattr(network, "get_classifier", None)
    if get_classifier is not None:
        classifier = get_classifier()
        names += [name for name, module in network.named_modules() if module is classifier]
    return [f"{name}.{tensor}" for name in dict.fromkeys(names) for tensor in ("weight", "bias")]


def _has_other_classes(own: Mapping[str, Tensor], state: Mapping[str, Any], key: str) -> bool:
    if key not in own or key not in state:
        return False
    return bool(own[key].shape[1:] == state[key].shape[1:] and len(own[key]) != len(state[key]))


@functools.cache  # once, however many networks start from it
def _say_what_stays_behind(path: Path) -> None:
    config = path.with_name("config.json")
    if config.is_file() and '"nas_kd_student"' in config.read_text(encoding="utf-8", errors="replace"):
        _logger.warning(
            "%s are the weights alone of an exported model: its images may have been normalised otherwise; "
            "local-dir:%s takes that along",
            path,
            path.parent,
        )


def _translated(network: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """`state` with the network's own keys, by the `checkpoint_filter_fn` beside its class as timm's models have it."""
    translate = getattr(sys.modules.get(type(network).__module__), "checkpoint_filter_fn", None)
    if translate is None or not _mismatch(network.state_dict(), state):
        return state
    try:
        translated: Mapping[str, Any] = translate(dict(state), network)
    except (KeyError, IndexError, ValueError, RuntimeError, AttributeError, TypeError):
        return state  # it knows other checkpoints than this one, which is compared with the network as it is
    return translated


def load_exactly(network: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Loads a state dict that came from `path`, after it was compared with the network: all of it or nothing.

    Raises CheckpointError that names the first keys or shapes which differ, or a tensor that is not finite.
    """
    if reason := _mismatch(network.state_dict(), state):
        raise CheckpointError(f"{path} does not fit the model {type(network).__name__}: {reason}")
    network.load_state_dict(dict(state), strict=False)  # strict but for the batch counters, see _mismatch


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint file {path}")
    try:
        with warnings.catch_warnings():  # torch warns of strange pickles before it refuses them; the error is enough
            warnings.simplefilter("ignore")
            state = load_state_dict(str(path), weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError,
            pickle.UnpicklingError, struct.error, SafetensorError) as error:  # fmt: skip
        raise CheckpointError(
            f"cannot read the checkpoint {path}: it must be safetensors or a torch file of tensors only ({_why(error)})"
        ) from error
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"the checkpoint {path} holds no state dict of tensors (nor one under 'state_dict')")
    return dict(state)


def _why(error: Exception) -> str:
    """A few words: unpickling says which byte it stumbled over, and timm advises what is not safe."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, (KeyError, struct.error, pickle.UnpicklingError)) or "weights_only" in first:
        return "it is none, or holds other objects too"
    return first


def _mismatch(own: Mapping[str, Tensor], state: Mapping[str, Any]) -> str:
    """Why the state does not fit, in words; empty when it does."""
    # old checkpoints have no batch counters, and nothing depends on them
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    if len(missing) > len(own) / 2:
        return (
            f"these are weights of another architecture ({len(own) - len(missing)} of its {len(own)} tensors are there)"
        )
    if missing or unexpected:
        parts = [_some("it lacks", missing), _some("the model does not have", unexpected)]
        return "; ".join(part for part in parts if part)
    for key, tensor in state.items():
        if tensor.shape != own[key].shape:
            return f"{key} is {tuple(tensor.shape)} there and {tuple(own[key].shape)} in the model"
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return f"{key} holds values that are not finite"
    return ""


def _some(words: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{words} {', '.join(keys[:3])}{more}"
