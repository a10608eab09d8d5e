"""In which form networks get their images: size, normalisation, resizing and cropping."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import nn

from nas_kd.arguments.data import DataSettings
from nas_kd.arguments.network import NetworkSettings
from nas_kd.data.augment import PhotoAugmentation
from nas_kd.data.class_maps import warn_of_order
from nas_kd.data.cutting import DataSpec, check_source
from nas_kd.data.dataset_names import DIGITS, FOLDER
from nas_kd.data.memory import memory_of_machine
from nas_kd.data.preprocessing import CROP_MODES, PHOTO, Preprocessing
from nas_kd.data.sources import Source
from nas_kd.preparation.augmenting import augmentation_of

DIGITS_SIZE = 16  # at the base's own stride: measured, docs/decisions.md
_DETAIL = 2.0  # times the network's size is the short side of an original: a crop of a quarter of it stays sharp
_ORIGINALS_BYTES = 8 << 30  # on disk, memory-mapped
_PHOTO_WORKERS = 8


def data_spec(
    data: DataSettings,
    input_size: Sequence[int],
    source: Source,
    network: nn.Module,
    *,
    weighted: bool,
) -> DataSpec:
    """The images, in the form that `network` wants. When it is `weighted`, it brings weights from elsewhere and with
    them its normalisation; else that is taken from the training images.

    Raises DataError for too few images, and for an augmentation that timm cannot read.
    """
    config = _timm_config(network)
    channels, side, _ = input_size
    mean, std = (_for_channels(config.get(name, ()), channels) if weighted else None for name in ("mean", "std"))
    spec = DataSpec(
        dataset=data.dataset,
        data_dir=data.data_dir,
        img_size=side,
        in_chans=channels,
        num_classes=data.num_classes,
        mean=mean,
        std=std,
        val_fraction=data.val_fraction,
        train_images=data.train_images,
        seed=data.seed,
        workers=data.workers,
        preprocessing=_preprocessing(data, min(side, source.side), config),
        class_map=data.class_map,
        skip_unreadable=data.skip_unreadable,
        originals=_DETAIL if isinstance(augmentation_of(data, side), PhotoAugmentation) else None,
        originals_bytes=_ORIGINALS_BYTES,
        memory=memory_of_machine() // 2 if data.data_memory is None else data.data_memory,
    )
    check_source(source, spec)
    return spec


def in_chans_of(network: NetworkSettings, data: DataSettings) -> int:
    """The channels of the images: as given, or what the dataset has."""
    return network.in_chans or (1 if data.dataset == DIGITS else 3)


def img_size_of(network: NetworkSettings, data: DataSettings) -> int | None:
    """The side of the images in pixels: as given, or what the dataset has; None where it is the model's own."""
    return network.img_size or (DIGITS_SIZE if data.dataset == DIGITS else None)


def beside_gpu(spec: DataSpec, device: torch.device) -> DataSpec:
    """Where a GPU trains, processes transform photos ahead of it: one does some 600 a second (docs/results/gpu.md). The
    cores of a CPU are busy with the network."""
    if device.type == "cpu":
        return spec
    return dataclasses.replace(spec, photo_workers=max(spec.workers, min(_PHOTO_WORKERS, (os.cpu_count() or 1) // 2)))


def _timm_config(network: nn.Module) -> dict[str, Any]:
    """What timm knows of the images of a network; nothing where it does not know the network."""
    config: Any = getattr(network, "pretrained_cfg", None)
    return dict(resolve_data_config(pretrained_cfg=config)) if config else {}


def _for_channels(values: Sequence[float], channels: int) -> tuple[float, ...] | None:
    """A mean or std for so many channels; for one the average, as timm adds a pretrained stem's colours up."""
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) if channels == 1 and values else None


def _preprocessing(data: DataSettings, side: int, config: dict[str, Any]) -> Preprocessing:
    """How images are resized and cropped: as given, else as the network's config says where they are photos; tiny ones
    are not cropped."""
    usual = Preprocessing()
    if side >= PHOTO and config:
        mode = config["crop_mode"] if config["crop_mode"] in CROP_MODES else usual.crop_mode
        crop_pct = min(1.0, config["crop_pct"])
        usual = Preprocessing(crop_pct=crop_pct, interpolation=config["interpolation"], crop_mode=mode)
    return dataclasses.replace(
        usual,
        crop_pct=data.crop_pct or usual.crop_pct,
        interpolation=data.interpolation or usual.interpolation,
    )


def warn_of_other_order(source: Source, data: DataSettings, network: nn.Module, weights: str) -> None:
    """Warns when `network`, which has its weights from `weights`, may number the classes otherwise than the data."""
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    names = config.get("label_names") or ()
    known = names if isinstance(names, (list, tuple)) and len(names) == getattr(network, "num_classes", 0) else ()
    told = data.dataset != FOLDER or data.class_map is not None or weights.startswith("timm's ")
    if known or not told:
        warn_of_order(source.class_names, known, weights)
