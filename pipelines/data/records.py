r"""Streams of bytes to records that tile them, however long a record or tight a packing is.

The records of a text shard tile it: joined together they are its bytes again, so nothing can be
skipped unseen. Lines end at LF alone; U+2028 and form feeds are text.

    >>> [record.data for record in split(io.BytesIO(b'{"text": "a"}\n\n{"text": "b"}'), "jsonl")]
    [b'{"text": "a"}\n', b'\n', b'{"text": "b"}']
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from pipelines.data.filesystems import open_file, parse

Modality = Literal["text", "images"]
THINGS: dict[Modality, str] = {"text": "document", "images": "picture"}
"""What a record of a modality is called."""
Form = Literal["jsonl", "txt-file", "txt-blank-line", "parquet", "tar", "parquet-images", "files"]
"""How records lie in a shard; `files` is a source of loose pictures, each of them a record."""
PICTURE_FORMS: tuple[Form, ...] = ("tar", "parquet-images", "files")
Seen = Callable[[bytes], object]
"""Is given the bytes of every record, all of them before the record is."""

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
MAX_RECORD_BYTES = 16 * 1024 * 1024
CHUNK_BYTES = 1024 * 1024
"""Read at once, and the most that a line is read ahead of being known as too long."""
SMALL_CONTENT_BYTES = 64 * 1024 * 1024
"""Content of less than this is no bomb, however tightly it was packed."""


class Record(NamedTuple):
    """One record as it lies in its shard."""

    data: bytes | None
    """Its bytes; of one that is too long, the first of them, more than MAX_RECORD_BYTES.
    None for the null of a parquet column."""
    bytes: int
    """How many it has."""
    fate: str = ""
    """What becomes of it, where its shard has already told: bytes of a tar that are passed over."""
    key: str = ""
    """Of a sample of a tar, or the name of a loose picture: no two of a shard may share one."""


def split(stream: io.BufferedIOBase, form: Form, seen: Seen | None = None) -> Iterator[Record]:
    """Yield the records of a stream that starts with one; they tile it."""
    parts: list[bytes] = []
    size = 0
    for chunk, opens in _chunks(stream, form):
        if opens and size:
            yield Record(b"".join(parts), size)
            parts, size = [], 0
        if size <= MAX_RECORD_BYTES:
            parts.append(chunk)
        size += len(chunk)
        if seen:
            seen(chunk)
    if size:
        yield Record(b"".join(parts), size)


@contextmanager
def open_content(name: str, max_expansion: float) -> Iterator[io.BufferedReader]:
    """Open the content of a shard, unpacked when its name ends in .gz or .zst.

    Raises:
        OSError: Here or while it is read, if the file is cut, has a strange tail, or unpacks to
            more than `max_expansion` times its size.
    """
    codec = COMPRESSED.get(suffixes(name)[1])
    with open_file(name) as file:
        raw: Any = _Unpacked(file, codec, max_expansion) if codec else file
        yield io.BufferedReader(raw, buffer_size=CHUNK_BYTES)


def suffixes(name: str) -> tuple[str, str]:
    """Return what a name says of the form and of the packing of a file: (".jsonl", ".gz")."""
    stem, last = os.path.splitext(os.path.basename(parse(name).path).lower())
    return (os.path.splitext(stem)[1], last) if last in COMPRESSED else (last, "")


def check_expansion(content_bytes: int, file_bytes: int, max_expansion: float) -> None:
    """Refuse content that is out of proportion to the file it was packed in.

    Raises:
        OSError: If it is.
    """
    if content_bytes > max(SMALL_CONTENT_BYTES, max_expansion * file_bytes):
        raise OSError(
            f"it unpacks to over {max_expansion:g} times its size, as a bomb does; "
            "--source.max-expansion allows more"
        )


class _Unpacked(io.RawIOBase):
    """The content of a compressed file, all of which has to be consumed for it."""

    def __init__(self, file: pa.NativeFile, codec: str, max_expansion: float) -> None:
        self._file = file
        self._stream = pa.CompressedInputStream(file, codec)
        self._max_expansion = max_expansion
        self._content_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._stream.readinto(buffer)
        self._content_bytes += count
        consumed = self._file.tell()
        check_expansion(self._content_bytes, consumed, self._max_expansion)
        if not count and consumed == 0:
            raise OSError("it is empty, which no compressed file is")
        if not count and consumed != self._file.size():
            raise OSError(f"its content ends {self._file.size() - consumed} bytes before the file")
        return count


def _chunks(stream: io.BufferedIOBase, form: Form) -> Iterator[tuple[bytes, bool]]:
    """Yield the stream in chunks, and whether a record opens with each.

    A line is one chunk, unless it is very long: then only its first chunk can open a record.
    """
    if form == "txt-file":
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk, False
        return
    at_line_start, closed = True, False
    while chunk := stream.readline(CHUNK_BYTES):
        if form == "jsonl":
            opens = at_line_start
        else:
            blank = at_line_start and not chunk.strip()
            opens = at_line_start and closed and not blank
            closed = blank or (closed and not opens)
        yield chunk, opens
        at_line_start = chunk.endswith(b"\n")
