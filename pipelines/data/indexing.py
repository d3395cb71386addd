"""One pass over raw shards: their blocks and the ledger, in parallel, joined to a manifest."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

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
from pipelines.data.records import Modality, Record, suffixes
from pipelines.data.shards import (
    SourceConfig,
    form_of,
    is_picture,
    loose_pictures,
    parts,
    unit_of,
)
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
    run: Callable[[Callable[[Any], ShardIndex], Sequence[Any]], Sequence[ShardIndex]],
    modality: Modality = "text",
) -> Manifest:
    """Return the manifest of the shards; `run` maps a function over them, in parallel or not.

    The modality says what is read of parquet. What cannot be read to its end is in the ledger:
    whether such a corpus may be used is for `gate.check` to say.

    Raises:
        DataError: If a shard vanished or changed meanwhile, or has no column of the name.
        OutageError: If the store of a shard fails.
    """
    root, names = split_root([file.name for file in files])
    size = sum(file.bytes for file in files)
    block_bytes = min(max(size // BLOCKS_PER_CORPUS, MIN_BLOCK_BYTES), MAX_BLOCK_BYTES)
    if is_picture(files[0].name):
        indexes = run(partial(index_pictures, source), [*_runs(files, block_bytes)])
    else:
        indexer = Indexer(source=source, block_bytes=block_bytes, modality=modality)
        indexes = run(indexer, files)
    paths = dict(zip((file.name for file in files), names, strict=True))
    return _join(root, paths, source, block_bytes, indexes)


@dataclass(frozen=True, kw_only=True)
class Indexer:
    """Reads one shard once and cuts it into blocks; a value, so that it travels to workers."""

    source: SourceConfig
    block_bytes: int
    modality: Modality = "text"

    def __call__(self, file: File) -> ShardIndex:
        """Return the blocks and the ledger of one shard, by its whole name.

        Raises:
            DataError: If it vanished or changed meanwhile, or has no column of the name.
            OutageError: If its store fails.
        """
        shard = Shard(
            path=file.name,
            bytes=0,
            file_bytes=file.bytes,
            form=form_of(file.name, self.source, self.modality),
            source=file.source,
        )
        found = _Findings(shard, self.source, self.block_bytes)
        try:
            for part in parts(file.name, shard.form, self.source, found.seen):
                for record in part:
                    found.add(record)
                found.close_block()
        except READ_ERRORS as error:
            # Only a shard whose bytes can all be read is cut: no outage may leave shards out.
            if (num_bytes := read_through(file.name)) != file.bytes:
                raise _changed(file, num_bytes) from error
            return _left_out(shard, reason(error))
        if suffixes(file.name)[1] == "" and found.unit == "byte" and found.offset != file.bytes:
            raise _changed(file, found.offset)
        return found.index()


def index_pictures(source: SourceConfig, files: Sequence[File]) -> ShardIndex:
    """Return the index of loose pictures as one block of the shard that they are part of.

    Raises:
        DataError: If one vanished or changed meanwhile.
        OutageError: If one cannot be read.
    """
    size = sum(file.bytes for file in files)
    shard = Shard(path=".", bytes=0, file_bytes=size, form="files", source=files[0].source)
    found = _Findings(shard, source, size + 1)
    records = loose_pictures([file.name for file in files], found.seen)
    for file, record in zip(files, records, strict=True):
        if record.bytes != file.bytes:
            raise _changed(file, record.bytes)
        found.add(record)
    found.close_block()
    return found.index()


def _runs(files: Sequence[File], block_bytes: int) -> Iterator[list[File]]:
    """Yield loose pictures in runs of the size of a block, each of one source."""
    for _, members in groupby(sorted(files, key=_source), key=_source):
        run, size = [], 0
        for file in members:
            run.append(file)
            size += file.bytes
            if size >= block_bytes:
                yield run
                run, size = [], 0
        if run:
            yield run


def _source(file: File) -> int:
    return file.source


class _Findings:
    """What is known of a shard while it is read."""

    def __init__(self, shard: Shard, source: SourceConfig, block_bytes: int) -> None:
        self.unit = unit_of(shard.path)
        self.offset = 0
        """Where the open block starts."""
        self._shard, self._source, self._block_bytes = shard, source, block_bytes
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
        is_file = self._shard.form == "files"
        fate, _ = fate_of(record, self._shard.form, self._source)
        if record.key in self._keys:
            fate = DUPLICATE
            self._excluded.append(self._fates.total())
        elif record.key:
            self._keys.add(record.key)
        self._ledger.setdefault(fate, Counter()).update(records=1, bytes=record.bytes)
        if fate.startswith("quarantined") and len(self._quarantined) < MAX_QUARANTINE_ENTRIES:
            self._quarantined.append(
                Quarantined(
                    path=record.key if is_file else self._shard.path,
                    offset=0 if is_file else self.offset + self._block_size(),
                    bytes=record.bytes,
                    reason=fate,
                )
            )
        self._bytes += record.bytes
        self._fates[fate] += 1
        if is_file:
            self._files.append(record.key)
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
                files=tuple(self._files),
            )
        )
        self.offset += self._block_size()
        self._open_block()

    def index(self) -> ShardIndex:
        """Return what was found in the whole shard."""
        size = sum(block.bytes for block in self._blocks)
        return ShardIndex(
            shard=replace(self._shard, bytes=size),
            blocks=tuple(self._blocks),
            ledger={fate: Entry(**counts) for fate, counts in sorted(self._ledger.items())},
            quarantined=tuple(self._quarantined),
        )

    def _open_block(self) -> None:
        self._bytes = 0
        self._hash = hashlib.sha256()
        self._fates: Counter[str] = Counter()
        self._excluded: list[int] = []
        self._files: list[str] = []

    def _block_size(self) -> int:
        return self._bytes if self.unit == "byte" else self._fates.total()


def _left_out(shard: Shard, detail: str) -> ShardIndex:
    """Return the index of a shard that is not to be used: one record of all its bytes."""
    size = shard.file_bytes
    entry = Quarantined(path=shard.path, offset=0, bytes=size, reason=CUT, detail=detail)
    return ShardIndex(
        shard=replace(shard, bytes=size),
        blocks=(),
        ledger={CUT: Entry(records=1, bytes=size)},
        quarantined=(entry,),
    )


def _changed(file: File, num_bytes: int) -> DataError:
    return DataError(
        f"{file.name}: {num_bytes} bytes where {file.bytes} were listed: it is being written to; "
        "index it when that is done"
    )


def _join(
    root: str,
    paths: dict[str, str],
    source: SourceConfig,
    block_bytes: int,
    indexes: Sequence[ShardIndex],
) -> Manifest:
    blocks: list[Block] = []
    shards: list[Shard] = []
    quarantined: list[Quarantined] = []
    totals: dict[str, Counter[str]] = {}
    next_record = 0
    for index in indexes:
        found = replace(index.shard, path=paths.get(index.shard.path, index.shard.path))
        if shards and (found.path, found.source) == (shards[-1].path, shards[-1].source):
            found = _sum(shards.pop(), found)  # of the loose pictures of a source
        number = len(shards)
        shards.append(found)
        quarantined += [replace(entry, path=paths[entry.path]) for entry in index.quarantined]
        for block in index.blocks:
            files = tuple(paths[name] for name in block.files)
            blocks.append(replace(block, shard=number, first_record=next_record, files=files))
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


def _sum(one: Shard, other: Shard) -> Shard:
    num_bytes, file_bytes = one.bytes + other.bytes, one.file_bytes + other.file_bytes
    return replace(one, bytes=num_bytes, file_bytes=file_bytes)
