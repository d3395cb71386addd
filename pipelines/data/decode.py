"""Bytes of a picture to canonical pixels, or a reason why not.

Canonical is uint8 (height, width, channels), upright by its EXIF orientation: RGB, or grey where
one channel is asked for. Transparency shows white, of an animation the first frame counts, and
16 bits are cut to the upper 8. A picture is decoded whole or not at all: a grey lower half, which
lenient readers put where a file was cut, never passes as a picture.
"""

import io
import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from pipelines.data.shards import Rejected

Pixels = NDArray[np.uint8]
Reduction = Callable[[int, int], int]
"""Upright height and width of a JPEG to how many times smaller its pixels may be at most."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is read. Pillow knows more, some of which run programs of their own."""
MAX_PIXELS = 32_000_000
"""Of a picture as its header tells: up to 14 bytes are needed for each, 22 in a WebP."""
JPEG_REDUCTIONS = (8, 4, 2)
"""A JPEG is decoded at these fractions of its size for less than the whole costs; others cost
more."""
_TURNED = (5, 6, 7, 8)
"""EXIF orientations whose rows are the columns of the upright picture."""


def decode(
    data: bytes, channels: Literal[1, 3], reduction: Reduction | None = None
) -> Pixels | Rejected:
    """Return the pixels of a picture, or why it has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow only warns of is judged here
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                return Rejected("quarantined:too-many-pixels")
            if image.format in ("JPEG", "MPO"):  # a JPEG with more behind it, as cameras write
                return _jpeg(data, image, channels, reduction)
            return _upright(_canonical(image, channels), _orientation(image))
    except Image.DecompressionBombError:
        return Rejected("quarantined:too-many-pixels")
    except UnidentifiedImageError:
        return Rejected("quarantined:not-an-image")
    except Exception as error:  # decoders raise whatever their parsers stumble on
        is_cut = any(word in str(error).lower() for word in ("premature", "truncated"))
        return Rejected("quarantined:cut-image" if is_cut else "quarantined:bad-image")


def leaving(smallest_side: int) -> Reduction:
    """Return the reduction that leaves the shorter side at least so long."""
    return lambda height, width: min(height, width) // smallest_side


def _jpeg(data: bytes, image: Any, channels: int, reduction: Reduction | None) -> Pixels:
    """Decode strictly; four channels, which only Pillow turns into RGB, are checked first."""
    orientation = _orientation(image)
    if image.mode == "CMYK":
        simplejpeg.decode_jpeg(data, colorspace="CMYK")
        return _upright(_canonical(image, channels), orientation)
    height, width = image.size if orientation in _TURNED else image.size[::-1]
    most = reduction(height, width) if reduction else 1
    divisor = next((n for n in JPEG_REDUCTIONS if n <= most), 1)
    pixels: Pixels = simplejpeg.decode_jpeg(
        data,
        colorspace="RGB" if channels == 3 else "GRAY",
        min_height=-(-image.height // divisor),
        min_width=-(-image.width // divisor),
    )
    return _upright(pixels, orientation)


def _canonical(image: Any, channels: int) -> Pixels:
    if image.mode == "F":
        raise ValueError("numbers of no known range")
    image.load()
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = _on_white(image)
    pixels: Pixels = np.asarray(_in_mode(image, "RGB" if channels == 3 else "L"))
    return pixels.reshape(*pixels.shape[:2], channels)


def _on_white(image: Any) -> Any:
    canvas = Image.new("RGB", image.size, "white")
    image = _in_mode(image, "RGBA")
    canvas.paste(image, mask=image)
    return canvas


def _in_mode(image: Any, mode: str) -> Any:
    """Convert where there is a need; Pillow makes a copy of a large picture where there is none."""
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Any) -> Any:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("numbers of no known range")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _orientation(image: Any) -> int:
    """Return the EXIF orientation, 1 where there is none that can be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a broken EXIF block says nothing
        return 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Turn and flip as EXIF 2.32 says; an unknown orientation leaves the picture as it is."""
    if orientation in _TURNED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
