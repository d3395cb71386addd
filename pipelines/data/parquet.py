"""Strict reading of one column of parquet shards, texts or pictures, row group by row group.

A record is one value, as the bytes that the column holds. Nothing else of the file is read, and
of a row group never more at once than a page and a few rows. Pictures may lie as `datasets`
writes them: in a struct of `bytes` and `path`, of which only the first is read.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.data.filesystems import open_file
from pipelines.data.records import Record, Seen, check_expansion
from pipelines.errors import DataError

BYTES = "bytes"
"""The field of a struct that holds a picture."""
READ_BYTES = 4 * 1024 * 1024
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


def _is_picture(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index(BYTES)
        return index >= 0 and _is_picture(kind.field(index).type)
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view())


TEXTS = Wanted("strings", "--source.text-field", _is_text)
PICTURES = Wanted("pictures as bytes", "--source.image-field", _is_picture)
IDS = Wanted("strings or whole numbers", "--labels or --id-field", _is_id)


def row_groups(
    name: str, column: str, wanted: Wanted, max_expansion: float, seen: Seen
) -> Iterator[Iterator[Record]]:
    """Yield the records of each row group of a shard.

    Raises:
        OSError: If the shard is cut, corrupt, or a bomb; or another of pyarrow's errors.
        DataError: If it has no such column of what is wanted.
    """
    total = 0
    with _open(name, column, wanted) as (shard, leaf, file_bytes):

        def counted(data: bytes) -> None:
            nonlocal total
            total += len(data)
            check_expansion(total, file_bytes, max_expansion)
            seen(data)

        for group in range(shard.num_row_groups):
            # Of what a page holds packed, and of what a dictionary is said to repeat.
            packed, unpacked = _sizes(shard.metadata.row_group(group), leaf)
            check_expansion(unpacked, packed, max_expansion)
            yield _rows(shard, group, leaf, 0, counted)


def rows_from(
    name: str, column: str, wanted: Wanted, first_row: int, seen: Seen
) -> Iterator[Record]:
    """Yield the records from a row to the end of its row group, which is decoded from its start.

    Raises:
        OSError: If they cannot be read; or another of pyarrow's errors.
        DataError: If the shard has no such column of what is wanted.
    """
    with _open(name, column, wanted) as (shard, leaf, _):
        for group in range(shard.num_row_groups):
            num_rows = shard.metadata.row_group(group).num_rows
            if first_row < num_rows:
                yield from _rows(shard, group, leaf, first_row, seen)
                return
            first_row -= num_rows


@contextmanager
def _open(name: str, column: str, wanted: Wanted) -> Iterator[tuple[pq.ParquetFile, str, int]]:
    """Open a shard that has such a column; with it come the path of its values and its bytes."""
    with open_file(name) as file:
        shard = pq.ParquetFile(
            file,
            page_checksum_verification=True,
            pre_buffer=False,  # which is the whole column of a row group
            buffer_size=READ_BYTES,
        )
        schema = shard.schema_arrow
        index = schema.get_field_index(column)  # -1 also where two have the name
        if index < 0 or not wanted.has(schema.field(index).type):
            there = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise DataError(
                f"{name}: no column {column!r} of {wanted.what}; it has {there:.500}; "
                f"choose one with {wanted.flag}"
            )
        is_nested = pa.types.is_struct(schema.field(index).type)
        yield shard, f"{column}.{BYTES}" if is_nested else column, file.size()


def _sizes(group: pq.RowGroupMetaData, leaf: str) -> tuple[int, int]:
    chunks = (group.column(i) for i in range(group.num_columns))
    (chunk,) = (chunk for chunk in chunks if chunk.path_in_schema == leaf)
    return chunk.total_compressed_size, chunk.total_uncompressed_size


def _rows(
    shard: pq.ParquetFile, group: int, leaf: str, first_row: int, seen: Seen
) -> Iterator[Record]:
    num_rows = 0
    for batch in shard.iter_batches(
        batch_size=BATCH_ROWS, row_groups=[group], columns=[leaf], use_threads=False
    ):
        skipped = max(0, first_row - num_rows)
        num_rows += batch.num_rows
        if num_rows <= first_row:
            continue
        values = batch.column(0).slice(skipped)
        if pa.types.is_struct(values.type):
            values = pc.struct_field(values, BYTES)
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
