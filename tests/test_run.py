"""What a run refuses to start with."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines import run as runs
from pipelines.config import RunConfig
from pipelines.data.text_config import Pairing
from pipelines.errors import DataError
from pipelines.recipes import text_tiny
from pipelines.run import open_run
from tests.corpus import serial_map, write_corpus


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Return a run on one document, indexed in this process."""
    monkeypatch.setattr(runs, "parallel_map", serial_map)
    (shard,) = write_corpus(tmp_path / "corpus", num_documents=1, num_shards=1)
    return replace(text_tiny(), data=(str(shard),), name="run", runs=str(tmp_path))


def paired(config: RunConfig, pairing: Pairing) -> RunConfig:
    return replace(config, text=replace(config.text, pairing=pairing))


@pytest.mark.parametrize("pairing", ["honest", "reference"])
def test_notnext_needs_a_second_document(config: RunConfig, pairing: Pairing) -> None:
    asked = paired(config, pairing)
    with pytest.raises(DataError, match=rf"1 document for training: .*{pairing} pairing"):
        open_run(asked, Path(asked.runs) / "run")
    masks_alone = replace(asked, objective=replace(asked.objective, nsp_coefficient=0.0))
    assert open_run(masks_alone, Path(asked.runs) / "run").manifest.records_where("training") == 1


def test_sentence_order_needs_no_second_document(config: RunConfig) -> None:
    asked = paired(config, "sentence-order")
    run = open_run(asked, Path(asked.runs) / "run")
    table = run.source.table(run.source.plan.order(0))
    assert set(table["nsp_label"].to_pylist()) == {0, 1, -100}
