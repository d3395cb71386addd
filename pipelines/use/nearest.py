"""A small search: the embeddings that `rayssl embed` wrote, and which of them are near a query."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import DataError, UserError
from pipelines.storage import write_file
from pipelines.use import neighbours
from pipelines.use.embed import PREFIX
from pipelines.use.encoder import Encoder
from pipelines.use.neighbours import Numbers, Vectors

EMBEDDINGS = "embeddings"
"""Where `duplicates` has them, below its folder."""
TOLD = ("bundle_sha256", "fingerprint", "id_field", "files")
"""What every file of one embedding tells alike; its model may go by several names."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Index:
    """The embeddings of a corpus."""

    paths: tuple[Path, ...]
    """The files, in their order."""
    names: pa.Table
    """Columns id, shard and record, a row for each embedding."""
    told: dict[str, str]
    """The `TOLD` of the files."""

    @cached_property
    def vectors(self) -> Vectors:
        """The embeddings (rows, dimension), read when they are asked for."""
        columns = [pq.read_table(path, columns=["embedding"])["embedding"] for path in self.paths]
        values = [chunk.flatten() for column in columns for chunk in column.chunks]
        return np.concatenate(values).reshape(self.names.num_rows, -1)


class Neighbour(NamedTuple):
    """An item of an index beside a query."""

    id: str
    similarity: float


def read_index(folder: Path) -> Index:
    """Return what `embed` wrote into a folder, or `duplicates` below it.

    Raises:
        UserError: If there are no embeddings in it, or not all of them yet.
        DataError: If a file is none of `embed`, or the files are not of one embedding.
    """
    if (below := folder / EMBEDDINGS).is_dir():
        folder = below
    paths = tuple(sorted(folder.glob("unit-*.parquet")))
    if not paths:
        raise UserError(f"no embeddings in {folder}: make some with rayssl embed --out {folder}")
    tables = []
    for path in paths:
        try:
            tables.append(pq.read_table(path, columns=["id", "shard", "record"]))
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path} cannot be read ({error!s:.80}): embed it again") from error
        if _told(tables[-1]) != _told(tables[0]):
            raise DataError(f"{path} and {paths[0]} are not of one embedding: embed again")
    told, names = _told(tables[0]), pa.concat_tables(tables)
    if told["files"] != str(len(paths)):
        raise UserError(
            f"{folder} holds {len(paths)} of {told['files']} files of its embedding: the same "
            "rayssl embed makes the others"
        )
    if not names.num_rows:
        raise UserError(f"no embedding is in the {len(paths)} files of {folder}: embed other data")
    return Index(paths=paths, names=names, told=told)


def embed_query(encoder: Encoder, sha256: str, index: Index, query: str) -> Vectors:
    """Return the embedding (1, dimension), at length 1, of a text or of the picture of a file.

    Raises:
        UserError: If the index is of another model, or there is no such file.
        DataError: If the file is no picture.
    """
    if (made_by := index.told["bundle_sha256"]) != sha256:
        raise UserError(
            f"the index is of another model (bundle_sha256 {made_by[:12]}, not {sha256[:12]}): "
            "name that one, or embed the data with this one"
        )
    embedded = encoder.encode([query] if encoder.modality == "text" else [_picture(query)])
    return neighbours.on_sphere(embedded)


def nearest(index: Index, query_1D: Vectors, top: int) -> list[Neighbour]:
    """Return the items most like a query, the nearest first, by comparing it with every one."""
    numbers, cosines = neighbours.nearest(neighbours.on_sphere(index.vectors), query_1D, top)
    return _named(index, numbers[0], cosines[0])


def probably_nearest(index: Index, query_1D: Vectors, top: int) -> list[Neighbour]:
    """Return nearly the items most like a query, by a graph that is made once, beside the files.

    Malkov and Yashunin 2016, HNSW, arXiv:1603.09320, by usearch. With the graph there the
    embeddings are not read.

    Raises:
        UserError: If usearch is not there.
        StorageError: If the graph cannot be written.
    """
    try:
        from usearch.index import Index as Graph
    except ImportError as error:
        raise UserError("--ann needs usearch: pip install 'rayssl[search]'") from error
    of = f"{index.told['bundle_sha256'][:16]}-{index.told['fingerprint'][:16]}"
    path = index.paths[0].parent / f".graph-{of}-{index.names.num_rows}.usearch"
    if not path.exists():
        graph = Graph(ndim=query_1D.shape[1], metric="cos", dtype="f32")
        graph.add(np.arange(index.names.num_rows), index.vectors)
        write_file(path, graph.save)
    found = Graph.restore(path, view=True).search(query_1D[0], top)
    return _named(index, np.asarray(found.keys, np.int64), 1 - found.distances)


def _named(index: Index, numbers: Numbers, cosines: Vectors) -> list[Neighbour]:
    ids = index.names["id"].take(pa.array(numbers)).to_pylist()
    return [Neighbour(*found) for found in zip(ids, cosines.tolist(), strict=True)]


def _told(table: pa.Table) -> dict[str, str]:
    told = table.schema.metadata or {}
    return {name: told.get(f"{PREFIX}{name}".encode(), b"").decode() for name in TOLD}


def _picture(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the picture {path!r}: {error.strerror}") from error
