"""The sheet shows the pictures of each pair where it says, and what is told of them."""

import numpy as np

from pipelines.data.decode import Pixels
from pipelines.use.contact_sheet import (
    GAP,
    SIDE,
    TEXT_WIDTH,
    SheetRow,
    box_of,
    contact_sheet,
    thumbnail,
)


def plain(height: int, width: int, colour: tuple[int, int, int]) -> Pixels:
    return np.broadcast_to(np.array(colour, np.uint8), (height, width, 3))


def test_pictures_and_lines_stand_where_they_belong() -> None:
    rows = [
        SheetRow(plain(160, 120, (200, 0, 0)), plain(40, 160, (0, 200, 0)), ("one", "a" * 500)),
        SheetRow(plain(90, 90, (0, 0, 200)), plain(160, 160, (9, 9, 9)), ()),
    ]
    sheet = contact_sheet(rows)
    assert sheet.size == (3 * GAP + 2 * SIDE + TEXT_WIDTH, GAP + 2 * (SIDE + GAP))
    pixels = np.asarray(sheet).copy()
    for number, row in enumerate(rows):
        for column, picture in enumerate((row.first, row.second)):
            left, top, right, bottom = box_of(number, column, picture.shape)
            assert 0 <= left < right < 3 * GAP + 2 * SIDE
            assert number * (SIDE + GAP) < top < bottom <= (number + 1) * (SIDE + GAP)
            np.testing.assert_array_equal(pixels[top:bottom, left:right], picture)
            pixels[top:bottom, left:right] = 255
    beside, text = np.split(pixels, [3 * GAP + 2 * SIDE], axis=1)
    assert (beside == 255).all()
    half = GAP + SIDE
    assert (text[:half] < 100).any()
    assert (text[half:] == 255).all()
    assert (text[:, -GAP // 2 :] == 255).all()


def test_a_thumbnail_keeps_its_shape_and_shows_the_pixels_of_a_small_picture() -> None:
    assert thumbnail(plain(640, 320, (1, 2, 3))).shape == (SIDE, SIDE // 2, 3)
    larger = np.arange(100 * 90 * 3, dtype=np.uint8).reshape(100, 90, 3)
    np.testing.assert_array_equal(thumbnail(larger), larger)
    small = larger[:20, :30]
    shown = thumbnail(small)
    assert shown.shape == (100, 150, 3)
    np.testing.assert_array_equal(shown[2::5, 2::5], small)
    np.testing.assert_array_equal(shown[:5, :5], np.broadcast_to(small[0, 0], (5, 5, 3)))
