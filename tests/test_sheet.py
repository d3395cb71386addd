"""Sheets and maps: boxes where the crops are, pictures whole and in their places."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.use.sheet import (
    COLOURS,
    GAP,
    LINE,
    MAP,
    PANEL,
    THUMBNAIL,
    WHITE,
    Cell,
    Head,
    draw_cell,
    draw_map,
    draw_sheet,
    write_png,
)

GREY = 77


def flat(height: int, width: int, value: int = GREY, channels: int = 3) -> NDArray[np.uint8]:
    return np.full((height, width, channels), value, dtype=np.uint8)


def places_of(image: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Return left, top, and the last column and row that hold a colour."""
    rows, columns = np.nonzero((np.asarray(image) == colour).all(axis=2))
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_box_is_drawn_at_the_edges_of_its_crop(factor: int, channels: int) -> None:
    height, width = PANEL // 2 * factor, PANEL * factor
    boxes = [(10 * factor, 20 * factor, 50 * factor, 40 * factor), (0, 0, width, height)]
    drawn = draw_cell(Cell(flat(height, width, channels=channels), boxes=boxes))
    assert drawn.size == (PANEL, PANEL // 2)
    assert places_of(drawn, COLOURS[0]) == (10, 20, 59, 59)
    assert places_of(drawn, COLOURS[1]) == (0, 0, PANEL - 1, PANEL // 2 - 1)
    pixels = np.asarray(drawn)
    for x, y in ((10, 40), (59, 40), (30, 20), (30, 59)):
        assert tuple(pixels[y, x]) == COLOURS[0]
    assert tuple(pixels[40, 30]) == (GREY,) * 3  # inside


def test_small_pictures_grow_as_squares_and_strips_stay_strips() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    drawn = np.asarray(draw_cell(Cell(pixels)))
    half = PANEL // 2
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        part = drawn[row * half : (row + 1) * half, column * half : (column + 1) * half]
        assert (part == pixels[row, column]).all()
    strip = draw_cell(Cell(flat(1, 5000), boxes=[(4999, 0, 1, 1), (0, 0, 1, 1)]))
    assert strip.size == (PANEL, 1)


def test_every_cell_of_a_sheet_stands_under_its_head_with_its_words_below() -> None:
    rows = [
        [Cell(flat(9, 9, 10), ["a", "b", "c"]), Cell(flat(9, 9, 20))],
        [Cell(flat(9, 9, 30)), Cell(flat(9, 9, 40), ["d"])],
    ]
    sheet = np.asarray(draw_sheet([Head("left", COLOURS[0]), Head("right")], rows))
    assert (sheet.shape[1], sheet.shape[2]) == (GAP + 2 * (PANEL + GAP), 3)
    tops = [LINE + GAP, LINE + 2 * GAP + PANEL + 3 * LINE]
    for row, top in enumerate(tops):
        for column, left in enumerate((GAP, 2 * GAP + PANEL)):
            cell = sheet[top : top + PANEL, left : left + PANEL]
            assert (cell == 10 * (2 * row + column + 1)).all()
    below = sheet[tops[0] + PANEL : tops[1]]
    assert below[:, : GAP + PANEL].min() < 100
    assert (below[:, GAP + PANEL :] == WHITE).all()
    head = sheet[: tops[0], : GAP + PANEL].reshape(-1, 3)
    assert (np.abs(head.astype(int) - COLOURS[0]).sum(axis=1) < 60).any()


def test_thumbnails_of_a_map_are_whole_inside_its_frame_and_in_their_places() -> None:
    places = np.array([[-3.0, 5.0], [7.0, -1.0], [2.0, 2.0]])
    drawn = np.asarray(draw_map(places, [flat(8, 8, value) for value in (50, 90, 130)], "a head"))
    top = 2 * GAP + LINE
    last = MAP - THUMBNAIL
    expected = {50: (0, last), 90: (last, 0), 130: (last // 2, last // 2)}
    for value, (x, y) in expected.items():
        found = places_of(Image.fromarray(drawn), (value,) * 3)
        assert found == (GAP + x, top + y, GAP + x + THUMBNAIL - 1, top + y + THUMBNAIL - 1)
    assert drawn[GAP : 2 * GAP + LINE - 2].min() < 100  # the head is there


def test_a_map_of_features_that_are_all_one_is_drawn() -> None:
    drawn = np.asarray(draw_map(np.zeros((2, 2)), [flat(8, 4), flat(8, 4)], ""))
    found = places_of(Image.fromarray(drawn), (GREY,) * 3)
    assert found == (GAP, 2 * GAP + LINE, GAP + THUMBNAIL // 2 - 1, 2 * GAP + LINE + THUMBNAIL - 1)


def test_what_is_written_is_a_png(tmp_path: Path) -> None:
    path = write_png(tmp_path / "new" / "a.png", draw_cell(Cell(flat(3, 3))))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]
