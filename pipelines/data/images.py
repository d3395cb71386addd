"""Pictures to views to rows to arrays. Pure functions, no ray.

picture 7:  decode once -> x1 and x1', two views of its pixels      views.py
slot:       x2 of a row is another picture of the same slot, told by its index: every picture
is decoded once and embedded once, and serves as x1, as x1' and as x2
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.data.decode import Pixels, decode, leaving
from pipelines.data.manifest import Picture
from pipelines.data.randomness import draws, key, uniform
from pipelines.data.shards import Rejected
from pipelines.data.views import NUM_DRAWS, View, ViewConfig, apply_view, centre_view, draw_view

FATES = (
    "used",
    "quarantined:not-an-image",
    "quarantined:cut-image",
    "quarantined:bad-image",
    "quarantined:too-many-pixels",
)
"""What becomes of a picture when it is made into a row; all but the first are placeholders."""
USED = 0
PART_BYTES = 16 * 1024 * 1024
"""Of views that are made at once, whatever the size of a work order. Numpy asks for large pages for
arrays from 4 MiB on; with smaller ones a tenth of the time went into page faults."""


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How pictures become rows."""

    kind: Literal["images"] = "images"
    views: ViewConfig = field(default_factory=ViewConfig)
    channels: Literal[1, 3] = 3
    """1 reads every picture as grey, 3 as RGB."""
    rows: Literal["pairs", "single"] = "pairs"
    """Two views of each picture, or one."""
    corruption: float = 0.0
    """Of single rows: share of the pixels that a corrupted copy of the view loses."""

    def __post_init__(self) -> None:
        if not 0 <= self.corruption < 1:
            raise ValueError(f"corruption must be in [0, 1), got {self.corruption}")
        if self.corruption and self.rows == "pairs":
            raise ValueError("corruption is for single rows: set --images.rows single")


class ImageRows:
    """Makes the rows of a work order, and the batches of a slot, from pictures."""

    fates = FATES

    def __init__(self, config: ImageConfig) -> None:
        self.config = config

    @property
    def rows_at_once(self) -> int:
        """How many rows are made at once: some megabytes of them."""
        return max(1, PART_BYTES // (len(self._columns()) * math.prod(self.shape)))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one view: channels, height, width."""
        return self.config.channels, self.config.views.size, self.config.views.size

    def rows(self, pictures: Sequence[Picture], *, seed: int, order: int) -> pa.Table:
        """Return the rows of a work order, one for each picture, in their order.

        Columns: the views `first` and, of pairs, `second`, or `corrupted` where asked for, each
        uint8 (channels x height x width); `record`; `content`, the hash of the picture; and
        `fate`, an index into `fates`: what is not used is black, and has no weight.
        """
        del order  # nothing is exchanged between pictures before they meet in a slot
        names = self._columns()
        whole = np.zeros((len(names), len(pictures), *self.shape), np.uint8)
        arrays = dict(zip(names, whole, strict=True))
        fate = np.zeros(len(pictures), dtype=np.int8)
        for i, picture in enumerate(pictures):
            made = self._views(picture, seed)
            if isinstance(made, Rejected):
                fate[i] = FATES.index(made.reason)
                continue
            for name, pixels in zip(names, made, strict=True):
                cv2.split(pixels, [*arrays[name][i]])  # into the planes that are there
        size = math.prod(self.shape)
        columns = {
            name: pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), size)
            for name, array in arrays.items()
        }
        return pa.table(
            columns
            | {
                "record": pa.array([picture.record for picture in pictures], pa.int64()),
                "content": pa.array([picture.content for picture in pictures], pa.uint64()),
                "fate": pa.array(fate),
            }
        )

    def decoded(self, picture: Picture, seed: int) -> Pixels | Rejected:
        """Return the pixels that the views of a picture are made of, or why it has none.

        Large JPEGs are decoded at a fraction of their size if no crop has to be enlarged for it.
        """
        size = self.config.views.size

        def reduction(height: int, width: int) -> int:
            if min(height, width) < 2 * size:
                return 1
            views = self._draw(picture, height, width, seed)
            return min(min(view.width, view.height) for view in views) // size

        return decode(picture.data, self.config.channels, reduction)

    def views(self, picture: Picture, pixels: Pixels, seed: int) -> list[View]:
        """Return what is drawn for the views of a `decoded` picture, a function of these."""
        height, width, _ = pixels.shape
        return self._draw(picture, height, width, seed)

    def _draw(self, picture: Picture, height: int, width: int, seed: int) -> list[View]:
        num_views = 2 if self.config.rows == "pairs" else 1
        counters = np.arange(num_views * NUM_DRAWS, dtype=np.uint64)
        uniforms = uniform(draws(_key(picture, seed, "views"), counters))
        return [
            draw_view(self.config.views, part, height, width)
            for part in uniforms.reshape(num_views, NUM_DRAWS)
        ]

    def collate(self, table: pa.Table, *, seed: int, step: int, slot: int) -> dict[str, Any]:
        """Return the batch that the model is given for the rows of one slot of one step."""
        used = table["fate"].to_numpy() == USED
        batch: dict[str, Any] = {
            name: _unnest(table[name]).reshape(-1, *self.shape).copy() for name in self._columns()
        }
        batch["weight"] = used.astype(np.float32)
        content = table["content"].to_numpy()
        if self.config.rows == "pairs":
            negative = partners(content, used, key(seed, step, slot, "negative"))
            # A row that finds no partner is none itself: it has nothing to be told from.
            batch["weight"] *= negative >= 0
            batch["negative"] = np.maximum(negative, 0)
            batch["group"] = content.view(np.int64).copy()
        else:
            batch["image"] = batch.pop("first")
        return batch

    def plain(self, data: bytes) -> Pixels | Rejected:
        """Return a picture as an encoder is to see it, uint8 (channels, height, width)."""
        size = self.config.views.size
        pixels = decode(data, self.config.channels, leaving(size))
        if isinstance(pixels, Rejected):
            return pixels
        height, width, _ = pixels.shape
        view = apply_view(pixels, centre_view(height, width), size)
        return np.ascontiguousarray(view.transpose(2, 0, 1))

    def _columns(self) -> tuple[str, ...]:
        if self.config.rows == "pairs":
            return "first", "second"
        return ("first", "corrupted") if self.config.corruption else ("first",)

    def _views(self, picture: Picture, seed: int) -> list[Pixels] | Rejected:
        config = self.config
        pixels = self.decoded(picture, seed)
        if isinstance(pixels, Rejected):
            return pixels
        views = [
            apply_view(pixels, view, config.views.size)
            for view in self.views(picture, pixels, seed)
        ]
        if config.corruption:
            views.append(_corrupt(views[0], config.corruption, _key(picture, seed, "corruption")))
        return views


def partners(
    content: NDArray[np.uint64], used: NDArray[np.bool_], partner_key: int
) -> NDArray[np.int64]:
    """Return for each row the index of another row, keyed; -1 where there is none.

    A partner is a row that is used and is no copy of the same picture.
    """
    allowed = used[None, :] & used[:, None] & (content[None, :] != content[:, None])
    counts = allowed.sum(axis=1)
    words = draws(partner_key, np.arange(len(content), dtype=np.uint64))
    chosen = (uniform(words) * counts).astype(np.int64)
    places = (allowed.cumsum(axis=1) > chosen[:, None]) & allowed
    return np.where(counts > 0, places.argmax(axis=1), -1)


def _corrupt(view: Pixels, ratio: float, corruption_key: int) -> Pixels:
    """Return a copy of a view that has lost a share of its pixels to black.

    The masking noise of Vincent et al. 2008, Extracting and Composing Robust Features with
    Denoising Autoencoders, but for all channels of a pixel alike.
    """
    height, width, _ = view.shape
    words = draws(corruption_key, np.arange(height * width, dtype=np.uint64))
    is_kept = uniform(words).reshape(height, width, 1) >= ratio
    return view * is_kept.astype(np.uint8)


def _key(picture: Picture, seed: int, operation: str) -> int:
    """Return the key of one operation on one picture in one pass."""
    record = np.array([picture.record], dtype=np.uint64)
    return int(draws(key(seed, picture.visit, operation), record)[0])


def _unnest(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    values: NDArray[np.uint8] = column.combine_chunks().flatten().to_numpy()
    return values
