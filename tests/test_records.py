"""Records tile their stream, whatever its form or packing; nothing makes one outgrow memory."""

import doctest
import gzip
import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.data import records
from pipelines.data.records import Form, open_content, suffixes
from pipelines.data.shards import SourceConfig, document

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
    found = list(records.split(io.BytesIO(data), form))
    assert all(len(record.data or b"") == record.bytes for record in found)
    return [record.data or b"" for record in found]


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
    tried = doctest.testmod(records)
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


PACKINGS = pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstd)])


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
def test_the_content_of_any_packing_is_the_bytes_that_were_packed(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"shard.jsonl{suffix}"
    data = LINES * 40  # past the buffers of the reader
    path.write_bytes(compress(data))
    with open_content(str(path), 200) as stream:
        assert stream.read() == data
    with open_content(str(path), 200) as stream:
        assert sum(1 for _ in records.split(stream, "jsonl")) == 120_000


@PACKINGS
def test_a_cut_is_an_error_wherever_it_is(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"part-7.jsonl{suffix}"
    whole = compress(LINES)
    ends = {len(whole) // 2: whole + whole[: len(whole) // 2], 0: b""}
    cuts = [*range(1, 20), *range(20, len(whole) - 20, 97), *range(len(whole) - 20, len(whole))]
    for cut in [*cuts, *ends]:
        path.write_bytes(ends.get(cut, whole[:cut]))
        with open_content(str(path), 200) as stream, pytest.raises(OSError, match=r".+"):
            stream.read()


@PACKINGS
@pytest.mark.parametrize("tail", [b"what is this", b"\0" * 512, b"\n"], ids=repr)
def test_a_strange_tail_is_an_error(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes], tail: bytes
) -> None:
    path = tmp_path / f"part-7.jsonl{suffix}"
    path.write_bytes(compress(LINES) + tail)
    with open_content(str(path), 200) as stream, pytest.raises(OSError, match=r".+"):
        stream.read()


def test_a_wrong_checksum_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "part-7.jsonl.gz"
    data = bytearray(gzip.compress(LINES))
    data[-8] ^= 1
    path.write_bytes(data)
    with open_content(str(path), 200) as stream, pytest.raises(OSError, match=r"zlib"):
        stream.read()


@PACKINGS
def test_a_bomb_is_refused_before_it_is_unpacked_and_can_be_allowed(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "SMALL_CONTENT_BYTES", 1 << 20)
    path = tmp_path / f"bomb.txt{suffix}"
    path.write_bytes(compress(bytes(30 << 20)))
    with open_content(str(path), 200) as stream, pytest.raises(OSError, match=r"over 200 times"):
        stream.read()
    with open_content(str(path), 100_000) as stream:
        assert sum(record.bytes for record in records.split(stream, "jsonl")) == 30 << 20


class _Endless(io.RawIOBase):
    """So many bytes without a line end, made as they are read."""

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self._left)
        buffer[:count] = b"a" * count
        self._left -= count
        return count


@pytest.mark.parametrize("form", FORMS)
def test_a_record_is_never_held_beyond_its_limit(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1 << 20)
    seen: list[int] = []
    tracemalloc.start()
    stream = io.BufferedReader(_Endless(200 << 20), 1 << 20)
    (record,) = records.split(stream, form, lambda chunk: seen.append(len(chunk)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert record.bytes == sum(seen) == 200 << 20
    assert peak < 12 << 20
    monkeypatch.setattr("pipelines.data.shards.MAX_RECORD_BYTES", 1 << 20)
    assert document(record.data, form, SOURCE) == ("quarantined:too-long",)


@given(
    lines=st.lists(
        st.sampled_from([b"a\n", b"b" * 9 + b"\n", b"c" * 30 + b"\n", b" " * 30 + b"\n"])
    )
)
@settings(max_examples=100, deadline=None)
def test_lines_longer_than_a_chunk_are_still_one_record(lines: list[bytes]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CHUNK_BYTES", 8)
        assert split(b"".join(lines), "jsonl") == lines
        assert b"".join(split(b"".join(lines), "txt-blank-line")) == b"".join(lines)


def test_what_is_seen_before_a_record_is_all_of_it_and_nothing_of_the_next() -> None:
    for form in FORMS:
        seen: list[bytes] = []
        total = b""
        for record in records.split(io.BytesIO(b"\n\na\n\nb\nc\n\n\nd"), form, seen.append):
            total += record.data or b""
            assert b"".join(seen) == total


@pytest.mark.parametrize(
    ("name", "form", "packing"),
    [
        ("/a.b/part-0.jsonl", ".jsonl", ""),
        ("/a/part-0.jsonl.gz", ".jsonl", ".gz"),
        ("/a/PART.TXT.ZST", ".txt", ".zst"),
        ("/a/part-0.gz", "", ".gz"),
        ("/a/.gz", "", ""),
        ("/a.txt/part", "", ""),
        ("s3://b.txt/part.parquet?endpoint_override=h.gz", ".parquet", ""),
    ],
)
def test_a_name_tells_form_and_packing(name: str, form: str, packing: str) -> None:
    assert suffixes(name) == (form, packing)
