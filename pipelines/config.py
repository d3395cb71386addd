"""The record of a run: every number that decides what it does, in one frozen value."""

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from pipelines.data.manifest import GATES
from pipelines.data.plan import OrderConfig
from pipelines.data.shards import SourceConfig
from pipelines.data.text_config import TextConfig
from pipelines.data.vocabulary import VocabularyConfig
from pipelines.errors import DataError, nearest
from ssl_models.masked_language import MaskedLanguageConfig
from ssl_models.optim import OptimizerConfig

MODEL_NAME = re.compile(r"[\w.\- ]+")
"""Of a registered model, so that models:/NAME@ALIAS can be told apart."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One pretraining run."""

    recipe: str
    """The named run that this one started from."""
    data: tuple[str, ...] = ()
    """Raw shards: files, folders or quoted globs, local or as URIs such as s3://bucket/folder;
    .txt and .jsonl, plain, .gz or .zst, and .parquet."""
    weights: tuple[float, ...] = ()
    """How often an epoch uses each pattern of --data, one number each: 2 is twice, 0.5 is one
    half, another half in the next epoch; without any, all of it once."""
    name: str = ""
    """The run lives in RUNS/NAME; the same name goes on where that run stopped."""
    runs: str = "runs"
    """Folder of all runs; on a cluster, one that every node sees."""
    steps: int = 1000
    """Optimizer steps."""
    workers: int = 2
    """Ray Train workers, from 1 to the recipe's slots; the batches do not depend on it."""
    threads_per_worker: int = 1
    """CPU threads of one worker; fixed, so that a resumed run adds numbers in the same order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes GPUs if the cluster has one for each worker; cuda computes in bfloat16."""
    compile: bool = False
    """Compile the model with torch.compile, up to minutes at each start. It rounds otherwise and
    draws other dropout masks, so a run keeps to what it was started with."""
    seed: int = 0
    checkpoint_every: int = 100
    """Steps between commits; what is lost at most when everything dies."""
    log_every: int = 10
    """Steps between logged metrics."""
    max_restarts: int = 3
    """How often a failed group of workers is started again from the newest commit."""
    init_from: str = ""
    """An encoder whose weights and vocabulary the run starts with: models:/NAME@ALIAS, or the
    folder of a bundle, a finished run or a BERT of transformers; drawn anew without."""
    vocabulary_file: str = ""
    """A WordPiece tokenizer.json or the vocab.txt of a BERT, to use instead of training one."""
    register: str = "rayssl-text"
    """Name in the model registry; the new version gets the alias `candidate`."""
    tracking_uri: str = "sqlite:///mlflow.db"
    """Where MLflow tracks and registers."""
    experiment: str = "rayssl"
    """MLflow experiment."""
    address: str = ""
    """Address of a Ray cluster; without one, a local Ray of workers + 2 CPUs is started."""
    verbose: bool = False
    """Show what Ray says."""

    source: SourceConfig = field(default_factory=SourceConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    text: TextConfig = field(default_factory=TextConfig)
    order: OrderConfig = field(default_factory=OrderConfig)
    objective: MaskedLanguageConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "threads_per_worker", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not re.fullmatch(r"[\w-][\w.-]*|", self.name):
            raise ValueError(f"name {self.name!r}: use letters, digits and _ . - (no leading dot)")
        if not MODEL_NAME.fullmatch(self.register):
            raise ValueError(f"register {self.register!r}: use letters, digits, space and _ . -")
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"weights must be above 0, got {self.weights}")
        if self.weights and self.data and len(self.weights) != len(self.data):
            raise ValueError(
                f"{len(self.weights)} weights for {len(self.data)} patterns of --data; give one "
                "for each"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if not 1 <= self.workers <= self.order.slots:
            raise ValueError(
                f"workers must be in 1..{self.order.slots}, the slots of this recipe, "
                f"got {self.workers}; more workers need more --order.slots"
            )
        if self.text.max_length > self.objective.encoder.max_length:
            raise ValueError(
                f"text.max_length {self.text.max_length} is more than the encoder's "
                f"{self.objective.encoder.max_length}; raise --objective.encoder.max-length"
            )


FREE_TO_CHANGE = frozenset(
    {
        "data",
        "name",
        "runs",
        "workers",
        "device",
        "checkpoint_every",
        "log_every",
        "max_restarts",
        "vocabulary_file",
        "register",
        "tracking_uri",
        "experiment",
        "address",
        "verbose",
        *(f"source.{gate}" for gate in GATES),
    }
)
"""Fields that a resumed run may change. The data is held by its fingerprint, not by its path."""


def with_vocab_size(config: RunConfig, size: int) -> RunConfig:
    """Return the config with an encoder of so many token ids."""
    encoder = replace(config.objective.encoder, vocab_size=size)
    return replace(config, objective=replace(config.objective, encoder=encoder))


def to_record(config: RunConfig) -> dict[str, Any]:
    """Return the config as plain JSON values."""
    record: dict[str, Any] = TypeAdapter(RunConfig).dump_python(config, mode="json")
    return record


def from_record(record: dict[str, Any]) -> RunConfig:
    """Return the config of a record.

    Raises:
        DataError: If a key is unknown, missing or of the wrong type; the nearest known key is
            named.
    """
    try:
        config = TypeAdapter(RunConfig).validate_python(record, extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        unknown = first["type"] == "unexpected_keyword_argument"
        said = f"unknown key.{nearest(place, _known_keys())}" if unknown else first["msg"]
        raise DataError(f"recorded config: {place}: {said}") from error
    # A key that is not there would take today's default, whatever the run was made with.
    if missing := sorted(_known_keys() - to_flat(record).keys()):
        raise DataError(f"recorded config: {missing[0]}: missing key")
    return config


def to_flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested record with dotted keys: `{"order.slots": 4}`."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        nested = isinstance(value, dict)
        flat |= to_flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def changed(recorded: RunConfig, asked: RunConfig) -> list[str]:
    """Return what a resumed run may not change, one `field: recorded -> asked` each."""
    before, after = to_flat(to_record(recorded)), to_flat(to_record(asked))
    return [
        f"{name}: {before[name]} -> {after[name]}"
        for name in before
        if name not in FREE_TO_CHANGE and before[name] != after[name]
    ]


def _known_keys() -> set[str]:
    """Return the dotted keys of every field that a record can hold."""
    schema = TypeAdapter(RunConfig).json_schema()

    def keys(node: dict[str, Any], prefix: str) -> set[str]:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node
        children = node.get("properties", {})
        nested = (keys(child, f"{prefix}.{name}") for name, child in children.items())
        return set().union(*nested) if children else {prefix.removeprefix(".")}

    return keys(schema, "")
