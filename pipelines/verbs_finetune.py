"""The verbs that use labels: their flags, and what they print."""

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pipelines.data.filesystems import holds_secret
from pipelines.errors import UserError
from pipelines.training.mlflow_client import SECRET_IN_URI
from pipelines.use.finetune_config import FinetuneConfig, LabelledData
from pipelines.verbs import Address, Model, refuse_shard

Labelled = Annotated[LabelledData, tyro.conf.arg(name="")]
"""Its flags stand beside those of the verb."""


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Fine-tune an encoder on labelled texts, pairs of texts or pictures, and register it."""

    model: Model
    source: Labelled
    task: Literal["classify"] = "classify"
    """What is learned: one label of each item."""
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
        if holds_secret(self.tracking_uri):
            raise UserError(SECRET_IN_URI)
        if not 1 <= self.workers <= self.training.slots:
            raise UserError(
                f"workers must be in 1..{self.training.slots}, the slots, got {self.workers}"
            )

    def run(self) -> dict[str, Any]:
        """Print figures on test examples, the confusion matrix and what was registered."""
        from pipelines.use.finetune import finetune

        name = self.name or time.strftime("finetune-%Y%m%d-%H%M%S")
        return finetune(replace(self, name=name))


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """Compare a fine-tuned encoder with the same net from scratch and a linear model.

    At fractions of the labels, with several seeds: does the pretraining pay?
    """

    model: Model
    source: Labelled
    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Shares of the labels."""
    seeds: int = 3
    """How often each is trained, each time on another share; of all labels there is one."""
    most: int = 0
    """So many training and validation examples count as all of them; 0 for all that there are."""
    out: Path = Path("label-table.json")
    """Where the figures are written."""
    runs: str = "runs"
    """Folder of all runs, where what is read is remembered."""
    tracking_uri: str = "sqlite:///mlflow.db"
    """Where the model is registered."""
    address: Address = ""
    training: FinetuneConfig = field(default_factory=FinetuneConfig)

    def __post_init__(self) -> None:
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise UserError(f"fractions must be above 0 and at most 1, got {self.fractions}")
        if self.seeds < 1:
            raise UserError(f"seeds must be at least 1, got {self.seeds}")
        if self.most < 0:
            raise UserError(f"most must be at least 0, got {self.most}")

    def run(self) -> dict[str, Any]:
        """Print the table; every contestant is trained and judged on the same examples."""
        from pipelines.cluster import cluster
        from pipelines.storage import write_json, writing
        from pipelines.use.fit import FitTask
        from pipelines.use.label_table import at_most, label_table, show
        from pipelines.use.labelled import read
        from pipelines.use.registry import open_model

        refuse_shard(self.out)
        with writing(self.out), self.out.open("a"):
            pass  # sooner than after hours
        model, sha256, encoder = open_model(self.model, self.tracking_uri)
        encoder.refuse_classifier()
        with cluster(self.address, 1, verbose=False):
            found, fingerprints = read(self.source, encoder, Path(self.runs))
            data = at_most(found, self.most)
            print(f"{model}: {data.line()}", flush=True)
            task = FitTask(config=self.training, encoder=encoder, labelled=data)
            rows = label_table(task, self.fractions, self.seeds)
        print(show(rows))
        result = {
            "model": model,
            "bundle_sha256": sha256,
            "fingerprints": list(fingerprints),
            "examples": data.line(),
            "seeds": self.seeds,
            "training": asdict(self.training),
            "rows": [row.record() for row in rows],
        }
        write_json(self.out, result)
        return result
