"""The manifest: what the raw shards hold, block by block, and a ledger that adds up.

Its blocks, runs of whole records, are the unit of reading and hashing. The ledger says of every
record and byte whether it is for training, held out, filtered or quarantined. The SHA-256 of all
this is the fingerprint of the data. `indexing.py` makes it, in one pass over the shards.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter

from pipelines.data.filesystems import READ_ERRORS, join, read_through, reason
from pipelines.data.records import PICTURE_FORMS, Form, Modality, Record, Seen
from pipelines.data.shards import (
    Rejected,
    SourceConfig,
    document,
    loose_pictures,
    picture,
    records_from,
    unit_of,
)
from pipelines.errors import DataError

Split = Literal["training", "heldout"]

CUT = "quarantined:cut-shard"
"""The fate of a shard that cannot be read to its end: it counts as one record."""
DUPLICATE = "quarantined:duplicate-key"
"""The fate of a sample whose key an earlier one of its shard has."""
GATES = ("max_quarantined_ratio", "cut_shards")
"""Fields of the source that only say whether a corpus may be used, never how it is read."""


class Document(NamedTuple):
    """One document of a block."""

    record: int
    """Number of its record in the corpus."""
    content: int
    """64-bit hash of its words; copies of one document share it."""
    text: str
    visit: int = 0
    """Which pass over its source this is: the document is cut and masked anew in each."""


class Picture(NamedTuple):
    """One picture of a block."""

    record: int
    """Number of its record in the corpus."""
    content: int
    """64-bit hash of its bytes; copies of one picture share it."""
    data: bytes
    visit: int = 0
    """Which pass over its source this is: its views are drawn anew in each."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One raw file and how its records are told apart, or all loose pictures of a source."""

    path: str
    """Below the root, which is where loose pictures lie."""
    bytes: int
    """What its records sum to: its content, or the values of its column; of a shard that is
    left out, the bytes of the file."""
    file_bytes: int
    form: Form
    source: int = 0
    """Number of its pattern, where sources have weights."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Contiguous records of one shard; in parquet, of one row group, all of it if it is small."""

    shard: int
    offset: int
    """Where its first record starts in the content; in parquet, the number of its row; 0 where
    it has `files`."""
    bytes: int
    sha256: str
    """Of its bytes; in parquet, of each value after its length in 8 bytes, little-endian, the
    length of a null being 2^64 - 1, and of files alike; in tar, of the bytes of its samples, and
    for what is passed over of its fate and size."""
    records: int
    first_record: int
    training: int
    """How many of its records are documents or pictures for training."""
    heldout: int
    excluded: tuple[int, ...] = ()
    """Which of its records, counted from 0, are not used for what only the whole shard tells: in
    tar, those whose key has been there before."""
    files: tuple[str, ...] = ()
    """Of loose pictures: the paths of its records, below the root, in their order."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Records and bytes that share one fate."""

    records: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """One record that is broken, or one shard that is cut, and where it lies."""

    path: str
    offset: int
    """A byte of the content; in parquet, a row."""
    bytes: int
    reason: str
    detail: str = ""
    """What was said of a cut shard."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The shards and blocks of a corpus, how they were read, and the ledger."""

    root: str
    """Folder, local or URI, that the shard paths are relative to; not part of the fingerprint."""
    source: SourceConfig
    block_bytes: int
    shards: tuple[Shard, ...]
    blocks: tuple[Block, ...]
    ledger: dict[str, Entry]
    quarantined: tuple[Quarantined, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in canonical JSON, of everything that decides what is read.

        Without the root, so that a corpus may move; without the gates, which only say yes or
        no; and without what a library said of a cut shard, which its next version words anew.
        """
        content = asdict(self)
        del content["root"]
        for gate in GATES:
            del content["source"][gate]
        for entry in content["quarantined"]:
            del entry["detail"]
        for block in content["blocks"]:
            for name in ("excluded", "files"):
                if not block[name]:  # as if there were no such field, which text does not need
                    del block[name]
        if not any(shard.form == "parquet-images" for shard in self.shards):
            del content["source"]["image_field"]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def modality(self) -> Modality:
        """What the shards hold."""
        return "images" if self.shards[0].form in PICTURE_FORMS else "text"

    def files(self) -> Iterator[tuple[str, int]]:
        """Yield the whole name of each raw file, and the number of its source."""
        for shard in self.shards:
            if shard.form != "files":
                yield join(self.root, shard.path), shard.source
        for block in self.blocks:
            for path in block.files:
                yield join(self.root, path), self.shards[block.shard].source

    def without(self, found: Sequence[Quarantined]) -> "Manifest":
        """Return the manifest with training records quarantined that cannot be used after all."""
        ledger = dict(self.ledger)
        for entry in found:
            for fate, sign in (("training", -1), (entry.reason, 1)):
                old = ledger.get(fate, Entry(records=0, bytes=0))
                ledger[fate] = Entry(
                    records=old.records + sign, bytes=old.bytes + sign * entry.bytes
                )
        ledger = dict(sorted(ledger.items()))
        return replace(self, ledger=ledger, quarantined=(*self.quarantined, *found))

    def blocks_of(self, split: Split) -> list[int]:
        """Return the numbers of the blocks that hold at least one document of a split."""
        return [i for i, block in enumerate(self.blocks) if getattr(block, split)]

    def read(self, number: int, split: Split) -> list[Any]:
        """Return what a block holds of a split: every `Document`, or every `Picture`.

        Raises:
            DataError: If the bytes are not the ones that were indexed.
            OutageError: If the store of the shard fails.
        """
        try:
            return self._read(number, split)
        except READ_ERRORS:
            name = join(self.root, self.shards[self.blocks[number].shard].path)
            read_through(name)
        # Its store gives every byte, maybe again: only what fails now is harm to the shard.
        try:
            return self._read(number, split)
        except READ_ERRORS as error:
            raise DataError(
                f"{name}: cannot be read any more ({reason(error)}); restore this shard"
            ) from error

    def records(self, number: int, seen: Seen = lambda _: None) -> Iterator[Record]:
        """Yield the records of a block as they lie in the shard, whether they are used or not.

        Raises:
            OSError: If they cannot be read; or another of pyarrow's errors.
            DataError: If a loose picture is gone.
            OutageError: If one cannot be read.
        """
        block = self.blocks[number]
        if block.files:
            return loose_pictures([join(self.root, path) for path in block.files], seen)
        shard = self.shards[block.shard]
        name = join(self.root, shard.path)
        found = records_from(name, shard.form, self.source, block.offset, seen)
        return islice(found, block.records)

    def _read(self, number: int, split: Split) -> list[Document | Picture]:
        block = self.blocks[number]
        form = self.shards[block.shard].form
        digest = hashlib.sha256()
        found: list[Document | Picture] = []
        for i, record in enumerate(self.records(number, digest.update)):
            fate, item = fate_of(record, form, self.source)
            if fate == split and item and i not in block.excluded:
                found.append(item._replace(record=block.first_record + i))
        if digest.hexdigest() != block.sha256:
            raise DataError(
                f"{self._place(block)} changed since they were indexed; "
                "restore the shard, or start a run of another name"
            )
        return found

    def _place(self, block: Block) -> str:
        """Return where the records of a block lie."""
        if block.files:
            first, last = (join(self.root, path) for path in (block.files[0], block.files[-1]))
            return f"some of the {block.records} pictures from {first} to {last}"
        name = join(self.root, self.shards[block.shard].path)
        unit = unit_of(name)
        end = block.offset + (block.records if unit == "row" else block.bytes)
        return f"{name}: {unit}s {block.offset} to {end}"

    def texts(self, split: Split) -> Iterator[str]:
        """Yield every document of a split, in the order of the shards."""
        for number in self.blocks_of(split):
            for found in self.read(number, split):
                yield found.text

    def records_where(self, prefix: str) -> int:
        """Return how many records of the ledger have a fate that starts with `prefix`."""
        return sum(e.records for fate, e in self.ledger.items() if fate.startswith(prefix))

    def to_json(self) -> str:
        """Return the manifest as JSON; `from_json` gives an equal one back."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Manifest":
        """Return the manifest that `to_json` wrote."""
        return TypeAdapter(Manifest).validate_json(text)


def content_hash(text: str) -> int:
    """Return a hash of the words of a text: case and white space do not count."""
    return _hash(" ".join(text.lower().split()).encode())


def fate_of(
    record: Record, form: Form, source: SourceConfig
) -> tuple[str, Document | Picture | None]:
    """Return what becomes of a record, from it alone, and what it holds, numbered 0."""
    if record.fate:
        return record.fate, None
    item: Document | Picture
    if form in PICTURE_FORMS:
        data = picture(record.data, form)
        if isinstance(data, Rejected):
            return data.reason, None
        item = Picture(0, _hash(data), data)
    else:
        text = document(record.data, form, source)
        if isinstance(text, Rejected):
            return text.reason, None
        item = Document(0, content_hash(text), text)
    # The lowest bits pair and mask; the held-out rule reads the hash as a fraction of 2^64.
    heldout = item.content < source.heldout_ratio * 2**64
    return ("heldout" if heldout else "training"), item


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
