"""What is done to an image before a network sees it, in timm's words. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from nas_kd.errors import DataError

INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming")
CROP_MODES = ("center", "squash")
PHOTO = 64  # pixels of the shorter side, in the files and as seen by the network, from which on images are photos


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """timm's evaluation transform: the shorter side is resized to the network's size / `crop_pct` (0–1], then the
    centre is cropped; the `crop_mode` squash resizes both sides. Raises DataError for a value that is none of timm's.
    """

    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if not 0 < self.crop_pct <= 1:
            raise DataError(f"crop_pct must lie in (0, 1], got {self.crop_pct!r}")
        for name, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
            if getattr(self, name) not in known:
                raise DataError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
