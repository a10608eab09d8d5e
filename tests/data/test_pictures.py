"""Images are opened as a person sees them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nas_kd import open_picture
from nas_kd.data.pictures import as_seen, readable_suffixes

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def opened(image: Image.Image, path: Path, **options: object) -> NDArray[np.uint8]:
    image.save(path, **options)
    return np.asarray(open_picture(path))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_every_exif_orientation_is_undone(tmp_path: Path, suffix: str) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255  # the upper left corner
    undo = {2: np.fliplr, 3: lambda a: a[::-1, ::-1], 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
            6: np.rot90, 7: lambda a: a[::-1, ::-1].transpose(1, 0, 2), 8: lambda a: np.rot90(a, 3)}  # fmt: skip
    for orientation, store in undo.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = Image.fromarray(np.ascontiguousarray(store(upright)))
        seen = opened(stored, tmp_path / f"{orientation}{suffix}", exif=exif)
        assert seen.shape == upright.shape
        assert (seen[:8, :8] > 200).all()
        assert seen[8:].max() < 50


@pytest.mark.parametrize(
    ("top", "bits"), [(255, 8), (1023, 10), (4095, 12), (16383, 14), (65535, 16), (200, 8), (3000, 12), (40000, 16)]
)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_greys_of_sixteen_bits_are_scaled_by_what_is_in_them(tmp_path: Path, top: int, bits: int, suffix: str) -> None:
    values = (RAMP * top).round().astype(np.uint16)
    seen = opened(Image.fromarray(values), tmp_path / f"grey{suffix}")
    assert np.abs(seen - values * (255 / (2**bits - 1))).max() <= 0.51


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 255.0), (-3.0, 5.0), (0.0, 1e12)])
def test_fractions_are_scaled_too(tmp_path: Path, low: float, high: float) -> None:
    values = (low + RAMP * (high - low)).astype(np.float32)
    values_with_hole = values.copy()
    values_with_hole[0, 0] = np.nan
    assert np.abs(opened(Image.fromarray(values), tmp_path / "x.tif") - 255 * RAMP).max() <= 0.6
    assert as_seen(Image.fromarray(values_with_hole)).mode == "L"


def png_of_sixteen_bits(values: NDArray[np.uint16]) -> bytes:
    """What Pillow reads, but does not write: 16 bits in each of three or four channels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("top", [255, 4095, 65535])
def test_colours_of_sixteen_bits_are_scaled_too(tmp_path: Path, top: int) -> None:
    values = np.dstack([RAMP, RAMP.T, 1 - RAMP])
    (tmp_path / "colours.png").write_bytes(png_of_sixteen_bits((values * top).round().astype(np.uint16)))
    assert np.abs(np.asarray(open_picture(tmp_path / "colours.png")) - 255 * values).max() <= 1
    half = np.dstack([(values * top).round(), np.full((8, 8), 65535)])
    half[:, :4, 3] = 0
    (tmp_path / "alpha.png").write_bytes(png_of_sixteen_bits(half.astype(np.uint16)))
    seen = np.asarray(open_picture(tmp_path / "alpha.png"))
    assert (seen[:, :4] == 255).all()
    assert np.abs(seen[:, 4:] - 255 * values[:, 4:]).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    colours = np.zeros((8, 8, 4), np.uint8)
    colours[:4, :, 3] = 255  # black strokes above, nothing below
    colours[4, :, 3] = 128
    seen = opened(Image.fromarray(colours).convert(mode), tmp_path / "x.png")
    assert (seen[:4] == 0).all()
    assert (seen[5:] == 255).all()
    assert (abs(seen[4].astype(int) - 127) <= 1).all()


def test_palettes_have_colours_and_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(np.repeat([[0], [1], [2]], 6, axis=1).astype(np.uint8))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert opened(image, tmp_path / "a.gif").tolist() == [[[255, 0, 0]] * 6, [[0, 255, 0]] * 6, [[0, 0, 255]] * 6]
    seen = opened(image, tmp_path / "b.png", transparency=1)
    assert seen[1].tolist() == [[255, 255, 255]] * 6
    seen = opened(image, tmp_path / "c.png", transparency=bytes([255, 0, 255]))
    assert seen[:2].tolist() == [[[255, 0, 0]] * 6, [[255, 255, 255]] * 6]


def test_a_colour_that_stands_for_nothing_is_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[[10, 20, 30], [40, 50, 60]]], np.uint8))
    assert opened(image, tmp_path / "x.png", transparency=(10, 20, 30)).tolist() == [[[255] * 3, [40, 50, 60]]]


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", ".jpg"), ("CMYK", ".tif"), ("YCbCr", ".jpg"), ("LAB", ".tif")])
def test_other_colours_are_what_they_look_like(tmp_path: Path, mode: str, suffix: str) -> None:
    red = Image.new("RGB", (8, 8), (200, 30, 30))
    image = Image.new("LAB", (8, 8), (109, 192, 172)) if mode == "LAB" else red.convert(mode)  # L·2.55, a+128, b+128
    seen = opened(image, tmp_path / f"x{suffix}")
    assert seen.shape == (8, 8, 3)
    assert np.abs(seen.reshape(-1, 3).mean(axis=0) - (200, 30, 30)).max() < 20


def test_black_and_white_is_grey(tmp_path: Path) -> None:
    bits = Image.fromarray(RAMP > 0.5)
    assert sorted(set(opened(bits, tmp_path / "x.png").flatten().tolist())) == [0, 255]


def test_damaged_exif_data_leave_the_picture_as_it_is(tmp_path: Path) -> None:
    image = Image.new("L", (8, 8), 77)
    assert (opened(image, tmp_path / "x.png", exif=b"Exif\0\0II*\0nonsense") == 77).all()


def test_the_formats_are_those_that_pillow_reads() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"} <= readable_suffixes()
    assert not {".pdf", ".txt", ".mpg", ".h5"} & readable_suffixes()
