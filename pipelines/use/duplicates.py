"""Near-duplicates by embeddings: a ranked table, every pair, groups, and a sheet of the pictures.

DIR/embeddings      what `rayssl embed` writes
DIR/pairs.parquet   the pairs, the most alike first, each with a likeness without a model
DIR/groups.parquet  the items that pairs join, and which one of each group to keep
DIR/sheet.png       of pictures, the first pairs
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from pipelines.cluster import parallel_map
from pipelines.data.decode import Pixels, Reduction, decode, leaving
from pipelines.data.manifest import Document, Manifest, Picture
from pipelines.errors import UserError
from pipelines.storage import write_file
from pipelines.use import neighbours
from pipelines.use.contact_sheet import SIDE, SheetRow, contact_sheet, thumbnail
from pipelines.use.embed import PREFIX, EmbedJob
from pipelines.use.likeness import DHASH_BITS, dhash, hash_distance, jaccard, shingles
from pipelines.use.nearest import Index, read_index
from pipelines.use.neighbours import Found, Numbers

MAX_PAIRS = 1_000_000
"""Written to pairs.parquet; of more pairs the most alike."""
LIKENESS = {"images": "dhash_distance", "text": "jaccard"}
"""Column beside the similarity: bits of 64 that differ, or the share of equal 5-grams."""


class Pair(NamedTuple):
    """Two items that are alike."""

    first: str
    second: str
    similarity: float
    likeness: float
    """What `LIKENESS` names."""


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """What was found."""

    items: int
    pairs: int
    """At or above the threshold."""
    kept_pairs: int
    """Of them, in pairs.parquet."""
    groups: int
    largest_group: int
    """Items in it; a large one is a chain of pairs and no set of copies: raise the threshold."""
    surplus: int
    """Items that go if one of each group is kept."""
    files: tuple[str, ...]
    """What was written."""
    top: tuple[Pair, ...] = field(repr=False)
    """The most alike pairs."""


def find_duplicates(job: EmbedJob, out: Path, threshold: float, top: int) -> Duplicates:
    """Find the near-duplicates of a corpus that is embedded, and write them to a folder.

    Raises:
        UserError: If there are no two items.
        StorageError: If a file cannot be written.
    """
    index = read_index(job.out)
    if (items := index.names.num_rows) < 2:
        raise UserError(f"there is {items} item in the data: it takes two to be duplicates")
    found = neighbours.find_pairs(neighbours.on_sphere(index.vectors), threshold, MAX_PAIRS)
    pairs = _pairs_table(job, index, found)
    groups = _groups_table(index, found)
    told = job.metadata | {f"{PREFIX}threshold": str(threshold)}
    files = [out / "pairs.parquet", out / "groups.parquet"]
    for path, table in zip(files, (pairs, groups), strict=True):
        write_file(path, partial(pq.write_table, table.replace_schema_metadata(told)))
    best = tuple(Pair(*row.values()) for row in pairs.slice(0, top).to_pylist())
    if job.encoder.modality == "images":
        files.append(out / "sheet.png")
        write_file(files[-1], lambda aside: _sheet(job, index, found, best).save(aside, "PNG"))
    kept = sum(groups["keep"].to_pylist())
    return Duplicates(
        items=items,
        pairs=found.num_pairs,
        kept_pairs=pairs.num_rows,
        groups=kept,
        largest_group=int(np.bincount(found.groups_n).max()) if kept else 0,
        surplus=groups.num_rows - kept,
        files=tuple(map(str, files)),
        top=best,
    )


def _pairs_table(job: EmbedJob, index: Index, found: Found) -> pa.Table:
    first, second, similarity = found.pairs
    records = _records(job, index)
    is_picture = job.encoder.modality == "images"
    trait, compare = (_dhash, hash_distance) if is_picture else (_shingles, jaccard)
    wanted = records[np.unique([first, second])].tolist()
    traits = _of_items(job.manifest, wanted, trait)
    likeness = [
        compare(traits[a], traits[b])
        for a, b in zip(records[first].tolist(), records[second].tolist(), strict=True)
    ]
    ids = index.names["id"].combine_chunks()
    return pa.table(
        {
            "first": ids.take(pa.array(first)),
            "second": ids.take(pa.array(second)),
            "similarity": similarity,
            LIKENESS[job.encoder.modality]: pa.array(
                likeness, pa.int32() if is_picture else pa.float64()
            ),
        }
    )


def _groups_table(index: Index, found: Found) -> pa.Table:
    """Return the members of all groups; the first of each in the corpus is the one to keep."""
    numbers, firsts, counts = np.unique(found.groups_n, return_index=True, return_counts=True)
    places = np.searchsorted(numbers, found.groups_n)
    members = np.flatnonzero(counts[places] > 1)
    leader = firsts[places[members]]
    order = np.lexsort((members, leader))
    members, leader = members[order], leader[order]
    table = index.names.take(pa.array(members))
    _, group = np.unique(leader, return_inverse=True)
    return table.append_column("group", pa.array(group)).append_column(
        "keep", pa.array(members == leader)
    )


def _sheet(job: EmbedJob, index: Index, found: Found, best: Sequence[Pair]) -> Any:
    records = _records(job, index)
    firsts, seconds = (records[column[: len(best)]].tolist() for column in found.pairs[:2])
    pictures = _of_items(job.manifest, {*firsts, *seconds}, _thumbnail)
    return contact_sheet(
        [
            SheetRow(
                pictures[first],
                pictures[second],
                (
                    f"{number}.  similarity {pair.similarity:.4f}",
                    f"dHash: {pair.likeness:.0f} of {DHASH_BITS} bits differ",
                    pair.first,
                    pair.second,
                ),
            )
            for number, (first, second, pair) in enumerate(
                zip(firsts, seconds, best, strict=True), 1
            )
        ]
    )


def _records(job: EmbedJob, index: Index) -> Numbers:
    """Return the number in the corpus of the record of each embedding."""
    first = {job.manifest.shards[s].path: record for s, record in job.first_records.items()}
    starts = np.array([first[shard] for shard in index.names["shard"].to_pylist()], np.int64)
    records: Numbers = starts + index.names["record"].to_numpy()
    return records


def _of_items(
    manifest: Manifest, records: Collection[int], what: Callable[[Any], Any]
) -> dict[int, Any]:
    """Return something of some items by the number of their record, made where they are read."""
    starts = [block.first_record for block in manifest.blocks]
    wanted: dict[int, set[int]] = defaultdict(set)
    for record in records:
        wanted[bisect_right(starts, record) - 1].add(record)
    told = ray.put(manifest)
    made = parallel_map(partial(_of_block, told, what), sorted(wanted.items()))
    return {record: value for part in made for record, value in part}


def _of_block(
    told: "ray.ObjectRef[Manifest]", what: Callable[[Any], Any], block: tuple[int, set[int]]
) -> list[tuple[int, Any]]:
    number, records = block
    items = ray.get(told).read(number, "training")
    return [(item.record, what(item)) for item in items if item.record in records]


def _dhash(picture: Picture) -> int:
    return dhash(_pixels(picture))


def _thumbnail(picture: Picture) -> Pixels:
    return thumbnail(_pixels(picture, leaving(2 * SIDE)))


def _shingles(document: Document) -> Any:
    return shingles(document.text)


def _pixels(picture: Picture, reduction: Reduction | None = None) -> Pixels:
    pixels = decode(picture.data, 3, reduction)
    assert isinstance(pixels, np.ndarray), "it was decoded when it was embedded"
    return pixels
