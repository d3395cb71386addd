"""What is broken is in the ledger, and too much of it stops a run with a page that explains."""

import gzip
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import FREE_TO_CHANGE
from pipelines.data.gate import check
from pipelines.data.indexing import build
from pipelines.data.manifest import CUT, Manifest
from pipelines.data.records import SMALL_CONTENT_BYTES
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.errors import DataError, OutageError
from tests.corpus import make_text, serial_map

HTML = b"<!doctype html>\n<html><body><p>404: not found</p></body></html>\n"
LINE = json.dumps({"text": make_text(0, 3)}).encode() + b"\n"


def parquet(texts: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), sink)
    return bytes(sink.getvalue())


def manifest_of(folder: Path, files: dict[str, bytes], **changes: Any) -> Manifest:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    source = replace(SourceConfig(heldout_ratio=0, txt_documents="blank-line"), **changes)
    return build(find_shards([str(folder)]), source, serial_map)


def fates(manifest: Manifest) -> dict[str, int]:
    return {fate: entry.records for fate, entry in manifest.ledger.items()}


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("html.jsonl", HTML, {"quarantined:bad-json": 2}),
        ("text.jsonl.gz", LINE, {CUT: 1}),
        ("gz.jsonl.zst", gzip.compress(LINE), {CUT: 1}),
        ("gz.jsonl", b"\x1f\x8b\x08\x00 packed", {"quarantined:bad-utf8": 1}),
        ("text.parquet", HTML, {CUT: 1}),
        ("parquet.txt", parquet(["a"]), {"quarantined:bad-utf8": 1}),
        ("empty.parquet", b"", {CUT: 1}),
        ("empty.jsonl.gz", b"", {CUT: 1}),
        ("empty.jsonl.zst", b"", {CUT: 1}),
        ("empty.jsonl", b"", {}),
        ("empty.txt.gz", gzip.compress(b""), {}),
        ("rowless.parquet", parquet(pa.array([], pa.string())), {}),
        ("utf16.txt", "the sea".encode("utf-16"), {"quarantined:bad-utf8": 1}),
        (
            "mixed.jsonl",
            LINE + '{"text": "caf\xe9"}\n'.encode("latin-1"),
            {"training": 1, "quarantined:bad-utf8": 1},
        ),
        (
            "nul.jsonl",
            b'{"text": "a\x00b"}\n{"text": "a\\u0000b"}\n',
            {"training": 1, "quarantined:bad-json": 1},
        ),
        ("nul.txt", b"a\x00b", {"training": 1}),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINE, {"training": 1}),
        ("crlf.jsonl", LINE.replace(b"\n", b"\r\n") * 2, {"training": 2}),
        ("separators.jsonl", '{"text": "a\u2028b\u0085c"}\n'.encode(), {"training": 1}),
        ("no-field.jsonl", b'{"body": "a"}\n', {"quarantined:no-text-field": 1}),
        ("spaces.txt", b" \n\n \t\n", {"filtered:no-words": 1}),
        ("empty-documents.jsonl", b'{"text": ""}\n\n', {"filtered:no-words": 2}),
        ("long.jsonl", b'{"text": "' + b"word " * (2 << 20) + b'"}\n' + LINE, {"training": 2}),
        ("word.txt", b"a" * 1_000_000, {"training": 1}),
        (
            "too-long.jsonl",
            b'{"text": "' + b"word " * (4 << 20) + b'"}\n' + LINE,
            {"training": 1, "quarantined:too-long": 1},
        ),
        ("twice.jsonl", LINE * 2, {"training": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_bad_input_has_its_place_in_the_ledger(
    tmp_path: Path, name: str, data: bytes, expected: dict[str, int]
) -> None:
    manifest = manifest_of(tmp_path, {name: data})
    assert fates(manifest) == expected
    in_files = sum(shard.bytes for shard in manifest.shards)
    assert sum(entry.bytes for entry in manifest.ledger.values()) == in_files
    read = [found for i in manifest.blocks_of("training") for found in manifest.read(i, "training")]
    assert len(read) == expected.get("training", 0)
    with nullcontext() if list(expected) == ["training"] else pytest.raises(DataError):
        check(manifest)


def broken(num_broken: int, num_records: int) -> dict[str, bytes]:
    return {"a.jsonl": LINE * (num_records - num_broken) + b"{}\n" * num_broken}


@pytest.mark.parametrize(
    ("num_broken", "ratio", "passes"),
    [(0, 0, True), (1, 0, False), (2, 0.001, True), (3, 0.001, False), (3, 0.0015, True)],
)
def test_so_much_may_be_broken_and_no_more(
    tmp_path: Path, num_broken: int, ratio: float, passes: bool
) -> None:
    manifest = manifest_of(tmp_path, broken(num_broken, 2000), max_quarantined_ratio=ratio)
    if passes:
        check(manifest)
    else:
        with pytest.raises(DataError, match=rf"{num_broken} of 2000 records are broken"):
            check(manifest)


def test_the_page_shows_what_is_wrong_where_and_what_to_do(tmp_path: Path) -> None:
    files = broken(12, 100) | {
        "b.jsonl.gz": gzip.compress(LINE * 50)[:-5],
        "c.parquet": parquet([make_text(1, 3), None]),
        "d.txt": b"\xff",
    }
    with pytest.raises(DataError) as refused:
        check(manifest_of(tmp_path, files))
    assert refused.value.exit_code == 65
    page = str(refused.value)
    size = len(files["b.jsonl.gz"])
    assert "1 of 4 shards cannot be read to the end and 14 of 103 records are broken" in page
    assert "(13.59%, where 0.10% are allowed)" in page
    lines = [line.split() for line in page.splitlines()]
    assert ["quarantined:no-text-field", "13", "36"] in lines
    assert ["quarantined:bad-utf8", "1", "1"] in lines
    assert [CUT, "1", str(size)] in lines
    assert ["total", "15", str(size + 37)] in lines
    first = 88 * len(LINE)
    for i in range(3):
        where = f"a.jsonl at byte {first + 3 * i}, 3 bytes: quarantined:no-text-field"
        assert where in page
    assert f"at byte {first + 9}" not in page
    assert "b.jsonl.gz: cannot be read to its end (Truncated compressed stream)" in page
    assert "--source.cut-shards quarantine" in page
    assert "--source.max-quarantined-ratio 0.136" in page
    assert len(page.splitlines()) < 25


def test_the_page_gives_a_row_where_there_are_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"c\.parquet at row 1, 0 bytes: quarantined:no-text"):
        check(manifest_of(tmp_path, {"c.parquet": parquet(["words", None])}))


def test_of_one_large_text_the_page_tells_how_to_cut_it(tmp_path: Path) -> None:
    files = {"dump.txt": b"one\n\ntwo " + b"a" * (16 << 20)}
    with pytest.raises(DataError, match=r"16 MiB: --source\.txt-documents blank-line cuts"):
        check(manifest_of(tmp_path, files))


def test_what_the_page_advises_is_enough(tmp_path: Path) -> None:
    files = broken(7, 99) | {"b.jsonl.gz": LINE}
    check(manifest_of(tmp_path, files, cut_shards="quarantine", max_quarantined_ratio=0.071))


def test_a_cut_shard_is_left_out_whole_if_that_is_allowed(tmp_path: Path) -> None:
    cut = gzip.compress(LINE * 5000)[:-1]
    files = {"a.jsonl": LINE, "b.jsonl.gz": cut, "c.jsonl": LINE}
    manifest = manifest_of(tmp_path, files, cut_shards="quarantine")
    check(manifest)
    assert fates(manifest) == {"training": 2, CUT: 1}
    assert manifest.ledger[CUT].bytes == len(cut) == manifest.shards[1].bytes
    assert list(manifest.texts("training")) == [make_text(0, 3)] * 2
    (entry,) = manifest.quarantined
    assert (entry.path, entry.reason, entry.offset) == ("b.jsonl.gz", CUT, 0)


@pytest.mark.parametrize(
    "change",
    [{"max_quarantined_ratio": 0.5}, {"cut_shards": "quarantine"}],
)
def test_a_gate_is_no_part_of_the_fingerprint(tmp_path: Path, change: dict[str, Any]) -> None:
    files = broken(3, 50) | {"b.jsonl.gz": b"cut"}
    manifest = manifest_of(tmp_path, files)
    assert manifest_of(tmp_path, files, **change).fingerprint == manifest.fingerprint
    entry = replace(manifest.quarantined[0], detail="what another version says")
    other = replace(manifest, quarantined=(entry, *manifest.quarantined[1:]))
    assert other.fingerprint == manifest.fingerprint


def test_what_counts_as_a_bomb_decides_what_is_read_and_is_part_of_the_fingerprint(
    tmp_path: Path,
) -> None:
    tight = gzip.compress(b" " * (SMALL_CONTENT_BYTES + 1000) + LINE)
    fingerprints = set()
    for max_expansion, found in [(200.0, CUT), (2000.0, "quarantined:too-long")]:
        settings = {"max_expansion": max_expansion, "cut_shards": "quarantine"}
        manifest = manifest_of(tmp_path, {"a.jsonl.gz": tight}, **settings)
        assert fates(manifest) == {found: 1}
        fingerprints.add(manifest.fingerprint)
    assert len(fingerprints) == 2
    assert "source.max_expansion" not in FREE_TO_CHANGE


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.txt": b"", "b.jsonl": b"\n"}, r"none of 1 records .*filtered:no-words"),
        ({"a.txt": b""}, r"none of 0 records"),
    ],
)
def test_a_corpus_without_training_documents_is_refused(
    tmp_path: Path, files: dict[str, bytes], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        check(manifest_of(tmp_path, files))


def test_a_store_that_fails_leaves_no_shard_out(tmp_path: Path) -> None:
    """Only a shard whose bytes can all be read is cut."""
    path, source = tmp_path / "b.jsonl.gz", SourceConfig(cut_shards="quarantine")
    path.write_bytes(gzip.compress(LINE))
    listed = find_shards([str(tmp_path)])
    path.unlink()
    with pytest.raises(DataError, match=r"b\.jsonl\.gz: is gone .*restore this shard"):
        build(listed, source, serial_map)
    path.mkdir()  # which is there and cannot be read
    with pytest.raises(OutageError, match=r"b\.jsonl\.gz: cannot be read .*try again once"):
        build(listed, source, serial_map)


@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz"])
def test_a_shard_that_is_still_being_written_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(LINE if name == "b.jsonl" else gzip.compress(LINE))
    files = find_shards([str(tmp_path)])
    path.write_bytes(path.read_bytes() + LINE)
    with pytest.raises(DataError, match=rf"{name}: \d+ bytes where \d+ were listed"):
        build(files, SourceConfig(), serial_map)
