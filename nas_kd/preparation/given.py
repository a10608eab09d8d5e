"""A trained network as a command is given it, and images for it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from nas_kd.arguments.data import DataSettings
from nas_kd.arguments.network import NetworkSettings
from nas_kd.data.sources import open_source
from nas_kd.data.splits import DataSpec
from nas_kd.errors import ModelError
from nas_kd.networks.hub import create_base, input_size_of
from nas_kd.preparation.image_form import data_spec
from nas_kd.training.checkpoint import load_checkpoint


def prepare_network(given: NetworkSettings, data: DataSettings) -> tuple[nn.Module, DataSpec]:
    """The network, and the images in the form that it wants. Raises ModelError when it has no weights, or not the
    data's classes."""
    has_weights = given.is_weighted or given.is_exported
    if not has_weights and "/" in given.model:
        raise ModelError(f"there is no exported model in {given.model}: name a folder that a study wrote")
    if not has_weights:
        raise ModelError(f"{given.model} has no weights: name an exported folder, --pretrained or --initial-checkpoint")
    source = open_source(data.dataset, data.data_dir, data.class_map)
    checkpoint = given.initial_checkpoint
    classes = {} if checkpoint is None else {"num_classes": len(source.class_names)}
    network = create_base(given.model, pretrained=checkpoint is None, **classes)
    if checkpoint is not None:
        load_checkpoint(network, Path(checkpoint))
    known = getattr(network, "num_classes", None)
    if known != len(source.class_names):
        raise ModelError(
            f"{given.model} tells {known} classes apart, there are {len(source.class_names)} in {source.name}: "
            "quantise a network that was trained for these images"
        )
    return network, data_spec(data, input_size_of(network, given.img_size), source, network, weighted=True)
