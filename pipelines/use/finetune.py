"""From an encoder and labels to a registered classifier: read, train, judge, hand over.

    labelled shards -> examples -> Ray Train workers (fit.py) -> figures on the test part -> bundle

    RUNS/NAME/finetune.json     what was asked, written first: another question needs another name
    RUNS/NAME/fitted/           the weights of the best evaluation
    RUNS/NAME/bundle/           what is registered
    RUNS/NAME/account.json      what came out, written last

What a run has finished is not made twice; a training that was killed begins anew.
"""

import json
import shutil
import uuid
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.train
import ray.train.torch
from pydantic import TypeAdapter
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import FailureConfig
from safetensors.torch import load_file, save_file

from pipelines.cluster import cluster, unwrap
from pipelines.config import MODEL_NAME, RUN_NAME, RUN_NAME_ADVICE
from pipelines.console import Progress, say
from pipelines.errors import TrainingError, UserError
from pipelines.pretrain import REGISTRY_TIMEOUT_SECONDS, register_bundle
from pipelines.storage import held, write_file, write_folder, write_json
from pipelines.training.lineage import code_version
from pipelines.training.tracking import RUN_KEY_TAG, Tracker, is_finished
from pipelines.training.workers import followed, root_cause
from pipelines.use.bundle import tells, write_bundle
from pipelines.use.classification_figures import ClassificationFigures, figures
from pipelines.use.classifier import probabilities
from pipelines.use.fit import FitTask, Fitted, fit
from pipelines.use.inputs import inputs_of
from pipelines.use.labelled import read
from pipelines.use.registry import CLASSES, open_model
from ssl_models.classification import Classification, ClassificationConfig

if TYPE_CHECKING:
    from pipelines.verbs_finetune import Finetune


@dataclass(frozen=True, eq=False, kw_only=True)
class Origin:
    """Where a classifier comes from."""

    model: str
    """URI of its encoder, with its version."""
    sha256: str
    """Of the encoder."""
    fingerprints: tuple[str, ...]
    """Of the labelled data, in the order training, validation, test."""


def finetune(asked: "Finetune") -> dict[str, Any]:
    """Train, judge and register a classifier; return its account.

    Raises:
        UserError: If the model, the data or the folder cannot be used as they are.
        TrainingError: If the workers failed.
    """
    if not RUN_NAME.fullmatch(asked.name):
        raise UserError(f"--name {asked.name!r}: {RUN_NAME_ADVICE}")
    run_dir = Path(asked.runs) / asked.name
    busy = f"run {asked.name!r} is being made by another process; wait, or choose another --name"
    with held(run_dir, busy), cluster(asked.address, asked.workers, verbose=asked.verbose):
        model, sha256, encoder = open_model(asked.model, asked.tracking_uri)
        data, fingerprints = read(asked.source, encoder, Path(asked.runs))
        task = FitTask(config=asked.training, encoder=encoder, labelled=data)
        origin = Origin(model=model, sha256=sha256, fingerprints=fingerprints)
        key = _begin(asked, origin, run_dir)
        account = run_dir / "account.json"
        made: dict[str, Any] = json.loads(account.read_text()) if account.exists() else {}
        if made.get("tracking_uri") == asked.tracking_uri and is_finished(run_dir):
            say(f"{made['registered']} is registered; MLflow run {made['mlflow_run']}")
            return made
        say(f"{data.line()}; {task.schedule.steps} steps at most, in {run_dir}")
        tracker = Tracker(run_dir, asked.tracking_uri, asked.experiment, key, asked.name)
        tracker.start()
        tracker.log_params(_params(asked))
        tracker.set_tags({"rayssl.encoder": model, "rayssl.fingerprint": fingerprints[0]})
        status: Any = "FAILED"
        try:
            fitted = _train(task, asked, run_dir.resolve())
            made = _finish(task, fitted, _Place(asked, origin, run_dir, tracker, key))
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            if not tracker.close(status, REGISTRY_TIMEOUT_SECONDS if status == "FINISHED" else 5):
                say(f"MLflow has not taken everything; what waits is in {run_dir}")
    return made


def judge(task: FitTask, objective: Classification) -> ClassificationFigures:
    """Return the figures of a trained classifier on the test examples."""
    inputs, test = inputs_of(task.encoder), task.labelled.test
    found = probabilities(objective, inputs, inputs.rows([example.item for example in test]))
    return figures(task.labelled.classes, np.array(task.labelled.numbers(test)), found)


@dataclass(frozen=True, eq=False)
class _Place:
    """Where what comes out goes."""

    asked: "Finetune"
    origin: Origin
    run_dir: Path
    tracker: Tracker
    key: str


def _begin(asked: "Finetune", origin: Origin, run_dir: Path) -> str:
    """Record what is asked, or see that it was this; return the key of the run.

    Raises:
        UserError: If the run was made of something else.
    """
    question = {
        "labels": asked.source.labels,
        "text_field": asked.source.text_field,
        "image_field": asked.source.image_field,
        "text_pair_field": asked.source.text_pair_field,
        "ratios": list(asked.source.ratios),
        "register": register_name(asked, origin.model),
        "training": asdict(asked.training),
        "origin": json.loads(json.dumps(asdict(origin))),
    }
    path, key = run_dir / "finetune.json", uuid.uuid4().hex
    if (run_dir / "run.json").exists():
        raise UserError(f"run {asked.name!r} is a pretraining: choose another --name")
    if path.exists():
        recorded = json.loads(path.read_text())
        if different := [name for name in question if recorded.get(name) != question[name]]:
            raise UserError(
                f"run {asked.name!r} was made with another {' and '.join(different)}: "
                "give it what it was made with, or choose another --name"
            )
        key = recorded["key"]
    write_json(path, {"key": key, **question})
    return key


def register_name(asked: "Finetune", model: str) -> str:
    """Return the name that the classifier is registered under.

    Raises:
        UserError: If it cannot be one.
    """
    path = Path(model.rpartition("/")[0] if model.startswith("models:/") else model).absolute()
    of_encoder = path.parent.name if path.name == "bundle" else path.name
    name = asked.register or f"{of_encoder}-{asked.source.labels}"
    if not MODEL_NAME.fullmatch(name):
        raise UserError(f"--register {name!r}: use letters, digits, space and _ . -")
    return name


def _params(asked: "Finetune") -> dict[str, str]:
    told = {"model": asked.model, "workers": asked.workers, **asdict(asked.source)}
    told |= {f"training.{name}": value for name, value in asdict(asked.training).items()}
    return {name: str(value) for name, value in told.items()}


def _train(task: FitTask, asked: "Finetune", run_dir: Path) -> Fitted:
    """Train in Ray Train workers, unless it was done; return the best weights.

    Raises:
        TrainingError: If the workers failed.
        UserError: The one that a worker raised.
    """
    folder = run_dir / "fitted"
    if not folder.exists():
        use_gpu = ray.cluster_resources().get("GPU", 0) >= asked.workers
        trainer = TorchTrainer(
            partial(_worker, ray.put(task), run_dir),
            torch_config=TorchConfig(timeout_s=300),
            scaling_config=ray.train.ScalingConfig(num_workers=asked.workers, use_gpu=use_gpu),
            run_config=ray.train.RunConfig(
                name="ray",
                storage_path=str(run_dir / "ray"),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )
        progress = Progress(run_dir, task.schedule)
        error = followed(trainer.fit, progress.update)
        progress.close()
        if error is not None:
            if isinstance(found := unwrap(error), UserError):
                raise found from error
            raise TrainingError(
                f"training failed: {root_cause(error)}; the same command begins anew, "
                "--verbose shows more"
            ) from error
    figures_of = json.loads((folder / "fitted.json").read_text())
    return Fitted(weights=load_file(folder / "model.safetensors"), **figures_of)


def _worker(task_ref: "ray.ObjectRef[FitTask]", run_dir: Path) -> None:
    fitted = fit(ray.get(task_ref), ray.train.torch.get_device(), run_dir / "spool")
    if ray.train.get_context().get_world_rank() == 0:
        figures_of = {name: value for name, value in fitted._asdict().items() if name != "weights"}

        def fill(aside: Path) -> None:
            save_file(fitted.weights, aside / "model.safetensors")
            write_json(aside / "fitted.json", figures_of)

        write_folder(run_dir / "fitted", fill)


def _finish(task: FitTask, fitted: Fitted, place: _Place) -> dict[str, Any]:
    """Judge and register what was trained."""
    asked, origin, run_dir, tracker = place.asked, place.origin, place.run_dir, place.tracker
    say(fitted.line())
    objective = Classification(task.objective)
    objective.load_state_dict(fitted.weights)
    found = judge(task, objective)
    for line in found.lines():
        say(line)
    write_file(run_dir / "confusion.png", found.draw)
    write_json(run_dir / "figures.json", asdict(found))
    for name in ("confusion.png", "figures.json", "finetune.json"):
        tracker.log_artifact(run_dir / name, "finetune")
    tracker.log_final_metrics(found.metrics(), fitted.steps_made)
    run_id = tracker.wait_for_run_id(REGISTRY_TIMEOUT_SECONDS)
    if not tells(run_dir / "bundle", {"mlflow_run": run_id}):  # nor one for another store
        shutil.rmtree(run_dir / "bundle", ignore_errors=True)
        _write_bundle(task, fitted, found, place)
    name = register_name(asked, origin.model)
    tags = {
        RUN_KEY_TAG: place.key,
        "rayssl.fingerprint": origin.fingerprints[0],
        "rayssl.encoder": origin.model,
    }
    registered = register_bundle(run_dir / "bundle", asked.tracking_uri, run_id, name, tags)
    account = {
        "run": asked.name,
        "steps": fitted.steps_made,
        "best_step": fitted.step,
        "validation_accuracy": fitted.accuracy,
        "evaluation": found.metrics(),
        "encoder": origin.model,
        "mlflow_run": run_id,
        "tracking_uri": asked.tracking_uri,
        "registered": registered.model_uri,
    }
    write_json(run_dir / "account.json", account)
    say(f"registered {registered.model_uri} as candidate; MLflow run {run_id}")
    return account


def _write_bundle(
    task: FitTask, fitted: Fitted, found: ClassificationFigures, place: _Place
) -> None:
    """Write the classifier as an encoder with a head, which tells what it was made from."""
    asked, origin, encoder = place.asked, place.origin, task.encoder
    objective = TypeAdapter(ClassificationConfig).dump_python(task.objective, mode="json")
    rows: dict[str, Any] = {
        name: encoder.config[name] for name in ("text", "images") if name in encoder.config
    }
    lineage = {
        "run_key": place.key,
        "encoder": origin.model,
        "encoder_sha256": origin.sha256,
        "fingerprint": origin.fingerprints[0],
        "fingerprints": list(origin.fingerprints),
        "labels": asked.source.labels,
        "seed": asked.training.seed,
        "steps": fitted.step,
        "mlflow_run": place.tracker.run_id,
        **code_version(),
    }
    card = (
        f"# {register_name(asked, origin.model)}\n\nTells {asked.source.labels!r} of its input, "
        f"one of {len(found.classes)} classes: {origin.model} fine-tuned by rayssl.\n\n"
        f"## Data\n\n{task.labelled.line()}; fingerprint {origin.fingerprints[0]}\n\n"
        f"## Test figures\n\n{found.lines()[0]}\n\n```\n{found.lines()[1]}\n```\n\n"
        f"## Limits\n\nKnows no other classes; its probabilities were not calibrated.\n"
    )
    write_bundle(
        place.run_dir / "bundle",
        config={
            "objective": objective,
            CLASSES: list(task.labelled.classes),
            "pairs": bool(asked.source.text_pair_field),
            **rows,
        },
        state=fitted.weights,
        tokenizer_json=encoder.pieces.json if encoder.pieces else None,
        lineage=lineage,
        card=card,
    )
