"""The ledger adds up, blocks are what was indexed, and the fingerprint is the data's alone."""

import gzip
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.cluster import parallel_map
from pipelines.data import indexing
from pipelines.data.filesystems import File, join
from pipelines.data.indexing import (
    BLOCKS_PER_CORPUS,
    MIN_BLOCK_BYTES,
    Indexer,
    ShardIndex,
    build,
)
from pipelines.data.manifest import CUT, Document, Manifest, Split, content_hash
from pipelines.data.records import open_content
from pipelines.data.shards import Rejected, SourceConfig, document, find_shards, form_of
from pipelines.errors import DataError
from pipelines.run import index
from tests.corpus import build_manifest, make_text, serial_map, write_corpus

SOURCE = SourceConfig(heldout_ratio=0.3, txt_documents="blank-line")
BROKEN = (b'{"text": "cut\n', b"\xff\n", b'{"title": "no text"}\n', b'{"text": "\\ud800 a"}\n')
EMPTY = (b"\n", b'{"text": ""}\n', b'{"text": "..."}\n')


class Mixed(NamedTuple):
    """Shards of every form that hold good, empty and broken records, some of them copies."""

    paths: list[Path]
    texts: list[str]
    num_records: int
    num_bytes: int


@pytest.fixture
def mixed(tmp_path: Path) -> Mixed:
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    good = [json.dumps({"text": make_text(i, 5)}).encode() + b"\n" for i in range(200)]
    lines = [*good, *BROKEN * 3, *EMPTY * 5]
    random.Random(0).shuffle(lines)
    stanzas = [make_text(i, 3) + "\n\n" for i in range(300, 340)]
    copied = b"".join(lines[:150])
    text = b"\n\n" + "".join(stanzas).encode() + b"\xff\xfe\n\n"
    (folder / "a.jsonl").write_bytes(b"".join(lines))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(copied))
    (folder / "deep" / "c.txt").write_bytes(text)
    (folder / "deep" / "d.txt").write_bytes(b"")
    return Mixed(
        [Path(file.name) for file in find_shards([str(folder)])],
        [json.loads(line)["text"] for line in [*good, *(x for x in lines[:150] if x in good)]]
        + stanzas,
        len(lines) + 150 + 42,
        sum(map(len, lines)) + len(copied) + len(text),
    )


def files(*paths: Path) -> list[File]:
    return find_shards([str(path) for path in paths])


def build_mixed(paths: Sequence[Path], block_bytes: int = 1000) -> Manifest:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "MIN_BLOCK_BYTES", block_bytes)
        return build(files(*paths), SOURCE, serial_map)


def documents(manifest: Manifest, split: Split) -> list[Document]:
    return [found for number in manifest.blocks_of(split) for found in manifest.read(number, split)]


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_t6_every_record_and_byte_has_one_fate(mixed: Mixed) -> None:
    manifest = build_mixed(mixed.paths)
    ledger = manifest.ledger
    assert set(ledger) == {
        "training",
        "heldout",
        "filtered:no-words",
        "quarantined:bad-json",
        "quarantined:bad-utf8",
        "quarantined:no-text-field",
        "quarantined:lone-surrogate",
    }
    assert sum(entry.bytes for entry in ledger.values()) == mixed.num_bytes
    assert sum(shard.bytes for shard in manifest.shards) == mixed.num_bytes
    assert sum(block.bytes for block in manifest.blocks) == mixed.num_bytes
    for shard, path in zip(manifest.shards, mixed.paths, strict=True):
        assert shard.file_bytes == path.stat().st_size
        assert (shard.bytes == shard.file_bytes) == (path.suffix != ".gz")
    assert ledger["training"].records + ledger["heldout"].records == len(mixed.texts)
    assert manifest.records_where("") == mixed.num_records
    assert sum(block.records for block in manifest.blocks) == mixed.num_records
    broken = manifest.records_where("quarantined")
    assert broken == len(manifest.quarantined) > 12
    for split in ("training", "heldout"):
        in_blocks = sum(getattr(block, split) for block in manifest.blocks)
        assert in_blocks == ledger[split].records > 50


def test_t6_what_is_read_is_what_was_counted(mixed: Mixed) -> None:
    manifest = build_mixed(mixed.paths)
    training, heldout = documents(manifest, "training"), documents(manifest, "heldout")
    assert len(training) == manifest.ledger["training"].records
    assert len(heldout) == manifest.ledger["heldout"].records
    assert sorted(d.text for d in [*training, *heldout]) == sorted(mixed.texts)
    numbers = [d.record for d in [*training, *heldout]]
    assert len(set(numbers)) == len(numbers)
    assert list(manifest.texts("training")) == [d.text for d in training]


def test_blocks_tile_the_shards_and_number_the_records(mixed: Mixed) -> None:
    manifest = build_mixed(mixed.paths)
    place, next_record = (0, 0), 0
    for block in manifest.blocks:
        while block.shard != place[0]:
            assert place[1] == manifest.shards[place[0]].bytes
            place = (place[0] + 1, 0)
        assert block.offset == place[1]
        assert block.first_record == next_record
        place, next_record = (block.shard, block.offset + block.bytes), next_record + block.records
    assert place[1] == manifest.shards[place[0]].bytes
    assert [shard.bytes for shard in manifest.shards[place[0] + 1 :]] == [0]


def test_quarantined_records_can_be_found_by_their_address(mixed: Mixed) -> None:
    manifest = build_mixed(mixed.paths)
    for entry in manifest.quarantined:
        name = join(manifest.root, entry.path)
        with open_content(name, 200) as stream:
            record = stream.read()[entry.offset : entry.offset + entry.bytes]
        assert document(record, form_of(name, SOURCE), SOURCE) == Rejected(entry.reason)


def test_a_flood_of_broken_records_is_counted_but_not_listed(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl.gz")]
    for path in paths:
        path.write_bytes(b"{}\n" * 3000 + b'{"text": "one"}\n')
    manifest = build_manifest(paths, heldout_ratio=0)
    assert manifest.quarantined[0].reason == CUT  # listed whatever else there is
    assert manifest.ledger["quarantined:no-text-field"].records == 6000
    assert len(manifest.quarantined) == indexing.MAX_QUARANTINE_ENTRIES


@given(
    records_of=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    block_bytes=st.integers(1, 300),
)
@settings(max_examples=50, deadline=None)
def test_a_block_is_closed_by_the_record_that_fills_it(
    tmp_path_factory: pytest.TempPathFactory, records_of: list[int], block_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("shard") / "a.jsonl"
    path.write_bytes(b"".join(b"a" * (size - 1) + b"\n" for size in records_of))
    found = Indexer(source=SOURCE, block_bytes=block_bytes)(files(path)[0])
    left = list(records_of)
    for i, block in enumerate(found.blocks):
        mine, left = left[: block.records], left[block.records :]
        assert block.bytes == sum(mine)
        assert sum(mine[:-1]) < block_bytes
        assert block.bytes >= block_bytes or i == len(found.blocks) - 1
    assert not left


def test_block_size_is_a_64th_of_the_corpus_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = write_jsonl(tmp_path / "small" / "a.jsonl", [make_text(0, 40)] * 50)
    made = build(files(small), SourceConfig(), serial_map)
    assert made.block_bytes == MIN_BLOCK_BYTES == 64 * 1024
    large = write_jsonl(tmp_path / "large" / "a.jsonl", [make_text(0, 40)] * 3000)
    size = large.stat().st_size
    assert build(files(large), SourceConfig(), serial_map).block_bytes == size // BLOCKS_PER_CORPUS
    assert indexing.MAX_BLOCK_BYTES == 4 * 1024 * 1024
    monkeypatch.setattr(indexing, "MAX_BLOCK_BYTES", 70_000)
    assert build(files(large), SourceConfig(), serial_map).block_bytes == 70_000


def test_serial_and_parallel_passes_give_the_same_manifest(mixed: Mixed) -> None:
    def backwards(
        function: Callable[[File], ShardIndex], paths: Sequence[File]
    ) -> Sequence[ShardIndex]:
        return [function(path) for path in reversed(paths)][::-1]

    def threaded(
        function: Callable[[File], ShardIndex], paths: Sequence[File]
    ) -> Sequence[ShardIndex]:
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(function, paths))

    serial = build(files(*mixed.paths), SOURCE, serial_map)
    for other in (backwards, threaded):
        assert build(files(*mixed.paths), SOURCE, other) == serial


@pytest.mark.usefixtures("ray_session")
def test_a_pass_of_the_cluster_gives_the_same_manifest_and_the_same_errors(mixed: Mixed) -> None:
    listed = files(*mixed.paths)
    assert build(listed, SOURCE, parallel_map) == build(listed, SOURCE, serial_map)
    mixed.paths[1].unlink()
    with pytest.raises(DataError, match=rf"{mixed.paths[1].name}: is gone .*restore this shard"):
        build(listed, SOURCE, parallel_map)


def test_the_fingerprint_does_not_depend_on_where_the_shards_lie(
    mixed: Mixed, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "else" / "where"
    shutil.copytree(tmp_path / "mixed", elsewhere)
    first, second = build_mixed(mixed.paths), build_mixed([elsewhere])
    assert first.root != second.root
    assert first.fingerprint == second.fingerprint
    assert documents(first, "training") == documents(second, "training")


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_any_changed_byte_changes_the_fingerprint(mixed: Mixed, number: int, place: float) -> None:
    path = mixed.paths[number]
    before = build_mixed(mixed.paths).fingerprint
    packed = path.suffix == ".gz"
    data = bytearray(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(gzip.compress(data) if packed else data)
    assert build_mixed(mixed.paths).fingerprint != before


def test_how_records_are_read_is_part_of_the_fingerprint(mixed: Mixed) -> None:
    manifest = build_mixed(mixed.paths)
    others = [
        replace(manifest, source=replace(SOURCE, text_field="body")),
        replace(manifest, block_bytes=1001),
        replace(manifest, blocks=manifest.blocks[::-1]),
        replace(manifest, shards=manifest.shards[::-1]),
        build_mixed(mixed.paths[:-1]),
        build_mixed(mixed.paths, 2000),
    ]
    assert len({m.fingerprint for m in [manifest, *others]}) == 7


def test_a_manifest_survives_json(mixed: Mixed) -> None:
    manifest = build_mixed(mixed.paths)
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.fingerprint == manifest.fingerprint
    assert again.to_json() == manifest.to_json()


def test_a_changed_shard_is_noticed_where_it_is_read(mixed: Mixed) -> None:
    manifest = build_mixed(mixed.paths)
    data = bytearray(mixed.paths[0].read_bytes())
    data[2500] ^= 1
    mixed.paths[0].write_bytes(data)
    refused = 0
    for number, block in enumerate(manifest.blocks):
        if block.shard == 0 and block.offset <= 2500 < block.offset + block.bytes:
            with pytest.raises(DataError, match=r"a\.jsonl: bytes .* changed since .* rest"):
                manifest.read(number, "training")
            refused += 1
        else:
            manifest.read(number, "training")
    assert refused == 1


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_shard_that_shrank_or_vanished_is_refused_by_name(mixed: Mixed, number: int) -> None:
    path = mixed.paths[number]
    manifest = build_mixed(mixed.paths)
    last = max(i for i, block in enumerate(manifest.blocks) if block.shard == number)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=path.name):
        manifest.read(last, "training")
    path.unlink()
    with pytest.raises(DataError, match=path.name):
        manifest.read(last, "training")


def test_t6_copies_of_a_document_are_on_one_side(tmp_path: Path) -> None:
    texts = [make_text(i, 2) for i in range(300)]
    copies = [f" {text.upper()}\n\t".replace(" ", "  ") for text in texts]
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", found) for i, found in enumerate((texts, copies))]
    manifest = build_manifest(paths, heldout_ratio=0.3)
    training = {d.content for d in documents(manifest, "training")}
    heldout = {d.content for d in documents(manifest, "heldout")}
    assert not training & heldout
    assert len(training | heldout) == len({content_hash(text) for text in texts}) > 290
    assert manifest.records_where("training") + manifest.records_where("heldout") == 600


def test_the_heldout_share_is_the_one_asked_for(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [f"document number {i}" for i in range(4000)])
    for ratio in (0.0, 0.05, 0.15, 0.5):
        held_out = build_manifest([path], heldout_ratio=ratio).records_where("heldout")
        sigma = (4000 * ratio * (1 - ratio)) ** 0.5
        assert abs(held_out - 4000 * ratio) <= 4.5 * sigma


def test_a_document_stays_on_its_side_when_the_corpus_grows(tmp_path: Path) -> None:
    texts = [make_text(i, 2) for i in range(200)]
    few = build_manifest([write_jsonl(tmp_path / "a" / "a.jsonl", texts[:50])], heldout_ratio=0.3)
    many = build_manifest([write_jsonl(tmp_path / "b" / "b.jsonl", texts)], heldout_ratio=0.3)
    assert set(few.texts("heldout")) <= set(many.texts("heldout"))
    assert set(few.texts("training")) <= set(many.texts("training"))


def test_content_is_the_words_and_nothing_else() -> None:
    assert content_hash("The  cat\n sat.") == content_hash(" the CAT sat.\t")
    assert len({content_hash(text) for text in ["the cat", "the cats", "thecat", "cat the"]}) == 4


@pytest.mark.usefixtures("ray_session")
def test_an_index_is_made_once_and_again_when_a_shard_or_the_reading_changes(
    tmp_path: Path,
) -> None:
    paths = write_corpus(tmp_path / "corpus", num_documents=6, num_shards=2, num_sentences=3)
    cache, patterns = tmp_path / "cache" / "manifest.json", [str(tmp_path / "corpus")]
    first = index(patterns, SourceConfig(), cache)
    assert first == build(files(*paths), SourceConfig(), serial_map)

    # Bytes of the same number and date: only a cache that does not read can miss them.
    stat, data = paths[0].stat(), paths[0].read_bytes()
    paths[0].write_bytes(data.replace(b"The", b"One"))
    os.utime(paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert index(patterns, SourceConfig(), cache) == first
    os.utime(paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    second = index(patterns, SourceConfig(), cache)
    assert second.fingerprint != first.fingerprint
    paths[0].write_bytes(data)
    third = index(patterns, SourceConfig(), cache)
    assert third == first

    other_source = SourceConfig(heldout_ratio=0.5)
    assert index(patterns, other_source, cache).source == other_source
    write_jsonl(tmp_path / "corpus" / "new.jsonl", ["one more"])
    assert len(index(patterns, other_source, cache).shards) == 3
