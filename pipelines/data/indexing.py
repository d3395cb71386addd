"""One pass over raw shards: their blocks and the ledger, in parallel, joined to a manifest."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from pipelines.data.filesystems import READ_ERRORS, File, read_through, reason, split_root
from pipelines.data.manifest import (
    CUT,
    DUPLICATE,
    Block,
    Entry,
    Manifest,
    Quarantined,
    Shard,
    fate_of,
)
from pipelines.data.records import Record, suffixes
from pipelines.data.shards import SourceConfig, form_of, parts, unit_of
from pipelines.errors import DataError

MIN_BLOCK_BYTES = 64 * 1024
MAX_BLOCK_BYTES = 4 * 1024 * 1024
BLOCKS_PER_CORPUS = 64
MAX_QUARANTINE_ENTRIES = 1000


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What one pass over one shard finds; blocks are numbered from 0 within it."""

    shard: Shard
    blocks: tuple[Block, ...]
    ledger: dict[str, Entry]
    quarantined: tuple[Quarantined, ...]


def build(
    files: Sequence[File],
    source: SourceConfig,
    run: Callable[[Callable[[File], ShardIndex], Sequence[File]], Sequence[ShardIndex]],
) -> Manifest:
    """Return the manifest of the shards; `run` maps a function over them, in parallel or not.

    What cannot be read to its end is in the ledger: whether such a corpus may be used is for
    `gate.check` to say.

    Raises:
        DataError: If a shard vanished or changed meanwhile, or has no column of the name.
        OutageError: If the store of a shard fails.
    """
    root, names = split_root([file.name for file in files])
    size = sum(file.bytes for file in files)
    block_bytes = min(max(size // BLOCKS_PER_CORPUS, MIN_BLOCK_BYTES), MAX_BLOCK_BYTES)
    indexes = run(Indexer(source=source, block_bytes=block_bytes), files)
    return _join(root, names, source, block_bytes, indexes)


@dataclass(frozen=True, kw_only=True)
class Indexer:
    """Reads one shard once and cuts it into blocks; a value, so that it travels to workers."""

    source: SourceConfig
    block_bytes: int

    def __call__(self, file: File) -> ShardIndex:
        """Return the blocks and the ledger of one shard, by its whole name.

        Raises:
            DataError: If it vanished or changed meanwhile, or has no column of the name.
            OutageError: If its store fails.
        """
        found = _Findings(file, self.source, self.block_bytes)
        try:
            for part in parts(file.name, self.source, found.seen):
                for record in part:
                    found.add(record)
                found.close_block()
        except READ_ERRORS as error:
            # Only a shard whose bytes can all be read is cut: no outage may leave shards out.
            if (num_bytes := read_through(file.name)) != file.bytes:
                raise _changed(file, num_bytes) from error
            return _left_out(file, self.source, reason(error))
        if suffixes(file.name)[1] == "" and found.unit == "byte" and found.offset != file.bytes:
            raise _changed(file, found.offset)
        return found.index()


class _Findings:
    """What is known of a shard while it is read."""

    def __init__(self, file: File, source: SourceConfig, block_bytes: int) -> None:
        self.unit = unit_of(file.name)
        self.offset = 0
        """Where the open block starts."""
        self._file, self._source, self._block_bytes = file, source, block_bytes
        self._form = form_of(file.name, source)
        self._ledger: dict[str, Counter[str]] = {}
        self._quarantined: list[Quarantined] = []
        self._blocks: list[Block] = []
        self._keys: set[str] = set()
        self._open_block()

    def seen(self, data: bytes) -> None:
        """Hash the bytes of the next record."""
        self._hash.update(data)

    def add(self, record: Record) -> None:
        """Account for a record."""
        fate, _ = fate_of(record, self._form, self._source)
        if record.key in self._keys:
            fate = DUPLICATE
            self._excluded.append(self._fates.total())
        elif record.key:
            self._keys.add(record.key)
        self._ledger.setdefault(fate, Counter()).update(records=1, bytes=record.bytes)
        if fate.startswith("quarantined") and len(self._quarantined) < MAX_QUARANTINE_ENTRIES:
            self._quarantined.append(
                Quarantined(
                    path=self._file.name,
                    offset=self.offset + self._block_size(),
                    bytes=record.bytes,
                    reason=fate,
                )
            )
        self._bytes += record.bytes
        self._fates[fate] += 1
        # To start within a row group costs all before it again.
        limit = self._block_bytes if self.unit == "byte" else MAX_BLOCK_BYTES
        if self._bytes >= limit:
            self.close_block()

    def close_block(self) -> None:
        """End the open block, if it holds anything, and open the next one."""
        if not self._fates:
            return
        self._blocks.append(
            Block(
                shard=0,
                offset=self.offset,
                bytes=self._bytes,
                sha256=self._hash.hexdigest(),
                records=self._fates.total(),
                first_record=0,
                training=self._fates["training"],
                heldout=self._fates["heldout"],
                excluded=tuple(self._excluded),
            )
        )
        self.offset += self._block_size()
        self._open_block()

    def index(self) -> ShardIndex:
        """Return what was found in the whole shard."""
        size = sum(block.bytes for block in self._blocks)
        return ShardIndex(
            shard=_shard(self._file, self._source, size),
            blocks=tuple(self._blocks),
            ledger={fate: Entry(**counts) for fate, counts in sorted(self._ledger.items())},
            quarantined=tuple(self._quarantined),
        )

    def _open_block(self) -> None:
        self._bytes = 0
        self._hash = hashlib.sha256()
        self._fates: Counter[str] = Counter()
        self._excluded: list[int] = []

    def _block_size(self) -> int:
        return self._bytes if self.unit == "byte" else self._fates.total()


def _shard(file: File, source: SourceConfig, content_bytes: int) -> Shard:
    return Shard(
        path=file.name,
        bytes=content_bytes,
        file_bytes=file.bytes,
        form=form_of(file.name, source),
        source=file.source,
    )


def _left_out(file: File, source: SourceConfig, detail: str) -> ShardIndex:
    """Return the index of a shard that is not to be used: one record of all its bytes."""
    entry = Quarantined(path=file.name, offset=0, bytes=file.bytes, reason=CUT, detail=detail)
    return ShardIndex(
        shard=_shard(file, source, file.bytes),
        blocks=(),
        ledger={CUT: Entry(records=1, bytes=file.bytes)},
        quarantined=(entry,),
    )


def _changed(file: File, num_bytes: int) -> DataError:
    return DataError(
        f"{file.name}: {num_bytes} bytes where {file.bytes} were listed: it is being written to; "
        "index it when that is done"
    )


def _join(
    root: str,
    names: Sequence[str],
    source: SourceConfig,
    block_bytes: int,
    indexes: Sequence[ShardIndex],
) -> Manifest:
    blocks: list[Block] = []
    shards: list[Shard] = []
    quarantined: list[Quarantined] = []
    totals: dict[str, Counter[str]] = {}
    next_record = 0
    for number, (name, index) in enumerate(zip(names, indexes, strict=True)):
        shards.append(replace(index.shard, path=name))
        quarantined += [replace(entry, path=name) for entry in index.quarantined]
        for block in index.blocks:
            blocks.append(replace(block, shard=number, first_record=next_record))
            next_record += block.records
        for fate, entry in index.ledger.items():
            totals.setdefault(fate, Counter()).update(asdict(entry))
    quarantined.sort(key=lambda entry: entry.reason != CUT)  # of these, none may be unlisted
    return Manifest(
        root=root,
        source=source,
        block_bytes=block_bytes,
        shards=tuple(shards),
        blocks=tuple(blocks),
        ledger={fate: Entry(**counts) for fate, counts in sorted(totals.items())},
        quarantined=tuple(quarantined[:MAX_QUARANTINE_ENTRIES]),
    )
