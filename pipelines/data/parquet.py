"""Strict reading of one text column of parquet shards, row group by row group.

A record is one value, as the bytes that the column holds. Nothing else of the file is read, and
of a row group never more at once than a page and a few rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.filesystems import open_file
from pipelines.data.records import Record, Seen, check_expansion
from pipelines.errors import DataError

BATCH_ROWS = 8
"""A batch repeats whatever a dictionary holds once, so that few rows bound its memory."""
_NULL = b"\xff" * 8


class Wanted(NamedTuple):
    """What a column has to hold, and the flag that chooses it."""

    what: str
    flag: str
    has: Callable[[pa.DataType], bool]


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def _is_id(kind: pa.DataType) -> bool:
    return _is_text(kind) or pa.types.is_integer(kind)


TEXTS = Wanted("strings", "--source.text-field", _is_text)
IDS = Wanted("strings or whole numbers", "--id-field", _is_id)


def row_groups(
    name: str, column: str, max_expansion: float, seen: Seen
) -> Iterator[Iterator[Record]]:
    """Yield the records of each row group of a shard.

    Raises:
        OSError: If the shard is cut, corrupt, or a bomb; or another of pyarrow's errors.
        DataError: If it has no such column of strings.
    """
    total = 0
    with _open(name, column, TEXTS) as (shard, file_bytes):

        def counted(data: bytes) -> None:
            nonlocal total
            total += len(data)
            check_expansion(total, file_bytes, max_expansion)
            seen(data)

        for group in range(shard.num_row_groups):
            # Of what a page holds packed, and of what a dictionary is said to repeat.
            packed, unpacked = _sizes(shard.metadata.row_group(group), column)
            check_expansion(unpacked, packed, max_expansion)
            yield _rows(shard, group, column, 0, counted)


def rows_from(name: str, column: str, first_row: int, seen: Seen) -> Iterator[Record]:
    """Yield the records from a row to the end of its row group, which is decoded from its start.

    Raises:
        OSError: If they cannot be read; or another of pyarrow's errors.
        DataError: If the shard has no such column of strings.
    """
    return _from_row(name, column, first_row, seen, TEXTS)


def _from_row(
    name: str, column: str, first_row: int, seen: Seen, wanted: Wanted
) -> Iterator[Record]:
    with _open(name, column, wanted) as (shard, _):
        for group in range(shard.num_row_groups):
            num_rows = shard.metadata.row_group(group).num_rows
            if first_row < num_rows:
                yield from _rows(shard, group, column, first_row, seen)
                return
            first_row -= num_rows


def ids_from(name: str, column: str, first_row: int) -> Iterator[Record]:
    """Yield the strings or whole numbers of a column, these in decimal, as `rows_from` does.

    Raises:
        OSError: If they cannot be read; or another of pyarrow's errors.
        DataError: If the shard has no such column.
    """
    return _from_row(name, column, first_row, lambda _: None, IDS)


@contextmanager
def _open(name: str, column: str, wanted: Wanted) -> Iterator[tuple[pq.ParquetFile, int]]:
    """Open a shard that has such a column; the second is its size in bytes."""
    with open_file(name) as file:
        shard = pq.ParquetFile(file, page_checksum_verification=True)
        schema = shard.schema_arrow
        index = schema.get_field_index(column)  # -1 also where two have the name
        if index < 0 or not wanted.has(schema.field(index).type):
            there = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise DataError(
                f"{name}: no column {column!r} of {wanted.what}; it has {there:.500}; "
                f"choose one with {wanted.flag}"
            )
        yield shard, file.size()


def _sizes(group: pq.RowGroupMetaData, column: str) -> tuple[int, int]:
    chunks = (group.column(i) for i in range(group.num_columns))
    (chunk,) = (chunk for chunk in chunks if chunk.path_in_schema == column)
    return chunk.total_compressed_size, chunk.total_uncompressed_size


def _rows(
    shard: pq.ParquetFile, group: int, column: str, first_row: int, seen: Seen
) -> Iterator[Record]:
    num_rows = 0
    for batch in shard.iter_batches(
        batch_size=BATCH_ROWS, row_groups=[group], columns=[column], use_threads=False
    ):
        skipped = max(0, first_row - num_rows)
        num_rows += batch.num_rows
        if num_rows <= first_row:
            continue
        values = batch.column(column).slice(skipped)
        if pa.types.is_integer(values.type):
            values = values.cast(pa.string())
        # As bytes: pyarrow does not look whether strings are UTF-8.
        values = values.cast(pa.large_binary())
        for value in values.to_pylist():
            # With its length before it, so that no two columns are hashed as the same bytes.
            seen(_NULL if value is None else len(value).to_bytes(8, "little") + value)
            yield Record(value, len(value or b""))
    if num_rows != shard.metadata.row_group(group).num_rows:
        raise OSError(f"row group {group} holds {num_rows} rows, not what its footer says")
