"""Embeddings of pictures: by the code of text, of every form, and none of what is no picture."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.cli import main
from pipelines.data import indexing
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.recipes import recipe
from pipelines.use.bundle import manifest_sha256, write_bundle
from pipelines.use.embed import QUARANTINED, EmbedJob, embed, write_unit
from pipelines.use.registry import load_encoder
from ssl_models import build_objective
from tests.corpus import serial_map, write_corpus
from tests.pictures import extension, make_picture, make_tar

NUM_PICTURES = 300
HTML, CUT = 7, 130
PICTURES = {f"{'ab'[i // 150]}/{i:03}.{extension(i)}": make_picture(i) for i in range(NUM_PICTURES)}
KEYS = [*PICTURES]
PICTURES[KEYS[HTML]] = b"<html></html>"
PICTURES[KEYS[CUT]] = PICTURES[KEYS[CUT]][:-40]
READABLE = [key for i, key in enumerate(KEYS) if i not in (HTML, CUT)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Add numbers in the order in which the workers add them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundle of an encoder as it is drawn."""
    config = recipe("image-tiny")
    folder = tmp_path_factory.mktemp("bundle") / "encoder"
    torch.manual_seed(0)
    objective = build_objective(config.objective)
    write_bundle(
        folder,
        config={
            "objective": dataclasses.asdict(config.objective),
            "images": dataclasses.asdict(config.images),
        },
        state={
            name: tensor
            for name, tensor in objective.state_dict().items()
            if not name.startswith(objective.pretraining_only)
        },
        tokenizer_json=None,
        lineage={},
        card="",
    )
    return folder


def write_files(folder: Path) -> None:
    for name, data in PICTURES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def write_tar(folder: Path) -> None:
    folder.mkdir()
    (folder / "x.tar").write_bytes(make_tar([*PICTURES.items()]))


def write_parquet(folder: Path) -> None:
    folder.mkdir()
    columns = {
        "image": [{"bytes": data, "path": name} for name, data in PICTURES.items()],
        "file": KEYS,
    }
    pq.write_table(pa.table(columns), folder / "x.parquet", row_group_size=40)


def make_job(bundle: Path, data: Path, out: Path, id_field: str = "") -> EmbedJob:
    source = SourceConfig(heldout_ratio=0.0)
    files = find_shards([str(data)], "images")
    return EmbedJob(
        encoder=load_encoder(str(bundle)),
        model=str(bundle),
        bundle_sha256=manifest_sha256(bundle),
        manifest=indexing.build(files, source, serial_map, "images"),
        out=out,
        id_field=id_field,
    )


@pytest.mark.parametrize(
    ("write", "id_field", "default_ids"),
    [
        (write_files, "key", READABLE),
        (write_tar, "key", [f"x.tar:{KEYS.index(key)}" for key in READABLE]),
        (write_parquet, "file", [f"x.parquet:{KEYS.index(key)}" for key in READABLE]),
    ],
)
def test_every_form_gives_the_same_embeddings_and_names_what_has_none(
    bundle: Path,
    tmp_path: Path,
    write: Callable[[Path], None],
    id_field: str,
    default_ids: list[str],
) -> None:
    write(tmp_path / "data")
    tables, jobs = [], []
    for name in ("", id_field):
        job = make_job(bundle, tmp_path / "data", tmp_path / f"out{name}", name)
        units = range(len(job.units))
        assert sum(write_unit(job, unit) for unit in units) == NUM_PICTURES - 2
        tables.append(pq.read_table(job.out))
        jobs.append(job)
    assert tables[0]["id"].to_pylist() == default_ids
    suffix = r"\.\w+$" if write is write_tar else "$"  # of a sample the key has none
    named = [re.sub(suffix, "", name) for name in READABLE]
    assert tables[1]["id"].to_pylist() == named
    assert tables[0]["record"].to_pylist() == [KEYS.index(key) for key in READABLE]
    told = [pq.read_metadata(path).metadata for path in sorted(jobs[0].out.glob("*.parquet"))]
    places = [entry for of in told for entry in json.loads(of.get(QUARANTINED.encode(), b"[]"))]
    assert [entry["reason"].removeprefix("quarantined:") for entry in places] == [
        "not-an-image",
        "cut-image",
    ]
    for entry, number in zip(places, (HTML, CUT), strict=True):
        data = PICTURES[KEYS[number]]
        if write is write_files:
            assert (entry["path"], entry["offset"]) == (KEYS[number], 0)
        elif write is write_parquet:
            assert (entry["path"], entry["offset"]) == ("x.parquet", number)
        else:  # its header is before it
            shard = (tmp_path / "data" / "x.tar").read_bytes()
            assert entry["offset"] == shard.index(data) - 512
        assert entry["bytes"] >= len(data)
    embedded = np.array(tables[0]["embedding"].to_pylist())
    alone = jobs[0].encoder.encode([PICTURES[key] for key in READABLE])
    np.testing.assert_allclose(embedded, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("ray_session")
def test_the_command_makes_what_is_not_there_and_accounts_for_every_picture(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "photos", tmp_path / "out"
    write_files(data)
    job = make_job(bundle, data, out)
    for unit in range(len(job.units)):
        write_unit(job, unit)
    whole = pq.read_table(out)
    first, *others = sorted(out.glob("*.parquet"))
    assert others
    first.unlink()  # the one that names the HTML
    stamps = [path.stat().st_mtime_ns for path in others]

    assert main(["embed", str(bundle), str(data), "--out", str(out), "--json"]) == 0
    *said, last = capsys.readouterr().out.splitlines()
    assert pq.read_table(out).equals(whole, check_metadata=True)
    assert [path.stat().st_mtime_ns for path in others] == stamps
    page = " ".join(" ".join(said).split())
    for words in [
        f"embedded {NUM_PICTURES - 2} ",
        "quarantined:not-an-image 1 13",
        "quarantined:cut-image 1 ",
        f"total {NUM_PICTURES} {sum(map(len, PICTURES.values())):,}",
        "a/007.png at byte 0, 13 bytes: quarantined:not-an-image",
        " pictures/s",
    ]:
        assert words in page, words
    assert "document" not in page
    report = json.loads(last)
    assert report["embedded"] == NUM_PICTURES - 2 == whole.num_rows
    assert report["found_files"] == len(others)
    assert report["ledger"]["training"] == {
        "records": NUM_PICTURES - 2,
        "bytes": sum(len(PICTURES[key]) for key in READABLE),
    }
    assert [entry["path"] for entry in report["quarantined"]] == [KEYS[HTML], KEYS[CUT]]


@pytest.mark.usefixtures("ray_session")
def test_data_of_the_other_modality_is_refused_before_it_is_read(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path / "text", num_documents=4, num_shards=1)
    assert main(["embed", str(bundle), str(tmp_path / "text"), "--out", str(tmp_path / "o")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "part-0.jsonl holds no images, which is what this is for" in line


@pytest.mark.usefixtures("ray_session")
def test_a_unit_without_any_readable_picture_is_a_file_of_no_rows(
    bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jpg").write_bytes(b"nothing")
    report = embed(make_job(bundle, tmp_path / "data", tmp_path / "out"), 1)
    assert (report.embedded, report.files) == (0, 1)
    assert [entry.reason for entry in report.quarantined] == ["quarantined:not-an-image"]
    assert pq.read_table(tmp_path / "out").num_rows == 0
