"""Pictures of tar, parquet and loose files: the same rows of each, and every fault has its name."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.cli import main
from pipelines.data import indexing, tar
from pipelines.data.batches import RowSource
from pipelines.data.gate import check
from pipelines.data.images import FATES, ImageRows
from pipelines.data.manifest import Manifest, Picture, Split
from pipelines.data.parquet import PICTURES as WANTED
from pipelines.data.parquet import row_groups
from pipelines.data.plan import Plan
from pipelines.data.records import Modality
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.errors import DataError, OutageError, UserError
from pipelines.recipes import recipe
from pipelines.run import open_run
from tests.corpus import serial_map
from tests.pictures import extension, make_picture, make_tar

NUM_PICTURES = 40
FILES = [(f"{'ab'[i // 20]}/{i:03}.{extension(i)}", make_picture(i)) for i in range(NUM_PICTURES)]
PICTURES = [data for _, data in FILES]
AS_DATASETS = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SOURCE = SourceConfig(heldout_ratio=0.2)
MODALITIES: tuple[Modality, ...] = ("text", "images")


def write_tar(folder: Path) -> None:
    (folder / "x.tar").write_bytes(make_tar(FILES))


def write_files(folder: Path) -> None:
    for name, data in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def write_parquet(folder: Path, values: Any = None, **settings: Any) -> Path:
    """Write a column of pictures between others."""
    values = pa.array(PICTURES, pa.binary()) if values is None else values
    numbers = list(range(len(values)))
    table = pa.table({"label": numbers, "image": values, "text": [f"no. {i}" for i in numbers]})
    pq.write_table(table, folder / "x.parquet", **{"row_group_size": 15} | settings)
    return folder / "x.parquet"


def write_large(folder: Path) -> None:
    write_parquet(folder, pa.array(PICTURES, pa.large_binary()), compression="zstd")


def write_view(folder: Path) -> None:
    write_parquet(folder, pa.array(PICTURES, pa.binary_view()))


def write_dictionary(folder: Path) -> None:
    write_parquet(folder, pa.array(PICTURES).dictionary_encode())


def write_as_datasets(folder: Path) -> None:
    rows = [{"bytes": data, "path": name} for name, data in FILES]
    write_parquet(folder, pa.array(rows, AS_DATASETS))


FORMS = [
    write_files,
    write_parquet,
    write_large,
    write_view,
    write_dictionary,
    write_as_datasets,
]


def manifest_of(
    *patterns: Path, block_bytes: int = 4000, modality: Modality = "images", **given: Any
) -> Manifest:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "MIN_BLOCK_BYTES", block_bytes)
        patch.setattr(indexing, "MAX_BLOCK_BYTES", block_bytes)
        files = find_shards([str(path) for path in patterns], modality, **given)
        return indexing.build(files, SOURCE, serial_map, modality)


def read(manifest: Manifest) -> list[Picture]:
    """Return the pictures of all blocks, in their order, after a check that all adds up."""
    found: list[Picture] = []
    for split in ("training", "heldout"):
        of_split = [item for i in manifest.blocks_of(split) for item in manifest.read(i, split)]
        assert len(of_split) == manifest.records_where(split)
        found += of_split
    ledger = manifest.ledger.values()
    assert sum(block.bytes for block in manifest.blocks) == sum(entry.bytes for entry in ledger)
    assert sum(block.bytes for block in manifest.blocks) == sum(s.bytes for s in manifest.shards)
    assert sum(block.records for block in manifest.blocks) == manifest.records_where("")
    return sorted(found, key=lambda picture: picture.record)


@pytest.mark.parametrize("write", FORMS)
def test_equal_pictures_give_equal_rows_in_every_form(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    for folder in ("tar", "other"):
        (tmp_path / folder).mkdir()
    write_tar(tmp_path / "tar")
    write(tmp_path / "other")
    there, here = (manifest_of(tmp_path / folder) for folder in ("tar", "other"))
    pictures = read(here)
    assert [picture.data for picture in pictures] == PICTURES
    assert [*map(tuple, pictures)] == [*map(tuple, read(there))]
    assert here.records_where("heldout") == there.records_where("heldout") > 2
    assert here.modality == "images"
    assert len(here.blocks) > 3
    maker = ImageRows(recipe("image-tiny").images)
    rows = [maker.rows(read(manifest)[:8], seed=3, order=0) for manifest in (here, there)]
    assert rows[0].equals(rows[1])
    assert Manifest.from_json(here.to_json()) == here
    assert here.fingerprint != there.fingerprint


def test_loose_pictures_share_blocks_across_folders(tmp_path: Path) -> None:
    """A million files are no million blocks, and one folder a picture is no block a picture."""
    for i, data in enumerate(PICTURES):
        (tmp_path / f"{i:03}").mkdir()
        (tmp_path / f"{i:03}" / "image.JPEG").write_bytes(data)
    manifest = manifest_of(tmp_path, block_bytes=8000)
    (shard,) = manifest.shards
    assert (shard.path, shard.form) == (".", "files")
    assert shard.bytes == shard.file_bytes == sum(map(len, PICTURES))
    assert all(block.bytes >= 8000 for block in manifest.blocks[:-1])
    files = [name for block in manifest.blocks for name in block.files]
    assert files == [f"{i:03}/image.JPEG" for i in range(NUM_PICTURES)]
    assert [picture.data for picture in read(manifest)] == PICTURES
    plan = Plan(manifest, 0, 2)
    tables = [
        RowSource(plan, ImageRows(recipe("image-tiny").images)).table(plan.order(i))
        for i in range(plan.orders_per_epoch)
    ]
    used = pa.concat_tables(tables)["record"].to_pylist()
    assert len(used) == len(set(used)) == manifest.records_where("training")


def test_the_fingerprint_is_that_of_the_files_wherever_they_lie(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_files(data)
    first = manifest_of(data).fingerprint
    data.rename(tmp_path / "elsewhere")
    data = tmp_path / "elsewhere"
    assert manifest_of(data).fingerprint == first

    def changed(change: Callable[[], object]) -> str:
        shutil.copytree(data, tmp_path / "copy")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path / "copy")
            change()
        found = manifest_of(tmp_path / "copy").fingerprint
        shutil.rmtree(tmp_path / "copy")
        return found

    path, data_of_it = Path(FILES[3][0]), FILES[3][1]
    found = [
        changed(lambda: path.write_bytes(data_of_it[:-1] + b"!")),
        changed(lambda: path.with_name("0035.png").write_bytes(data_of_it)),
        changed(path.unlink),
        changed(lambda: path.rename("a/003b.png")),
    ]
    assert len({first, *found}) == 5
    assert changed(lambda: Path("a/labels.csv").write_text("a,b")) == first


def test_no_two_folders_have_the_same_hash(tmp_path: Path) -> None:
    hashes = set()
    for i, contents in enumerate([(b"ab", b"c"), (b"a", b"bc"), (b"", b"abc")]):
        (tmp_path / f"{i}").mkdir()
        for name, data in zip("xy", contents, strict=True):
            (tmp_path / f"{i}" / f"{name}.png").write_bytes(data)
        hashes.add(manifest_of(tmp_path / f"{i}").blocks[0].sha256)
    assert len(hashes) == 3


def test_what_systems_leave_beside_pictures_is_ignored(tmp_path: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "a" / ".thumbnails").mkdir()
    names = (".DS_Store", "a/._000.jpeg", "a/Thumbs.db", "README.md", ".hidden.png")
    for name in (*names, "a/.thumbnails/000.jpeg"):
        (tmp_path / name).write_bytes(b"no picture")
    assert read(manifest_of(tmp_path))
    assert manifest_of(tmp_path).records_where("") == NUM_PICTURES
    (tmp_path / "empty").mkdir()
    for pattern in (tmp_path / "empty", tmp_path / "*.jpg"):
        with pytest.raises(UserError, match="no shards match"):
            find_shards([str(pattern)])


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ("b.tar", r"000\.jpeg is a picture and .*b\.tar a shard of many records: name either"),
        ("b.parquet", r"000\.jpeg is a picture and .*b\.parquet a shard of many"),
        ("b.txt", r"000\.jpeg holds pictures and .*b\.txt text: name either in --data"),
    ],
)
def test_loose_pictures_and_shards_are_no_one_corpus(
    tmp_path: Path, beside: str, said: str
) -> None:
    write_files(tmp_path)
    (tmp_path / beside).touch()
    with pytest.raises(UserError, match=said):
        find_shards([str(tmp_path)])
    assert find_shards([str(tmp_path / "**" / "*.jpeg"), str(tmp_path / "a" / "*.png")])


def test_what_holds_the_other_modality_is_refused_by_name(tmp_path: Path) -> None:
    cases: list[tuple[str, Modality]] = [
        ("a.tar", "text"),
        ("a.png", "text"),
        ("a.jsonl", "images"),
    ]
    for name, asked in cases:
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=rf"{name} holds no {asked}, which is what this is for"):
            find_shards([str(tmp_path / name)], asked)
    (tmp_path / "a.parquet").touch()
    assert find_shards([str(tmp_path / "a.parquet")], "images")
    assert find_shards([str(tmp_path / "a.parquet")], "text")


def test_a_picture_that_changes_between_index_and_use_is_noticed(tmp_path: Path) -> None:
    write_files(tmp_path)
    manifest = manifest_of(tmp_path)
    path, data = tmp_path / FILES[0][0], FILES[0][1]
    split: Split = "training" if 0 in manifest.blocks_of("training") else "heldout"
    path.write_bytes(data[:-1] + b"!")
    first, last = manifest.blocks[0].files[0], manifest.blocks[0].files[-1]
    with pytest.raises(
        DataError, match=rf"some of the \d+ pictures from .*{first} to .*{last} changed since"
    ):
        manifest.read(0, split)
    path.unlink()
    with pytest.raises(DataError, match=r"000\.jpeg: is gone \(.*restore this shard"):
        manifest.read(0, split)
    path.mkdir()  # something is there, and gives no bytes: not even root may read it
    with pytest.raises(OutageError, match=r"000\.jpeg: cannot be read \(.*try again"):
        manifest.read(0, split)
    path.rmdir()
    path.write_bytes(data)
    assert manifest.read(0, split)


def test_a_picture_that_changes_before_it_is_indexed_is_noticed(tmp_path: Path) -> None:
    write_files(tmp_path)
    listed = find_shards([str(tmp_path)])
    (tmp_path / FILES[7][0]).write_bytes(b"shorter")
    with pytest.raises(DataError, match=r"007\.png: 7 bytes where \d+ were listed: it is being"):
        indexing.build(listed, SOURCE, serial_map)
    (tmp_path / FILES[7][0]).unlink()
    with pytest.raises(DataError, match=r"007\.png: is gone"):
        indexing.build(listed, SOURCE, serial_map)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_picture_that_may_not_be_read_is_an_outage(tmp_path: Path) -> None:
    write_files(tmp_path)
    (tmp_path / FILES[7][0]).chmod(0)
    with pytest.raises(OutageError, match=r"007\.png: cannot be read"):
        manifest_of(tmp_path)


def test_what_is_no_picture_is_a_placeholder_of_its_reason(tmp_path: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "a" / "001.png").write_bytes(b"<!DOCTYPE html><html></html>")
    (tmp_path / "a" / "002.jpeg").write_bytes(b"")
    pictures = read(manifest_of(tmp_path))
    rows = ImageRows(recipe("image-tiny").images).rows(pictures, seed=0, order=0)
    fates = [FATES[fate] for fate in rows["fate"].to_pylist()]
    bad = "quarantined:not-an-image"
    assert fates == ["used", bad, bad, *["used"] * 37]


def test_odd_values_of_a_column_have_their_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar, "MAX_SAMPLE_BYTES", 20_000)
    rows: list[Any] = [{"bytes": data, "path": None} for data in PICTURES[:20]]
    rows[3] = None
    rows[5] = {"bytes": None, "path": "elsewhere.jpg"}
    rows[8] = {"bytes": b"x" * 20_001, "path": ""}
    rows[9] = {"bytes": b"", "path": ""}
    manifest = manifest_of(write_parquet(tmp_path, pa.array(rows, AS_DATASETS)))
    assert [item.data for item in read(manifest)] == [
        row["bytes"] for i, row in enumerate(rows) if i not in (3, 5, 8)
    ]
    said = [(entry.offset, entry.bytes, entry.reason) for entry in manifest.quarantined]
    assert said == [
        (3, 0, "quarantined:no-image-field"),
        (5, 0, "quarantined:no-image-field"),
        (8, 20_001, "quarantined:too-long"),
    ]
    with pytest.raises(DataError, match=r"x\.parquet at row 3, 0 bytes") as page:
        check(manifest)
    assert "--source.image-field names the column" in str(page.value)


def test_a_file_too_long_for_a_picture_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar, "MAX_SAMPLE_BYTES", 20_000)
    write_files(tmp_path)
    with (tmp_path / "a" / "000x.tiff").open("wb") as file:
        file.truncate(1 << 40)
    manifest = manifest_of(tmp_path)
    (entry,) = manifest.quarantined
    assert (entry.path, entry.offset, entry.bytes) == ("a/000x.tiff", 0, 1 << 40)
    assert entry.reason == "quarantined:too-long"
    assert [item.data for item in read(manifest)] == PICTURES


def test_a_column_that_is_none_of_pictures_is_answered_with_those_there_are(
    tmp_path: Path,
) -> None:
    write_as_datasets(tmp_path)
    files = find_shards([str(tmp_path)])
    for wrong in ("text", "label", "none", "image.path"):
        source = SourceConfig(image_field=wrong)
        with pytest.raises(DataError, match=f"no column '{wrong}' of pictures .*label.*image") as e:
            indexing.build(files, source, serial_map, "images")
        assert str(e.value).endswith("choose one with --source.image-field")
    text = indexing.build(files, SOURCE, serial_map, "text")
    assert (text.modality, text.shards[0].form) == ("text", "parquet")
    assert "no. 7" in [*text.texts("training"), *text.texts("heldout")]


def test_of_a_large_row_group_little_is_held(tmp_path: Path) -> None:
    large = pa.array([bytes([i % 256]) * 100_000 for i in range(400)], pa.binary())
    settings = {"use_dictionary": False, "write_batch_size": 8, "compression": "none"}
    name = str(write_parquet(tmp_path, large, row_group_size=400, **settings))
    before = pa.total_allocated_bytes()
    found = chain.from_iterable(row_groups(name, "image", WANTED, 200, lambda _: None))
    held = [pa.total_allocated_bytes() - before for _ in found]
    assert len(held) == 400
    assert max(held) < 20_000_000


def test_the_picture_column_is_in_the_fingerprint_only_where_it_is_read(tmp_path: Path) -> None:
    write_as_datasets(tmp_path)
    other = SourceConfig(heldout_ratio=0.2, image_field="other")
    for modality in MODALITIES:
        manifest = manifest_of(tmp_path, modality=modality)
        renamed = replace(manifest, source=other)
        assert (renamed.fingerprint != manifest.fingerprint) == (modality == "images")


def test_sources_of_loose_pictures_are_shards_of_their_own(tmp_path: Path) -> None:
    write_files(tmp_path)
    patterns = [tmp_path / "**" / f"*.{form}" for form in ("png", "jpeg")]  # in turn, by name
    manifest = manifest_of(*patterns, separate=True)
    assert [(shard.path, shard.source) for shard in manifest.shards] == [(".", 0), (".", 1)]
    ends = [
        {name[-4:] for b in manifest.blocks if b.shard == n for name in b.files} for n in (0, 1)
    ]
    assert ends == [{".png"}, {"jpeg"}]
    assert len(read(manifest)) == NUM_PICTURES
    assert set(manifest.files()) == {
        (str(tmp_path / name), int(name.endswith("jpeg"))) for name, _ in FILES
    }


@pytest.mark.usefixtures("ray_session")
def test_a_run_goes_on_with_the_pictures_it_was_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    write_files(Path("data"))
    config = replace(recipe("image-tiny"), name="x", runs="runs", data=("data",))
    run = open_run(config, Path("runs/x"))
    assert open_run(config, Path("runs/x")).manifest == run.manifest
    Path("data/b/new.png").write_bytes(PICTURES[0])
    with pytest.raises(UserError, match=r"started with other shards \(.*b/new\.png is in only one"):
        open_run(config, Path("runs/x"))

    write_as_datasets(Path("data/b"))
    assert main(["index", "data/b/x.parquet", "--images"]) == 0
    assert "1 shards" in capfd.readouterr().out
    assert main(["index", "data/b/x.parquet", "--images", "--source.image-field", "text"]) == 65
    shutil.rmtree("data")
    Path("data").mkdir()
    write_parquet(Path("data"), pa.array([None], pa.binary()))
    order = ["index", "data", "--images", "--source.max-quarantined-ratio", "1"]
    assert main(order) == 65
    said = capfd.readouterr().err
    assert "none of 1 records is a picture for training" in said
    assert "check --source.image-field" in said
