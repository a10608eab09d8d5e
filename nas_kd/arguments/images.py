"""What every command is asked for about its network and images."""

from __future__ import annotations

from dataclasses import dataclass, field

from nas_kd.arguments.augment import AugmentOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSettings:
    """The settings of any command, as far as they say which network, which images and in which form."""

    model: str
    pretrained: bool = False
    initial_checkpoint: str | None = None
    img_size: int | None = None
    num_classes: int | None = None
    dataset: str
    data_dir: str | None
    class_map: str | None = None
    skip_unreadable: bool = False
    data_memory: int | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    train_images: int | None
    val_fraction: float
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    workers: int
    seed: int
    quiet: bool
    debug: bool
