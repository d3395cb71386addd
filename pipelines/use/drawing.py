"""Masked pairs for the eye: what the model sees, and under it what it has to tell.

    A  [CLS] the [MASK] sails home . [SEP]
                 ^captain
    B  it is [MASK] that the tide turns . [SEP]
             ^late

Words of A and B have a colour each, control tokens are dim. Without a terminal, or with NO_COLOR,
the same characters come without colour.
"""

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from pipelines.data.vocabulary import Vocabulary

MAX_WIDTH = 100
MARGIN = 5
COLOURS = {"A": "cyan", "B": "magenta"}
CONTROL, SEEN, TRUTH, HEAD = "dim", "bold yellow", "green", "bold"


class DrawnRow(NamedTuple):
    """A row to draw: ids as the model sees them, and the true ids."""

    seen: Sequence[int]
    true: Sequence[int]
    masked: frozenset[int]
    """Positions that are to be predicted."""
    a_length: int
    """Tokens through the first [SEP]."""


class _Cell(NamedTuple):
    text: str
    style: str
    below: str = ""
    glued: bool = False
    """Whether it continues the word before it."""

    @property
    def width(self) -> int:
        return max(cell_len(self.text), cell_len(self.below)) + (not self.glued)


def open_console() -> Console:
    """Return a console of at most 100 columns, in colour only in a terminal without NO_COLOR."""
    plain = bool(os.environ.get("NO_COLOR"))
    console = Console(highlight=False, markup=False, color_system=None if plain else "auto")
    console.width = min(console.width, MAX_WIDTH) if console.is_terminal else MAX_WIDTH
    return console


def draw(row: DrawnRow, vocabulary: Vocabulary, width: int) -> Iterator[Text]:
    """Yield the lines of a row: A, then B, each with the truth under what is to be predicted."""
    segments = {"A": range(row.a_length), "B": range(row.a_length, len(row.seen))}
    for name, positions in segments.items():
        cells = [_cell(row, position, vocabulary, COLOURS[name]) for position in positions]
        for number, line in enumerate(_wrap(cells, width - MARGIN)):
            upper = Text("  ").append(" " if number else name, HEAD).append(" ")
            lower = Text(" " * 4)
            for cell in line:
                gap = "" if cell.glued else " "
                upper.append(gap).append(cell.text, cell.style)
                lower.append(gap).append(cell.below, TRUTH)
                for half in (upper, lower):
                    half.append(" " * max(0, max(upper.cell_len, lower.cell_len) - half.cell_len))
            for half in (upper, lower):
                half.rstrip()
            yield upper
            if lower:
                yield lower


def _cell(row: DrawnRow, position: int, vocabulary: Vocabulary, colour: str) -> _Cell:
    def piece(piece_id: int) -> str:
        return str(vocabulary.tokenizer.id_to_token(piece_id))

    text = piece(row.seen[position])
    if position in row.masked:
        return _Cell(text, SEEN, f"^{piece(row.true[position])}")
    if row.seen[position] in (vocabulary.cls, vocabulary.sep):
        return _Cell(text, CONTROL)
    if text.startswith("##") and position - 1 not in row.masked:
        return _Cell(text[2:], colour, glued=True)
    return _Cell(text, colour)


def _wrap(cells: Sequence[_Cell], width: int) -> Iterator[list[_Cell]]:
    line: list[_Cell] = []
    room = width
    for cell in cells:
        if line and cell.width > room:
            yield line
            line, room = [], width
            cell = cell._replace(glued=False)
        line.append(cell)
        room -= cell.width
    if line:
        yield line
