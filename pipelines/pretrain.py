"""From a config to a registered encoder: index, vocabulary, training, evaluation, handover.

Each stage leaves its result in the run's folder and is not made twice, so the same command goes
on after any interruption, and does nothing but report once all is done.
"""

import json
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import FailureConfig

from pipelines.cluster import ClusterError, cluster, unwrap
from pipelines.config import RunConfig, to_flat, to_record
from pipelines.console import Progress, say
from pipelines.errors import OutageError, TrainingError, UserError
from pipelines.run import Run, locked, open_run
from pipelines.storage import write_json
from pipelines.training.checkpoint import Commit, CommitLog
from pipelines.training.feed import PlannedDataConfig
from pipelines.training.lineage import code_version, dataset_of, submission_id
from pipelines.training.loop import Job, load_objective, train_worker
from pipelines.training.mlflow_client import answered
from pipelines.training.spool import read_spool
from pipelines.training.tracking import RUN_KEY_TAG, Tracker, is_finished
from pipelines.training.workers import followed, root_cause
from pipelines.use.bundle import tells, write_bundle
from pipelines.use.card import model_card
from pipelines.use.commit_figures import CommitFigures, evaluate_run, show_run
from pipelines.use.evaluate import Evaluation
from pipelines.use.evaluate_images import ImageEvaluation
from pipelines.use.heldout import NothingHeldOutError
from pipelines.use.registry import RECIPE_TAG, Registered, register
from ssl_models.objective import Objective

CPUS_FOR_DATA = 1
REGISTRY_TIMEOUT_SECONDS = 120.0
NOT_EVALUATED = "nothing is held out: the encoder is not evaluated"
LICENCE_TAG = "rayssl.data_licence"
HANDOVER = ("digest", "register", "data_licence", "mlflow_run")
"""What a lineage tells that another command, or another store, may want otherwise."""
TOLD_OF_LINEAGE = ("fingerprint", "seed", "steps", "started_from", "git_commit", "git_dirty")
"""Of the lineage, what is a tag of the version too."""
CURVES = {
    "entropy": "entropy of the prediction",
    "p_true": "p(true token)",
    "triplet_loss": "triplet loss",
    "active": "share of active triplets",
    "nt_xent_loss": "NT-Xent loss",
    "reconstruction_loss": "reconstruction loss",
}
"""Metrics whose first and last value are told, where an objective has them."""


def pretrain(config: RunConfig) -> dict[str, Any]:
    """Run the stages of a pretraining run that are still to be made; return its account.

    Raises:
        UserError: If the config, the data or the folder cannot be used as they are.
        TrainingError: If the workers failed more often than `max_restarts`.
    """
    with (
        locked(config) as run_dir,
        cluster(config.address, config.workers + CPUS_FOR_DATA, verbose=config.verbose),
    ):
        _refuse_few_gpus(config)
        run = open_run(config, run_dir)
        describe(run)
        if (made := _made(run)) and is_finished(run_dir):
            say(f"all {config.steps} steps have been made")
            say(_registered_line(made))
            return made
        tracker = start_tracking(run)
        status: Any = "FAILED"
        try:
            figures = CommitFigures(run, tracker.log_artifact)
            train(run, update=figures.update)
            if _made(run) is None:  # a run that is done has no figures to be waited for
                figures.close()
            account = finish(run, tracker)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            if not tracker.close(status, REGISTRY_TIMEOUT_SECONDS if status == "FINISHED" else 5):
                say(f"MLflow has not taken everything; what waits is in {run_dir}")
    return account


def _refuse_few_gpus(config: RunConfig) -> None:
    """See that each worker can have the GPU that it is to have.

    Raises:
        ClusterError: If it cannot.
    """
    found = int(ray.cluster_resources().get("GPU", 0))
    if config.device == "cuda" and found < config.workers:
        raise ClusterError(
            f"--device cuda takes a GPU for each of {config.workers} workers, and the cluster has "
            f"{found}: add nodes with GPUs, ask for fewer --workers, or leave --device out"
        )


def train(run: Run, worker: Any = train_worker, update: Callable[[], None] = lambda: None) -> None:
    """Train from the newest commit to the last step, in as many attempts as that takes.

    An attempt that ends before the last step without an error had too few rows planned. `update`
    is called from time to time meanwhile.

    Raises:
        TrainingError: If the workers failed more often than `max_restarts`, or cannot succeed.
        UserError: The one that a worker raised; but for an outage it is not tried again.
    """
    failures = 0
    step, last = _steps_made(run), run.config.steps
    if step >= last:
        say(f"all {step} steps have been made")
    while step < last:
        error = _attempt(run, worker, update)
        before, step = step, _steps_made(run)
        if error is not None:
            failures += 1
            if failures > run.config.max_restarts:
                raise TrainingError(
                    f"training failed: {error}; the same command goes on from the newest commit, "
                    "--verbose shows more"
                )
            say(f"the workers failed: {error}; restart {failures} of {run.config.max_restarts}")
        elif step <= before:
            raise TrainingError(
                f"the work orders planned from step {step} on hold no further "
                f"{run.config.order.steps_per_block} steps: this corpus is too uneven"
            )


def finish(run: Run, tracker: Tracker) -> dict[str, Any]:
    """Evaluate, register and report a run whose steps have all been made, each once."""
    if made := _made(run):
        say(_registered_line(made))
        return made
    commit, _ = run.log.newest_whole()
    assert commit is not None
    objective = load_objective(run)
    evaluation = evaluate_heldout(objective, run)
    figures, metrics = (evaluation.lines(), evaluation.metrics()) if evaluation else ([], {})
    if evaluation and run.started_from:
        figures.append(f"{run.started_from}, which it started from, may have been trained on them")
    for line in [*figures, *_curves(run)]:
        say(line)
    tracker.log_final_metrics(metrics, commit.step)
    shown = show_run(objective, run)
    # Those of earlier steps again: another store has none of them.
    for path in sorted((run.dir / shown.folder).rglob("[!.]*.*")):
        tracker.log_artifact(path, str(path.parent.relative_to(run.dir)))
    ledger = {
        "records": {fate: vars(entry) for fate, entry in run.manifest.ledger.items()},
        "rows": commit.fates,
        "quarantined": [vars(entry) for entry in run.manifest.quarantined],
    }
    write_json(run.dir / "ledger.json", ledger)
    tokenizer = ("tokenizer.json",) if run.pieces else ()
    for name in ("run.json", "manifest.json", "ledger.json", *tokenizer):
        tracker.log_artifact(run.dir / name, "run")
    registered = hand_over(run, commit, objective, figures, tracker)
    account = {
        "run": run.config.name,
        "steps": commit.step,
        "digest": commit.digest,
        "ledger": ledger["rows"],
        "evaluation": metrics,
        "mlflow_run": tracker.run_id,
        "handed_over": _handed_over(run.config),
        "registered": registered.model_uri,
    }
    write_json(run.dir / "account.json", account)
    say(f"registered {registered.model_uri} as candidate; MLflow run {tracker.run_id}")
    return account


def evaluate_heldout(objective: Objective, run: Run) -> Evaluation | ImageEvaluation | None:
    """Return the held-out figures of a run, or None where nothing that is held out gives any."""
    if not _holds_out(run):
        return None
    try:
        return evaluate_run(objective, run)
    except NothingHeldOutError as error:
        say(f"{error}: the encoder is not evaluated")
        return None


def _made(run: Run) -> dict[str, Any] | None:
    """Return the account of a run that has made its steps and was handed over as it now asks."""
    path, commit = run.dir / "account.json", run.log.newest_whole()[0]
    if not path.exists() or commit is None or commit.step < run.config.steps:
        return None
    account: dict[str, Any] = json.loads(path.read_text())
    is_this = account["digest"] == commit.digest
    return account if is_this and account.get("handed_over") == _handed_over(run.config) else None


def _registered_line(account: dict[str, Any]) -> str:
    return f"{account['registered']} is registered; MLflow run {account['mlflow_run']}"


def _handed_over(config: RunConfig) -> dict[str, str]:
    """Return where a run is handed over to, and what it says there, of what may change."""
    return {name: getattr(config, name) for name in ("tracking_uri", "register", "data_licence")}


def hand_over(
    run: Run, commit: Commit, objective: Objective, figures: Sequence[str], tracker: Tracker
) -> Registered:
    """Write the bundle of a trained encoder, unless it is there, and register it once."""
    folder = run.dir / "bundle"
    run_id = tracker.wait_for_run_id(REGISTRY_TIMEOUT_SECONDS)
    lineage = {
        "run_key": run.key,
        "fingerprint": run.manifest.fingerprint,
        "seed": run.config.seed,
        "steps": run.config.steps,
        "started_from": run.started_from,
        "digest": commit.digest,
        "register": run.config.register,
        "data_licence": run.config.data_licence,
        "mlflow_run": run_id,
        **code_version(),
    }
    if not tells(folder, {name: lineage[name] for name in HANDOVER}):
        shutil.rmtree(folder, ignore_errors=True)
        record = to_record(run.config)
        write_bundle(
            folder,
            config={name: record[name] for name in ("objective", run.config.modality, "recipe")},
            state={
                name: tensor
                for name, tensor in objective.state_dict().items()
                if not name.startswith(objective.pretraining_only)
            },
            tokenizer_json=run.pieces.json if run.pieces else None,
            lineage=lineage,
            card=model_card(run, figures or [NOT_EVALUATED], lineage),
        )
    tags = _version_tags(run, lineage)
    return register_bundle(folder, run.config.tracking_uri, run_id, run.config.register, tags)


def register_bundle(
    folder: Path, tracking_uri: str, run_id: str, name: str, tags: dict[str, str]
) -> Registered:
    """Register a bundle once.

    Raises:
        TrackingError: If MLflow does not, for now.
    """
    with answered(tracking_uri, f"{folder} is whole: the same command registers it later"):
        return register(folder, tracking_uri=tracking_uri, run_id=run_id, name=name, tags=tags)


def _version_tags(run: Run, lineage: dict[str, Any]) -> dict[str, str]:
    """Return what a version is looked up by."""
    tags = {
        RUN_KEY_TAG: run.key,
        RECIPE_TAG: run.config.recipe,
        LICENCE_TAG: run.config.data_licence,
        **{f"rayssl.{name}": str(lineage[name]) for name in TOLD_OF_LINEAGE},
    }
    return {name: value for name, value in tags.items() if value}


def start_tracking(run: Run) -> Tracker:
    """Start to send what the run logs; a server that is down delays nothing."""
    config = run.config
    tracker = Tracker(run.dir, config.tracking_uri, config.experiment, run.key, config.name)
    tracker.log_params({name: str(value) for name, value in to_flat(to_record(config)).items()})
    known = {
        "fingerprint": run.manifest.fingerprint,
        "submission_id": submission_id(),
        **code_version(),
    }
    tracker.set_tags({f"rayssl.{name}": value for name, value in known.items() if value})
    tracker.start(dataset_of(run.manifest))
    return tracker


def describe(run: Run) -> None:
    """Say what is about to be trained on what."""
    manifest, config = run.manifest, run.config
    size = sum(shard.bytes for shard in manifest.shards)
    ledger = ", ".join(f"{entry.records} {fate}" for fate, entry in manifest.ledger.items())
    things = "documents" if run.pieces else "pictures"
    rows = f"vocabulary {run.pieces.size}" if run.pieces else f"{config.images.views.size} pixels"
    say(f"{len(manifest.shards)} shards, {size / 1e6:.1f} MB: {ledger} {things}")
    say(
        f"run {config.name}: {config.recipe}, {rows}, {config.steps} "
        f"steps of {config.order.rows_per_step} rows, in {run.dir}"
    )
    if run.pieces and (reason := run.pieces.slow_because):
        say(f"tokens are made by the slower of two tokenizers: {reason}")
    if not _holds_out(run):
        say(f"{NOT_EVALUATED}; a run with a larger --source.heldout-ratio would be")


def _holds_out(run: Run) -> bool:
    return run.manifest.records_where("heldout") > 0


def _steps_made(run: Run) -> int:
    commit, _ = run.log.newest_whole()  # one that is spoilt is made again
    return commit.step if commit else 0


def _attempt(run: Run, worker: Any, update: Callable[[], None]) -> str | None:
    """Start the workers once, show how they get on, and return why they failed, if they did.

    Raises:
        UserError: The one that a worker raised, but for an outage.
    """
    progress = Progress(run.dir, run.config)
    error = followed(lambda: _fit(run, worker), progress.update, update)
    progress.close()
    if error is None:
        return None
    found = unwrap(error)
    if isinstance(found, UserError) and not isinstance(found, OutageError):
        raise found from error
    if run.config.verbose:
        traceback.print_exception(error)
    return str(found) if isinstance(found, OutageError) else root_cause(error)


def _fit(run: Run, worker: Any) -> None:
    config, log = run.config, CommitLog(run.dir.resolve())
    source_ref = ray.put(run.source)
    use_gpu = config.device == "cuda" or (
        config.device == "auto" and ray.cluster_resources().get("GPU", 0) >= config.workers
    )
    trainer = TorchTrainer(
        partial(worker, Job(config, log.run_dir, source_ref)),
        torch_config=TorchConfig(timeout_s=300),
        scaling_config=ray.train.ScalingConfig(num_workers=config.workers, use_gpu=use_gpu),
        run_config=ray.train.RunConfig(
            # A name of its own for every start: our commit log resumes, not Ray's snapshot.
            name=f"ray-{len(log.attempts()):06d}-{time.time_ns()}",
            storage_path=str(log.run_dir / "ray"),
            # Failures are counted by `train`, which knows which of them are worth another attempt.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
        # Only its name counts: PlannedDataConfig makes the real one at every start.
        datasets={"train": ray.data.range(1)},
        dataset_config=PlannedDataConfig(log, source_ref, config.order, config.steps),
    )
    trainer.fit()


def _curves(run: Run) -> list[str]:
    """Return how the metrics of training batches changed from the first to the last step."""
    records = [r for r in read_spool(run.dir / "spool", {}) if "loss" in r.metrics]
    first, last = records[0], records[-1]
    changes = (
        f"{name} {first.metrics[key]:.3f} to {last.metrics[key]:.3f}"
        for key, name in CURVES.items()
        if key in first.metrics
    )
    return [
        f"from step {first.step} to {last.step}: {', '.join(changes)}; all curves are in MLflow"
    ]
