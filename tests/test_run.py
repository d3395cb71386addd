"""What a run settles when it starts, and what it refuses when it goes on."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines import run as runs
from pipelines.cli import main
from pipelines.config import RunConfig
from pipelines.data.text_config import Pairing
from pipelines.data.vocabulary import Vocabulary
from pipelines.errors import DataError, UserError
from pipelines.recipes import text_tiny
from pipelines.run import open_run
from tests.corpus import serial_map, write_corpus

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Return a run over two sources, of which the second is used twice an epoch."""
    for seed, name in enumerate(("a", "b")):
        folder = tmp_path / name
        write_corpus(folder, num_documents=12, num_shards=2, num_sentences=20, seed=seed)
    data = (str(tmp_path / "a"), str(tmp_path / "b" / "*.jsonl"))
    return replace(text_tiny(), name="run", runs=str(tmp_path / "runs"), data=data, weights=(1, 2))


def run_dir(config: RunConfig) -> Path:
    return Path(config.runs) / config.name


def test_sources_have_the_weights_of_their_patterns(config: RunConfig) -> None:
    run = open_run(config, run_dir(config))
    shards = run.manifest.shards
    assert [(shard.path[0], shard.source) for shard in shards] == [("a", 0)] * 2 + [("b", 1)] * 2
    visits = [
        v for i in range(run.source.plan.orders_per_epoch) for v in run.source.plan.order(i).blocks
    ]
    twice = {v.block for v in visits if v.visit == 1}
    assert twice == {
        i for i in run.manifest.blocks_of("training") if shards[run.manifest.blocks[i].shard].source
    }


def test_a_resumed_run_keeps_its_sources_and_their_weights(config: RunConfig) -> None:
    first = open_run(config, run_dir(config))
    assert open_run(config, run_dir(config)).manifest == first.manifest
    with pytest.raises(UserError, match=r"weights: .*1.*2.* -> .*2.*1"):
        open_run(replace(config, weights=(2, 1)), run_dir(config))
    with pytest.raises(UserError, match="or in another source"):
        open_run(replace(config, data=config.data[::-1]), run_dir(config))
    with pytest.raises(UserError, match="is in only one of the two"):
        open_run(
            replace(config, data=(*config.data[:1], f"{config.data[0]}/../b/part-0.jsonl")),
            run_dir(config),
        )
    gates = replace(config.source, max_quarantined_ratio=0.5, cut_shards="quarantine")
    assert open_run(replace(config, source=gates), run_dir(config)).key == first.key


def test_a_resumed_run_keeps_its_vocabulary(
    config: RunConfig, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    first = open_run(config, run_dir(config))
    same, other = tmp_path / "same.json", tmp_path / "other.json"
    same.write_text(first.vocabulary.json)
    other.write_text(vocabulary.json)
    again = open_run(replace(config, vocabulary_file=str(same)), run_dir(config))
    assert again.key == first.key
    with pytest.raises(UserError, match=r"another vocabulary than .*other\.json: leave"):
        open_run(replace(config, vocabulary_file=str(other)), run_dir(config))


def test_a_source_with_nothing_to_train_on_has_no_weight(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text("\n\n")
    idle = replace(config, data=(config.data[0], str(tmp_path / "c.jsonl")))
    with pytest.raises(DataError, match=r"c\.jsonl' has a weight but nothing for training"):
        open_run(idle, run_dir(config))


def test_the_folder_of_a_fine_tuning_is_left_alone(config: RunConfig) -> None:
    run_dir(config).mkdir(parents=True, exist_ok=True)
    (run_dir(config) / "finetune.json").write_text("{}")
    with pytest.raises(UserError, match="is a fine-tuning: choose another --name"):
        open_run(config, run_dir(config))


def test_broken_data_stops_every_verb_and_index_shows_the_ledger_first(
    config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "broken.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="1 of 13 records are broken"):
        open_run(replace(config, data=("a",), weights=()), run_dir(config))
    for verb in ("index", "vocab"):
        capfd.readouterr()
        assert main([verb, "a"]) == 65
        out, err = capfd.readouterr()
        assert err.startswith("rayssl: 1 of 13 records are broken (7.69%, where 0.10% are allowed)")
        assert "broken.jsonl at byte 0, 3 bytes: quarantined:no-text-field" in err
        ledger = [line.split()[:2] for line in out.splitlines()]
        assert (["total", "13"] in ledger) == (verb == "index")
    assert main(["index", "a", "--source.max-quarantined-ratio", "0.08"]) == 0


@pytest.fixture
def lone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Return a run on one document, indexed in this process."""
    monkeypatch.setattr(runs, "parallel_map", serial_map)
    (shard,) = write_corpus(tmp_path / "corpus", num_documents=1, num_shards=1)
    return replace(text_tiny(), data=(str(shard),), name="run", runs=str(tmp_path))


def paired(lone: RunConfig, pairing: Pairing) -> RunConfig:
    return replace(lone, text=replace(lone.text, pairing=pairing))


@pytest.mark.parametrize("pairing", ["honest", "reference"])
def test_notnext_needs_a_second_document(lone: RunConfig, pairing: Pairing) -> None:
    asked = paired(lone, pairing)
    with pytest.raises(DataError, match=rf"1 document for training: .*{pairing} pairing"):
        open_run(asked, Path(asked.runs) / "run")
    masks_alone = replace(asked, objective=replace(asked.masked_language, nsp_coefficient=0.0))
    assert open_run(masks_alone, Path(asked.runs) / "run").manifest.records_where("training") == 1


def test_sentence_order_needs_no_second_document(lone: RunConfig) -> None:
    asked = paired(lone, "sentence-order")
    run = open_run(asked, Path(asked.runs) / "run")
    table = run.source.table(run.source.plan.order(0))
    assert set(table["nsp_label"].to_pylist()) == {0, 1, -100}
