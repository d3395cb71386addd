"""Strict readers: raw shards to records, and records to documents or a reason why not."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipelines.data import parquet, tar
from pipelines.data.filesystems import File, find_files, open_file, reading
from pipelines.data.records import (
    COMPRESSED,
    MAX_RECORD_BYTES,
    Form,
    Modality,
    Record,
    Seen,
    open_content,
    split,
    suffixes,
)
from pipelines.errors import UserError

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".txt")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".tar")
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm")
"""Of loose pictures and of those in a sample; what they are is told by their bytes."""
TOO_LONG = "quarantined:too-long"


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """How documents and pictures are read from raw shards, and which are kept from training."""

    text_field: str = "text"
    """The field of a jsonl line, or the column of a parquet shard, that holds the document."""
    image_field: str = "image"
    """The column of a parquet shard that holds the bytes of a picture, or a struct with them."""
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


def find_shards(
    patterns: Sequence[str], modality: Modality | None = None, *, separate: bool = False
) -> list[File]:
    """Return the shards that files, folders and globs name, sorted, each once.

    They are shards of many records, or loose pictures. With `separate`, each pattern is a source
    of its own.

    Raises:
        UserError: If there is no pattern, one matches nothing, a file is of no known form, some
            shards hold text and others pictures, or not what `modality` asks for, or a shard is
            in two sources that are to be separate.
    """
    if not patterns:
        raise UserError("no data: name raw shards, such as 'corpus/*.jsonl'")
    found: dict[str, File] = {}
    for source, pattern in enumerate(patterns):
        num_matches, number = 0, source if separate else 0
        for file in find_files(pattern, is_shard):
            if not is_shard(file.name):
                raise UserError(
                    f"{file.name}: unknown form; shards end in {', '.join(SUFFIXES)}, and but for "
                    f".parquet may be packed: {', '.join(COMPRESSED)}; pictures end in "
                    f".{', .'.join(EXTENSIONS)}"
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
    _refuse_mixture([file.name for file in shards], modality)
    return shards


def _refuse_mixture(names: Sequence[str], modality: Modality | None) -> None:
    first = {_kind(name): name for name in reversed(names)}
    picture, text = first.get("picture"), first.get("text")
    images = first.get("tar") or picture
    if text and images:
        raise UserError(f"{images} holds pictures and {text} text: name either in --data")
    if picture and (shard := first.get("tar") or first.get("parquet")):
        raise UserError(
            f"{picture} is a picture and {shard} a shard of many records: name either in --data"
        )
    # Parquet holds what is asked of it.
    if wrong := {"text": images, "images": text}.get(modality or ""):
        raise UserError(f"{wrong} holds no {modality}, which is what this is for: name other data")


def _kind(name: str) -> Literal["text", "parquet", "tar", "picture", ""]:
    """Return what a file is by its name."""
    form, packing = suffixes(name)
    if form in TEXT_SUFFIXES:
        return "text"
    if form == ".tar":
        return "tar"
    if form == ".parquet" and not packing:
        return "parquet"
    return "picture" if form[1:] in EXTENSIONS and not packing else ""


def is_shard(name: str) -> bool:
    """Return whether a file is raw data by its name."""
    return _kind(name) != ""


def is_picture(name: str) -> bool:
    """Return whether a file is a loose picture by its name."""
    return _kind(name) == "picture"


def identity(name: str) -> str:
    """Return what two names of one shard have in common: links to one file are one shard.

    It is not what the shard is called, because a link may have the suffix that its file lacks.
    """
    return os.path.realpath(name) if name.startswith("/") else name


def form_of(name: str, config: SourceConfig, modality: Modality = "text") -> Form:
    """Return how the records of a shard are told apart; the modality is asked for by parquet."""
    match suffixes(name)[0]:
        case ".txt":
            return "txt-file" if config.txt_documents == "file" else "txt-blank-line"
        case ".tar":
            return "tar"
        case ".parquet":
            return "parquet-images" if modality == "images" else "parquet"
    return "jsonl"


def unit_of(name: str) -> Literal["byte", "row"]:
    """Return what the offset of a record counts: bytes of the content, or rows."""
    return "row" if suffixes(name)[0] == ".parquet" else "byte"


def parts(name: str, form: Form, config: SourceConfig, seen: Seen) -> Iterator[Iterator[Record]]:
    """Yield the records of a shard in parts that no block may cross: row groups, or the whole.

    Raises:
        OSError: If the shard cannot be read to its end; or another of pyarrow's errors.
    """
    if column := _column(form, config):
        yield from parquet.row_groups(name, *column, config.max_expansion, seen)
    else:
        with open_content(name, config.max_expansion) as stream:
            yield tar.records(stream, seen) if form == "tar" else split(stream, form, seen)


def records_from(
    name: str, form: Form, config: SourceConfig, offset: int, seen: Seen
) -> Iterator[Record]:
    """Yield the records from the offset of a block on: a byte of the content, or a row.

    A compressed shard is read from its start, so keep such shards below some 100 MB.

    Raises:
        OSError: If they cannot be read; or another of pyarrow's errors.
    """
    if column := _column(form, config):
        yield from parquet.rows_from(name, *column, offset, seen)
        return
    with open_content(name, config.max_expansion) as stream:
        if suffixes(name)[1]:
            while skipped := len(stream.read(min(offset, 1 << 20))):
                offset -= skipped
        else:
            stream.seek(offset)
        yield from tar.records(stream, seen) if form == "tar" else split(stream, form, seen)


def _column(form: Form, config: SourceConfig) -> tuple[str, parquet.Wanted] | None:
    """Return which column of a parquet shard is read; None of another one."""
    if form == "parquet-images":
        return config.image_field, parquet.PICTURES
    return (config.text_field, parquet.TEXTS) if form == "parquet" else None


def loose_pictures(names: Sequence[str], seen: Seen) -> Iterator[Record]:
    """Yield the files as records, hashed as the values of a parquet column are.

    One that is too long for a picture is not read, so that of it only the size is hashed.

    Raises:
        DataError: If a file is gone.
        OutageError: If one cannot be read.
    """
    for name in names:
        with reading(name), open_file(name) as file:
            size = file.size()
            seen(size.to_bytes(8, "little"))
            if size > tar.MAX_SAMPLE_BYTES:
                yield Record(None, size, TOO_LONG, key=name)
                continue
            data = file.read()
        seen(data)
        yield Record(data, len(data), key=name)


def document(record: bytes | None, form: Form, config: SourceConfig) -> str | Rejected:
    """Return the text of a record, or the reason why it has none."""
    if record is None:
        return Rejected("quarantined:no-text-field")
    if len(record) > MAX_RECORD_BYTES:
        return Rejected(TOO_LONG)
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


def picture(record: bytes | None, form: Form) -> bytes | Rejected:
    """Return the picture of a record, or the reason why it has none.

    A sample of a tar holds it in one of its files.
    """
    if record is None:
        return Rejected("quarantined:no-image-field")
    if form != "tar":
        return record if len(record) <= tar.MAX_SAMPLE_BYTES else Rejected(TOO_LONG)
    try:
        files = tar.files(record)
    except ValueError:
        return Rejected("quarantined:two-files-of-one-name")
    found = [data for name, data in files.items() if name.rpartition(".")[2] in EXTENSIONS]
    if len(found) != 1:
        return Rejected("quarantined:several-pictures" if found else "filtered:no-picture")
    return found[0]
