"""What studies/versus.py compares with, beside torch-pruning (pruned.py) and a plain script (plain_optuna.py): small
models of timm's, and NVIDIA ModelOpt's FastNAS where it is installed (`pip install nvidia-modelopt
torchprofile==0.0.4`, 0.47 here)."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from torch import Tensor, nn

from nas_kd.analysis.stride_reduction import reduce_stride
from nas_kd.costs.verification import measure
from nas_kd.data.images import Images, normalise

DIVISOR = 4  # of channels; ModelOpt's own, 32, leaves nothing to choose in networks for small images
TRIES = 12  # bounds, each lower by a fiftieth


def small_model(name: str, images: Images, classes: int) -> nn.Module:
    """A timm model from its name and total stride, `tinynet_e/16`, with fresh weights."""
    model, _, reduction = name.partition("/")
    channels = images.pixels.shape[1]
    network = timm.create_model(model, num_classes=classes, in_chans=channels)
    return reduce_stride(network, int(reduction), channels)


def modelopt() -> ModuleType | None:
    """ModelOpt's pruning, if it is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import modelopt.torch.prune as prune
        except ImportError:
            return None
    return prune


def fastnas(base: nn.Module, macs: float, calibration: Images, score: Callable[[nn.Module], float]) -> nn.Module | None:
    """A copy of `base` within `macs`, pruned by FastNAS: how much `score` suffers from each width of each layer alone,
    then one threshold for all. None when it cannot get there.

    ModelOpt's count differs from torch's, so its bound is lowered until torch's counter agrees; what was measured of
    the layers is kept meanwhile."""
    size = calibration.pixels.shape[1:]
    with tempfile.TemporaryDirectory() as folder:
        for attempt in range(TRIES):
            search = {
                "score_func": score,
                "data_loader": list(batches(calibration)),
                "collect_func": lambda batch: batch,
                "checkpoint": str(Path(folder, "sensitivity.pth")),
                "verbose": False,
            }
            network = _searched(base, 2 * macs * (1 - attempt / 50), torch.zeros(1, *size), search)
            if measure(network, size).macs <= macs:
                return network
    return None


def _searched(base: nn.Module, bound: float, image: Tensor, search: dict[str, Any]) -> nn.Module:
    prune = modelopt()
    assert prune is not None
    config = prune.fastnas.FastNASConfig()
    for layer, divisor in (("nn.Conv2d", "channel_divisor"), ("nn.BatchNorm2d", "feature_divisor")):
        config[layer]["*"][divisor] = DIVISOR
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        network, _ = prune.prune(
            copy.deepcopy(base),
            mode=[("fastnas", config)],
            constraints={"flops": bound},
            dummy_input=image,
            config=search,
        )
    return network


def batches(images: Images, size: int = 128) -> Iterator[Tensor]:
    """Normalised batches, for batch norms."""
    for pixels in torch.split(images.pixels, size):
        yield normalise(pixels, images.mean, images.std, torch.device("cpu"))
