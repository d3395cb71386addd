"""The verbs that use labels: their flags, and what they print."""

import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import tyro

from pipelines.errors import UserError
from pipelines.use.finetune_config import FinetuneConfig
from pipelines.verbs import Address, Model


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Fine-tune an encoder on labelled texts, pairs of texts or pictures, and register it."""

    model: Model
    data: tyro.conf.Positional[tuple[str, ...]]
    """Labelled shards: files, folders or quoted globs, as for pretraining."""
    labels: str
    """Field of a record that holds its label: of a jsonl line, a column of a parquet shard, and of
    a tar the extension of a sample's file (cls), or a field of its json."""
    task: Literal["classify"] = "classify"
    """What is learned: one label of each item."""
    text_field: str = "text"
    """Field that holds the text."""
    text_pair_field: str = ""
    """Field that holds the second text, where the label is of a pair."""
    validation: tuple[str, ...] = ()
    """Labelled shards to choose the best weights by, instead of a part of the data."""
    test: tuple[str, ...] = ()
    """Labelled shards to measure the result on, instead of a part of the data."""
    validation_ratio: float = 0.1
    """Share of the data, chosen by a hash of its content, without --validation."""
    test_ratio: float = 0.15
    """Share of the data, chosen by a hash of its content, without --test."""
    name: str = ""
    """The run lives in RUNS/NAME; the same command does not train twice."""
    runs: str = "runs"
    """Folder of all runs; on a cluster, one that every node sees."""
    workers: int = 1
    """Ray Train workers, up to the slots; the steps do not depend on it."""
    register: str = ""
    """Name in the model registry, MODEL-LABELS by default; gets the alias `candidate`."""
    tracking_uri: str = "sqlite:///mlflow.db"
    """Where MLflow tracks and registers."""
    experiment: str = "rayssl"
    """MLflow experiment."""
    address: Address = ""
    verbose: bool = False
    """Show what Ray says."""
    training: FinetuneConfig = field(default_factory=FinetuneConfig)

    def __post_init__(self) -> None:
        check_ratios(self.validation_ratio, self.test_ratio)
        if not 1 <= self.workers <= self.training.slots:
            raise UserError(
                f"workers must be in 1..{self.training.slots}, the slots, got {self.workers}"
            )

    def run(self) -> dict[str, Any]:
        """Print figures on test examples, the confusion matrix and what was registered."""
        from pipelines.use.finetune import finetune

        return finetune(self if self.name else replace(self, name=self._new_name()))

    def _new_name(self) -> str:
        return time.strftime("finetune-%Y%m%d-%H%M%S")


def check_ratios(validation: float, test: float) -> None:
    """Refuse parts that leave nothing to train on.

    Raises:
        UserError: If a ratio is negative, or both are no less than 1.
    """
    if validation < 0 or test < 0 or validation + test >= 1:
        raise UserError(
            "validation_ratio and test_ratio must be at least 0 and together below 1, got "
            f"{validation} and {test}"
        )
