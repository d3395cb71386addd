"""Near-duplicates of made-up pictures and documents: known copies rank first, and are grouped."""

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.cli import main
from pipelines.data.decode import decode
from pipelines.data.vocabulary import Vocabulary
from pipelines.errors import UserError
from pipelines.use.contact_sheet import GAP, SIDE, box_of, contact_sheet, thumbnail
from pipelines.use.likeness import dhash, hash_distance
from pipelines.use.nearest import read_index
from tests.bundles import image_bundle, text_bundle
from tests.pictures import make_blotches, make_tar

NUM_PICTURES = 60
COPIES = {"copy-small": 4, "copy-jpeg": 9, "copy-of-9": 9}
TOP = 3


def changed(data: bytes, name: str) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if name == "copy-small":
        image = image.resize((image.width * 2 // 3, image.height * 2 // 3))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=30 if name == "copy-jpeg" else 95)
    return out.getvalue()


def pictures() -> dict[str, bytes]:
    found = {f"p{i:03}": make_blotches(i) for i in range(NUM_PICTURES)}
    return found | {name: changed(found[f"p{i:03}"], name) for name, i in COPIES.items()}


@dataclasses.dataclass(frozen=True)
class Finished:
    """A call of the command on pictures, three of which are copies."""

    folder: Path
    report: dict[str, Any]
    said: str

    @property
    def model(self) -> str:
        """Return the folder of the model."""
        return str(self.folder / "model")

    @property
    def out(self) -> Path:
        """Return what was written."""
        return self.folder / "out"


@pytest.fixture(scope="module")
def finished(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    del ray_session
    folder = tmp_path_factory.mktemp("duplicates")
    model = image_bundle(folder / "model", seed=0)
    (folder / "data").mkdir()
    members = [(f"{key}.jpg", data) for key, data in pictures().items()]
    for part in range(2):
        (folder / "data" / f"part-{part}.tar").write_bytes(make_tar(members[part::2]))
    order = ["duplicates", str(model), str(folder / "data"), "--out", str(folder / "out")]
    order += ["--id-field", "key", "--top", str(TOP), "--threshold", "0.9995", "--json"]
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        assert main(order) == 0
    *said, last = out.getvalue().splitlines()
    return Finished(folder, json.loads(last), "\n".join(said))


def test_known_copies_rank_first(finished: Finished) -> None:
    rows = pq.read_table(finished.out / "pairs.parquet").to_pylist()
    assert {frozenset((row["first"], row["second"])) for row in rows} == {
        frozenset(pair)
        for pair in [
            ("p004", "copy-small"),
            ("p009", "copy-of-9"),
            ("p009", "copy-jpeg"),
            ("copy-of-9", "copy-jpeg"),
        ]
    }
    assert finished.report["pairs"] == finished.report["kept_pairs"] == len(rows)
    similarities = [row["similarity"] for row in rows]
    assert similarities == sorted(similarities, reverse=True)
    hashes = {key: dhash(np.asarray(decode(data, 3))) for key, data in pictures().items()}
    for row in rows:
        assert row["dhash_distance"] == hash_distance(hashes[row["first"]], hashes[row["second"]])
    assert finished.report["top"] == [
        dict(zip(("first", "second", "similarity", "likeness"), row.values(), strict=True))
        for row in rows[:TOP]
    ]


def test_one_of_each_group_is_kept(finished: Finished) -> None:
    table = pq.read_table(finished.out / "groups.parquet")
    rows = [(row["group"], row["id"], row["keep"]) for row in table.to_pylist()]
    assert rows == [  # in the order of the shards, of which part-0 has copy-of-9
        (0, "p004", True),
        (0, "copy-small", False),
        (1, "copy-of-9", True),
        (1, "p009", False),
        (1, "copy-jpeg", False),
    ]
    report = finished.report
    assert (report["groups"], report["largest_group"], report["surplus"]) == (2, 3, 3)
    told = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
    assert told["rayssl.model"] == finished.model
    assert told["rayssl.threshold"] == "0.9995"


def test_the_sheet_shows_the_top_pairs(finished: Finished) -> None:
    sheet = Image.open(finished.out / "sheet.png")
    assert sheet.size == (contact_sheet([]).width, GAP + TOP * (GAP + SIDE))
    made = pictures()
    for number, pair in enumerate(finished.report["top"]):
        for column, key in enumerate((pair["first"], pair["second"])):
            expected = thumbnail(np.asarray(decode(made[key], 3)))
            shown = np.asarray(sheet.crop(box_of(number, column, expected.shape)))
            np.testing.assert_array_equal(shown, expected)


def test_the_table_has_ids_similarity_and_dhash(finished: Finished) -> None:
    lines = finished.said.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("first"))
    assert lines[head].split() == ["first", "second", "similarity", "dhash_distance"]
    top = finished.report["top"][0]
    assert lines[head + 1].split() == [
        top["first"],
        top["second"],
        f"{top['similarity']:.4f}",
        str(top["likeness"]),
    ]
    assert f"of {NUM_PICTURES + len(COPIES)} reach 0.9995" in lines[-2]


def test_another_threshold_takes_the_embeddings_that_are_there(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished.out, tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("embeddings/*.parquet")}
    order = ["duplicates", finished.model, str(finished.folder / "data"), "--out", str(out)]
    assert main([*order, "--id-field", "key", "--threshold", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {path: path.stat().st_mtime_ns for path in out.glob("embeddings/*.parquet")} == stamps
    assert (report["pairs"], report["groups"], report["surplus"]) == (0, 0, 0)
    assert pq.read_table(out / "pairs.parquet").num_rows == 0
    assert pq.read_table(out / "groups.parquet").num_rows == 0
    assert Image.open(out / "sheet.png").height == GAP


def test_the_nearest_of_an_indexed_picture_is_itself(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query = tmp_path / "query.png"
    query.write_bytes(pictures()["p009"])
    order = ["nearest", finished.model, str(finished.out), str(query)]
    assert main([*order, "--top", "4", "--json"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)["nearest"]
    assert [neighbour["id"] for neighbour in found[:1]] == ["p009"]
    assert found[0]["similarity"] == pytest.approx(1, abs=1e-4)
    assert {"copy-jpeg", "copy-of-9"} <= {neighbour["id"] for neighbour in found}
    assert len(found) == 4

    for _ in range(2):  # the second time by the graph that is there
        assert main([*order, "--top", "4", "--json", "--ann"]) == 0
        *_, last = capsys.readouterr().out.splitlines()
        graph = json.loads(last)["nearest"]
        assert [neighbour["id"] for neighbour in graph] == [neighbour["id"] for neighbour in found]
        for one, other in zip(graph, found, strict=True):
            assert one["similarity"] == pytest.approx(other["similarity"], abs=1e-4)
    assert len(list((finished.out / "embeddings").glob(".graph-*.usearch"))) == 1


def test_what_cannot_be_searched_is_refused_in_one_line(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = image_bundle(tmp_path / "other", seed=1)
    index = str(finished.out / "embeddings")
    (tmp_path / "page.jpg").write_text("<html>")
    for arguments, code, said in [
        ([str(other), index, "x.jpg"], 2, "the index is of another model"),
        ([finished.model, str(tmp_path), "x.jpg"], 2, "no embeddings in"),
        ([finished.model, index, "absent.jpg"], 2, "cannot read the picture 'absent.jpg'"),
        ([finished.model, index, str(tmp_path / "page.jpg")], 65, "not-an-image"),
        ([finished.model, index, "x.jpg", "--top", "0"], 2, "--top must be at least 1"),
    ]:
        assert main(["nearest", *arguments]) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_an_index_that_is_not_whole_is_refused(finished: Finished, tmp_path: Path) -> None:
    path, *others = (finished.out / "embeddings").glob("*.parquet")
    copy = tmp_path / path.name
    shutil.copy(path, copy)
    with pytest.raises(UserError, match=f"holds 1 of {1 + len(others)} files of its embedding"):
        read_index(tmp_path)
    empty = pq.read_table(path).slice(0, 0)
    told = empty.schema.metadata | {b"rayssl.files": b"1"}
    pq.write_table(empty.replace_schema_metadata(told), copy)
    with pytest.raises(UserError, match="no embedding is in the 1 files"):
        read_index(tmp_path)


def test_a_picture_that_cannot_be_decoded_is_told_and_left_out(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [*pictures().values()][:3]
    members = [("a.jpg", made[0]), ("b.jpg", made[1][: len(made[1]) // 2]), ("c.jpg", made[2])]
    (tmp_path / "x.tar").write_bytes(make_tar(members))
    order = ["duplicates", finished.model, str(tmp_path / "x.tar"), "--out", str(tmp_path / "out")]
    assert main(order) == 0
    said = capsys.readouterr().out
    assert re.search(r"quarantined:cut-image +1 ", said)
    assert re.search(r"x\.tar at byte \d+, \d+ bytes: quarantined:cut-image", said)
    assert "1 pairs of 2 reach" in said


@pytest.mark.usefixtures("ray_session")
def test_documents_are_compared_by_shingles_and_have_no_sheet(
    vocabulary: Vocabulary, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = text_bundle(tmp_path / "model", vocabulary)
    texts = {
        "tide": "the captain sails home before the tide turns in the harbour",
        "fish": "a whale and a reef",
        "again": "the captain sails home before the tide turns in the harbour",
    }
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"id": k, "text": v}) + "\n" for k, v in texts.items()))
    order = ["duplicates", str(model), str(data), "--out", str(tmp_path / "out")]
    assert main([*order, "--id-field", "id", "--threshold", "0.9999"]) == 0
    assert "first" in capsys.readouterr().out
    (pair,) = pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    assert (pair["first"], pair["second"], pair["jaccard"]) == ("tide", "again", 1.0)
    assert not (tmp_path / "out" / "sheet.png").exists()

    order = ["nearest", str(model), str(tmp_path / "out" / "embeddings"), texts["fish"]]
    assert main([*order, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["nearest"][0]["id"] == "fish"

    data.write_text('{"text": "a whale"}\n')
    order = ["duplicates", str(model), str(data), "--out"]
    for out, more, said in [
        ("one", [], "there is 1 item in the data: it takes two"),
        ("two", ["--threshold", "95"], "--threshold must be in -1..1"),
        ("two", ["--top", "0"], "--top must be at least 1"),
    ]:
        assert main([*order, str(tmp_path / out), *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    data.write_text("")
    assert main([*order, str(tmp_path / "three")]) == 65
    assert "none of 0 records" in capsys.readouterr().err
