"""Records tile their shard, whatever its form; what cannot be read to its end is refused."""

import doctest
import gzip
import io
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.data import shards
from pipelines.data.manifest import Indexer
from pipelines.data.shards import (
    MAX_RECORD_BYTES,
    Form,
    Rejected,
    SourceConfig,
    document,
    find_shards,
    form_of,
    open_shard,
    read_span,
    records,
)
from pipelines.errors import DataError, UserError

FORMS: tuple[Form, ...] = ("jsonl", "txt-file", "txt-blank-line")
SOURCE = SourceConfig(heldout_ratio=0)
LINES = b"".join(b'{"text": "line %d of the shard"}\n' % i for i in range(3000))

LINE_ENDS = (
    b"\n",
    b"\n",
    b"\r\n",
    b"\n \t\n",
    b"\r",
    b"\x0b",
    b"\x0c",
    b"\xe2\x80\xa8",
    b"\xc2\x85",
)
pieces = st.sampled_from(
    [b"a", b"word ", b'{"text": "a"}', b"\xff\xfe", b"\xef\xbb\xbf", b"\x00", *LINE_ENDS]
)
contents = st.lists(pieces, max_size=30).map(b"".join)


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data))


def split(data: bytes, form: Form) -> list[bytes]:
    return list(records(io.BytesIO(data), form))


def index(path: Path) -> int:
    """Return how many records a pass over one shard finds."""
    indexer = Indexer(root=path.parent, source=SOURCE, block_bytes=1 << 16)
    return sum(block.records for block in indexer(path).blocks)


@pytest.mark.parametrize("form", FORMS)
@given(data=contents)
@example(data=b"")
@example(data=b"\n\n\na\n\nb")
@example(data=b"a\n\n\n\n")
@settings(max_examples=150, deadline=None)
def test_records_tile_the_shard(form: Form, data: bytes) -> None:
    found = split(data, form)
    assert b"".join(found) == data
    assert all(found)


@pytest.mark.parametrize("form", FORMS)
@given(data=contents)
@example(data=b"\n\n\na\n\nb\n\n\nc")
@settings(max_examples=100, deadline=None)
def test_a_run_of_records_is_split_into_the_same_records(form: Form, data: bytes) -> None:
    found = split(data, form)
    for first in range(len(found)):
        for last in range(first, len(found) + 1):
            assert split(b"".join(found[first:last]), form) == found[first:last]


def test_the_example_of_the_module_holds() -> None:
    tried = doctest.testmod(shards)
    assert tried.attempted > 0
    assert tried.failed == 0


def test_lines_end_at_line_feeds_alone() -> None:
    text = "one\u2028two\u0085three\x0bfour\x0cfive\rsix"
    line = f'{{"text": "{text}"}}'.replace("\x0b", "\\u000b").replace("\x0c", "\\u000c")
    line = line.replace("\r", "\\r")
    shard = f"{line}\n".encode() * 2
    assert split(shard, "jsonl") == [f"{line}\n".encode()] * 2
    assert document(split(shard, "jsonl")[1], "jsonl", SOURCE) == text
    paragraphs = f"{text}\n{text}\n\nnext".encode()
    assert split(paragraphs, "txt-blank-line") == [f"{text}\n{text}\n\n".encode(), b"next"]


def test_a_lone_carriage_return_ends_no_line() -> None:
    assert split(b'{"n": 1,\r"text": "a"}\n\r\n', "jsonl") == [b'{"n": 1,\r"text": "a"}\n', b"\r\n"]
    assert split(b"a\r\rb\n\nc", "txt-blank-line") == [b"a\r\rb\n\n", b"c"]


def test_crlf_a_byte_order_mark_and_a_missing_last_newline_change_no_document() -> None:
    plain = b'{"text": "a"}\n{"text": "b"}\n'
    windows = b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n").removesuffix(b"\r\n")
    assert [document(r, "jsonl", SOURCE) for r in split(windows, "jsonl")] == ["a", "b"]
    stanzas = b"\xef\xbb\xbfa\r\na\r\n\r\nb"
    found = [document(r, "txt-blank-line", SOURCE) for r in split(stanzas, "txt-blank-line")]
    assert [str(text).split() for text in found] == [["a", "a"], ["b"]]
    assert str(found[0]).startswith("a")


def test_paragraphs_are_told_apart_by_any_number_of_blank_lines() -> None:
    found = split(b"\n \na\nb\n\n\t\n\nc\n", "txt-blank-line")
    assert found == [b"\n \n", b"a\nb\n\n\t\n\n", b"c\n"]


def test_a_txt_file_is_one_document() -> None:
    assert split(b"a\n\nb\n", "txt-file") == [b"a\n\nb\n"]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        ("", lambda data: data),
        (".gz", gzip.compress),
        (".gz", lambda data: gzip.compress(data[:777]) + gzip.compress(data[777:])),
        (".zst", zstd),
        (".zst", lambda data: zstd(data[:777]) + zstd(data[777:])),
    ],
    ids=["plain", "gz", "gz of two members", "zst", "zst of two frames"],
)
def test_any_span_of_any_packing_is_that_slice_of_the_bytes(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"shard.jsonl{suffix}"
    data = LINES * 40  # past the buffers of the reader
    path.write_bytes(compress(data))
    with open_shard(path) as stream:
        assert stream.read() == data
    with open_shard(path) as stream:
        assert sum(1 for _ in records(stream, "jsonl")) == 120_000
    spans = [(0, 10), (770, 20), (0, len(data)), (len(data) - 5, 99), (len(data), 1)]
    for offset, length in [*spans, (3_000_000, 500_000), (len(data) + 9, 1)]:
        assert read_span(path, offset, length) == data[offset : offset + length]


@pytest.mark.parametrize(
    ("record", "form", "reason"),
    [
        (b"", "txt-file", "filtered:no-words"),
        (b"\n", "jsonl", "filtered:no-words"),
        (b" \t ...\n", "txt-blank-line", "filtered:no-words"),
        (b'{"text": "?!"}', "jsonl", "filtered:no-words"),
        (b'{"text": ""}', "jsonl", "filtered:no-words"),
        (b"\xff\xfe", "txt-file", "quarantined:bad-utf8"),
        (b"\xed\xa0\x80 in UTF-8", "txt-file", "quarantined:bad-utf8"),
        (b'{"text": "caf\xe9"}', "jsonl", "quarantined:bad-utf8"),
        (b'{"text": "cut', "jsonl", "quarantined:bad-json"),
        (b'{"text": "a"} {"text": "b"}', "jsonl", "quarantined:bad-json"),
        (b"[" * 200_000, "jsonl", "quarantined:bad-json"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "jsonl", "quarantined:bad-json"),
        (b'{"title": "a"}', "jsonl", "quarantined:no-text-field"),
        (b'{"text": 7}', "jsonl", "quarantined:no-text-field"),
        (b'{"text": null}', "jsonl", "quarantined:no-text-field"),
        (b'["text"]', "jsonl", "quarantined:no-text-field"),
        (b"null", "jsonl", "quarantined:no-text-field"),
        (b'{"text": "a \\ud800 b"}', "jsonl", "quarantined:lone-surrogate"),
        (b"a" * (MAX_RECORD_BYTES + 1), "txt-file", "quarantined:too-long"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_record_that_is_no_document_says_why(record: bytes, form: Form, reason: str) -> None:
    assert document(record, form, SOURCE) == Rejected(reason)


@pytest.mark.parametrize(
    ("record", "form", "text"),
    [
        (b'{"text": "a", "n": 1e999}', "jsonl", "a"),
        (b'{"text": "\\ud83d\\ude00 a"}', "jsonl", "\U0001f600 a"),
        (b'{"text": "7\\u0000"}', "jsonl", "7\x00"),
        (b"  spaces stay \n", "txt-file", "  spaces stay \n"),
        ("\u4e2d".encode(), "txt-blank-line", "\u4e2d"),
        (b"a" * MAX_RECORD_BYTES, "txt-file", "a" * MAX_RECORD_BYTES),
    ],
    ids=lambda value: repr(value[:30]),
)
def test_a_document_is_its_text_unchanged(record: bytes, form: Form, text: str) -> None:
    assert document(record, form, SOURCE) == text


def test_the_text_field_can_be_named() -> None:
    source = SourceConfig(text_field="body")
    assert document(b'{"body": "a", "text": "b"}', "jsonl", source) == "a"


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstd)])
def test_a_cut_shard_is_refused_by_name_wherever_it_was_cut(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"part-7.jsonl{suffix}"
    whole = compress(LINES)
    path.write_bytes(whole)
    assert index(path) == 3000
    for cut in [
        *range(1, 20),
        *range(20, len(whole) - 20, 97),
        *range(len(whole) - 20, len(whole)),
    ]:
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"part-7\.jsonl.*cut or corrupt.*mend or remove"):
            index(path)


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstd)])
def test_a_shard_with_a_strange_tail_is_refused(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"part-7.jsonl{suffix}"
    path.write_bytes(compress(LINES) + b"what is this")
    with pytest.raises(DataError, match=r"part-7\.jsonl.*cut or corrupt"):
        index(path)


def test_a_corrupt_gz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "part-7.jsonl.gz"
    data = bytearray(gzip.compress(LINES))
    data[-8] ^= 1  # its checksum
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"part-7\.jsonl\.gz: cut or corrupt"):
        index(path)


def test_files_folders_and_globs_name_shards_once_and_sorted(tmp_path: Path) -> None:
    names = ["b.jsonl", "a.txt.gz", "deep/er/c.ndjson.zst", "d.txt"]
    for name in [*names, "README.md", "e.jsonl.bz2", "f.gz"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    expected = sorted(tmp_path / name for name in names)
    assert find_shards([str(tmp_path)]) == expected
    assert find_shards([str(tmp_path), str(tmp_path / "*.txt"), str(expected[0])]) == expected
    assert find_shards([str(tmp_path / "**" / "*.ndjson*")]) == [tmp_path / names[2]]


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    for pattern in [str(tmp_path), str(tmp_path / "*.jsonl"), str(tmp_path / "gone.txt")]:
        with pytest.raises(UserError, match=r"no shards match .*: check the path, and quote"):
            find_shards([pattern])


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.bz2", "a.gz", "a"])
def test_a_file_of_unknown_form_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"{name}: unknown form; .*\.jsonl.*\.txt.*\.gz.*\.zst"):
        find_shards([str(tmp_path / name)])


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_the_name_tells_the_form(suffix: str) -> None:
    stanzas = SourceConfig(txt_documents="blank-line")
    assert form_of(Path(f"a.jsonl{suffix}"), stanzas) == "jsonl"
    assert form_of(Path(f"a.ndjson{suffix}"), SOURCE) == "jsonl"
    assert form_of(Path(f"a.txt{suffix}"), SOURCE) == "txt-file"
    assert form_of(Path(f"a.txt{suffix}"), stanzas) == "txt-blank-line"


@pytest.mark.parametrize("ratio", [-0.1, 1, 7])
def test_an_impossible_heldout_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"heldout_ratio must be in \[0, 1\), got"):
        SourceConfig(heldout_ratio=ratio)
