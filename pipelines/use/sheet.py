"""Sheets of pictures for the eye: cells in rows under heads, with boxes in them and words below.

first view      second view     another picture
+---------+     +---------+     +---------+
| picture |     | picture |     | picture |
+---------+     +---------+     +---------+
43 % of area    18 % of area
flipped         grey
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipelines.data.decode import Pixels
from pipelines.storage import write_file

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]

PANEL = 168
"""Longer side of every picture on a sheet, in pixels."""
GAP = 14
LINE = 15
BLACK, WHITE, FRAME = (0, 0, 0), (255, 255, 255), (190, 190, 190)
COLOURS: tuple[Colour, Colour] = ((230, 80, 0), (0, 120, 255))
"""Of the boxes of a picture, and of the heads that they belong to."""
THUMBNAIL = 30
MAP = 960
"""Height and width of the frame of a map."""


class Cell(NamedTuple):
    """One picture of a sheet."""

    pixels: Pixels
    """uint8 (height, width, 1 or 3)."""
    lines: Sequence[str] = ()
    boxes: Sequence[Box] = ()
    """Left, top, width and height in its pixels, of at most two."""


class Head(NamedTuple):
    """What stands above a column."""

    text: str
    colour: Colour = BLACK


def draw_sheet(heads: Sequence[Head], rows: Sequence[Sequence[Cell]]) -> Image.Image:
    """Return a sheet on which every picture has the same longer side."""
    heights = [PANEL + LINE * max(len(cell.lines) for cell in row) + GAP for row in rows]
    sheet = Image.new("RGB", (GAP + (PANEL + GAP) * len(heads), LINE + 2 * GAP + sum(heights)))
    pen = _clear(sheet)
    for column, head in enumerate(heads):
        pen.text((_left(column), GAP // 2), head.text, head.colour, _font())
    top = LINE + GAP
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(draw_cell(cell), (_left(column), top))
            words = "\n".join(cell.lines)
            pen.multiline_text((_left(column), top + PANEL), words, BLACK, _font(), spacing=2)
        top += height
    return sheet


def draw_cell(cell: Cell) -> Image.Image:
    """Return the picture of a cell, its longer side `PANEL` pixels, with its boxes."""
    drawn = _scaled(cell.pixels, PANEL)
    scale = PANEL / max(cell.pixels.shape[:2])
    pen = ImageDraw.Draw(drawn)
    for (left, top, width, height), colour in zip(cell.boxes, COLOURS, strict=False):
        first = round(left * scale), round(top * scale)
        last = round((left + width) * scale) - 1, round((top + height) * scale) - 1
        end = (max(first[0], last[0]), max(first[1], last[1]))
        pen.rectangle((first, end), outline=colour, width=2)
    return drawn


def draw_map(places_n2: NDArray[np.float64], pictures: Sequence[Pixels], head: str) -> Image.Image:
    """Return pictures as thumbnails at their places, all of them whole and inside the frame."""
    drawn = Image.new("RGB", (MAP + 2 * GAP, MAP + 3 * GAP + LINE))
    pen = _clear(drawn)
    pen.text((GAP, GAP), head, BLACK, _font())
    left, top = GAP, 2 * GAP + LINE
    pen.rectangle((left - 1, top - 1, left + MAP, top + MAP), outline=FRAME)
    low, high = places_n2.min(axis=0), places_n2.max(axis=0)
    shares_n2 = (places_n2 - low) / np.where(high > low, high - low, 1.0)
    for (x, y), pixels in zip(shares_n2.tolist(), pictures, strict=True):
        thumbnail = _scaled(pixels, THUMBNAIL)
        room = MAP - thumbnail.width, MAP - thumbnail.height
        drawn.paste(thumbnail, (left + round(x * room[0]), top + round(y * room[1])))
    return drawn


def write_png(path: Path, image: Image.Image) -> Path:
    """Write an image as PNG and return its path.

    Raises:
        StorageError: If it cannot be written.
    """
    write_file(path, lambda aside: image.save(aside, "PNG"))
    return path


def _scaled(pixels: Pixels, side: int) -> Image.Image:
    """Return RGB whose longer side is `side`: averages where it shrinks, squares where it grows."""
    height, width, channels = pixels.shape
    image = Image.fromarray(pixels if channels == 3 else pixels[..., 0]).convert("RGB")
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return image.resize(size, Image.Resampling.BOX)


def _clear(image: Image.Image) -> ImageDraw.ImageDraw:
    pen = ImageDraw.Draw(image)
    pen.rectangle(((0, 0), image.size), WHITE)
    return pen


def _left(column: int) -> int:
    return GAP + (PANEL + GAP) * column


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)
