"""Strict readers: raw shards to records, and records to documents or a reason why not."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipelines.data import parquet, tar
from pipelines.data.filesystems import File, find_files
from pipelines.data.records import (
    COMPRESSED,
    MAX_RECORD_BYTES,
    Form,
    Record,
    Seen,
    open_content,
    split,
    suffixes,
)
from pipelines.errors import UserError

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "txt",
    ".parquet": "parquet",
    ".tar": "tar",
}
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm")
"""Of the files of a sample that hold a picture; what they are is told by their bytes."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """How documents and pictures are read from raw shards, and which are kept from training."""

    text_field: str = "text"
    """The field of a jsonl line, or the column of a parquet shard, that holds the document."""
    txt_documents: Literal["file", "blank-line"] = "file"
    """What is one document in a txt shard: the whole file, or text between blank lines."""
    heldout_ratio: float = 0.15
    """Share of documents held out for evaluation, chosen by a hash of their words, so that
    copies of one document are always on the same side; of pictures, by a hash of their bytes."""
    max_quarantined_ratio: float = 0.001
    """Share of records that may be broken; with more of them nothing is started."""
    cut_shards: Literal["refuse", "quarantine"] = "refuse"
    """Whether shards that cannot be read to their end stop the run or are left out whole."""
    max_expansion: float = 200.0
    """How many times its size a shard may hold; what unpacks to more is taken for a bomb."""

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_ratio < 1:
            raise ValueError(f"heldout_ratio must be in [0, 1), got {self.heldout_ratio}")
        if not 0 <= self.max_quarantined_ratio <= 1:
            raise ValueError(
                f"max_quarantined_ratio must be in 0..1, got {self.max_quarantined_ratio}"
            )
        if not 1 <= self.max_expansion < math.inf:
            raise ValueError(f"max_expansion must be at least 1, got {self.max_expansion}")


class Rejected(NamedTuple):
    """Why a record is not a document or a picture."""

    reason: str
    """`filtered:...` for what is empty by design, `quarantined:...` for what is broken."""


def find_shards(patterns: Sequence[str], *, separate: bool = False) -> list[File]:
    """Return the shards that files, folders and globs name, sorted, each once.

    With `separate`, each pattern is a source of its own.

    Raises:
        UserError: If there is no pattern, one matches nothing, a file is of no known form, some
            shards hold text and others pictures, or a shard is in two sources that are to be
            separate.
    """
    if not patterns:
        raise UserError("no data: name raw shards, such as 'corpus/*.jsonl'")
    found: dict[str, File] = {}
    for source, pattern in enumerate(patterns):
        num_matches, number = 0, source if separate else 0
        for file in find_files(pattern, is_shard):
            if not is_shard(file.name):
                raise UserError(
                    f"{file.name}: unknown form; shards end in {', '.join(_SUFFIXES)}, "
                    f"and but for .parquet may be packed: {', '.join(COMPRESSED)}"
                )
            num_matches += 1
            first = found.setdefault(identity(file.name), file._replace(source=number))
            if first.source != number:
                raise UserError(
                    f"{file.name} is in two sources, {patterns[first.source]!r} and {pattern!r}, "
                    "and cannot have two weights; make the patterns of --data disjoint"
                )
        if not num_matches:
            raise UserError(f"no shards match {pattern!r}: check the path, and quote the pattern")
    shards = sorted(found.values())
    pictures = [file.name for file in shards if holds_pictures(file.name)]
    if 0 < len(pictures) < len(shards):
        text = next(file.name for file in shards if not holds_pictures(file.name))
        raise UserError(f"{pictures[0]} holds pictures and {text} text: name either in --data")
    return shards


def holds_pictures(name: str) -> bool:
    """Return whether a shard holds pictures and not text."""
    return suffixes(name)[0] == ".tar"


def is_shard(name: str) -> bool:
    """Return whether a file is a shard by its name."""
    form, packing = suffixes(name)
    return form in _SUFFIXES and not (packing and form == ".parquet")


def identity(name: str) -> str:
    """Return what two names of one shard have in common: links to one file are one shard.

    It is not what the shard is called, because a link may have the suffix that its file lacks.
    """
    return os.path.realpath(name) if name.startswith("/") else name


def form_of(name: str, config: SourceConfig) -> Form:
    """Return how the records of a shard are told apart."""
    known = _SUFFIXES[suffixes(name)[0]]
    if known == "txt":
        return "txt-file" if config.txt_documents == "file" else "txt-blank-line"
    if known == "tar":
        return "tar"
    return "parquet" if known == "parquet" else "jsonl"


def unit_of(name: str) -> Literal["byte", "row"]:
    """Return what the offset of a record counts: bytes of the content, or rows."""
    return "row" if suffixes(name)[0] == ".parquet" else "byte"


def parts(name: str, config: SourceConfig, seen: Seen) -> Iterator[Iterator[Record]]:
    """Yield the records of a shard in parts that no block may cross: row groups, or the whole.

    Raises:
        OSError: If the shard cannot be read to its end; or another of pyarrow's errors.
    """
    form = form_of(name, config)
    if form == "parquet":
        yield from parquet.row_groups(name, config.text_field, config.max_expansion, seen)
    else:
        with open_content(name, config.max_expansion) as stream:
            yield tar.records(stream, seen) if form == "tar" else split(stream, form, seen)


def records_from(name: str, config: SourceConfig, offset: int, seen: Seen) -> Iterator[Record]:
    """Yield the records from the offset of a block on: a byte of the content, or a row.

    A compressed shard is read from its start, so keep such shards below some 100 MB.

    Raises:
        OSError: If they cannot be read; or another of pyarrow's errors.
    """
    form = form_of(name, config)
    if form == "parquet":
        yield from parquet.rows_from(name, config.text_field, offset, seen)
        return
    with open_content(name, config.max_expansion) as stream:
        if suffixes(name)[1]:
            while skipped := len(stream.read(min(offset, 1 << 20))):
                offset -= skipped
        else:
            stream.seek(offset)
        yield from tar.records(stream, seen) if form == "tar" else split(stream, form, seen)


def document(record: bytes | None, form: Form, config: SourceConfig) -> str | Rejected:
    """Return the text of a record, or the reason why it has none."""
    if record is None:
        return Rejected("quarantined:no-text-field")
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


def picture(sample: bytes) -> bytes | Rejected:
    """Return the file of a sample that holds its picture, or the reason why there is none."""
    try:
        files = tar.files(sample)
    except ValueError:
        return Rejected("quarantined:two-files-of-one-name")
    found = [data for name, data in files.items() if name.rpartition(".")[2] in EXTENSIONS]
    if len(found) != 1:
        return Rejected("quarantined:several-pictures" if found else "filtered:no-picture")
    return found[0]
