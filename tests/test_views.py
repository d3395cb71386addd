"""Tests of views: what is drawn is what is done, and it is drawn as asked for."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.decode import Pixels
from pipelines.data.randomness import draws, uniform
from pipelines.data.views import NUM_DRAWS, View, ViewConfig, apply_view, draw_view
from tests.test_decode import scene

STILL = ViewConfig(size=16, flip=0, jitter=0, greyscale=0)
"""Crops alone."""
ALL = ViewConfig(
    size=16, rotation=1, inversion=1, jitter=1, greyscale=1, blur=1, solarisation=1, flip=1
)


def altered(config: ViewConfig, changes: dict[str, Any]) -> ViewConfig:
    return replace(config, **changes)


def uniforms(number: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return uniform(draws(number, np.arange(NUM_DRAWS, dtype=np.uint64)))


def view_of(config: ViewConfig, number: int = 0, height: int = 60, width: int = 80) -> View:
    return draw_view(config, uniforms(number), height, width)


WHOLE = View(0, 0, 80, 60, False, 0.0, 1.0, 1.0, 1.0, 0.0, False, 0.0, False, False)


def made(view: View, pixels: Pixels | None = None, size: int = 40) -> Pixels:
    return apply_view(scene() if pixels is None else pixels, view, size)


@settings(max_examples=300, deadline=None)
@given(number=st.integers(0, 2**40), height=st.integers(1, 500), width=st.integers(1, 500))
def test_crops_lie_inside_and_have_the_share_and_ratio_asked_for(
    number: int, height: int, width: int
) -> None:
    config = replace(STILL, crop_scale=(0.3, 0.6), crop_ratio=(0.5, 2.0))
    view = view_of(config, number, height, width)
    assert 0 <= view.left < view.left + view.width <= width
    assert 0 <= view.top < view.top + view.height <= height
    if min(height, width) > 50 and max(height, width) < 2 * min(height, width):
        assert 0.28 < view.width * view.height / (height * width) < 0.62
        assert 0.47 < view.width / view.height < 2.1


def test_crops_of_a_strip_are_as_wide_as_allowed() -> None:
    view = view_of(STILL, 0, height=10, width=50_000)
    assert (view.width, view.height) == (13, 10)


def test_crop_areas_are_uniform() -> None:
    config = replace(STILL, crop_scale=(0.2, 0.6), crop_ratio=(1.0, 1.0))
    views = [view_of(config, number, 1000, 1000) for number in range(2000)]
    shares = np.sort([view.width * view.height / 1e6 for view in views])
    expected = 0.2 + 0.4 * (np.arange(2000) + 0.5) / 2000
    assert np.abs(shares - expected).max() < 0.4 * 1.63 / math.sqrt(2000)  # Kolmogorov at 1 %


CHANGES: dict[str, Callable[[View], object]] = {
    "flip": lambda view: view.flip,
    "rotation": lambda view: view.degrees != 0,
    "inversion": lambda view: view.invert,
    "jitter": lambda view: view.brightness != 1,
    "greyscale": lambda view: view.greyscale,
    "blur": lambda view: view.blur_sigma != 0,
    "solarisation": lambda view: view.solarise,
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_changes_are_as_frequent_as_asked_for(name: str, probability: float) -> None:
    config = altered(ALL, {name: probability})
    happened = [bool(CHANGES[name](view_of(config, number))) for number in range(2000)]
    share = sum(happened) / len(happened)
    assert abs(share - probability) <= 3.3 * math.sqrt(probability * (1 - probability) / 2000)


def test_changes_are_drawn_apart_from_each_other() -> None:
    half = altered(ALL, dict.fromkeys(CHANGES, 0.5))
    views = [view_of(half, number) for number in range(2000)]
    happened = np.array([[bool(change(view)) for change in CHANGES.values()] for view in views])
    correlations = np.corrcoef(happened.T) - np.eye(len(CHANGES))
    assert np.abs(correlations).max() < 0.1


def test_strengths_stay_within_what_was_asked_for() -> None:
    views = [view_of(ALL, number) for number in range(500)]
    for name, low, high in (
        *(("degrees", -15, 15), ("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4)),
        *(("saturation", 0.6, 1.4), ("hue", -0.1, 0.1), ("blur_sigma", 0.1, 2.0)),
    ):
        values = [getattr(view, name) for view in views]
        assert low <= min(values) < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < max(values) <= high


def test_the_whole_picture_at_its_own_size_is_itself() -> None:
    square = scene(40, 40)
    assert (made(WHOLE._replace(width=40, height=40), square) == square).all()


def test_a_crop_is_that_part_of_the_picture() -> None:
    view = WHOLE._replace(left=11, top=7, width=40, height=40)
    assert (made(view) == scene()[7:47, 11:51]).all()


def test_a_flip_is_the_mirror_image() -> None:
    assert (made(WHOLE._replace(flip=True)) == made(WHOLE)[:, ::-1]).all()


@pytest.mark.parametrize(("degrees", "turns"), [(90.0, 1), (180.0, 2), (-90.0, 3)])
def test_right_angles_turn_anticlockwise(degrees: float, turns: int) -> None:
    turned, expected = made(WHOLE._replace(degrees=degrees)), np.rot90(made(WHOLE), turns)
    assert np.abs(turned.astype(int) - expected.astype(int)).max() <= 2


def test_inversion_is_the_opposite_and_solarisation_of_the_bright_half() -> None:
    still = made(WHOLE)
    assert (made(WHOLE._replace(invert=True)) == 255 - still).all()
    expected = np.where(still < 128, still, 255 - still)
    assert (made(WHOLE._replace(solarise=True)) == expected).all()


def test_brightness_multiplies_and_contrast_stretches_around_the_mean() -> None:
    still = made(WHOLE).astype(float)
    bright = made(WHOLE._replace(brightness=1.3))
    assert np.abs(bright - (1.3 * still).clip(0, 255)).max() <= 0.5
    luma = (still @ [0.299, 0.587, 0.114]).mean()
    flat = made(WHOLE._replace(contrast=0.5))
    assert np.abs(flat - (0.5 * still + 0.5 * luma)).max() <= 1.1


def test_saturation_moves_away_from_grey_and_no_saturation_is_grey() -> None:
    grey = made(WHOLE._replace(greyscale=True))
    assert (grey == grey[..., :1]).all()
    assert np.abs(grey[..., 0] - made(WHOLE) @ [0.299, 0.587, 0.114]).max() <= 1
    washed = made(WHOLE._replace(saturation=0.25)).astype(float)
    assert np.abs(washed - (0.25 * made(WHOLE) + 0.75 * grey)).max() <= 1.1


def test_a_third_of_the_colour_circle_swaps_the_colours() -> None:
    red = np.full((40, 40, 3), (200, 0, 0), np.uint8)
    square = WHOLE._replace(width=40, height=40)
    turned = made(square._replace(hue=1 / 3), red)
    assert np.abs(turned.astype(int) - (0, 200, 0)).max() <= 6


def test_blur_smooths_and_keeps_the_mean() -> None:
    dice = np.random.default_rng(0)
    noise = dice.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    square = WHOLE._replace(width=40, height=40)
    blurred = made(square._replace(blur_sigma=2.0), noise)
    assert blurred.std() < 0.35 * noise.std()
    assert abs(blurred.mean() - noise.mean()) < 3


def test_fine_patterns_are_averaged_away_and_do_not_turn_coarse() -> None:
    board = (np.indices((400, 400)).sum(axis=0) % 2 * 255).astype(np.uint8)
    pixels = np.repeat(board[..., None], 3, axis=2)
    small = made(WHOLE._replace(width=399, height=399), pixels)
    assert np.abs(small.astype(int) - 128).max() < 20


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (3, 50_000), (33, 7), (700, 500)])
def test_every_view_of_every_picture_has_its_shape(shape: tuple[int, int], channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, channels), dtype=np.uint8)
    for number in range(20):
        view = apply_view(pixels, view_of(ALL, number, *shape), 16)
        assert view.shape == (16, 16, channels)
        assert view.dtype == np.uint8
        assert view.flags.c_contiguous


def test_views_are_a_function_of_their_draws() -> None:
    first, again, other = view_of(ALL, 1), view_of(ALL, 1), view_of(ALL, 2)
    assert first == again != other
    assert made(first).tobytes() == made(again).tobytes() != made(other).tobytes()


def test_every_field_of_the_config_changes_something() -> None:
    base = replace(ALL, greyscale=0, solarisation=0, inversion=0)
    others = {
        **{field.name: 0.0 for field in fields(ViewConfig)},
        **{"size": 24, "degrees": 90.0, "blur_sigma": (3.0, 4.0)},
        **{"crop_scale": (0.9, 1.0), "crop_ratio": (1.0, 1.0)},
        **{"greyscale": 1.0, "solarisation": 1.0, "inversion": 1.0},
    }
    first = apply_view(scene(), view_of(base, 3), base.size)
    for name, other in others.items():
        config = altered(base, {name: other})
        view = apply_view(scene(), view_of(config, 3), config.size)
        assert view.tobytes() != first.tobytes(), name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("size", 7), ("flip", 1.1), ("blur", -0.1), ("hue", 0.6), ("degrees", 181.0)),
        *(("crop_scale", (0.5, 0.2)), ("crop_scale", (0.0, 1.0)), ("crop_scale", (0.5, 1.5))),
        *(("crop_ratio", (2.0, 1.0)), ("blur_sigma", (0.0, 1.0))),
    ],
)
def test_what_cannot_be_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        altered(ALL, {name: value})
