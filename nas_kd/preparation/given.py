"""A trained network as a command is given it, and images for it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from nas_kd.arguments.images import ImageSettings
from nas_kd.arguments.parsing import LOCAL
from nas_kd.data.sources import open_source
from nas_kd.data.splits import DataSpec
from nas_kd.errors import ModelError
from nas_kd.networks.hub import create_base
from nas_kd.preparation.image_form import data_spec
from nas_kd.search.space import input_size_of
from nas_kd.training.checkpoint import load_checkpoint


def prepare_network(settings: ImageSettings) -> tuple[nn.Module, DataSpec]:
    """The network, and the images in the form that it wants. Raises ModelError when it has no weights, or not the
    data's classes."""
    has_weights = settings.pretrained or settings.initial_checkpoint or settings.model.startswith(LOCAL)
    if not has_weights and "/" in settings.model:
        raise ModelError(f"there is no exported model in {settings.model}: name a folder that a study wrote")
    if not has_weights:
        raise ModelError(
            f"{settings.model} has no weights: name an exported folder, --pretrained or --initial-checkpoint"
        )
    source = open_source(settings.dataset, settings.data_dir, settings.class_map)
    checkpoint = settings.initial_checkpoint
    given = {} if checkpoint is None else {"num_classes": len(source.class_names)}
    network = create_base(settings.model, pretrained=checkpoint is None, **given)
    if checkpoint is not None:
        load_checkpoint(network, Path(checkpoint))
    classes = getattr(network, "num_classes", None)
    if classes != len(source.class_names):
        raise ModelError(
            f"{settings.model} tells {classes} classes apart, there are {len(source.class_names)} in {source.name}: "
            "quantise a network that was trained for these images"
        )
    return network, data_spec(settings, input_size_of(network, settings.img_size), source, network, weighted=True)
