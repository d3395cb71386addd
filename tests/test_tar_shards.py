"""Tar shards in the manifest: every byte and sample has a fate, and blocks read what it says."""

import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipelines.data import indexing, tar
from pipelines.data.gate import check
from pipelines.data.manifest import DUPLICATE, GATES, Manifest, Picture, Split
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.errors import DataError, UserError
from tests.corpus import serial_map
from tests.pictures import extension, make_picture, make_tar, write_pictures

NUM_PICTURES = 40
GOOD = [(f"{i:03}.{extension(i)}", make_picture(i)) for i in range(NUM_PICTURES)]
PICTURES = {data for _, data in GOOD}


def manifest_of(*paths: Path, block_bytes: int = 4000, heldout_ratio: float = 0.3) -> Manifest:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "MIN_BLOCK_BYTES", block_bytes)
        source = SourceConfig(heldout_ratio=heldout_ratio)
        return indexing.build(find_shards([str(path) for path in paths]), source, serial_map)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def read(manifest: Manifest, split: Split) -> list[Picture]:
    return [found for i in manifest.blocks_of(split) for found in manifest.read(i, split)]


def assert_adds_up(manifest: Manifest, path: Path) -> None:
    """Bytes tile the shard, the ledger is that of the blocks, and blocks read what it counts."""
    size = path.stat().st_size
    edges = [(block.offset, block.offset + block.bytes) for block in manifest.blocks]
    starts, ends = [start for start, _ in edges], [end for _, end in edges]
    assert [*starts, size] == [0, *ends]
    assert sum(entry.bytes for entry in manifest.ledger.values()) == size
    records = sum(block.records for block in manifest.blocks)
    assert manifest.records_where("") == records
    for split in ("training", "heldout"):
        assert manifest.records_where(split) == len(read(manifest, split))


def fates(manifest: Manifest) -> dict[str, int]:
    return {fate: entry.records for fate, entry in manifest.ledger.items()}


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_every_picture_is_read_once_from_one_of_many_blocks(tmp_path: Path, packing: str) -> None:
    data = make_tar([*GOOD, ("notes.txt", b"no picture")])
    path = write(tmp_path / f"a.tar{packing}", gzip.compress(data) if packing else data)
    manifest = manifest_of(path)
    assert len(manifest.blocks) > 3
    training, heldout = read(manifest, "training"), read(manifest, "heldout")
    assert len(heldout) > 3
    assert {picture.data for picture in training + heldout} == PICTURES
    assert len({picture.record for picture in training + heldout}) == NUM_PICTURES
    assert fates(manifest) == {
        "training": len(training),
        "heldout": len(heldout),
        "filtered:no-picture": 1,
        "filtered:end-of-archive": 1,
    }
    if not packing:
        assert_adds_up(manifest, path)


def test_copies_of_a_picture_are_on_one_side(tmp_path: Path) -> None:
    copies = [(f"copy-{name}", data) for name, data in GOOD]
    manifest = manifest_of(write(tmp_path / "a.tar", make_tar([*GOOD, *copies])))
    sides = [{found.content for found in read(manifest, s)} for s in ("training", "heldout")]
    assert not sides[0] & sides[1]
    assert sum(map(len, sides)) == NUM_PICTURES


@pytest.mark.parametrize("block_bytes", [1, 4000, 1 << 20])
def test_a_key_that_comes_again_is_used_the_first_time_alone(
    tmp_path: Path, block_bytes: int
) -> None:
    again = [("003.png", b"other bytes"), ("007.cls", b"0"), ("003.jpg", b"third")]
    members = [*GOOD[:10], again[0], *GOOD[10:20], *again[1:], *GOOD[20:]]
    path = write(tmp_path / "a.tar", make_tar(members))
    manifest = manifest_of(path, block_bytes=block_bytes)
    assert_adds_up(manifest, path)
    assert fates(manifest)[DUPLICATE] == 3
    assert [entry.reason for entry in manifest.quarantined] == [DUPLICATE] * 3
    assert {found.data for s in ("training", "heldout") for found in read(manifest, s)} == PICTURES
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_one_key_in_two_shards_is_two_samples(tmp_path: Path) -> None:
    one = write(tmp_path / "a.tar", make_tar(GOOD[:4]))
    two = write(tmp_path / "b.tar", make_tar([(GOOD[0][0], GOOD[5][1])]))
    assert DUPLICATE not in fates(manifest_of(one, two))


def test_samples_without_their_one_picture_have_a_reason(tmp_path: Path) -> None:
    members = [
        *GOOD[:8],
        ("a.json", b"{}"),
        ("b.jpg", b"1"),
        ("b.png", b"2"),
        ("c.jpg", b"1"),
        ("c.jpg", b"2"),
    ]
    path = write(tmp_path / "a.tar", make_tar(members))
    manifest = manifest_of(path)
    assert_adds_up(manifest, path)
    found = fates(manifest)
    assert found["filtered:no-picture"] == 1
    assert found["quarantined:several-pictures"] == 1
    assert found["quarantined:two-files-of-one-name"] == 1
    assert found["training"] + found["heldout"] == 8


@pytest.mark.parametrize("where", [0, 5, 20])
def test_a_zeroed_header_costs_its_sample_and_no_other(tmp_path: Path, where: int) -> None:
    data = bytearray(make_tar(GOOD))
    start = data.index(GOOD[where][0].encode())
    data[start : start + 512] = bytes(512)
    path = write(tmp_path / "a.tar", bytes(data))
    manifest = manifest_of(path)
    assert_adds_up(manifest, path)
    assert manifest.records_where("quarantined") == 1
    used = {found.data for s in ("training", "heldout") for found in read(manifest, s)}
    assert used == PICTURES - {GOOD[where][1]}
    with pytest.raises(DataError, match="1 of 41 records are broken"):
        check(manifest)


def test_a_cut_tar_is_never_taken_for_a_whole_one(tmp_path: Path) -> None:
    whole = make_tar(GOOD)
    content_ends = len(whole.rstrip(b"\0"))
    member_edge = whole.index(GOOD[9][0].encode())
    for cut in (0, 1, 511, 512, 700, member_edge, member_edge + 512, content_ends - 3):
        path = write(tmp_path / "a.tar", whole[:cut])
        manifest = manifest_of(path)
        assert_adds_up(manifest, path)
        assert manifest.records_where("quarantined") in (1, 2), cut
        used = {found.data for s in ("training", "heldout") for found in read(manifest, s)}
        assert used <= PICTURES


@pytest.mark.parametrize("seed", range(200))
def test_whatever_is_cut_or_flipped_in_a_shard_is_used_or_in_the_ledger(
    tmp_path: Path, seed: int
) -> None:
    dice = random.Random(seed)
    harmed = bytearray(make_tar(GOOD[:10]))
    place = dice.randrange(len(harmed.rstrip(b"\0")))
    is_cut = seed % 2 == 0
    if is_cut:
        del harmed[place:]
    else:
        harmed[place] ^= 1 << dice.randrange(8)
    path = write(tmp_path / "a.tar", bytes(harmed))
    manifest = manifest_of(path)
    assert_adds_up(manifest, path)
    used = [found.data for s in ("training", "heldout") for found in read(manifest, s)]
    whole = [data for data in used if data in PICTURES]
    # Bits that are flipped inside a picture are the picture: the hash of the block holds them.
    assert len(used) - len(whole) <= (0 if is_cut else 1)
    if is_cut:
        assert manifest.records_where("quarantined") > 0


def test_a_changed_block_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", make_tar(GOOD))
    manifest = manifest_of(path)
    data = bytearray(path.read_bytes())
    data[data.index(GOOD[30][1][:40]) + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="changed since they were indexed"):
        read(manifest, "training")


def test_text_and_pictures_are_no_one_corpus(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", make_tar(GOOD[:2]))
    write(tmp_path / "b.txt", b"Some text.")
    with pytest.raises(UserError, match=r"a\.tar holds pictures and .*b\.txt text"):
        find_shards([str(tmp_path)])


def test_excluded_records_are_in_the_fingerprint_only_where_there_are_any(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", make_tar([*GOOD, GOOD[0]]))
    manifest = manifest_of(path, block_bytes=1 << 20)
    (block,) = manifest.blocks
    assert block.excluded == (NUM_PICTURES,)
    without = replace(manifest, blocks=(replace(block, excluded=()),))
    assert without.fingerprint != manifest.fingerprint
    content = asdict(without)
    del content["root"], content["blocks"][0]["excluded"], content["quarantined"][0]["detail"]
    del content["blocks"][0]["files"], content["source"]["image_field"]  # of other forms
    for gate in GATES:
        del content["source"][gate]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert without.fingerprint == hashlib.sha256(canonical.encode()).hexdigest()


def test_records_tile_a_tar_from_every_one_of_them_on() -> None:
    data = make_tar([*GOOD[:6], GOOD[0]])
    found = list(tar.records(io.BytesIO(data)))
    assert sum(record.bytes for record in found) == len(data)
    offset = 0
    for i, record in enumerate(found):
        assert list(tar.records(io.BytesIO(data[offset:]))) == found[i:]
        offset += record.bytes


WEBDATASET = """
import hashlib, sys
import webdataset as wds
ours, theirs = sys.argv[1:]
for sample in wds.WebDataset(ours, shardshuffle=False):
    files = {name: data for name, data in sample.items() if not name.startswith("__")}
    data = b"".join(name.encode() + files[name] for name in sorted(files))
    print(sample["__key__"], hashlib.sha256(data).hexdigest())
with open(theirs, "wb") as file, wds.TarWriter(file) as out:
    for sample in wds.WebDataset(ours, shardshuffle=False):
        del sample["__url__"], sample["__local_path__"]
        out.write(sample)
"""


def test_webdataset_reads_what_we_read_and_we_read_what_it_writes(tmp_path: Path) -> None:
    (ours,), theirs = write_pictures(tmp_path, 20, 1), tmp_path / "theirs.tar"
    made = subprocess.run(
        [sys.executable, "-c", WEBDATASET, str(ours), str(theirs)],
        env=os.environ | {"WDS_SECURE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = [_told(piece) for piece in tar.samples(io.BytesIO(ours.read_bytes()))]
    assert [tuple(line.split()) for line in made.stdout.splitlines()] == found[:-1]
    assert len(found) == 21
    manifest = manifest_of(theirs)
    assert_adds_up(manifest, theirs)
    used = [picture.data for s in ("training", "heldout") for picture in read(manifest, s)]
    assert sorted(used) == sorted(make_picture(i) for i in range(20))
    assert manifest.records_where("quarantined") == 0


def _told(piece: tar.Sample | tar.PassedOver) -> tuple[str, str]:
    if isinstance(piece, tar.PassedOver):
        return "", piece.reason
    files = tar.files(piece.data)
    data = b"".join(name.encode() + files[name] for name in sorted(files))
    return piece.key, hashlib.sha256(data).hexdigest()
