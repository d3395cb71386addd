"""Records with a label, which no training ever sees, and their features.

    labels of every record -> those that are drawn -> their bytes -> features of several encoders

Only what was drawn is decoded and embedded; both passes are made in parallel, block by block.
"""

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from pipelines.cluster import parallel_map
from pipelines.data.fields import field_of_each
from pipelines.data.images import ImageRows
from pipelines.data.manifest import Document, Manifest, Split
from pipelines.data.randomness import Words64
from pipelines.data.shards import Rejected
from pipelines.data.spans import Ints
from pipelines.errors import UserError
from pipelines.use.encoder import Encoder
from pipelines.use.probe import stratified

RAW_PIXELS = 32
"""Side of a picture as raw pixels, if the encoder does not see a smaller one."""
MAX_LABEL_CHARS = 200
"""A longer value is a text and no label: each of them would be held for all records."""
RAW_CHARS = 20_000
"""So much of a text counts as its words; of an encoder the row is the limit."""


class Part(NamedTuple):
    """What a manifest has of a split."""

    manifest: Manifest
    split: Split


@dataclass(frozen=True, eq=False, kw_only=True)
class Items:
    """Labelled records, in the order of the shards."""

    part: Part
    block: Ints
    record: Ints
    content: Words64
    """Hash of each; copies share it."""
    label: NDArray[np.str_]
    num_unlabelled: int = 0
    """Records of the part that have no label and are left out."""

    def __len__(self) -> int:
        return len(self.record)

    def distinct(self) -> "Items":
        """Return the first of each content: copies are no items of their own."""
        return self.take(np.sort(np.unique(self.content, return_index=True)[1]))

    def at_most(self, count: int, words: Words64) -> "Items":
        """Return so many items, of each class its share, as the words draw; all of fewer."""
        if len(self) <= count:
            return self
        _, codes = np.unique(self.label, return_inverse=True)
        return self.take(stratified(codes, words, count))

    def take(self, places: NDArray[Any]) -> "Items":
        """Return those at some places, or where a mask has them."""
        names = ("block", "record", "content", "label")
        return replace(self, **{name: getattr(self, name)[places] for name in names})


@dataclass(frozen=True, eq=False, kw_only=True)
class Embedded:
    """Items that can be read, and their features."""

    items: Items
    raw: Any
    """Of pictures their pixels, uint8 (items, pixels); of texts a list of them."""
    features: NDArray[np.float32]
    """(encoders, items, width)."""
    num_unreadable: int
    """Pictures that cannot be decoded and are left out."""


def labelled_items(part: Part, field: str) -> Items:
    """Return the records of a part that have a label, read in parallel.

    Raises:
        UserError: If none has a label, or one is as long as a text.
    """
    told = ray.put((part, field))
    blocks = part.manifest.blocks_of(part.split)
    rows = [row for found in parallel_map(partial(_labels, told), blocks) for row in found]
    labelled = [row for row in rows if row.label is not None]
    if not labelled:
        raise UserError(
            f"none of {len(rows)} records has a string or whole number {field!r}: name another "
            "field with --labels, of a sample of a tar an extension such as cls"
        )
    return Items(
        part=part,
        block=np.array([row.block for row in labelled]),
        record=np.array([row.record for row in labelled]),
        content=np.array([row.content for row in labelled], dtype=np.uint64),
        label=np.array([row.label for row in labelled]),
        num_unlabelled=len(rows) - len(labelled),
    )


def embedded(items: Items, encoders: list[Encoder]) -> Embedded:
    """Return the features of items by each encoder, made in parallel, in the order of the items.

    Raises:
        DataError: If a shard has changed since it was indexed.
    """
    told = ray.put((items.part, encoders))
    found = parallel_map(partial(_features, told), _by_block(items))
    readable = np.concatenate([readable for readable, _, _ in found])
    raws = [raw for _, raw, _ in found]
    return Embedded(
        items=items.take(readable),
        raw=[text for raw in raws for text in raw] if encoders[0].pieces else np.concatenate(raws),
        features=np.concatenate([features for _, _, features in found], axis=1),
        num_unreadable=int((~readable).sum()),
    )


def readable_features(
    items: Items, encoder: Encoder
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Return which items an encoder can read, and its features (items, width), zeros for others.

    Raises:
        DataError: If a shard has changed since it was indexed.
    """
    told = ray.put((items.part, encoder))
    found = parallel_map(partial(_readable_features, told), _by_block(items))
    readable, features = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return readable, features


class _Row(NamedTuple):
    block: int
    record: int
    content: int
    label: str | None


def _labels(told: "ray.ObjectRef[tuple[Part, str]]", number: int) -> list[_Row]:
    (manifest, split), field = _fetch(told)
    items = manifest.read(number, split)
    values = field_of_each(manifest, number, items, field)
    longest = max((value or "" for value in values), key=len, default="")
    if len(longest) > MAX_LABEL_CHARS:
        raise UserError(
            f"{field!r} holds {longest[:40]!r}... of {len(longest)} characters, which is no label: "
            "name another field with --labels"
        )
    return [
        _Row(number, item.record, item.content, value)
        for item, value in zip(items, values, strict=True)
    ]


def _features(
    told: "ray.ObjectRef[tuple[Part, list[Encoder]]]", wanted: tuple[int, Ints]
) -> tuple[NDArray[np.bool_], Any, NDArray[np.float32]]:
    """Return which of the wanted records of a block can be read, and of those raw and features."""
    part, encoders = _fetch(told)
    data = _contents(part, *wanted)
    if encoders[0].pieces:
        readable = [True] * len(data)
        raw: Any = [text[:RAW_CHARS] for text in data]
    else:
        maker = raw_pixels(encoders[0].image_rows)
        pixels = [maker.plain(picture) for picture in data]
        readable = [not isinstance(made, Rejected) for made in pixels]
        data = [picture for picture, is_read in zip(data, readable, strict=True) if is_read]
        rows = [made.reshape(-1) for made in pixels if not isinstance(made, Rejected)]
        raw = np.array(rows, dtype=np.uint8).reshape(len(rows), int(np.prod(maker.shape)))
    features = np.stack([encoder.encode(data) for encoder in encoders])
    return np.array(readable), raw, features


def _readable_features(
    told: "ray.ObjectRef[tuple[Part, Encoder]]", wanted: tuple[int, Ints]
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    part, encoder = _fetch(told)
    features, reasons = encoder.encode_readable(_contents(part, *wanted))
    return np.array([place not in reasons for place in range(len(features))]), features


def _by_block(items: Items) -> list[tuple[int, Ints]]:
    """Return the records that are wanted of each block."""
    numbers, starts = np.unique(items.block, return_index=True)
    return list(zip(numbers.tolist(), np.split(items.record, starts[1:]), strict=True))


def _contents(part: Part, number: int, records: Ints) -> list[Any]:
    """Return the texts, or the bytes of the pictures, of records of a block."""
    found = {item.record: item for item in part.manifest.read(number, part.split)}
    items = [found[record] for record in records.tolist()]
    return [item.text if isinstance(item, Document) else item.data for item in items]


def raw_pixels(maker: ImageRows) -> ImageRows:
    """Return what makes the raw pixels that an encoder has to beat."""
    views = maker.config.views
    size = min(views.size, RAW_PIXELS)
    return ImageRows(replace(maker.config, views=replace(views, size=size)))


@lru_cache(maxsize=1)
def _fetch(told: "ray.ObjectRef[Any]") -> Any:
    """Return what every task is told; a process holds its encoders for the blocks to come."""
    torch.set_num_threads(1)  # others have the other cores
    return ray.get(told)
