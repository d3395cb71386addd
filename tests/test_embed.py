"""Embeddings of a corpus: each document once, the same whatever was killed, and never mixed up."""

import dataclasses
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.cli import main
from pipelines.data.indexing import MAX_BLOCK_BYTES, build
from pipelines.data.manifest import Manifest
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.data.vocabulary import Vocabulary
from pipelines.errors import DataError, StorageError, UserError
from pipelines.use.bundle import manifest_sha256
from pipelines.use.embed import MAX_UNIT_BYTES, EmbedJob, embed, write_unit
from pipelines.use.registry import load_encoder
from tests.bundles import text_bundle
from tests.command import command
from tests.corpus import serial_map, write_corpus

BROKEN = '{"text": "cut'
NUM_DOCUMENTS = 3000
EMPTY = '{"text": "...", "id": "dots"}'


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Add numbers in the order in which the workers add them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary) -> Path:
    return text_bundle(tmp_path_factory.mktemp("bundle") / "encoder", vocabulary)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return documents of one to thirty tokens, a broken record and one without words."""
    folder = tmp_path_factory.mktemp("embed") / "corpus"
    first, *_ = write_corpus(folder, num_documents=NUM_DOCUMENTS, num_shards=3, num_sentences=2)
    lines = first.read_text().splitlines()
    first.write_text("\n".join([*lines[:5], BROKEN, EMPTY, *lines[5:]]) + "\n")
    return folder


def texts_of(corpus: Path) -> dict[str, str]:
    """Return the documents by shard and number of the line."""
    found = {}
    for path in sorted(corpus.iterdir()):
        for number, line in enumerate(path.read_text().splitlines()):
            if line not in (BROKEN, EMPTY):
                found[f"{path.name}:{number}"] = json.loads(line)["text"]
    return found


def make_job(bundle: Path, corpus: Path, out: Path, id_field: str = "") -> EmbedJob:
    return EmbedJob(
        encoder=load_encoder(str(bundle)),
        model=str(bundle),
        bundle_sha256=manifest_sha256(bundle),
        manifest=manifest_of(corpus),
        out=out,
        id_field=id_field,
    )


def manifest_of(corpus: Path) -> Manifest:
    return build(find_shards([str(corpus)]), SourceConfig(heldout_ratio=0.0), serial_map)


@pytest.fixture(scope="module")
def undisturbed(bundle: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Return what one process writes, without Ray."""
    job = make_job(bundle, corpus, tmp_path_factory.mktemp("undisturbed"))
    assert len(job.units) > 3
    assert sum(write_unit(job, unit) for unit in range(len(job.units))) == NUM_DOCUMENTS
    return pq.read_table(job.out)


def test_every_document_has_its_own_embedding(
    bundle: Path, corpus: Path, undisturbed: pa.Table
) -> None:
    texts = texts_of(corpus)
    rows = undisturbed.to_pylist()
    assert [row["id"] for row in rows] == list(texts)
    assert [f"{row['shard']}:{row['record']}" for row in rows] == list(texts)
    assert undisturbed.schema.field("embedding").type == pa.list_(pa.float32(), 32)

    encoder = load_encoder(str(bundle))
    alone = np.concatenate([encoder.encode([texts[row["id"]]]) for row in rows[::97]])
    embedded = np.array([row["embedding"] for row in rows[::97]])
    np.testing.assert_allclose(embedded, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("ray_session")
def test_the_command_embeds_each_document_once_and_goes_on(
    bundle: Path,
    corpus: Path,
    undisturbed: pa.Table,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A second call makes what is not there, with another number of workers, and nothing else."""
    out = tmp_path / "out"
    order = ["embed", str(bundle), str(corpus), "--out", str(out), "--json"]
    order += ["--source.max-quarantined-ratio", "0.01"]
    assert main(order) == 0
    first_said = capsys.readouterr().out
    files = sorted(out.glob("*.parquet"))
    kept, lost = files[0::2], files[1::2]
    stamps = [path.stat().st_mtime_ns for path in kept]
    for path in lost:
        path.rename(path.with_name(f".{path.name}.77.tmp"))  # as a kill leaves it

    assert main([*order, "--workers", "1"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])

    assert pq.read_table(out).equals(undisturbed, check_metadata=True)
    assert (report["embedded"], report["files"]) == (NUM_DOCUMENTS, len(files))
    assert report["found_files"] == len(kept) < len(files)
    assert [path.stat().st_mtime_ns for path in kept] == stamps
    assert {path.name for path in out.iterdir()} == {
        ".lock",
        ".manifest.json",
        *(path.name for path in files),
    }
    *table, broken, sentence, last = first_said.splitlines()
    ledger = {cells[0]: int(cells[1]) for cells in map(str.split, table[-4:])}
    assert ledger == {
        "filtered:no-words": 1,
        "quarantined:bad-json": 1,
        "embedded": NUM_DOCUMENTS,
        "total": NUM_DOCUMENTS + 2,
    }
    assert broken.startswith("part-0.jsonl at byte ")
    assert broken.endswith("quarantined:bad-json")
    assert sentence.startswith(
        f"{NUM_DOCUMENTS} embeddings of 32 numbers by {bundle} in {len(files)} files"
    )
    assert json.loads(last)["rows_per_second"] > 0


def test_the_files_tell_where_they_come_from(
    bundle: Path, corpus: Path, undisturbed: pa.Table, tmp_path: Path
) -> None:
    told = {name.decode(): value.decode() for name, value in undisturbed.schema.metadata.items()}
    assert told == {
        "rayssl.model": str(bundle),
        "rayssl.bundle_sha256": manifest_sha256(bundle),
        "rayssl.fingerprint": manifest_of(corpus).fingerprint,
        "rayssl.id_field": "",
        "rayssl.files": str(len(make_job(bundle, corpus, tmp_path).units)),
    }


@pytest.mark.usefixtures("ray_session")
def test_embeddings_of_another_model_or_corpus_are_not_mixed_in(
    bundle: Path, corpus: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    job = make_job(bundle, corpus, tmp_path / "out")
    write_unit(job, 1)
    write_corpus(tmp_path / "other", num_documents=20)
    other_bundle = text_bundle(tmp_path / "encoder", vocabulary, seed=1)
    for other, said in [
        (make_job(other_bundle, corpus, job.out), "has bundle_sha256 "),
        (make_job(bundle, tmp_path / "other", job.out), "has fingerprint "),
        (make_job(bundle, corpus, job.out, id_field="id"), "has id_field '', not 'id'"),
    ]:
        with pytest.raises(UserError, match=said) as refused:
            embed(other, 1)
        assert "choose another --out" in str(refused.value)

    job.path(0).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"unit-000000\.parquet is no Parquet file"):
        embed(job, 1)
    job.path(0).unlink()
    job.path(1).rename(job.out / "mine.parquet")
    with pytest.raises(UserError, match=r"mine\.parquet is no file of this embedding"):
        embed(job, 1)


@pytest.mark.usefixtures("ray_session")
def test_an_altered_file_is_noticed(bundle: Path, corpus: Path, tmp_path: Path) -> None:
    job = make_job(bundle, corpus, tmp_path)
    for unit in range(len(job.units)):
        write_unit(job, unit)
    assert embed(job, 1).embedded == NUM_DOCUMENTS

    pq.write_table(pq.read_table(job.path(2)).slice(1), job.path(2))
    with pytest.raises(DataError, match="holds 2999 embeddings of 3000 documents"):
        embed(job, 1)


def write_records(folder: Path, *records: Any) -> Path:
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return folder


def test_a_field_of_the_record_can_be_its_id(bundle: Path, tmp_path: Path) -> None:
    records = [{"text": "a", "url": "x/1"}, {"text": "..."}, {"text": "b", "url": 7}]
    job = make_job(bundle, write_records(tmp_path / "data", *records), tmp_path / "out", "url")
    assert write_unit(job, 0) == 2
    table = pq.read_table(job.out)
    assert table["id"].to_pylist() == ["x/1", "7"]
    assert table["record"].to_pylist() == [0, 2]


def test_ids_of_parquet_are_a_column_of_its_own(bundle: Path, tmp_path: Path) -> None:
    columns = {"text": ["the sea", "", "a tide", "reef"], "id": ["x", "y", "z", None]}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(columns).slice(0, 3), tmp_path / "data" / "a.parquet", row_group_size=2)
    job = make_job(bundle, tmp_path / "data", tmp_path / "out", "id")
    for unit in range(len(job.units)):
        write_unit(job, unit)
    table = pq.read_table(tmp_path / "out")
    assert table["id"].to_pylist() == ["x", "z"]
    assert table["record"].to_pylist() == [0, 2]

    pq.write_table(pa.table(columns), tmp_path / "data" / "a.parquet")
    job = make_job(bundle, tmp_path / "data", tmp_path / "other", "id")
    with pytest.raises(DataError, match=r"record 3 of a\.parquet has no string"):
        write_unit(job, 0)


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint8()])
def test_ids_of_parquet_can_be_whole_numbers_and_nothing_else(
    bundle: Path, tmp_path: Path, kind: pa.DataType
) -> None:
    columns = {"text": ["the sea", "", "a tide"], "n": pa.array([0, 1, 200], kind)}
    columns["share"] = pa.array([0.5, 1.5, 2.5])
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "data" / "a.parquet")
    assert write_unit(make_job(bundle, tmp_path / "data", tmp_path / "out", "n"), 0) == 2
    assert pq.read_table(tmp_path / "out")["id"].to_pylist() == ["0", "200"]
    for wrong in ("share", "none"):
        with pytest.raises(DataError, match=f"no column '{wrong}' of .* numbers.* --id-field$"):
            write_unit(make_job(bundle, tmp_path / "data", tmp_path / "other", wrong), 0)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("value", [None, True, 1.5, ["a"]])
def test_a_document_without_an_id_is_named(
    bundle: Path,
    tmp_path: Path,
    value: Any,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = write_records(tmp_path / "data", {"text": "a", "id": 1}, {"text": "b", "id": value})
    if value is None:  # through Ray once
        order = ["embed", str(bundle), str(data), "--out", str(tmp_path / "out")]
        assert main([*order, "--id-field", "id"]) == 65
        said = capfd.readouterr().err
        assert said.startswith("rayssl: record 1 of a.jsonl has no string or whole number 'id'")
        assert len(said.splitlines()) == 1
    with pytest.raises(DataError, match=r"record 1 of a\.jsonl has no"):
        write_unit(make_job(bundle, data, tmp_path / "out", "id"), 0)


@pytest.mark.usefixtures("ray_session")
def test_a_shard_that_changed_is_told_in_one_line(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It changes between its index and its use."""
    data, out = write_records(tmp_path / "data", {"text": "a"}), tmp_path / "out"
    shard, nothing_held_out = data / "a.jsonl", ["--source.heldout-ratio", "0"]
    assert main(["index", str(data), "--out", str(out / ".manifest.json"), *nothing_held_out]) == 0
    stamp = shard.stat().st_mtime_ns
    shard.write_text('{"text": "b"}\n')
    os.utime(shard, ns=(stamp, stamp))
    capfd.readouterr()
    assert main(["embed", str(bundle), str(data), "--out", str(out)]) == 65
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("rayssl: ")
    assert "a.jsonl: bytes 0 to 14 changed since" in line


class Elsewhere(EmbedJob):
    """A job whose files are to lie below a file."""

    def path(self, unit: int) -> Path:
        """Return where there can be no file."""
        return self.out / ".lock" / super().path(unit).name


@pytest.mark.usefixtures("ray_session")
def test_a_file_that_cannot_be_written_is_told_in_one_line(
    bundle: Path, corpus: Path, tmp_path: Path
) -> None:
    job = make_job(bundle, corpus, tmp_path / "out")
    with pytest.raises(StorageError, match=r"cannot write .*\.parquet: .*goes on") as refused:
        embed(Elsewhere(**{f.name: getattr(job, f.name) for f in dataclasses.fields(job)}), 1)
    assert "\n" not in str(refused.value)


def test_the_weights_travel_once(bundle: Path, corpus: Path, tmp_path: Path) -> None:
    num_bytes = (bundle / "model.safetensors").stat().st_size
    encoder = pickle.dumps(make_job(bundle, corpus, tmp_path).encoder)
    assert num_bytes < len(encoder) < 1.5 * num_bytes


def test_small_shards_share_a_file(bundle: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", num_documents=300, num_shards=50)
    job = make_job(bundle, tmp_path / "corpus", tmp_path)
    blocks = [block for unit in job.units for block in unit]
    assert blocks == list(range(len(job.manifest.blocks)))
    assert len(blocks) >= 50
    sizes = [sum(job.manifest.blocks[block].bytes for block in unit) for unit in job.units]
    assert all(size >= job.manifest.block_bytes for size in sizes[:-1])
    assert len(job.units) < 20


@pytest.mark.parametrize(("num_blocks", "blocks_of_a_unit"), [(64, 1), (640, 10), (6400, 16)])
def test_the_files_of_a_large_corpus_are_few_and_its_workers_hold_little(
    bundle: Path, corpus: Path, tmp_path: Path, num_blocks: int, blocks_of_a_unit: int
) -> None:
    job = make_job(bundle, corpus, tmp_path)
    block = dataclasses.replace(job.manifest.blocks[0], bytes=MAX_BLOCK_BYTES)
    manifest = dataclasses.replace(
        job.manifest, block_bytes=MAX_BLOCK_BYTES, blocks=(block,) * num_blocks
    )
    units = dataclasses.replace(job, manifest=manifest).units
    assert {len(unit) for unit in units} == {blocks_of_a_unit}
    assert blocks_of_a_unit * MAX_BLOCK_BYTES <= MAX_UNIT_BYTES


def test_a_long_text_counts_as_far_as_the_encoder_reads(bundle: Path) -> None:
    """What is cut before it is tokenised must not change what is read."""
    encoder = load_encoder(str(bundle))
    limit = 30
    texts = [
        "the captain " * 500,
        "captain" * 900,
        "a \u0000\u0007 " * 400 + "tide",
        " " * 4000 + "the tide",
        "x" * 239 + " " + "unbelievably long harbour " * 90,
        "\u6f22\u5b57 " * 300,
        "",
    ]
    whole = [ids[:limit].tolist() for ids in encoder.vocabulary.encode(texts)]
    assert [ids.tolist() for ids in encoder.first_ids(texts, limit)] == whole

    cut = ["the captain " * 15, "the tide"]
    np.testing.assert_allclose(
        encoder.encode([texts[0], texts[3]]), encoder.encode(cut), rtol=1e-4, atol=1e-5
    )


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (["encoder", "absent/*.jsonl"], (2, "no shards match 'absent/*.jsonl'")),
        (["absent", "corpus"], (65, "no bundle at ")),
        (["models:/whales@champion", "corpus"], (65, "there is no registry at ")),
        (["encoder", "."], (2, "out lies within the data of '.': choose another --out")),
        (["encoder", "**/*.jsonl"], (2, "out lies within the data of '**/*.jsonl'")),
        (["encoder", "corpus", "--workers", "0"], (2, "workers must be in 1..5, the CPUs of")),
        (["encoder", "corpus", "--workers", "99"], (2, "workers must be in 1..5, the CPUs of")),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    refusal: tuple[int, str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder").symlink_to(bundle)
    write_records(tmp_path / "corpus", {"text": "a"})
    code = main(["embed", *arguments, "--out", "out"])
    err = capfd.readouterr().err
    assert code == refusal[0]
    assert refusal[1] in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_killed_command_loses_and_doubles_nothing(
    bundle: Path, corpus: Path, undisturbed: pa.Table, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    allowed = ["--source.max-quarantined-ratio", "0.01"]
    order = ["embed", str(bundle), str(corpus), "--out", str(out), *allowed]
    with command(tmp_path, *order) as killed:
        killed.wait_until(lambda: list(out.glob("*.parquet")))
    job = make_job(bundle, corpus, out)
    num_finished = len(list(out.glob("*.parquet")))
    assert 0 < num_finished < len(job.units)

    report = embed(job, 1)

    assert report.found_files == num_finished
    assert pq.read_table(out).equals(undisturbed)
