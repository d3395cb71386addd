"""A field of each record: what a label or an id is in every form of shard."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data import indexing
from pipelines.data.fields import field_of_each, field_values
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.errors import DataError
from tests.corpus import serial_map
from tests.pictures import make_picture, make_tar


def values(folder: Path, field: str) -> list[str | None]:
    manifest = indexing.build(find_shards([str(folder)]), SourceConfig(), serial_map)
    blocks = range(len(manifest.blocks))
    return [value for block in blocks for value in field_values(manifest, block, field)]


def test_a_sample_of_a_tar_has_its_files_the_fields_of_its_json_and_its_key(tmp_path: Path) -> None:
    told = json.dumps({"label": 7, "cls": "of the json", "is": True}).encode()
    members = [
        ("a.jpg", make_picture(0)),
        ("a.cls", b"3\n"),
        ("a.json", told),
        ("n/b.jpg", make_picture(2)),
    ]
    (tmp_path / "x.tar").write_bytes(make_tar(members))
    end = [None]  # the end of the archive is a record too
    assert values(tmp_path, "cls") == ["3", None, *end]
    assert values(tmp_path, "label") == ["7", None, *end]
    assert values(tmp_path, "is") == [None, None, *end]
    assert values(tmp_path, "key") == ["a", "n/b", *end]


def test_each_item_of_a_split_has_the_field_of_its_own_record(tmp_path: Path) -> None:
    members = [
        member
        for i in range(40)
        for member in ((f"{i}.jpg", make_picture(i)), (f"{i}.cls", str(i).encode()))
    ]
    (tmp_path / "x.tar").write_bytes(make_tar(members))
    source = SourceConfig(heldout_ratio=0.3)
    manifest = indexing.build(find_shards([str(tmp_path)]), source, serial_map)
    shown = {make_picture(i): str(i) for i in range(40)}
    items = manifest.read(0, "heldout")
    assert 0 < len(items) < 40
    assert field_of_each(manifest, 0, items, "cls") == [shown[item.data] for item in items]
    assert field_of_each(manifest, 0, [], "cls") == []


def test_an_empty_value_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a b", "label": ""}\n{"text": "c", "label": "d"}\n')
    found = indexing.build(find_shards([str(tmp_path)]), SourceConfig(), serial_map, "text")
    assert list(field_values(found, 0, "label")) == [None, "d"]


@pytest.mark.parametrize("content", [b"\xff", b"{", b"[1]", b"[" * 100_000])
def test_what_cannot_be_read_is_no_value(content: bytes, tmp_path: Path) -> None:
    members = [("a.jpg", make_picture(0)), ("a.json", content), ("a.cls", b"\xff")]
    (tmp_path / "x.tar").write_bytes(make_tar(members))
    assert values(tmp_path, "label")[0] is None
    assert values(tmp_path, "cls")[0] is None


def test_a_loose_picture_has_its_path_and_its_folder_and_nothing_else(tmp_path: Path) -> None:
    for name in ("cats/1.jpg", "cats/deep/2.JPG", "dogs/1.jpg", "3.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(make_picture(0))
    assert values(tmp_path, "key") == ["3.jpg", "cats/1.jpg", "cats/deep/2.JPG", "dogs/1.jpg"]
    assert values(tmp_path, "folder") == [tmp_path.name, "cats", "deep", "dogs"]
    assert values(tmp_path, "cls") == [None] * 4
    assert values(tmp_path / "cats", "folder") == ["cats", "deep"]  # below the deepest of all


def test_a_row_beside_a_picture_has_its_columns(tmp_path: Path) -> None:
    columns = {
        "image": [{"bytes": make_picture(i), "path": f"{i}.jpg"} for i in range(3)],
        "label": [2, 0, None],
        "name": ["a", "", "c"],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=2)
    files = find_shards([str(tmp_path)])
    manifest = indexing.build(files, SourceConfig(), serial_map, "images")

    def of(field: str) -> list[str | None]:
        return [v for i in range(len(manifest.blocks)) for v in field_values(manifest, i, field)]

    assert of("label") == ["2", "0", None]
    assert of("name") == ["a", None, "c"]
    with pytest.raises(DataError, match=r"no column 'image' of strings or whole numbers"):
        of("image")
