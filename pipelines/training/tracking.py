"""MLflow without blocking and without loss: a spool on disk, and one thread that empties it.

Rank 0 appends a line per logged step; the driver's thread sends what is new, with the original
times. MLflow's SQL store ignores a point that it already has, so sending again does no harm:

    RUN_DIR/spool/0000.jsonl   {"step": 1, "timestamp_ms": 1700000000000, "metrics": {"loss": 7.1}}
    RUN_DIR/spool/0001.jsonl   the next attempt, resumed from a checkpoint: replays some steps
    RUN_DIR/tracking.json      what was sent, and what waits; losing it only means sending again
"""

import copy
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pipelines.data.filesystems import holds_secret
from pipelines.errors import TrackingError, UserError, brief
from pipelines.storage import writing
from pipelines.training.lineage import Dataset
from pipelines.training.mlflow_client import SECRET_IN_URI, open_client, sqlite_path
from pipelines.training.spool import SpoolRecord, SpoolWriter, read_spool

logger = logging.getLogger(__name__)

FinalStatus = Literal["FINISHED", "FAILED", "KILLED"]
RUN_KEY_TAG = "rayssl.run_key"
PARAM_DRIFT_TAG = "rayssl.param_drift"

POLL_SECONDS = 2.0
LONGEST_WAIT_SECONDS = 60.0
CLOSING_WAIT_SECONDS = 1.0
MAX_METRICS_PER_BATCH = 1000  # what MLflow takes in one request
MAX_PARAM_CHARACTERS = 6000  # MLflow cuts longer values without a word
STATE_FILE = "tracking.json"
FINAL_FILE = "final.jsonl"  # of the driver; sorts behind the numbered attempts
COMMITS_FILE = "commits.jsonl"
"""Of the driver: held-out figures of commits, which MLflow also keeps by commit and data."""


def _chunks(records: list[SpoolRecord]) -> Iterator[list[SpoolRecord]]:
    """Cut records into chunks of at most MAX_METRICS_PER_BATCH metrics, if each record is."""
    chunk: list[SpoolRecord] = []
    num_metrics = 0
    for record in records:
        if chunk and num_metrics + len(record.metrics) > MAX_METRICS_PER_BATCH:
            yield chunk
            chunk, num_metrics = [], 0
        chunk.append(record)
        num_metrics += len(record.metrics)
    if chunk:
        yield chunk


@dataclass
class _Marks:
    """How far the spool was sent to one MLflow run."""

    run_id: str = ""
    offsets: dict[str, int] = field(default_factory=dict)
    attempt: str = ""
    high_water: dict[str, int] = field(default_factory=dict)
    """Metric -> highest step sent. Per metric: an evaluation may follow its step much later."""
    floor: dict[str, int] = field(default_factory=dict)
    """`high_water` when `attempt` began: what is not above was replayed after a restart."""

    def take(self, record: SpoolRecord) -> dict[str, float]:
        """Move past a record and return those of its metrics that are not a replay."""
        if record.attempt != self.attempt or record.attempt == FINAL_FILE:
            self.attempt, self.floor = record.attempt, dict(self.high_water)
        self.offsets[record.attempt] = record.end_offset
        fresh = {
            name: value
            for name, value in record.metrics.items()
            if record.step > self.floor.get(name, -1)
        }
        for name in fresh:
            self.high_water[name] = max(record.step, self.high_water.get(name, -1))
        return fresh


@dataclass
class _State:
    """The content of tracking.json."""

    marks: _Marks = field(default_factory=_Marks)
    outbox: list[dict[str, Any]] = field(default_factory=list)
    """Params, tags and artifacts that wait, oldest first."""
    is_finished: bool = False
    """Whether all was sent, with the status of a run that is done."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file; one that is absent or broken counts as empty."""
        try:
            fields = json.loads(path.read_text())
            return cls(_Marks(**fields["marks"]), fields["outbox"], fields["is_finished"])
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def save(self, path: Path) -> None:
        """Replace the file in one step.

        Raises:
            StorageError: If it cannot be written.
        """
        partial = path.with_suffix(".partial")
        with writing(path):
            partial.write_text(json.dumps(asdict(self)))
            partial.replace(path)


def is_finished(run_dir: Path) -> bool:
    """Return whether MLflow has all of a run that is done."""
    return _State.load(run_dir / STATE_FILE).is_finished


class Tracker:
    """Owns the one MLflow run of a `run_key`, in the driver; only its thread talks to MLflow.

    While the server is down the thread tries for ever, and everything waits on disk: metrics in
    the spool, the rest in tracking.json. A later Tracker of the same directory sends it.
    """

    def __init__(
        self, run_dir: Path, tracking_uri: str, experiment: str, run_key: str, run_name: str
    ) -> None:
        if holds_secret(tracking_uri):
            raise UserError(SECRET_IN_URI)
        if "'" in run_key:
            raise ValueError(f"run_key {run_key!r} has a quote, which MLflow cannot search for")
        run_dir.mkdir(parents=True, exist_ok=True)
        self._spool_dir = run_dir / "spool"
        self._state_path = run_dir / STATE_FILE
        self._state = _State.load(self._state_path)
        self._tracking_uri = tracking_uri
        self._experiment = experiment
        self._run_key = run_key
        self._run_name = run_name
        self._dataset: Dataset | None = None
        self._artifacts_uri = Path("mlartifacts").resolve().as_uri()
        self._client: Any = None
        self._run_id: str | None = None
        self._last_error = "it has not answered yet"
        self._final_status: FinalStatus = "FINISHED"
        self._lock = threading.Lock()  # guards the outbox and the file
        self._resolved, self._closing = threading.Event(), threading.Event()
        self._abandoned, self._delivered = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once MLflow has named it."""
        return self._run_id

    def start(self, dataset: Dataset | None = None) -> None:
        """Begin to send; returns at once. The data is logged as the run's input, once."""
        if dataset:
            self._dataset = dataset  # before anything is sent: figures of commits name it
            self._queue(kind="dataset", values=asdict(dataset))
        self._thread.start()

    def wait_for_run_id(self, timeout_seconds: float) -> str:
        """Return the MLflow run, waiting for it if need be.

        Raises:
            TrackingError: If MLflow has not answered in time.
        """
        if not self._resolved.wait(timeout_seconds) or self._run_id is None:
            raise TrackingError(
                f"MLflow at {self._tracking_uri} gave no run within {timeout_seconds:g} s: "
                f"{self._last_error}; check the tracking URI and that the server runs"
            )
        return self._run_id

    def log_params(self, params: dict[str, str]) -> None:
        """Log params; where a resumed run has other values they stay, and a tag tells the drift."""
        self._queue(kind="params", values=params)

    def set_tags(self, tags: dict[str, str]) -> None:
        """Set tags of the run."""
        self._queue(kind="tags", values=tags)

    def log_artifact(self, path: Path, folder: str) -> None:
        """Upload a file or directory into a folder of the run; it must stay until it was sent."""
        self._queue(kind="artifact", path=str(path.resolve()), folder=folder)

    def log_final_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Log the results of a run that is done, unless it logged them at this step before."""
        writer = SpoolWriter(self._spool_dir / FINAL_FILE)
        writer.append(step, metrics)
        writer.close()

    def close(self, status: FinalStatus, timeout_seconds: float) -> bool:
        """Send the rest, set the final status, and return whether all of it was delivered.

        What was not stays on disk, and the next Tracker of this directory sends it.
        """
        self._final_status = status
        self._closing.set()
        self._thread.join(timeout_seconds)
        self._abandoned.set()
        return self._delivered.is_set()

    def _queue(self, **entry: Any) -> None:
        with self._lock:
            self._state.is_finished = False
            self._state.outbox.append(entry)
            self._state.save(self._state_path)

    def _run(self) -> None:
        wait_seconds = POLL_SECONDS
        num_failures = 0
        while not self._abandoned.is_set():
            is_closing = self._closing.is_set()  # before sending: what is queued now is the last
            try:
                self._send(is_closing)
            except Exception as error:  # whatever MLflow or a network can raise: try again
                self._note(error, is_first=num_failures == 0)
                num_failures += 1
                wait_seconds = min(POLL_SECONDS * 2**num_failures, LONGEST_WAIT_SECONDS)
            else:
                num_failures, wait_seconds = 0, POLL_SECONDS
                if is_closing:
                    self._delivered.set()
                    return
            self._closing.wait(wait_seconds)
            if num_failures:
                self._abandoned.wait(CLOSING_WAIT_SECONDS)

    def _note(self, error: Exception, *, is_first: bool) -> None:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        self._last_error = f"{kind}{brief(error)}"
        if is_first:
            logger.warning(
                "MLflow at %s: %s; the run goes on, what it logs waits in %s",
                self._tracking_uri,
                self._last_error,
                self._spool_dir,
            )

    def _send(self, is_closing: bool) -> None:
        if self._run_id is None:
            self._resolve_run()
        self._send_spool()
        error = self._send_outbox()
        if is_closing:
            self._client.set_terminated(self._run_id, status=self._final_status)
        if error is not None:
            raise error
        if is_closing:
            with self._lock:
                self._state.is_finished = self._final_status == "FINISHED"
                self._state.save(self._state_path)

    def _send_outbox(self) -> Exception | None:
        """Deliver what waits, in order; return why artifacts are not taken, if they are not.

        Their store may be another than that of the rest, which does not wait for it.
        """
        first_error = None
        for entry in self._state.outbox.copy():
            try:
                self._deliver(entry)
            except Exception as error:
                if entry["kind"] != "artifact":
                    raise
                first_error = first_error or error
                continue
            with self._lock:
                self._state.outbox.remove(entry)
                self._state.save(self._state_path)
        return first_error

    def _resolve_run(self) -> None:
        """Find or create the run of this key; another one than last time gets the whole spool."""
        self._client = open_client(self._tracking_uri)
        experiment_id = self._find_or_create_experiment()
        tags = {RUN_KEY_TAG: self._run_key}
        runs = self._client.search_runs(
            [experiment_id],
            filter_string=f"tags.`{RUN_KEY_TAG}` = '{self._run_key}'",
            order_by=["attributes.start_time ASC"],
            max_results=1,
        ) or [self._client.create_run(experiment_id, run_name=self._run_name, tags=tags)]
        run = runs[0]
        if run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")
        if self._state.marks.run_id != run.info.run_id:
            self._save_marks(_Marks(run_id=run.info.run_id))
        self._run_id = run.info.run_id
        self._resolved.set()

    def _find_or_create_experiment(self) -> str:
        """Return the id; only SQLite must be told where artifacts go, a server decides itself."""
        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is not None:
            return str(experiment.experiment_id)
        location = self._artifacts_uri if sqlite_path(self._tracking_uri) else None
        return str(self._client.create_experiment(self._experiment, artifact_location=location))

    def _send_spool(self) -> None:
        from mlflow.entities import Metric

        for chunk in _chunks(read_spool(self._spool_dir, self._state.marks.offsets)):
            marks = copy.deepcopy(self._state.marks)
            metrics = []
            for record in chunk:
                fresh = marks.take(record)
                is_of_commit = fresh and record.attempt == COMMITS_FILE
                belongs = self._commit_of(marks.run_id, record.step) if is_of_commit else {}
                metrics += [
                    Metric(name, value, record.timestamp_ms, record.step, **belongs)
                    for name, value in fresh.items()
                ]
            if metrics:
                self._client.log_batch(marks.run_id, metrics=metrics, synchronous=True)
            self._save_marks(marks)

    def _commit_of(self, run_id: str, step: int) -> dict[str, str]:
        """Return what figures of a commit belong to: a LoggedModel without files, and the data."""
        from mlflow.entities import LoggedModelOutput

        experiment_id = self._client.get_run(run_id).info.experiment_id
        name = f"step-{step:09d}"
        found = self._client.search_logged_models(
            [experiment_id], f"name = '{name}' AND source_run_id = '{run_id}'"
        )
        model, *_ = found or [
            self._client.create_logged_model(
                experiment_id, name=name, source_run_id=run_id, model_type="checkpoint"
            )
        ]
        if model.status != "READY":  # new, or its maker was killed here
            self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=step)])
            self._client.finalize_logged_model(model.model_id, "READY")
        belongs = {"model_id": model.model_id, "run_id": run_id}
        if self._dataset:
            named = self._dataset
            belongs |= {"dataset_name": named.name, "dataset_digest": named.digest}
        return belongs

    def _save_marks(self, marks: _Marks) -> None:
        with self._lock:
            self._state.marks = marks
            self._state.save(self._state_path)

    def _deliver(self, entry: dict[str, Any]) -> None:
        """Send one entry of the outbox; one that MLflow will never take is dropped aloud."""
        from mlflow.exceptions import MlflowException

        if entry["kind"] == "artifact" and not Path(entry["path"]).exists():
            logger.warning("dropped artifact of the MLflow run: %s is gone", entry["path"])
            return
        try:
            match entry["kind"]:
                case "params":
                    self._deliver_params(entry["values"])
                case "tags":
                    self._deliver_tags(entry["values"])
                case "dataset":
                    self._deliver_dataset(entry["values"])
                case "artifact":
                    self._client.log_artifact(self._run_id, entry["path"], entry["folder"])
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            logger.warning("dropped %s of the MLflow run: %s", entry["kind"], brief(error))

    def _deliver_params(self, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        known = self._client.get_run(self._run_id).data.params
        values = {name: value[:MAX_PARAM_CHARACTERS] for name, value in params.items()}
        new = [Param(name, value) for name, value in values.items() if name not in known]
        self._client.log_batch(self._run_id, params=new, synchronous=True)
        drift = {
            name: {"first": known[name], "now": value}
            for name, value in values.items()
            if name in known and known[name] != value
        }
        if drift:
            self._deliver_tags({PARAM_DRIFT_TAG: json.dumps(drift)})

    def _deliver_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        run_tags = [RunTag(name, value) for name, value in tags.items()]
        self._client.log_batch(self._run_id, tags=run_tags, synchronous=True)

    def _deliver_dataset(self, values: dict[str, str]) -> None:
        from mlflow.entities import Dataset as Entity
        from mlflow.entities import DatasetInput, InputTag

        context = InputTag("mlflow.data.context", "pretraining")
        self._client.log_inputs(self._run_id, [DatasetInput(Entity(**values), [context])])
