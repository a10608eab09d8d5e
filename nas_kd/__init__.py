"""Any timm CNN in, a family of smaller timm CNNs out, each within a hard budget, with the accuracy of distillation.

The public names are loaded when they are first used, so that importing the package is instant.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str  # of the tag that was installed
    from nas_kd.analysis.stride_reduction import reduce_stride as reduce_stride
    from nas_kd.budget import Budget as Budget
    from nas_kd.budget import Cost as Cost
    from nas_kd.budget import parse_budget as parse_budget
    from nas_kd.costs.verification import analyse as analyse
    from nas_kd.data.images import Images as Images
    from nas_kd.data.pictures import open_picture as open_picture
    from nas_kd.errors import NasKdError as NasKdError
    from nas_kd.genotype import Choice as Choice
    from nas_kd.genotype import Genotype as Genotype
    from nas_kd.library.building import LibrarySpec as LibrarySpec
    from nas_kd.library.building import build_library as build_library
    from nas_kd.library.library import Library as Library
    from nas_kd.networks.hub import create_base as create_base
    from nas_kd.results.export import Card as Card
    from nas_kd.results.export import export as export
    from nas_kd.results.export import load as load
    from nas_kd.search.options import parse_options as parse_options
    from nas_kd.search.sampler import KnapsackSampler as KnapsackSampler
    from nas_kd.search.space import Space as Space
    from nas_kd.training.anchoring import anchor as anchor
    from nas_kd.training.evaluation import recalibrate as recalibrate
    from nas_kd.training.losses import distillation_loss as distillation_loss
    from nas_kd.training.losses import ensemble_loss as ensemble_loss
    from nas_kd.training.losses import soft_loss as soft_loss
    from nas_kd.training.online import make_ensemble as make_ensemble

_HOMES = {
    "Budget": "nas_kd.budget",
    "Card": "nas_kd.results.export",
    "Choice": "nas_kd.genotype",
    "Cost": "nas_kd.budget",
    "Genotype": "nas_kd.genotype",
    "Images": "nas_kd.data.images",
    "KnapsackSampler": "nas_kd.search.sampler",
    "Library": "nas_kd.library.library",
    "LibrarySpec": "nas_kd.library.building",
    "NasKdError": "nas_kd.errors",
    "Space": "nas_kd.search.space",
    "analyse": "nas_kd.costs.verification",
    "anchor": "nas_kd.training.anchoring",
    "build_library": "nas_kd.library.building",
    "create_base": "nas_kd.networks.hub",
    "distillation_loss": "nas_kd.training.losses",
    "ensemble_loss": "nas_kd.training.losses",
    "export": "nas_kd.results.export",
    "load": "nas_kd.results.export",
    "make_ensemble": "nas_kd.training.online",
    "open_picture": "nas_kd.data.pictures",
    "parse_budget": "nas_kd.budget",
    "parse_options": "nas_kd.search.options",
    "recalibrate": "nas_kd.training.evaluation",
    "reduce_stride": "nas_kd.analysis.stride_reduction",
    "soft_loss": "nas_kd.training.losses",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def _version() -> str:
    try:
        return importlib.metadata.version("nas-kd")
    except importlib.metadata.PackageNotFoundError:  # a folder of sources that was never installed
        return "0+unknown"


def __dir__() -> list[str]:
    return [*globals(), *__all__]
