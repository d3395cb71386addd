"""A parquet shard is one column of strings, read row group by row group, and nothing else of it."""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data import records
from pipelines.data.indexing import Indexer, ShardIndex, build
from pipelines.data.manifest import CUT, Manifest
from pipelines.data.parquet import TEXTS as TEXTS_WANTED
from pipelines.data.parquet import row_groups
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.errors import DataError
from tests.corpus import make_text, serial_map

SOURCE = SourceConfig(heldout_ratio=0)
TEXTS = [make_text(i, 6) for i in range(100)]


def write(path: Path, texts: Any, **settings: Any) -> Path:
    table = pa.table({"n": list(range(len(texts))), "text": texts})
    pq.write_table(table, path, **{"row_group_size": 30, "write_page_checksum": True} | settings)
    return path


def index(path: Path, source: SourceConfig = SOURCE) -> ShardIndex:
    return Indexer(source=source, block_bytes=3000)(find_shards([str(path)])[0])


def manifest_of(path: Path, source: SourceConfig = SOURCE) -> Manifest:
    """Return a manifest of blocks smaller than a row group."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.data.indexing.MAX_BLOCK_BYTES", 3000)
        return build(find_shards([str(path)]), source, serial_map)


def texts_of(manifest: Manifest) -> list[str]:
    return list(manifest.texts("training"))


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
@pytest.mark.parametrize("dictionary", [False, True])
def test_every_value_of_a_column_of_strings_is_a_record(
    tmp_path: Path, compression: str, kind: pa.DataType, dictionary: bool
) -> None:
    column = pa.array(TEXTS + TEXTS[:7], kind if not dictionary else pa.string())
    column = column.dictionary_encode() if dictionary else column
    path = write(tmp_path / "a.parquet", column, compression=compression)
    manifest = manifest_of(path)
    assert texts_of(manifest) == TEXTS + TEXTS[:7]
    (shard,) = manifest.shards
    assert shard.form == "parquet"
    assert shard.file_bytes == path.stat().st_size
    assert shard.bytes == manifest.ledger["training"].bytes
    assert shard.bytes == sum(len(text.encode()) for text in TEXTS + TEXTS[:7])


def test_a_block_is_rows_that_cross_no_row_group(tmp_path: Path) -> None:
    manifest = manifest_of(write(tmp_path / "a.parquet", TEXTS))
    next_row, groups = 0, set()
    for block in manifest.blocks:
        assert block.offset == block.first_record == next_row
        next_row += block.records
        assert block.offset // 30 == (next_row - 1) // 30
        groups.add(block.offset // 30)
    assert next_row == 100
    assert len(groups) == 4 < len(manifest.blocks)


def test_a_row_group_of_ordinary_size_is_one_block_and_decoded_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", TEXTS)
    found = index(path)
    assert [block.records for block in found.blocks] == [30, 30, 30, 10]
    assert min(block.bytes for block in found.blocks[:3]) > 3000
    assert index(path) == found


def test_a_null_is_quarantined_and_found_by_its_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [*TEXTS[:40], None, "", *TEXTS[40:], None])
    found = index(path)
    assert found.ledger["quarantined:no-text-field"].records == 2
    assert found.ledger["filtered:no-words"].records == 1
    assert [(entry.offset, entry.bytes) for entry in found.quarantined] == [(40, 0), (102, 0)]
    assert texts_of(manifest_of(path)) == TEXTS


def test_bytes_that_are_no_text_are_quarantined(tmp_path: Path) -> None:
    column = pa.array([b"good", b"\xff bad"]).cast(pa.string(), safe=False)
    column = column if isinstance(column, pa.Array) else column.chunk(0)
    found = index(write(tmp_path / "a.parquet", column))
    assert {fate: entry.records for fate, entry in found.ledger.items()} == {
        "quarantined:bad-utf8": 1,
        "training": 1,
    }


def test_no_two_columns_have_the_same_hash(tmp_path: Path) -> None:
    columns: Sequence[list[str | None]] = [
        ["ab", ""],
        ["a", "b"],
        ["", "ab"],
        ["ab", None],
        ["ab"],
        ["ab", "\xff" * 8],
    ]
    hashes = set()
    for i, column in enumerate(columns):
        texts = pa.array(column, pa.string())
        hashes.add(index(write(tmp_path / f"{i}.parquet", texts)).blocks[0].sha256)
    assert len(hashes) == len(columns)


def test_the_column_can_be_named_and_a_wrong_one_is_answered_with_those_there_are(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "a.parquet", TEXTS)
    for wrong in ("body", "n"):
        with pytest.raises(
            DataError, match=rf"no column '{wrong}' .* n \(int64\), text \(string\)"
        ):
            index(path, SourceConfig(text_field=wrong))
    pq.write_table(pa.table({"body": TEXTS, "text": [1] * 100}), path)
    assert index(path, SourceConfig(text_field="body", heldout_ratio=0)).shard.bytes > 0


def spoil(path: Path, group: int, column: int) -> None:
    """Change bytes in the middle of the pages of a column of a row group."""
    chunk = pq.ParquetFile(path).metadata.row_group(group).column(column)
    data = bytearray(path.read_bytes())
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    data[middle : middle + 8] = b"\xaa" * 8
    path.write_bytes(data)


def test_reading_a_block_touches_only_its_row_group_and_its_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", TEXTS, use_dictionary=False)
    manifest = manifest_of(path)
    spoil(path, 1, 1)
    spoil(path, 2, 0)
    for number, block in enumerate(manifest.blocks):
        if block.offset // 30 == 1:
            with pytest.raises(DataError, match=r"a\.parquet: cannot be read any more"):
                manifest.read(number, "training")
        else:
            rows = slice(block.offset, block.offset + block.records)
            assert [found.text for found in manifest.read(number, "training")] == TEXTS[rows]


def test_a_changed_value_is_refused_by_its_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", TEXTS)
    manifest = manifest_of(path)
    write(path, [*TEXTS[:99], "other"])
    manifest.read(0, "training")
    last = len(manifest.blocks) - 1
    with pytest.raises(DataError, match=r"a\.parquet: rows 9\d to 100 changed since"):
        manifest.read(last, "training")
    write(path, TEXTS[:50])
    with pytest.raises(DataError, match=r"a\.parquet: rows 9\d to 100 changed since"):
        manifest.read(last, "training")


def cut(data: bytes, place: float) -> bytes:
    return data[: int(place * len(data))]


def flip_last_magic(data: bytes, place: float) -> bytes:
    del place
    return data[:-1] + b"!"


def flip_page(data: bytes, place: float) -> bytes:
    chunk = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(1).column(1)
    spot = chunk.data_page_offset + int(chunk.total_compressed_size * (0.5 + place / 2))
    return data[:spot] + bytes([data[spot] ^ 1]) + data[spot + 1 :]


@pytest.mark.parametrize("harm", [cut, flip_last_magic, flip_page])
def test_a_harmed_shard_is_left_out_whole_with_what_was_said(
    tmp_path: Path, harm: Callable[[bytes, float], bytes]
) -> None:
    whole = write(tmp_path / "whole.parquet", TEXTS, use_dictionary=False).read_bytes()
    path = tmp_path / "a.parquet"
    for i in range(20):
        path.write_bytes(harm(whole, i / 20))
        found = index(path)
        assert list(found.ledger) == [CUT]
        assert found.ledger[CUT].bytes == path.stat().st_size == found.shard.bytes
        assert found.blocks == ()
        assert found.quarantined[0].detail


@pytest.mark.parametrize("dictionary", [False, True])
def test_a_bomb_is_refused_whether_packed_or_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dictionary: bool
) -> None:
    monkeypatch.setattr(records, "SMALL_CONTENT_BYTES", 100_000)
    texts = ["a" * 50_000] * 60
    path = write(tmp_path / "a.parquet", texts, use_dictionary=dictionary, compression="zstd")
    seen: list[bytes] = []
    rows = chain.from_iterable(row_groups(str(path), "text", TEXTS_WANTED, 200, seen.append))
    with pytest.raises(OSError, match="over 200 times its size"):
        list(rows)
    assert len(seen) < 10 if dictionary else not seen
    assert "over 200 times its size" in index(path).quarantined[0].detail
    assert index(path, SourceConfig(max_expansion=1e6)).shard.bytes == 3_000_000
