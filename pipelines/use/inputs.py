"""What a classifier is given: texts, pairs of texts, or pictures, made into rows and batches.

text      [CLS] text [SEP]
pair      [CLS] A [SEP] B [SEP]     the longer of the two is cut first
picture   training: a view of its own in each pass; otherwise the largest square of its middle
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from pipelines.data.batches import ArrayBatch
from pipelines.data.decode import Pixels
from pipelines.data.images import ImageRows
from pipelines.data.manifest import Picture
from pipelines.data.shards import Rejected
from pipelines.data.views import ViewConfig
from pipelines.errors import DataError
from pipelines.use.encoder import ROWS_PER_BATCH, Encoder

Item = str | tuple[str, str] | bytes
"""A text, a pair of texts, or the bytes of a picture."""

SMALLEST_CROP = 0.6
"""Share of a picture that a training view shows at least; the label should survive it."""


class Inputs(Protocol):
    """How the items of one kind become what the model is given."""

    def rows(self, items: Sequence[Any]) -> list[Any]:
        """Return each item as it is predicted on."""

    def batch(self, rows: Sequence[Any]) -> ArrayBatch:
        """Return the batch of some of these rows."""

    def kept(self, items: Sequence[Any]) -> list[Any]:
        """Return what is kept of each item to train on it again and again."""

    def training_batch(self, kept: Sequence[Any], visits: Sequence[int], seed: int) -> ArrayBatch:
        """Return the batch of some of what is kept, each in its visit: a pure function."""


class TextRow(NamedTuple):
    """One row of a text or a pair."""

    ids: list[int]
    a_length: int
    """Tokens through the first [SEP]."""


class TextInputs:
    """Rows of texts or pairs, cut to the longest row of the pretraining."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def rows(self, items: Sequence[Any]) -> list[TextRow]:
        """Return the rows of texts (str) or of pairs (tuples of two)."""
        cls, sep = self._encoder.vocabulary.cls, self._encoder.vocabulary.sep
        if not items or isinstance(items[0], str):
            found = self._encoder.first_ids(items, self._encoder.max_tokens - 2)
            return [TextRow([cls, *ids.tolist(), sep], len(ids) + 2) for ids in found]
        room = self._encoder.max_tokens - 3
        first, second = (self._encoder.first_ids(texts, room) for texts in zip(*items, strict=True))
        rows = []
        for a, b in zip(first, second, strict=True):
            a_size = min(len(a), max(room - len(b), (room + 1) // 2))
            ids = [cls, *a[:a_size].tolist(), sep, *b[: room - a_size].tolist(), sep]
            rows.append(TextRow(ids, a_size + 2))
        return rows

    def batch(self, rows: Sequence[TextRow]) -> ArrayBatch:
        """Return rows padded to the longest of them."""
        lengths = np.array([len(row.ids) for row in rows])
        place = np.arange(lengths.max())
        attended = place < lengths[:, None]
        input_ids = np.full(attended.shape, self._encoder.vocabulary.pad, dtype=np.int64)
        input_ids[attended] = np.concatenate([row.ids for row in rows])
        in_second = place >= np.array([row.a_length for row in rows])[:, None]
        return {
            "input_ids": input_ids,
            "token_type_ids": (in_second & attended).astype(np.int64),
            "attention_mask": attended,
        }

    def kept(self, items: Sequence[Any]) -> list[TextRow]:
        """Return the rows: a text is the same in each pass."""
        return self.rows(items)

    def training_batch(
        self, kept: Sequence[TextRow], visits: Sequence[int], seed: int
    ) -> ArrayBatch:
        """Return the rows padded to the longest of them."""
        del visits, seed  # nothing is drawn here
        return self.batch(kept)


class PictureInputs:
    """Pictures: mildly cropped and, if the pretraining did so, mirrored views to train on."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        found = encoder.image_config
        views = ViewConfig(
            size=found.views.size,
            flip=found.views.flip,
            crop_scale=(max(SMALLEST_CROP, found.views.crop_scale[0]), 1.0),
            jitter=0.0,
            greyscale=0.0,
        )
        self.maker = ImageRows(replace(found, rows="single", corruption=0.0, views=views))

    def rows(self, items: Sequence[Any]) -> list[Pixels]:
        """Return plain views, uint8 (channels, height, width).

        Raises:
            DataError: If an item is no picture.
        """
        maker = self._encoder.image_rows
        made: list[Pixels] = []
        for i, data in enumerate(items):
            pixels = maker.plain(data)
            if isinstance(pixels, Rejected):
                raise DataError(f"picture {i} of {len(items)}: {pixels.reason}; leave it out")
            made.append(pixels)
        return made

    def batch(self, rows: Sequence[Pixels]) -> ArrayBatch:
        """Return the views stacked."""
        return {"image": np.stack(rows)}

    def kept(self, items: Sequence[Any]) -> list[Picture]:
        """Return the pictures, numbered: their view is another in each pass."""
        return [Picture(number, 0, data) for number, data in enumerate(items)]

    def training_batch(
        self, kept: Sequence[Picture], visits: Sequence[int], seed: int
    ) -> ArrayBatch:
        """Return a view of each picture, drawn by its number, the visit and the seed."""
        visited = [p._replace(visit=visit) for p, visit in zip(kept, visits, strict=True)]
        table = self.maker.rows(visited, seed=seed, order=0)
        image: Any = self.maker.collate(table, seed=seed, step=0, slot=0)["image"]
        return {"image": image}


def inputs_of(encoder: Encoder) -> Inputs:
    """Return how items become rows of this encoder."""
    return TextInputs(encoder) if encoder.pieces else PictureInputs(encoder)


def batches(inputs: Inputs, rows: Sequence[Any]) -> Iterator[tuple[list[int], ArrayBatch]]:
    """Yield the places of rows and their batch; rows of like length share one."""
    by_length = sorted(range(len(rows)), key=lambda i: _length(rows[i]))
    for start in range(0, len(rows), ROWS_PER_BATCH):
        places = by_length[start : start + ROWS_PER_BATCH]
        yield places, inputs.batch([rows[i] for i in places])


def _length(row: Any) -> int:
    return len(row.ids) if isinstance(row, TextRow) else 0
