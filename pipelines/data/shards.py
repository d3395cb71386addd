r"""Strict readers: raw shards to records, and records to documents or a reason why not.

The records of a shard tile it: joined together they are its bytes again, so nothing can be
skipped unseen. Lines end at LF alone; U+2028 and form feeds are text.

    >>> list(records(io.BytesIO(b'{"text": "a"}\n\n{"text": "b"}'), "jsonl"))
    [b'{"text": "a"}\n', b'\n', b'{"text": "b"}']
"""

import glob
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa

from pipelines.errors import DataError, UserError

Form = Literal["jsonl", "txt-file", "txt-blank-line"]

_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "txt"}
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
MAX_RECORD_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """How documents are read from raw shards, and which of them are kept from training."""

    text_field: str = "text"
    """The field of a jsonl line that holds the document."""
    txt_documents: Literal["file", "blank-line"] = "file"
    """What is one document in a txt shard: the whole file, or text between blank lines."""
    heldout_ratio: float = 0.15
    """Share of documents held out for evaluation, chosen by a hash of their words, so that
    copies of one document are always on the same side."""

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_ratio < 1:
            raise ValueError(f"heldout_ratio must be in [0, 1), got {self.heldout_ratio}")


class Rejected(NamedTuple):
    """Why a record is not a document."""

    reason: str
    """`filtered:...` for what is empty by design, `quarantined:...` for what is broken."""


def find_shards(patterns: Sequence[str]) -> list[Path]:
    """Return the shards that files, folders and globs name, sorted, each once.

    Raises:
        UserError: If a pattern matches nothing, or a file is of no known form.
    """
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = [p for p in path.rglob("*") if p.is_file() and _stem_suffix(p) in _SUFFIXES]
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file()]
        if not matches:
            raise UserError(f"no shards match {pattern!r}: check the path, and quote the pattern")
        found.update(match.resolve() for match in matches)
    for path in found:
        if _stem_suffix(path) not in _SUFFIXES:
            raise UserError(
                f"{path}: unknown form; shards end in {', '.join(_SUFFIXES)}, "
                f"plain or with {', '.join(_COMPRESSED)}"
            )
    return sorted(found)


def form_of(path: Path, config: SourceConfig) -> Form:
    """Return how the records of a shard are told apart."""
    if _SUFFIXES[_stem_suffix(path)] == "jsonl":
        return "jsonl"
    return "txt-file" if config.txt_documents == "file" else "txt-blank-line"


def open_shard(path: Path) -> io.BufferedReader:
    """Open the bytes of a shard, decompressed when its name ends in .gz or .zst."""
    stream = pa.input_stream(str(path), compression=_COMPRESSED.get(path.suffix))
    return io.BufferedReader(stream, buffer_size=1 << 20)


def read_span(path: Path, offset: int, num_bytes: int) -> bytes:
    """Return `num_bytes` of the decompressed shard from `offset`.

    A compressed shard is read from its start, so keep such shards below some 100 MB.
    """
    with open_shard(path) as stream:
        if path.suffix in _COMPRESSED:
            while offset > 0:
                offset -= len(stream.read(min(offset, 1 << 20))) or offset
        else:
            stream.seek(offset)
        return stream.read(num_bytes)


def records(stream: io.BufferedIOBase, form: Form) -> Iterator[bytes]:
    """Yield the records of a shard; joined together they are the shard again."""
    if form == "jsonl":
        yield from stream
    elif form == "txt-file":
        if whole := stream.read():
            yield whole
    else:
        yield from _paragraphs(stream)


def document(record: bytes, form: Form, config: SourceConfig) -> str | Rejected:
    """Return the text of a record, or the reason why it has none."""
    if len(record) > MAX_RECORD_BYTES:
        return Rejected("quarantined:too-long")
    try:
        text = record.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Rejected("quarantined:bad-utf8")
    if form == "jsonl" and text.strip():
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):  # ValueError also for integers of over 4300 digits
            return Rejected("quarantined:bad-json")
        value = fields.get(config.text_field) if isinstance(fields, dict) else None
        if not isinstance(value, str):
            return Rejected("quarantined:no-text-field")
        try:
            value.encode()
        except UnicodeEncodeError:
            return Rejected("quarantined:lone-surrogate")
        text = value
    # Every letter or digit gives at least one token: what passes here gives at least one row.
    if not any(character.isalnum() for character in text):
        return Rejected("filtered:no-words")
    return text


def read_error(path: Path, error: Exception) -> DataError:
    """Return the error for a shard that cannot be read to its end."""
    return DataError(f"{path}: cut or corrupt ({error}); mend or remove this shard")


def _paragraphs(stream: io.BufferedIOBase) -> Iterator[bytes]:
    lines: list[bytes] = []
    closed = False
    for line in stream:
        blank = not line.strip()
        if closed and not blank:
            yield b"".join(lines)
            lines, closed = [], False
        lines.append(line)
        closed = closed or blank
    if lines:
        yield b"".join(lines)


def _stem_suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix
