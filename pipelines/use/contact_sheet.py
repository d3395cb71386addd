"""A sheet of pairs of pictures for the eye: both beside each other, and what is said of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipelines.data.decode import Pixels

SIDE = 160
"""Longest side of a picture on the sheet, in pixels."""
GAP = 12
TEXT_WIDTH = 400
FONT_SIZE, LINE_HEIGHT = 15, 22
BACKGROUND, INK = "white", "black"

Box = tuple[int, int, int, int]


class SheetRow(NamedTuple):
    """A pair of RGB pictures and the lines beside it."""

    first: Pixels
    second: Pixels
    lines: Sequence[str]


def contact_sheet(rows: Sequence[SheetRow]) -> Image.Image:
    """Return the sheet, a row for each pair; of a long line the end is shown."""
    size = 3 * GAP + 2 * SIDE + TEXT_WIDTH, GAP + len(rows) * (SIDE + GAP)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    for number, row in enumerate(rows):
        for column, pixels in enumerate((row.first, row.second)):
            left, top, _, _ = box_of(number, column, pixels.shape)
            sheet.paste(Image.fromarray(pixels), (left, top))
        place = 3 * GAP + 2 * SIDE, GAP + number * (SIDE + GAP)
        for i, line in enumerate(row.lines):
            shown = _fitting(line, font)
            draw.text((place[0], place[1] + i * LINE_HEIGHT), shown, fill=INK, font=font)
    return sheet


def box_of(row: int, column: int, shape: tuple[int, ...]) -> Box:
    """Return left, top, right and bottom of a picture of this height and width on the sheet."""
    height, width = shape[:2]
    left = GAP + column * (SIDE + GAP) + (SIDE - width) // 2
    top = GAP + row * (SIDE + GAP) + (SIDE - height) // 2
    return left, top, left + width, top + height


def thumbnail(pixels: Pixels) -> Pixels:
    """Return an RGB picture at the size that it has on the sheet.

    A small one is made larger so many times as it fits, in squares: nothing is made up.
    """
    if (times := SIDE // max(pixels.shape[:2])) > 1:
        return pixels.repeat(times, axis=0).repeat(times, axis=1)
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    return np.asarray(image)


def _fitting(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(line) <= TEXT_WIDTH - GAP:
        return line
    start = 1
    while font.getlength(f"...{line[start:]}") > TEXT_WIDTH - GAP:
        start += 1
    return f"...{line[start:]}"
