"""Tracking: nothing lost, nothing doubled, nobody waits; with a real MLflow on SQLite."""

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.indexing import build
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.errors import StorageError, TrackingError, UserError, brief
from pipelines.recipes import recipe
from pipelines.training import tracking
from pipelines.training.lineage import Dataset, dataset_of
from pipelines.training.mlflow_client import open_client
from pipelines.training.spool import SpoolWriter, read_spool
from pipelines.training.tracking import COMMITS_FILE, Tracker, is_finished
from pipelines.use.finetune_config import LabelledData
from pipelines.verbs_finetune import Finetune
from tests.corpus import serial_map


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the URI of a database that exists: making its tables takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    open_client(uri).search_experiments()
    return uri


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.fixture
def dead_uri() -> str:
    """Return the address of a port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def started(run_dir: Path, uri: str, data: Dataset | None = None) -> Tracker:
    """Start a Tracker whose run and experiment are those of this directory."""
    key = run_dir.parent.name
    tracker = Tracker(run_dir, uri, f"experiment-{key}", key, "a run")
    tracker.start(data)
    return tracker


def finished(tracker: Tracker) -> str:
    """Close a Tracker and return its run."""
    assert tracker.close("FINISHED", timeout_seconds=60)
    assert tracker.run_id is not None
    return tracker.run_id


def log(run_dir: Path, attempt: int, steps: dict[int, dict[str, float]]) -> None:
    writer = SpoolWriter(run_dir / "spool" / f"{attempt:04}.jsonl")
    for step, metrics in steps.items():
        writer.append(step, metrics)
    writer.close()


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    points = open_client(uri).get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in points)


def run_of(uri: str, run_id: str) -> Any:
    return open_client(uri).get_run(run_id)


def test_a_half_written_line_waits_for_its_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log(tmp_path, 0, {1: {"loss": 2.0}})
    file = tmp_path / "spool" / "0000.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:20])

    (record,) = read_spool(tmp_path / "spool", {})
    assert (record.step, record.end_offset) == (1, len(whole))

    file.write_bytes(whole + whole)
    (record,) = read_spool(tmp_path / "spool", {"0000.jsonl": len(whole)})
    assert (record.step, record.end_offset) == (1, 2 * len(whole))
    assert not caplog.records


def test_a_line_cut_by_a_kill_costs_only_itself(tmp_path: Path) -> None:
    log(tmp_path, 0, {1: {"loss": 2.0}, 2: {"loss": 1.5}})
    file = tmp_path / "spool" / "0000.jsonl"
    file.write_bytes(file.read_bytes()[:-10])

    log(tmp_path, 0, {3: {"loss": 1.0}})

    assert [record.step for record in read_spool(tmp_path / "spool", {})] == [1, 3]


def test_the_spool_keeps_what_is_not_finite(tmp_path: Path) -> None:
    log(tmp_path, 0, {1: {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1}})

    json.loads((tmp_path / "spool" / "0000.jsonl").read_text(), parse_constant=pytest.fail)
    (record,) = read_spool(tmp_path / "spool", {})
    assert math.isnan(record.metrics.pop("a"))
    assert record.metrics == {"b": math.inf, "c": -math.inf, "d": 0.1}


@pytest.mark.parametrize("name", ["recall@1", "", "/loss", "a//b", "a/../b", ".", "loss (mean)"])
def test_names_that_mlflow_refuses_are_refused_at_once(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not accepted by MLflow"):
        log(tmp_path, 0, {1: {name: 1.0}})


def test_replayed_steps_are_not_doubled(run_dir: Path, store: str) -> None:
    log(run_dir, 0, {step: {"loss": 10.0 - step} for step in range(1, 6)})
    log(run_dir, 1, {step: {"loss": 20.0 - step} for step in range(3, 9)})

    run_id = finished(started(run_dir, store))

    first, second = [(s, 10.0 - s) for s in range(1, 6)], [(s, 20.0 - s) for s in range(6, 9)]
    assert history(store, run_id, "loss") == first + second


def test_a_metric_that_the_first_attempt_did_not_reach_is_kept(run_dir: Path, store: str) -> None:
    log(run_dir, 0, {4: {"loss": 1.0}})
    log(run_dir, 1, {4: {"loss": 1.0, "heldout": 3.0}})

    run_id = finished(started(run_dir, store))

    assert history(store, run_id, "loss") == [(4, 1.0)]
    assert history(store, run_id, "heldout") == [(4, 3.0)]


def test_points_keep_their_times_and_a_lost_state_doubles_none(run_dir: Path, store: str) -> None:
    log(run_dir, 0, {1: {"loss": 2.0}, 2: {"loss": 1.0}})
    log(run_dir, 1, {2: {"loss": 1.0}, 3: {"loss": 0.5}})
    run_id = finished(started(run_dir, store))

    (run_dir / "tracking.json").write_text("half a li")
    assert finished(started(run_dir, store)) == run_id

    points = open_client(store).get_metric_history(run_id, "loss")
    spooled = {(record.timestamp_ms, record.step) for record in read_spool(run_dir / "spool", {})}
    assert len(points) == 3
    assert {(point.timestamp, point.step) for point in points} <= spooled


def test_more_metrics_than_one_request_takes(run_dir: Path, store: str) -> None:
    log(run_dir, 0, {step: {f"m{i}": 1.0 for i in range(300)} for step in range(5)})

    run_id = finished(started(run_dir, store))

    assert len(history(store, run_id, "m299")) == 5


def test_one_run_across_two_trackers(run_dir: Path, store: str) -> None:
    first = started(run_dir, store)
    run_id = first.wait_for_run_id(60)
    log(run_dir, 0, {1: {"loss": 2.0}})
    assert first.close("FAILED", timeout_seconds=60)
    assert run_of(store, run_id).info.status == "FAILED"

    second = started(run_dir, store)
    assert second.wait_for_run_id(60) == run_id
    assert run_of(store, run_id).info.status == "RUNNING"
    log(run_dir, 1, {2: {"loss": 1.0}})
    finished(second)

    assert run_of(store, run_id).info.status == "FINISHED"
    assert history(store, run_id, "loss") == [(1, 2.0), (2, 1.0)]


def test_new_points_arrive_while_the_run_goes_on(run_dir: Path, store: str) -> None:
    tracker = started(run_dir, store)
    run_id = tracker.wait_for_run_id(60)
    log(run_dir, 0, {1: {"loss": 2.0}})

    deadline = time.monotonic() + 60
    while not history(store, run_id, "loss") and time.monotonic() < deadline:
        time.sleep(0.2)

    assert history(store, run_id, "loss") == [(1, 2.0)]
    finished(tracker)


def test_a_deleted_run_is_replaced_by_a_complete_one(run_dir: Path, store: str) -> None:
    log(run_dir, 0, {1: {"loss": 2.0}})
    deleted = finished(started(run_dir, store))
    open_client(store).delete_run(deleted)
    log(run_dir, 1, {2: {"loss": 1.0}})

    run_id = finished(started(run_dir, store))

    assert run_id != deleted
    assert history(store, run_id, "loss") == [(1, 2.0), (2, 1.0)]


def test_figures_of_commits_are_kept_by_commit_and_data(run_dir: Path, store: str) -> None:
    data = Dataset(name="corpus", digest="d" * 32, source_type="local", source="{}", profile="{}")

    def log_commit(step: int, value: float) -> None:
        writer = SpoolWriter(run_dir / "spool" / COMMITS_FILE)
        writer.append(step, {"commit/loss": value})
        writer.close()

    log(run_dir, 1, {1: {"loss": 5.0}, 2: {"loss": 4.0}})
    log_commit(1, 4.5)
    run_id = finished(started(run_dir, store, data))
    log_commit(2, 3.5)
    client = open_client(store)
    experiment = run_of(store, run_id).info.experiment_id
    # A driver that was killed here has made the second, and no more.
    client.create_logged_model(experiment, name="step-000000002", source_run_id=run_id)
    (run_dir / "tracking.json").unlink()  # all is sent again
    assert finished(started(run_dir, store, data)) == run_id

    assert history(store, run_id, "commit/loss") == [(1, 4.5), (2, 3.5)]
    commits = {model.name: model for model in client.search_logged_models([experiment])}
    assert sorted(commits) == ["step-000000001", "step-000000002"]
    assert {model.status for model in commits.values()} == {"READY"}
    (metric,) = commits["step-000000002"].metrics
    assert (metric.key, metric.value, metric.step) == ("commit/loss", 3.5, 2)
    assert (metric.dataset_name, metric.dataset_digest) == ("corpus", "d" * 32)
    outputs = run_of(store, run_id).outputs.model_outputs
    assert sorted(output.step for output in outputs) == [1, 2]


def test_params_that_differ_after_a_restart_become_a_tag(run_dir: Path, store: str) -> None:
    first = started(run_dir, store)
    first.log_params({"seed": "7", "workers": "2", "notes": "x" * 7000})
    finished(first)
    second = started(run_dir, store)
    second.log_params({"seed": "7", "workers": "4", "notes": "x" * 7000, "device": "cpu"})
    second.set_tags({"who": "me"})

    data = run_of(store, finished(second)).data

    assert (data.params["workers"], data.params["device"]) == ("2", "cpu")
    assert json.loads(data.tags["rayssl.param_drift"]) == {"workers": {"first": "2", "now": "4"}}
    assert data.tags["who"] == "me"


def test_the_data_of_a_run_is_its_input_once(run_dir: Path, store: str, corpus_dir: Path) -> None:
    manifest = build(find_shards([str(corpus_dir)]), SourceConfig(), serial_map)
    for _ in range(2):
        run_id = finished(started(run_dir, store, dataset_of(manifest)))

    (logged,) = run_of(store, run_id).inputs.dataset_inputs
    assert {tag.key: tag.value for tag in logged.tags} == {"mlflow.data.context": "pretraining"}
    assert (logged.dataset.name, logged.dataset.digest) == (
        corpus_dir.name,
        manifest.fingerprint[:32],
    )
    assert json.loads(logged.dataset.profile)["records"]["training"]["records"] > 100
    from mlflow.data import get_source

    assert get_source(logged).uri == str(corpus_dir)


def test_artifacts_and_final_metrics(run_dir: Path, store: str, tmp_path: Path) -> None:
    report = tmp_path / "report.txt"
    report.write_text("good")
    for _ in range(2):  # the second time as a run that is started again when it is done
        tracker = started(run_dir, store)
        tracker.log_artifact(report, "reports")
        tracker.log_artifact(tmp_path / "gone.txt", "reports")
        tracker.log_final_metrics({"final/accuracy": 0.5}, step=10)
        run_id = finished(tracker)

    assert history(store, run_id, "final/accuracy") == [(10, 0.5)]
    (artifact,) = (tmp_path / "mlartifacts").rglob("report.txt")
    assert artifact.parts[-3:] == ("artifacts", "reports", "report.txt")
    assert not (tmp_path / "mlruns").exists()


def test_a_server_that_does_not_answer_blocks_nobody(
    run_dir: Path, dead_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answers, waited = threading.Event(), threading.Event(), threading.Event()

    def slow(uri: str) -> Any:
        asked.set()
        answers.wait(60)
        waited.set()
        return open_client(uri)

    monkeypatch.setattr(tracking, "open_client", slow)
    tracker = started(run_dir, dead_uri)
    assert asked.wait(60)
    tracker.log_params({"seed": "7"})
    tracker.log_final_metrics({"accuracy": 0.5}, step=2)
    with pytest.raises(TrackingError, match="gave no run within"):
        tracker.wait_for_run_id(0.1)
    assert not tracker.close("FINISHED", timeout_seconds=0.1)
    assert not waited.is_set()  # the server is silent to this moment
    answers.set()


def test_a_store_of_artifacts_that_fails_holds_nothing_else_up(
    run_dir: Path, store: str, tmp_path: Path
) -> None:
    """It may be another server than that of the rest, and raises of all kinds."""
    (tmp_path / "report.txt").write_text("good")
    (tmp_path / "mlartifacts").write_text("a file where a folder is to be")
    tracker = started(run_dir, store)
    tracker.log_artifact(tmp_path / "report.txt", "reports")
    tracker.set_tags({"who": "me"})
    assert not tracker.close("FINISHED", timeout_seconds=3)
    assert not is_finished(run_dir)
    run = run_of(store, str(tracker.run_id))
    assert (run.info.status, run.data.tags["who"]) == ("FINISHED", "me")

    (tmp_path / "mlartifacts").unlink()
    assert finished(started(run_dir, store)) == tracker.run_id
    assert is_finished(run_dir)
    assert list((tmp_path / "mlartifacts").rglob("report.txt"))


def test_a_full_disk_is_told_in_one_line(run_dir: Path, store: str) -> None:
    tracker = started(run_dir, store)
    (run_dir / "tracking.partial").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"cannot write .*tracking\.json: No space left"):
        tracker.set_tags({"who": "me"})
    (run_dir / "tracking.partial").unlink()
    finished(tracker)


def test_a_dead_server_costs_nothing(
    run_dir: Path, store: str, dead_uri: str, tmp_path: Path
) -> None:
    report = tmp_path / "report.txt"
    report.write_text("good")
    tracker = started(run_dir, dead_uri)
    tracker.log_params({"seed": "7"})
    tracker.log_artifact(report, "reports")
    tracker.log_final_metrics({"accuracy": 0.5}, step=2)
    log(run_dir, 0, {1: {"loss": 2.0}, 2: {"loss": 1.0}})
    assert not tracker.close("FINISHED", timeout_seconds=2)
    assert not is_finished(run_dir)

    run_id = finished(started(run_dir, store))
    assert history(store, run_id, "loss") == [(1, 2.0), (2, 1.0)]
    assert history(store, run_id, "accuracy") == [(2, 0.5)]
    assert run_of(store, run_id).data.params == {"seed": "7"}
    assert list((tmp_path / "mlartifacts").rglob("report.txt"))


def test_a_long_error_is_cut_at_a_word() -> None:
    told = brief(ValueError("word " * 60 + "\nand more"))
    assert told == "word " * 23 + "..."
    assert brief("short\nand more") == "short"


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:pa55word@mlflow:5000",
        "postgresql://me:pa55word@db/mlflow",
        "http://mlflow?token=pa55word",
    ],
)
def test_a_uri_with_a_password_is_refused_and_not_repeated(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        open_client(uri)
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as invalid:
        replace(recipe("text-tiny"), tracking_uri=uri)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as untracked:
        Tracker(tmp_path, uri, "experiment", "key", "a run")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as unfinetuned:
        Finetune(model="a", source=LabelledData(data=("b",), labels="c"), tracking_uri=uri)
    for error in (refused.value, invalid.value, untracked.value, unfinetuned.value):
        assert "pa55word" not in str(error)


def test_a_run_key_with_a_quote_is_refused(run_dir: Path) -> None:
    with pytest.raises(ValueError, match="quote"):
        Tracker(run_dir, "sqlite:///mlflow.db", "experiment", "it's", "a run")


def test_a_first_run_prints_nothing(tmp_path: Path) -> None:
    code = """
from pathlib import Path
from pipelines.training.tracking import Tracker
tracker = Tracker(Path("run"), "sqlite:///mlflow.db", "experiment", "key", "a run")
tracker.start()
assert tracker.close("FINISHED", 100)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    stray = tmp_path / "mlruns" / "0" / "meta.yaml"  # which moves MLflow's own default store
    stray.parent.mkdir(parents=True)
    stray.write_text("experiment_id: '0'\n")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlruns", "run"]
    assert [path for path in (tmp_path / "mlruns").rglob("*") if path.is_file()] == [stray]


def test_a_process_killed_while_it_makes_the_tables_leaves_no_broken_store(tmp_path: Path) -> None:
    code = "from pipelines.training.mlflow_client import open_client; open_client('sqlite:///mlflow.db')"
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "TMPDIR": str(tmp_path),
    }
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    while not list(tmp_path.rglob("growing.db")) and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.3)
    process.kill()
    assert process.wait() == -9, "it was too quick to be killed"
    assert not (tmp_path / "mlflow.db").exists()
