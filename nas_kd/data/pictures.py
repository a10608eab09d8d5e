"""Image files as a person sees them: upright, on white, in eight bits, grey or in colour."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from os import PathLike
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

from nas_kd.files.arrays import Array

_DEPTHS = (8, 10, 12, 14, 16, 24, 32)  # bits that cameras and scanners write
# how colours of 16 bits are stored, and the opposite byte order
_SWAPPED = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L", "RGB;16L": "RGB;16B", "RGBA;16L": "RGBA;16B"}
_STUBS = frozenset({"BUFR", "GRIB", "HDF5", "MPEG", "WMF"})  # that Pillow knows, and cannot read by itself


def readable_suffixes() -> frozenset[str]:
    """The suffixes (`.png`, …) of the image files that Pillow and its plugins read, in lower case."""
    known = Image.registered_extensions().items()
    return frozenset(suffix.lower() for suffix, kind in known if kind in Image.OPEN and kind not in _STUBS)


def open_picture(path: str | PathLike[str] | BytesIO) -> Image.Image:
    """The first picture of a file, as an image viewer shows it.

    It is turned as its EXIF orientation says, what is transparent is white, and more than eight bits are scaled by the
    depth that is in it: 12-bit values in a 16-bit file become white at 4095.

    Args:
        path: Of a file, or its bytes.

    Returns:
        A picture of mode L or RGB.

    Raises:
        OSError: Or whatever else Pillow raises for a file that cannot be read.

    Example:
        >>> from PIL import Image
        >>> from io import BytesIO
        >>> from nas_kd import open_picture
        >>> content = BytesIO()
        >>> Image.new("RGBA", (4, 2), (255, 0, 0, 0)).save(content, "PNG")  # transparent
        >>> picture = open_picture(content)
        >>> picture.mode, picture.size, picture.getpixel((0, 0))
        ('RGB', (4, 2), (255, 255, 255))
    """
    with Image.open(path) as image:
        swapped = [_SWAPPED.get(_raw_mode(tile), "") for tile in getattr(image, "tile", ())]
        image.load()
        if image.mode in ("RGB", "RGBA") and swapped and all(swapped):
            return as_seen(_upright(_deep_colours(path, image), image))
        return as_seen(image)


def as_seen(image: Image.Image) -> Image.Image:
    """A decoded picture of any mode as one of mode L or RGB, upright, on white, in eight bits."""
    image = _upright(image, image)
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_in_eight_bits(np.asarray(image)))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        return _on_white(image)
    if image.mode in ("L", "1"):
        return image.convert("L")
    return _CONVERT.get(image.mode, _to_rgb)(image)


def _upright(image: Image.Image, described: Image.Image) -> Image.Image:
    """`image` turned as the EXIF data of `described` say."""
    try:
        turned = described.getexif().get(0x0112, 1) != 1
    except Exception:  # damaged EXIF data raise anything; a viewer shows such a picture as it is stored
        return image
    if not turned:
        return image
    if image is not described:
        image.info["exif"] = described.getexif().tobytes()
    return ImageOps.exif_transpose(image)


def _on_white(image: Image.Image) -> Image.Image:
    colours = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")


def _to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    seen = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert seen is not None
    return seen


_CONVERT: dict[str, Callable[[Image.Image], Image.Image]] = {"LAB": _lab_to_rgb}


def _in_eight_bits(values: Array) -> Array:
    """Greys or colours of more bits or of another type, scaled to uint8 by the depth that they have.

    Whole numbers are scaled by the least usual depth that holds them, so that a dim picture stays dim; fractions up
    to 1 by 1; negative numbers take the whole range from the least to the greatest.
    """
    values = np.where(np.isfinite(values), values, 0).astype(np.float64)
    least, most = float(values.min()), float(values.max())
    if least < 0 or most >= 2.0 ** _DEPTHS[-1]:
        values, most = values - least, most - least
        top = most or 1.0
    else:
        top = 1.0 if 0 < most <= 1 and (values % 1).any() else _top(most)
    return (values * (255 / top) + 0.5).astype(np.uint8)


def _top(most: float) -> float:
    return next(2.0**bits - 1 for bits in _DEPTHS if most < 2**bits)


def _raw_mode(tile: Any) -> str:
    details = tile[3]
    return str(details[0] if isinstance(details, tuple) and details else details)


def _with_raw_mode(tile: Any) -> Any:
    details, swapped = tile[3], _SWAPPED[_raw_mode(tile)]
    given = (swapped, *details[1:]) if isinstance(details, tuple) else swapped
    return tile._replace(args=given) if hasattr(tile, "_replace") else (*tile[:3], given)


def _deep_colours(path: str | PathLike[str] | BytesIO, high: Image.Image) -> Image.Image:
    """A picture with 16 bits in each colour, of which Pillow reads the upper eight: here the lower ones are read too,
    by the opposite byte order."""
    with Image.open(path) as image:
        image.tile = [_with_raw_mode(tile) for tile in image.tile]
        values = 256 * np.asarray(high, dtype=np.int64) + np.asarray(image)
    colours = _in_eight_bits(values[..., :3])
    return Image.fromarray(np.dstack([colours, np.asarray(high)[..., 3:]]))
