"""The manifest: what the raw shards hold, block by block, and a ledger that adds up.

One pass over the shards cuts them into blocks, runs of whole records that are the unit of
reading and hashing, and says of every record and byte whether it is for training, held out,
filtered or quarantined. The SHA-256 of all this is the fingerprint of the data.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter

from pipelines.data.shards import (
    Form,
    Rejected,
    SourceConfig,
    document,
    form_of,
    open_shard,
    read_error,
    read_span,
    records,
)
from pipelines.errors import DataError

Split = Literal["training", "heldout"]

MIN_BLOCK_BYTES = 64 * 1024
MAX_BLOCK_BYTES = 4 * 1024 * 1024
BLOCKS_PER_CORPUS = 64
MAX_QUARANTINE_ENTRIES = 1000


class Document(NamedTuple):
    """One document of a block."""

    record: int
    """Number of its record in the corpus."""
    content: int
    """64-bit hash of its words; copies of one document share it."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One raw file: its path, its bytes when decompressed, and how its records are told apart."""

    path: str
    bytes: int
    form: Form


@dataclass(frozen=True, kw_only=True)
class Block:
    """Contiguous records of one shard."""

    shard: int
    offset: int
    bytes: int
    sha256: str
    records: int
    first_record: int
    training: int
    """How many of its records are documents for training."""
    heldout: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Records and bytes that share one fate."""

    records: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """One record that is broken, and where it lies in the decompressed shard."""

    path: str
    offset: int
    bytes: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What one pass over one shard finds; blocks are numbered from 0 within it."""

    shard: Shard
    blocks: tuple[Block, ...]
    ledger: dict[str, Entry]
    quarantined: tuple[Quarantined, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The shards and blocks of a corpus, how they were read, and the ledger."""

    root: str
    """Folder that the shard paths are relative to; not part of the fingerprint."""
    source: SourceConfig
    block_bytes: int
    shards: tuple[Shard, ...]
    blocks: tuple[Block, ...]
    ledger: dict[str, Entry]
    quarantined: tuple[Quarantined, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything but the root, in canonical JSON."""
        content = {name: value for name, value in asdict(self).items() if name != "root"}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def blocks_of(self, split: Split) -> list[int]:
        """Return the numbers of the blocks that hold at least one document of a split."""
        return [i for i, block in enumerate(self.blocks) if getattr(block, split)]

    def read(self, number: int, split: Split) -> list[Document]:
        """Return the documents of a split in one block.

        Raises:
            DataError: If the bytes are not the ones that were indexed.
        """
        block = self.blocks[number]
        shard = self.shards[block.shard]
        path = Path(self.root) / shard.path
        try:
            data = read_span(path, block.offset, block.bytes)
        except OSError as error:
            raise read_error(path, error) from error
        if hashlib.sha256(data).hexdigest() != block.sha256:
            raise DataError(
                f"{path}: bytes {block.offset} to {block.offset + block.bytes} changed since "
                "they were indexed; restore the shard, or start a run of another name"
            )
        found: list[Document] = []
        for i, record in enumerate(records(io.BytesIO(data), shard.form)):
            fate, text = _fate(record, shard.form, self.source)
            if fate == split:
                found.append(Document(block.first_record + i, content_hash(text), text))
        return found

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
    words = " ".join(text.lower().split())
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little")


def build(
    paths: Sequence[Path],
    source: SourceConfig,
    run: Callable[[Callable[[Path], ShardIndex], Sequence[Path]], Sequence[ShardIndex]],
) -> Manifest:
    """Return the manifest of the shards; `run` maps a function over them, in parallel or not.

    Raises:
        DataError: If a shard is cut, or no document is left to train on.
    """
    root = Path(paths[0]).parent
    while not all(path.is_relative_to(root) for path in paths):
        root = root.parent
    size = sum(path.stat().st_size for path in paths)
    block_bytes = min(max(size // BLOCKS_PER_CORPUS, MIN_BLOCK_BYTES), MAX_BLOCK_BYTES)
    indexer = Indexer(root=root, source=source, block_bytes=block_bytes)
    manifest = _join(root, source, block_bytes, run(indexer, paths))
    if not manifest.records_where("training"):
        raise DataError(
            f"none of {sum(e.records for e in manifest.ledger.values())} records is a document "
            f"for training ({', '.join(manifest.ledger)}); check --source.text-field and the data"
        )
    return manifest


@dataclass(frozen=True, kw_only=True)
class Indexer:
    """Reads one shard once and cuts it into blocks; a value, so that it travels to workers."""

    root: Path
    source: SourceConfig
    block_bytes: int

    def __call__(self, path: Path) -> ShardIndex:
        """Return the blocks and the ledger of one shard.

        Raises:
            DataError: If the shard cannot be read to its end.
        """
        form = form_of(path, self.source)
        ledger: dict[str, Counter[str]] = {}
        quarantined: list[Quarantined] = []
        blocks: list[Block] = []
        pending = _PendingBlock()
        name = str(path.relative_to(self.root))
        try:
            with open_shard(path) as stream:
                for record in records(stream, form):
                    fate, _ = _fate(record, form, self.source)
                    ledger.setdefault(fate, Counter()).update(records=1, bytes=len(record))
                    if fate.startswith("quarantined") and len(quarantined) < MAX_QUARANTINE_ENTRIES:
                        offset = pending.offset + pending.bytes
                        quarantined.append(
                            Quarantined(path=name, offset=offset, bytes=len(record), reason=fate)
                        )
                    pending.add(record, fate)
                    if pending.bytes >= self.block_bytes:
                        blocks.append(pending.close())
                        pending = _PendingBlock(offset=pending.offset + pending.bytes)
        except (OSError, EOFError) as error:
            raise read_error(path, error) from error
        if pending.bytes:
            blocks.append(pending.close())
        return ShardIndex(
            shard=Shard(path=name, bytes=pending.offset + pending.bytes, form=form),
            blocks=tuple(blocks),
            ledger={fate: Entry(**counts) for fate, counts in sorted(ledger.items())},
            quarantined=tuple(quarantined),
        )


class _PendingBlock:
    """A block that is still being filled."""

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset
        self.bytes = 0
        self._hash = hashlib.sha256()
        self._fates: Counter[str] = Counter()

    def add(self, record: bytes, fate: str) -> None:
        self.bytes += len(record)
        self._hash.update(record)
        self._fates[fate] += 1

    def close(self) -> Block:
        return Block(
            shard=0,
            offset=self.offset,
            bytes=self.bytes,
            sha256=self._hash.hexdigest(),
            records=self._fates.total(),
            first_record=0,
            training=self._fates["training"],
            heldout=self._fates["heldout"],
        )


def _fate(record: bytes, form: Form, source: SourceConfig) -> tuple[str, str]:
    """Return what becomes of a record, from its bytes alone, and its text if it has one."""
    text = document(record, form, source)
    if isinstance(text, Rejected):
        return text.reason, ""
    # The lowest bits pair and mask; the held-out rule reads the hash as a fraction of 2^64.
    heldout = content_hash(text) < source.heldout_ratio * 2**64
    return ("heldout" if heldout else "training"), text


def _join(
    root: Path, source: SourceConfig, block_bytes: int, indexes: Sequence[ShardIndex]
) -> Manifest:
    blocks: list[Block] = []
    totals: dict[str, Counter[str]] = {}
    next_record = 0
    for number, index in enumerate(indexes):
        for block in index.blocks:
            numbered: dict[str, Any] = {"shard": number, "first_record": next_record}
            blocks.append(Block(**(asdict(block) | numbered)))
            next_record += block.records
        for fate, entry in index.ledger.items():
            totals.setdefault(fate, Counter()).update(asdict(entry))
    quarantined = [entry for index in indexes for entry in index.quarantined]
    return Manifest(
        root=str(root),
        source=source,
        block_bytes=block_bytes,
        shards=tuple(index.shard for index in indexes),
        blocks=tuple(blocks),
        ledger={fate: Entry(**counts) for fate, counts in sorted(totals.items())},
        quarantined=tuple(quarantined[:MAX_QUARANTINE_ENTRIES]),
    )
