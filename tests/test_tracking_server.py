"""A run against what a team runs: MLflow with basic auth on Postgres and S3, killed on the way."""

import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pipelines.data.indexing import build
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.errors import TrackingError
from pipelines.run import load_run
from pipelines.training.checkpoint import CommitLog
from pipelines.training.mlflow_client import open_client
from pipelines.training.spool import read_spool
from pipelines.training.tracking import RUN_KEY_TAG, Tracker
from pipelines.use.bundle import BundleError, write_bundle
from pipelines.use.gate_config import GateConfig
from pipelines.use.promotion import judge_pair, open_pair, pin_pair, settle
from pipelines.use.registry import load_encoder, register
from pipelines.use.verify import verify
from tests.command import PATIENCE_SECONDS, Command, command
from tests.corpus import serial_map, write_corpus
from tests.servers import BUCKET, PASSWORD, USER, MlflowServer, postgres, s3, s3_client

pytestmark = pytest.mark.slow

STEPS = 400
COMMIT_EVERY = 10


class Stack(NamedTuple):
    """The servers of a team."""

    mlflow: MlflowServer
    bucket: Any
    """Client of the S3 server."""

    @property
    def client(self) -> Any:
        """Return a client of MLflow."""
        return open_client(self.mlflow.uri)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Start the servers; the name and password are in the environment, those of S3 are not."""
    with (
        pytest.MonkeyPatch.context() as patch,
        s3() as address,
        postgres("store", "auth") as databases,
    ):
        patch.setenv("MLFLOW_TRACKING_USERNAME", USER)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        bucket = s3_client(address)
        bucket.create_bucket(Bucket=BUCKET)
        mlflow = MlflowServer(tmp_path_factory.mktemp("mlflow"), databases, address)
        try:
            mlflow.start()
            yield Stack(mlflow, bucket)
        finally:
            mlflow.kill()


@dataclass(frozen=True)
class Story:
    """A run that was interrupted, lost its server and a worker, ended, and was started again."""

    folder: Path
    codes: list[int]
    """Exit codes of the three commands."""
    statuses: list[str]
    """What MLflow said of the run after each."""
    steps_when_killed: int
    steps_without_server: int
    accounts: list[dict[str, Any]]
    """What the second and the third command told."""

    @property
    def dir(self) -> Path:
        """Return the folder of the run."""
        return self.folder / "runs" / "run"


def runs_of(stack: Stack) -> list[Any]:
    experiment = stack.client.get_experiment_by_name("rayssl").experiment_id
    return list(stack.client.search_runs([experiment]))


def status_of(stack: Stack) -> str:
    (run,) = runs_of(stack)
    return str(run.info.status)


def steps_of(log: CommitLog) -> int:
    newest = log.newest()
    return newest.step if newest else 0


def attempt_of(log: CommitLog) -> int:
    newest = log.newest()
    return newest.attempt if newest else 0


def kill_between_commits(training: Command, spool: Path) -> None:
    """Kill the one worker of a command when it has logged a step that no commit holds."""

    def killed() -> bool:
        with training.paused() as worker:
            between = read_spool(spool, {})[-1].step % COMMIT_EVERY != 0
            if between:
                os.kill(worker, signal.SIGKILL)
        return between

    training.wait_until(killed)


@pytest.fixture(scope="module")
def story(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("team")
    write_corpus(folder, num_documents=36, num_shards=12, num_sentences=8)
    (folder / "mlruns" / "0").mkdir(parents=True)
    (folder / "mlruns" / "0" / "meta.yaml").write_text("experiment_id: '0'\n")
    words = ["pretrain", "text-tiny", "--data", str(folder / "*.jsonl"), "--name", "run"]
    words += ["--steps", str(STEPS), "--workers", "1"]
    words += ["--checkpoint-every", str(COMMIT_EVERY)]
    words += ["--tracking-uri", stack.mlflow.uri, "--json"]
    log, state = CommitLog(folder / "runs" / "run"), folder / "runs" / "run" / "tracking.json"
    codes, statuses, accounts = [], [], []

    with command(folder, *words) as training:
        training.wait_until(log.newest)
        with training.paused():
            training.wait_until(lambda: json.loads(state.read_text())["marks"]["high_water"])
            training.kill(signal.SIGTERM)
            codes.append(training.wait())
        statuses.append(status_of(stack))
        training.wait_for_session()
    with command(folder, *words) as training:
        training.wait_until(lambda: attempt_of(log) == 2)
        stack.mlflow.kill()
        killed = steps_of(log)
        training.wait_until(lambda: steps_of(log) >= killed + 20)
        without_server = steps_of(log)
        kill_between_commits(training, folder / "runs" / "run" / "spool")
        training.wait_until(lambda: attempt_of(log) == 3)
        with training.paused():
            stack.mlflow.start()
        codes.append(training.wait())
        statuses.append(status_of(stack))
        accounts.append(json.loads(training.out[-1]))
        training.wait_for_session()
    with command(folder, *words) as training:
        codes.append(training.wait())
        statuses.append(status_of(stack))
        accounts.append(json.loads(training.out[-1]))
    return Story(folder, codes, statuses, killed, without_server, accounts)


def test_a_killed_server_and_a_killed_worker_cost_no_point_and_double_none(
    stack: Stack, story: Story
) -> None:
    assert story.steps_without_server >= story.steps_when_killed + 20  # nobody waited for it
    (run,) = runs_of(stack)
    spool = read_spool(story.dir / "spool", {})
    logged = {(r.step, r.timestamp_ms, r.metrics["loss"]) for r in spool if "loss" in r.metrics}
    assert len(logged) > STEPS  # some steps were made twice
    points = stack.client.get_metric_history(run.info.run_id, "loss")
    assert sorted(point.step for point in points) == list(range(1, STEPS + 1))
    assert {(point.step, point.timestamp, point.value) for point in points} <= logged
    (evaluated,) = stack.client.get_metric_history(run.info.run_id, "heldout/mlm_loss")
    assert evaluated.value == story.accounts[0]["evaluation"]["heldout/mlm_loss"]
    assert verify(load_run(story.dir)).status == "PASS"


def test_there_is_one_run_and_it_tells_how_each_command_ended(story: Story, stack: Stack) -> None:
    assert story.codes == [130, 0, 0]
    assert story.statuses == ["KILLED", "FINISHED", "FINISHED"]
    assert len(load_run(story.dir).log.attempts()) == 3
    (run,) = runs_of(stack)
    assert run.data.tags[RUN_KEY_TAG] == load_run(story.dir).key
    assert len(run.inputs.dataset_inputs) == 1
    assert [name for name in run.data.metrics if name.startswith("system/")]


def test_the_same_job_again_makes_no_run_and_no_version(stack: Stack, story: Story) -> None:
    assert story.accounts[0] == story.accounts[1]
    assert len(stack.client.search_model_versions("name = 'rayssl-text'")) == 1
    (run,) = runs_of(stack)
    assert len(run.outputs.model_outputs) == 1


def test_what_lies_about_in_the_working_directory_changes_nothing(story: Story) -> None:
    files = [path for path in (story.folder / "mlruns").rglob("*") if path.is_file()]
    assert files == [story.folder / "mlruns" / "0" / "meta.yaml"]
    assert not (story.folder / "mlflow.db").exists()
    assert not (story.folder / "mlartifacts").exists()


def test_the_password_is_nowhere(stack: Stack, story: Story, tmp_path: Path) -> None:
    (run,) = runs_of(stack)
    stack.client.download_artifacts(run.info.run_id, "", str(tmp_path))
    told = repr((run.data, stack.client.get_model_version("rayssl-text", "1")))
    written = [path for top in (story.folder, tmp_path) for path in top.rglob("*")]
    held = [path for path in written if path.is_file() and PASSWORD.encode() in path.read_bytes()]
    assert (held, PASSWORD in told) == ([], False)
    assert (tmp_path / "run" / "manifest.json").is_file()


def test_altered_weights_in_the_bucket_are_refused(stack: Stack, story: Story) -> None:
    (uri,) = {account["registered"] for account in story.accounts}
    found = stack.bucket.list_objects_v2(Bucket=BUCKET)["Contents"]
    (key,) = [entry["Key"] for entry in found if entry["Key"].endswith("model.safetensors")]
    whole = stack.bucket.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    stack.bucket.put_object(Bucket=BUCKET, Key=key, Body=whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(BundleError, match=r"model\.safetensors is not what was registered"):
            load_encoder(uri, stack.mlflow.uri)
    finally:
        stack.bucket.put_object(Bucket=BUCKET, Key=key, Body=whole)


@pytest.mark.usefixtures("one_thread")
def test_the_encoder_is_loaded_and_trained_further_where_mlflow_may_run_no_code(
    stack: Stack, story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_MODEL_CODE_EXECUTION", "false")
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    encoder = load_encoder(story.accounts[0]["registered"], stack.mlflow.uri)
    before = encoder.encode(["The captain anchors near the island."])
    parameters = [p for p in encoder.objective.parameters() if p.requires_grad]
    ids = torch.tensor([[encoder.vocabulary.cls, 9, 10, encoder.vocabulary.sep]])
    batch = {
        "input_ids": ids,
        "token_type_ids": torch.zeros_like(ids),
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
    }
    encoder.objective.train()
    torch.autograd.backward(encoder.objective.encode(batch).square().sum())
    torch.optim.SGD(parameters, lr=1.0).step()
    assert abs(encoder.encode(["The captain anchors near the island."]) - before).max() > 1e-3


@pytest.mark.usefixtures("one_thread", "story")
def test_a_worse_candidate_leaves_the_champion_where_it_is(stack: Stack, tmp_path: Path) -> None:
    client, uri = stack.client, stack.mlflow.uri
    client.set_registered_model_alias("rayssl-text", "champion", "1")
    encoder = load_encoder("models:/rayssl-text@champion", uri)
    torch.manual_seed(0)
    write_bundle(
        tmp_path / "worse",
        config={name: encoder.config[name] for name in ("objective", "text", "recipe")},
        state={name: tensor + torch.randn_like(tensor) for name, tensor in encoder.state.items()},
        tokenizer_json=encoder.vocabulary.json,
        lineage={},
        card="# Worse\n\nOn purpose.\n",
    )
    (run,) = runs_of(stack)
    tags = {RUN_KEY_TAG: "worse"}
    worse = register(
        tmp_path / "worse", tracking_uri=uri, run_id=run.info.run_id, name="rayssl-text", tags=tags
    )
    write_corpus(tmp_path, num_documents=48, num_sentences=10, seed=9)
    data = build(find_shards([str(tmp_path)]), SourceConfig(heldout_ratio=0.0), serial_map)
    pair = pin_pair("rayssl-text", uri)
    report = judge_pair(pair, open_pair(pair, uri), data, GateConfig(), uri)
    settle(pair, report, uri)

    assert (report.verdict, report.candidate) == ("failed", worse.model_uri)
    aliases = Counter(client.get_registered_model("rayssl-text").aliases)
    assert aliases == {"champion": "1", "candidate": "2"}
    assert client.list_artifacts(run.info.run_id, "gate")


def test_a_wrong_password_blocks_nobody_and_the_right_one_loses_nothing(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def tracker() -> Tracker:
        started = Tracker(tmp_path, stack.mlflow.uri, "locked out", "locked-out", "a run")
        started.start()
        return started

    with monkeypatch.context() as wrong:
        wrong.setenv("MLFLOW_TRACKING_PASSWORD", "guessed")
        refused = tracker()
        refused.set_tags({"who": "me"})
        with pytest.raises(TrackingError) as told:
            refused.wait_for_run_id(0)
        give_up = time.monotonic() + PATIENCE_SECONDS
        while " 401 " not in str(told.value) and time.monotonic() < give_up:
            with pytest.raises(TrackingError) as told:
                refused.wait_for_run_id(0.5)
        assert re.search(r"gave no run .* 401 .*check the tracking URI", str(told.value))
        assert not refused.close("FINISHED", 5)
    (warned,) = caplog.messages
    assert "guessed" not in warned
    let_in = tracker()
    assert let_in.close("FINISHED", 60)
    assert stack.client.get_run(let_in.run_id).data.tags["who"] == "me"
