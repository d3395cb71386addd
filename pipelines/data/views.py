"""Augmented views of a picture: drawn as numbers first, then made from its pixels.

A view is a function of (seed, visit, record, number of the view): the draws are addressed, so a
task that runs again gives the same bytes. What was drawn is kept, so that a sheet can show it.

Chen et al. 2020, A Simple Framework for Contrastive Learning, arXiv:2002.05709, appendix A.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.data.decode import Pixels

CROP_TRIES = 10
NUM_DRAWS = 4 * CROP_TRIES + 16
"""Uniform draws that one view may use."""
LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in the luma of ITU-R BT.601."""

_ACROSS = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)

cv2.setNumThreads(1)  # one task has one core


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """What may happen to a view, how likely and how strongly; 0 turns a change off."""

    size: int = 32
    """Height and width of a view in pixels."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the picture's area that a crop takes."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Narrowest and widest crop, as width / height."""
    flip: float = 0.5
    """Probability of a mirror image, left to right."""
    rotation: float = 0.0
    """Probability of a rotation."""
    degrees: float = 15.0
    """Largest rotation to either side; what turns into view mirrors the edge."""
    inversion: float = 0.0
    """Probability that every colour becomes its opposite."""
    jitter: float = 0.8
    """Probability of a change of brightness, contrast, saturation and hue."""
    brightness: float = 0.4
    """Largest relative change."""
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    """Largest turn of the colour circle, at most 0.5."""
    greyscale: float = 0.2
    """Probability of losing all colour."""
    blur: float = 0.0
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation in pixels of the view."""
    solarisation: float = 0.0
    """Probability that every value from 128 on becomes its opposite."""

    def __post_init__(self) -> None:
        if self.size < 8:
            raise ValueError(f"size must be at least 8 pixels, got {self.size}")
        for name in (
            *("flip", "rotation", "inversion", "jitter", "greyscale", "blur", "solarisation"),
            *("brightness", "contrast", "saturation"),
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5 or not 0 <= self.degrees <= 180:
            raise ValueError(
                f"hue must be in 0..0.5 and degrees in 0..180, got {self.hue} and {self.degrees}"
            )
        for name, most in (("crop_scale", 1.0), ("crop_ratio", math.inf), ("blur_sigma", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= most:
                raise ValueError(f"{name} must rise within (0, {most}], got {low}, {high}")


class View(NamedTuple):
    """What was drawn for one view; each change is made in this order."""

    left: int
    """The crop, in pixels of the upright picture."""
    top: int
    width: int
    height: int
    flip: bool
    degrees: float
    """Anticlockwise; 0 where it is not rotated."""
    brightness: float
    """Factors; 1 where nothing changes."""
    contrast: float
    saturation: float
    hue: float
    """Turn of the colour circle; 0 where nothing changes."""
    greyscale: bool
    blur_sigma: float
    """0 where it is not blurred."""
    solarise: bool
    invert: bool


def draw_view(config: ViewConfig, draws: NDArray[np.float64], height: int, width: int) -> View:
    """Return a view of a picture of this size, from `NUM_DRAWS` uniform draws in [0, 1)."""
    drawn = draws.tolist()  # floats of Python are faster one by one
    chances, amounts, crops = drawn[:7], drawn[7:14], drawn[16:]

    def factor(amount: float, strength: float) -> float:
        return 1 + strength * (2 * amount - 1) if chances[2] < config.jitter else 1.0

    low, high = config.blur_sigma
    turn = config.degrees * (2 * amounts[0] - 1)
    return View(
        *_draw_crop(config, crops, height, width),
        flip=chances[0] < config.flip,
        degrees=turn if chances[1] < config.rotation else 0.0,
        brightness=factor(amounts[1], config.brightness),
        contrast=factor(amounts[2], config.contrast),
        saturation=factor(amounts[3], config.saturation),
        hue=factor(amounts[4], config.hue) - 1,
        greyscale=chances[3] < config.greyscale,
        blur_sigma=low + (high - low) * amounts[5] if chances[4] < config.blur else 0.0,
        solarise=chances[5] < config.solarisation,
        invert=chances[6] < config.inversion,
    )


def centre_view(height: int, width: int) -> View:
    """Return the largest square of the middle of a picture, unchanged."""
    side = min(height, width)
    return View(
        (width - side) // 2,
        (height - side) // 2,
        side,
        side,
        flip=False,
        degrees=0.0,
        brightness=1.0,
        contrast=1.0,
        saturation=1.0,
        hue=0.0,
        greyscale=False,
        blur_sigma=0.0,
        solarise=False,
        invert=False,
    )


def apply_view(pixels: Pixels, view: View, size: int) -> Pixels:
    """Return the view, uint8 (size, size, channels)."""
    made = pixels[view.top : view.top + view.height, view.left : view.left + view.width]
    # Averages of 2 x 2 pixels first, or fine patterns would turn into coarse ones. Both steps are
    # integer arithmetic, so the same on every machine.
    while min(made.shape[:2]) >= 2 * size:
        high, wide = made.shape[0] // 2, made.shape[1] // 2
        made = cv2.resize(made[: 2 * high, : 2 * wide], (wide, high), interpolation=cv2.INTER_AREA)
    made = cv2.resize(made, (size, size), interpolation=cv2.INTER_LINEAR)
    if view.flip:
        made = cv2.flip(made, 1)
    if view.degrees:
        centre = ((size - 1) / 2, (size - 1) / 2)
        matrix = cv2.getRotationMatrix2D(centre, view.degrees, 1.0)
        made = cv2.warpAffine(made, matrix, (size, size), borderMode=cv2.BORDER_REFLECT_101)
    made = _colours(made.reshape(size, size, -1), view)
    if view.blur_sigma:
        made = cv2.GaussianBlur(made, (0, 0), view.blur_sigma)
    if view.solarise:
        made = np.where(made < 128, made, 255 - made)
    if view.invert:
        made = 255 - made
    whole: Pixels = np.ascontiguousarray(made).reshape(size, size, pixels.shape[2])
    return whole


def _draw_crop(
    config: ViewConfig, draws: Sequence[float], height: int, width: int
) -> tuple[int, int, int, int]:
    """Return left, top, width and height of a crop.

    The ratio is uniform on a logarithmic scale, as in Inception's crops (Szegedy et al. 2015,
    arXiv:1409.4842). Where none of ten tries fits in, the largest centred crop of an allowed
    ratio is taken.
    """
    (smallest, largest), (narrowest, widest) = config.crop_scale, config.crop_ratio
    for i in range(0, 4 * CROP_TRIES, 4):
        area, ratio, x, y = draws[i : i + 4]
        pixels = height * width * (smallest + (largest - smallest) * area)
        shape = narrowest * (widest / narrowest) ** ratio
        wide, high = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(x * (width - wide + 1)), int(y * (height - high + 1))
            return left, top, wide, high
    shape = min(max(width / height, narrowest), widest)
    wide, high = min(width, round(height * shape)), min(height, round(width / shape))
    wide, high = max(wide, 1), max(high, 1)
    return (width - wide) // 2, (height - high) // 2, wide, high


def _colours(pixels: Pixels, view: View) -> Pixels:
    """Change brightness, contrast, saturation and hue, and drop the colours if so drawn.

    Each is linear in the pixel and the mean, so together they are one matrix, and values are cut
    to bytes once.
    """
    factors = (view.brightness, view.contrast, view.saturation)
    if factors == (1, 1, 1) and not view.hue and not view.greyscale:
        return pixels
    channels = pixels.shape[2]
    luma = np.array([LUMA] * 3 if channels == 3 else [[1.0]])
    colours = view.saturation * np.eye(channels) + (1 - view.saturation) * luma
    if view.hue and channels == 3:
        colours = _turn(2 * math.pi * view.hue) @ colours
    if view.greyscale:
        colours = luma @ colours
    mean = float(luma[0] @ cv2.mean(pixels)[:channels])
    # A shift of all channels stays what it is, because the rows of `colours` sum to 1.
    shift = (1 - view.contrast) * view.brightness * mean
    matrix = np.full((channels, channels + 1), shift)
    matrix[:, :channels] = view.contrast * view.brightness * colours
    made: Pixels = cv2.transform(pixels, matrix)
    return made.reshape(pixels.shape)


def _turn(angle: float) -> NDArray[np.float64]:
    """Return the rotation of the colour cube about its grey axis, from red to green to blue.

    Unlike a turn of HSV's hue it is linear, and keeps the mean of the three channels: NVIDIA's
    DALI does the same for speed.
    """
    return math.cos(angle) * np.eye(3) + (1 - math.cos(angle)) / 3 + math.sin(angle) * _ACROSS
