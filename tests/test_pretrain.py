"""One pretraining run from raw shards to the registry, and what calling it again does not do."""

import contextlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from pipelines.cli import main
from pipelines.cluster import ClusterError
from pipelines.config import RunConfig, to_flat, to_record
from pipelines.data.indexing import build
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.errors import UserError
from pipelines.pretrain import pretrain
from pipelines.recipes import recipe
from pipelines.run import load_run
from pipelines.training.mlflow_client import open_client
from pipelines.training.tracking import RUN_KEY_TAG
from pipelines.training.workers import followed, root_cause
from pipelines.use.bundle import BundleError
from pipelines.use.gate_config import GateConfig
from pipelines.use.promotion import judge_pair, open_pair, pin_pair
from pipelines.use.registry import load_encoder
from pipelines.use.verify import verify
from tests.corpus import serial_map


@dataclass(frozen=True)
class Finished:
    """A run that pretrain was called for twice."""

    folder: Path
    config: RunConfig
    account: dict[str, Any]
    said: list[str]
    again: dict[str, Any]
    said_again: list[str]

    @property
    def dir(self) -> Path:
        """Return the folder of the run."""
        return self.folder / "runs" / "sea-and-space"

    @property
    def client(self) -> Any:
        """Return a client of the MLflow store that the run was tracked in."""
        return open_client(self.config.tracking_uri)


@pytest.fixture(scope="module")
def finished(
    ray_session: None, corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Finished]:
    del ray_session
    folder = tmp_path_factory.mktemp("pretrain")
    config = replace(
        recipe("text-tiny"),
        data=(str(corpus_dir),),
        name="sea-and-space",
        runs=str(folder / "runs"),
        workers=2,
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
        register="topics",
        data_licence="CC0-1.0",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where artifacts go
        account, said = call(config)
        # As if killed before the last word, then once more when all is done.
        (folder / "runs" / config.name / "account.json").unlink()
        assert call(config)[0] == account
        again, said_again = call(replace(config, workers=1))
        yield Finished(folder, config, account, said, again, said_again)


def call(config: RunConfig) -> tuple[dict[str, Any], list[str]]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        account = pretrain(config)
    return account, out.getvalue().splitlines()


def mlflow_runs(finished: Finished) -> list[Any]:
    experiment = finished.client.get_experiment_by_name("rayssl")
    found: list[Any] = finished.client.search_runs([experiment.experiment_id])
    return found


def test_the_account_tells_what_was_made(finished: Finished) -> None:
    assert finished.account.keys() == {
        "run",
        "steps",
        "digest",
        "ledger",
        "handed_over",
        "evaluation",
        "mlflow_run",
        "registered",
    }
    assert finished.account["run"] == "sea-and-space"
    assert finished.account["steps"] == finished.config.steps
    assert finished.account["registered"] == "models:/topics/1"
    rows = finished.config.steps * finished.config.order.rows_per_step
    assert sum(finished.account["ledger"].values()) == rows
    written = json.loads((finished.dir / "account.json").read_text())
    assert written == finished.account


def test_what_was_trained_is_what_was_planned(finished: Finished) -> None:
    verdict = verify(load_run(finished.dir))
    assert (verdict.status, verdict.digest) == ("PASS", finished.account["digest"])


def test_the_output_is_a_handful_of_lines(finished: Finished) -> None:
    said = "\n".join(finished.said)
    assert finished.said[0].startswith("6 shards, 0.")
    assert "training from the start with 2 workers" in finished.said
    assert "step 20/20  loss " in said
    assert "held-out documents:" in said
    assert "  masked tokens: loss " in said
    assert "  next sentence: accuracy " in said
    assert finished.said[-1].startswith("registered models:/topics/1 as candidate")
    assert len(finished.said) <= 12


def test_mlflow_has_the_run_with_all_that_belongs_to_it(finished: Finished) -> None:
    (run,) = mlflow_runs(finished)
    key = json.loads((finished.dir / "run.json").read_text())["key"]
    record = load_run(finished.dir)

    assert run.info.run_id == finished.account["mlflow_run"]
    assert run.info.status == "FINISHED"
    assert run.data.tags[RUN_KEY_TAG] == key
    assert run.data.tags["rayssl.fingerprint"] == record.manifest.fingerprint
    expected = {name: str(value) for name, value in to_flat(to_record(record.config)).items()}
    assert run.data.params == expected
    for name, value in finished.account["evaluation"].items():
        assert run.data.metrics[name] == pytest.approx(value)
    history = finished.client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in history] == list(range(1, 21))
    assert {"rayssl.git_commit", "rayssl.git_dirty"} <= run.data.tags.keys()
    assert "rayssl.submission_id" not in run.data.tags  # nobody has submitted it
    (data,) = run.inputs.dataset_inputs
    assert data.dataset.digest == record.manifest.fingerprint[:32]
    (processor,) = [name for name in run.data.metrics if "cpu_utilization" in name]
    assert re.fullmatch(r"system/[\w.-]+/cpu_utilization_percentage", processor)
    artifacts = {found.path for found in finished.client.list_artifacts(run.info.run_id, "run")}
    names = ("run.json", "manifest.json", "ledger.json", "tokenizer.json")
    assert artifacts == {f"run/{name}" for name in names}


def test_the_logged_ledger_adds_up(finished: Finished, tmp_path: Path) -> None:
    path = finished.client.download_artifacts(
        finished.account["mlflow_run"], "run/ledger.json", str(tmp_path)
    )
    ledger = json.loads(Path(path).read_text())
    assert sum(entry["records"] for entry in ledger["records"].values()) == 120
    shards = load_run(finished.dir).manifest.shards
    counted = sum(entry["bytes"] for entry in ledger["records"].values())
    assert counted == sum(shard.bytes for shard in shards)
    assert ledger["rows"] == finished.account["ledger"]


def test_the_candidate_is_the_encoder_of_the_newest_commit(finished: Finished) -> None:
    encoder = load_encoder("models:/topics@candidate", finished.config.tracking_uri)
    run = load_run(finished.dir)
    commit = run.log.newest()
    assert commit is not None
    trained, _ = run.log.load(commit)

    assert encoder.state.keys() == trained.keys()
    for name, tensor in trained.items():
        assert torch.equal(encoder.state[name], tensor), name
    embedded = encoder.encode(["The captain anchors near the island.", "A baker boils dough."])
    assert embedded.shape == (2, 32)
    assert np.isfinite(embedded).all()
    assert not np.allclose(embedded[0], embedded[1])


def test_the_registered_version_knows_where_it_comes_from(finished: Finished) -> None:
    run = load_run(finished.dir)
    version = finished.client.get_model_version_by_alias("topics", "candidate")
    assert version.run_id == finished.account["mlflow_run"]
    assert version.tags[RUN_KEY_TAG] == run.key
    assert version.tags["rayssl.fingerprint"] == run.manifest.fingerprint
    lineage = json.loads((finished.dir / "bundle" / "lineage.json").read_text())
    assert lineage["fingerprint"] == run.manifest.fingerprint
    assert lineage["steps"] == finished.config.steps
    assert version.tags["rayssl.recipe"] == "text-tiny"
    assert version.tags["rayssl.data_licence"] == "CC0-1.0"
    assert version.tags["rayssl.steps"] == "20"
    assert "rayssl.started_from" not in version.tags  # nothing to tell


def test_the_card_tells_data_recipe_figures_and_limits(finished: Finished) -> None:
    card = (finished.dir / "bundle" / "MODEL_CARD.md").read_text()
    version = finished.client.get_model_version_by_alias("topics", "candidate")
    assert version.description == card.partition("\n\n## ")[0]
    assert version.description.endswith("recipe text-tiny, 20 steps of 16 rows.")
    titles = [line for line in card.splitlines() if line.startswith("## ")]
    assert titles == [
        f"## {title}"
        for title in ("Use", "Data", "Recipe", "Held-out figures", "Limits", "Lineage")
    ]
    for told in (
        "A text is cut to 32 tokens.",
        "Licence of the data: CC0-1.0",
        load_run(finished.dir).manifest.fingerprint,
        "- part-0.jsonl",
        "| text.mask_ratio | 0.15 |",
        "- masked tokens: loss ",
        'load_encoder("models:/topics@champion"',
        f"| mlflow_run | {finished.account['mlflow_run']} |",
    ):
        assert told in card, told
    assert "images." not in card
    assert str(finished.config.runs) not in card


def test_the_gate_tells_that_a_model_was_trained_on_its_data(
    finished: Finished, corpus_dir: Path
) -> None:
    uri = finished.config.tracking_uri
    source = SourceConfig(heldout_ratio=0.0)
    data = build(find_shards([str(corpus_dir)]), source, serial_map)
    pair = pin_pair("topics", uri)
    report = judge_pair(pair, open_pair(pair, uri), data, GateConfig(), uri)
    (note,) = report.notes
    count = len(data.blocks)
    assert note.startswith(f"models:/topics/1 was trained on {count} of {count} blocks")


def test_the_candidate_knows_how_its_rows_were_made(finished: Finished) -> None:
    encoder = load_encoder("models:/topics@candidate", finished.config.tracking_uri)
    record = to_record(load_run(finished.dir).config)
    assert encoder.config["text"] == record["text"]
    assert encoder.config["objective"] == record["objective"]


def test_the_same_command_again_makes_nothing_new(finished: Finished) -> None:
    assert finished.again == finished.account
    assert "all 20 steps have been made" in finished.said_again
    assert finished.said_again[-1].startswith("models:/topics/1 is registered; MLflow run ")
    assert not [line for line in finished.said_again if "held-out" in line]
    assert not [line for line in finished.said_again if line.startswith("training from")]
    assert len(load_run(finished.dir).log.attempts()) == 1
    assert len(mlflow_runs(finished)) == 1
    assert len(finished.client.search_model_versions("name = 'topics'")) == 1


def test_the_same_command_again_leaves_the_mlflow_run_as_it_was(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code, its workers and its time are those of the training."""
    (before,) = mlflow_runs(finished)
    monkeypatch.setenv("RAYSSL_GIT_COMMIT", "another")
    account, _ = call(replace(finished.config, workers=1))
    (after,) = mlflow_runs(finished)
    assert account == finished.account
    assert after.to_dictionary() == before.to_dictionary()


def test_final_figures_are_logged_once_however_often_it_is_called(finished: Finished) -> None:
    history = finished.client.get_metric_history(finished.account["mlflow_run"], "heldout/mlm_loss")
    assert [point.step for point in history] == [20]


def test_workers_without_room_are_for_later_and_no_failure_of_the_training() -> None:
    def without_room() -> None:
        raise WorkerGroupStartupTimeoutError(2)

    with pytest.raises(ClusterError, match="others hold them; try again later") as refused:
        followed(without_room)
    assert refused.value.exit_code == 75


def test_gpus_that_are_not_there_are_missed_at_once(finished: Finished) -> None:
    with pytest.raises(ClusterError, match="a GPU for each of 2 workers, and the cluster has 0"):
        call(replace(finished.config, device="cuda", name="other"))


def test_an_error_without_a_message_is_told_by_its_name() -> None:
    assert root_cause(AssertionError()) == "AssertionError"
    assert root_cause(OSError("first\nlast\n")) == "OSError: last"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"steps": 30}, "steps: 20 -> 30"),
        ({"data": ("elsewhere",)}, "no shards match 'elsewhere'"),
    ],
)
def test_a_run_is_not_continued_with_something_else(
    finished: Finished, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        pretrain(replace(finished.config, **change))
    assert len(mlflow_runs(finished)) == 1


def test_a_run_is_not_continued_on_a_part_of_its_shards(
    finished: Finished, corpus_dir: Path
) -> None:
    part = replace(finished.config, data=(str(corpus_dir / "part-0.jsonl"),))
    with pytest.raises(UserError, match=r"was started with other shards .*part-1\.jsonl"):
        pretrain(part)


def test_masks_are_filled_from_the_command_line(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(
        [
            "fill-mask",
            "models:/topics@candidate",
            "The [MASK] anchors near the island.",
            "--tracking-uri",
            finished.config.tracking_uri,
            "--json",
        ]
    )
    *table, last = capsys.readouterr().out.splitlines()
    (guesses,) = json.loads(last)["masks"]

    assert code == 0
    assert len(guesses) == 5
    assert table[0].split() == ["mask", "1", "probability"]
    assert table[1].split() == [guesses[0]["piece"], f"{guesses[0]['probability']:.4f}"]


def test_a_flipped_byte_in_the_registry_is_refused_in_one_line(
    finished: Finished, capfd: pytest.CaptureFixture[str]
) -> None:
    (weights,) = (finished.folder / "mlartifacts").rglob("encoder/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    flags = ["--tracking-uri", finished.config.tracking_uri]
    try:
        code = main(["fill-mask", "models:/topics@candidate", "a [MASK]", *flags])
        with pytest.raises(BundleError):
            load_encoder("models:/topics/1", finished.config.tracking_uri)
    finally:
        content[-5] ^= 1
        weights.write_bytes(content)
    out, err = capfd.readouterr()

    assert code == 65
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("rayssl: model.safetensors is not what was registered: SHA-256 differs")
    assert main(["fill-mask", "models:/topics@candidate", "a [MASK]", *flags]) == 0


@pytest.mark.slow  # and last: the tests above count what is in MLflow
def test_a_finished_run_is_handed_over_where_it_is_asked_to_be(finished: Finished) -> None:
    store = f"sqlite:///{finished.folder}/elsewhere.db"
    elsewhere = replace(finished.config, tracking_uri=store, data_licence="MIT")
    (finished.dir / "tables" / "step-10").mkdir()
    (finished.dir / "tables" / "step-10" / "predictions.csv").write_text("of an earlier step")
    account, said = call(elsewhere)
    assert "all 20 steps have been made" in said
    version = open_client(store).get_model_version("topics", "1")
    assert account["registered"] == "models:/topics/1"
    assert version.tags["rayssl.data_licence"] == "MIT"
    assert "Licence of the data: MIT" in (finished.dir / "bundle/MODEL_CARD.md").read_text()
    (table,) = open_client(store).list_artifacts(account["mlflow_run"], "tables/step-10")
    assert table.path == "tables/step-10/predictions.csv"


@pytest.mark.slow
def test_a_second_run_starts_where_the_first_one_ended(finished: Finished) -> None:
    config = replace(
        finished.config,
        name="second",
        steps=1,
        workers=1,
        init_from="models:/topics@candidate",
        register="second",
    )
    _, said = call(config)
    run, first = load_run(finished.folder / "runs" / "second"), load_run(finished.dir)
    assert run.started_from == "models:/topics/1"
    assert "starts from models:/topics/1" in said
    assert run.vocabulary.json == first.vocabulary.json

    ended, newest = first.log.newest(), run.log.newest()
    assert ended is not None
    assert newest is not None
    start, made = run.log.lineage(newest)
    trained, _ = first.log.load(ended)
    given, moments = run.log.load(start)
    assert (start.step, made.step) == (0, 1)
    assert not moments
    assert all(torch.equal(given[name], trained[name]) for name in trained)
    assert verify(run).status == "PASS"
    lineage = json.loads((run.dir / "bundle" / "lineage.json").read_text())
    assert lineage["started_from"] == "models:/topics/1"
    flattered = "models:/topics/1, which it started from, may have been trained on them"
    assert flattered in (run.dir / "bundle" / "MODEL_CARD.md").read_text()

    # The alias may move: a resumed run does not look again.
    finished.client.delete_registered_model_alias("topics", "candidate")
    try:
        _, said = call(config)
        with pytest.raises(UserError, match="init_from: models:/topics@candidate -> models:/"):
            pretrain(replace(config, init_from="models:/topics/1"))
    finally:
        finished.client.set_registered_model_alias("topics", "candidate", "1")
    assert "all 1 steps have been made" in said


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_run_without_held_out_documents_is_registered_and_says_so(
    corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = replace(
        recipe("text-tiny"),
        name="all-in",
        data=(str(corpus_dir),),
        source=SourceConfig(heldout_ratio=0.0),
        steps=2,
    )
    account, said = call(config)
    assert account["registered"] == "models:/rayssl-text/1"
    assert account["evaluation"] == {}
    assert [line for line in said if line.startswith("nothing is held out: ")]
