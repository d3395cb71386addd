"""A small search: the embeddings that `rayssl embed` wrote, and which of them are near a query."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import DataError, UserError
from pipelines.use import neighbours
from pipelines.use.embed import PREFIX
from pipelines.use.encoder import Encoder
from pipelines.use.neighbours import Vectors

TOLD = ("bundle_sha256", "fingerprint", "id_field")
"""What every file of one embedding tells alike; its model may go by several names."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Index:
    """The embeddings of a corpus, in memory."""

    names: pa.Table
    """Columns id, shard and record, a row for each embedding."""
    vectors: Vectors
    """(rows, dimension)."""
    told: dict[str, str]
    """The `TOLD` of its files."""


class Neighbour(NamedTuple):
    """An item of an index beside a query."""

    id: str
    similarity: float


def read_index(folder: Path) -> Index:
    """Return what `embed` wrote into a folder.

    Raises:
        UserError: If there are no embeddings in it.
        DataError: If a file is none of `embed`, or the files are not of one embedding.
    """
    paths = sorted(folder.glob("unit-*.parquet"))
    if not paths:
        raise UserError(f"no embeddings in {folder}: make some with rayssl embed --out {folder}")
    tables = []
    for path in paths:
        try:
            tables.append(pq.read_table(path))
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path} cannot be read ({error!s:.80}): embed it again") from error
        if _told(tables[-1]) != _told(tables[0]):
            raise DataError(f"{path} and {paths[0]} are not of one embedding: embed again")
    table = pa.concat_tables(tables)
    column = table["embedding"].combine_chunks()
    values = column.values if isinstance(column, pa.FixedSizeListArray) else column.flatten()
    return Index(
        names=table.drop_columns(["embedding"]),
        vectors=np.asarray(values).reshape(table.num_rows, -1),
        told=_told(tables[0]),
    )


def nearest(encoder: Encoder, sha256: str, index: Index, query: str, top: int) -> list[Neighbour]:
    """Return the items most like a text, or like the picture of a file, the nearest first.

    Raises:
        UserError: If the index is of another model, or there is no such picture.
    """
    if (made_by := index.told["bundle_sha256"]) != sha256:
        raise UserError(
            f"the index is of another model (bundle_sha256 {made_by[:12]}, not {sha256[:12]}): "
            "name that one, or embed the data with this one"
        )
    if top < 1:
        raise UserError(f"--top must be at least 1, got {top}")
    embedded = encoder.encode([query] if encoder.modality == "text" else [_picture(query)])
    unit = neighbours.on_sphere(index.vectors)
    numbers, cosines = neighbours.nearest(unit, neighbours.on_sphere(embedded), top)
    ids = index.names["id"].take(numbers[0]).to_pylist()
    return [Neighbour(*found) for found in zip(ids, cosines[0].tolist(), strict=True)]


def _told(table: pa.Table) -> dict[str, str]:
    told = table.schema.metadata or {}
    return {name: told.get(f"{PREFIX}{name}".encode(), b"").decode() for name in TOLD}


def _picture(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the picture {path!r}: {error.strerror}") from error
