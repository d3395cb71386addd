"""`rayssl evaluate`: figures of a run or a model on what it was not trained on, or of labels."""

import dataclasses
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from pipelines.data.records import Modality
from pipelines.data.shards import SourceConfig
from pipelines.errors import UserError
from pipelines.verbs import Address, all_of, indexed, is_model, run_folder

if TYPE_CHECKING:
    from pipelines.data.manifest import Manifest
    from pipelines.use.evaluate import Evaluation
    from pipelines.use.evaluate_images import ImageEvaluation
    from pipelines.use.evaluate_labels import LabelEvaluation


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a run's newest commit, or a model, on what it was not trained on."""

    name: tyro.conf.Positional[str]
    """Name of a run, models:/NAME@ALIAS, models:/NAME/VERSION or the folder of a bundle."""
    data: tuple[str, ...] = ()
    """Files, folders or quoted globs, all of whose records count as held out; without them a run
    is measured on what it has held out itself. With --labels, what a probe learns from."""
    labels: str = ""
    """Field of a record, such as cls: how well it is told from frozen features is measured, by a
    linear probe and by kNN, beside raw pixels or TF-IDF and beside the untrained encoder."""
    test: tuple[str, ...] = ()
    """Of --labels: what a probe is asked for; without, a fifth of --data by its content."""
    num_labelled: int = 1000
    """Of --labels: how many items of --data a probe learns from."""
    seeds: int = 3
    """Of --labels: draws of labelled items, and of an untrained encoder."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    tracking_uri: str = "sqlite:///mlflow.db"
    """Where the model is registered."""
    address: Address = ""
    source: SourceConfig = field(default_factory=SourceConfig)
    """How --data is read."""

    def run(self) -> dict[str, Any]:
        """Print held-out figures beside what they have to beat."""
        evaluation: Evaluation | ImageEvaluation | LabelEvaluation
        if self.labels:
            evaluation = self._of_labels()
        elif self.test:
            raise UserError("--test is what is asked of a probe: name a field with --labels")
        else:
            evaluation = self._of_model() if is_model(self.name) else self._of_run()
        print("\n".join(evaluation.lines()))
        return evaluation.metrics()

    def _of_model(self) -> "Evaluation":
        from pipelines.use.evaluate import evaluate_encoder, text_config
        from pipelines.use.registry import load_encoder

        if not self.data:
            raise UserError(f"{self.name} holds no data to measure it on: name some with --data")
        encoder = load_encoder(self.name, self.tracking_uri)
        if encoder.modality == "images":
            raise UserError(
                f"{self.name} is an encoder of images without what trained it: measure it by "
                "--labels, or its run by name"
            )
        text_config(encoder)  # refused before anything is read
        with self._held_out(encoder.modality) as manifest:
            return evaluate_encoder(encoder, manifest)

    def _of_run(self) -> "Evaluation | ImageEvaluation":
        from pipelines.run import load_run
        from pipelines.training.loop import load_objective
        from pipelines.use.commit_figures import evaluate_run

        run = load_run(run_folder(self.runs, self.name))
        objective = load_objective(run)
        if not self.data:
            return evaluate_run(objective, run)
        with self._held_out(run.config.modality) as manifest:
            return evaluate_run(objective, run, manifest)

    def _of_labels(self) -> "LabelEvaluation":
        from pipelines.run import load_run
        from pipelines.use.evaluate_labels import TEST_RATIO, encoder_of, evaluate_labels
        from pipelines.use.labelled_features import Part
        from pipelines.use.registry import load_encoder

        if not self.data:
            raise UserError("--labels needs labelled records: name some with --data")
        if is_model(self.name):
            encoder = load_encoder(self.name, self.tracking_uri)
        else:
            encoder = encoder_of(load_run(run_folder(self.runs, self.name)))
        measure = partial(
            evaluate_labels,
            encoder,
            labels=self.labels,
            num_labelled=self.num_labelled,
            seeds=self.seeds,
        )
        folder, modality = self.runs / ".index", encoder.modality
        if self.test:
            asked, source = dataclasses.replace(self, data=self.test), all_of(self.source)
            with (
                self._held_out(modality) as manifest,
                indexed(asked, source, folder / "test.json", modality) as test,
            ):
                return measure(Part(manifest, "training"), Part(test, "training"))
        source = dataclasses.replace(self.source, heldout_ratio=TEST_RATIO)
        with indexed(self, source, folder / "labels.json", modality) as manifest:
            return measure(Part(manifest, "training"), Part(manifest, "heldout"))

    def _held_out(self, modality: Modality) -> "AbstractContextManager[Manifest]":
        cache = self.runs / ".index" / "evaluate.json"
        return indexed(self, all_of(self.source), cache, modality)
