"""The record of a run: every number that decides what it does, in one frozen value."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Protocol, assert_never

from pydantic import Discriminator, TypeAdapter, ValidationError

from pipelines.data.filesystems import holds_secret
from pipelines.data.images import ImageConfig
from pipelines.data.manifest import GATES
from pipelines.data.plan import OrderConfig
from pipelines.data.records import Modality
from pipelines.data.shards import SourceConfig
from pipelines.data.text_config import TextConfig
from pipelines.data.vocabulary import VocabularyConfig
from pipelines.errors import DataError, UserError, nearest
from pipelines.training.mlflow_client import SECRET_IN_URI
from ssl_models import ObjectiveConfig
from ssl_models.autoencoder import AutoencoderConfig
from ssl_models.contrastive import ContrastiveConfig
from ssl_models.masked_language import MaskedLanguageConfig
from ssl_models.optim import OptimizerConfig
from ssl_models.vit import ViTConfig

RUN_NAME = re.compile(r"[\w-][\w.-]*|")
RUN_NAME_ADVICE = "use letters, digits and _ . - (no leading dot)"
MODEL_NAME = re.compile(r"[\w.\- ]+")
"""Of a registered model, so that models:/NAME@ALIAS can be told apart."""


class Schedule(Protocol):
    """What a step knows of its run."""

    @property
    def seed(self) -> int:
        """Of all that is drawn."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""

    @property
    def order(self) -> OrderConfig:
        """The rows of a step and their slots."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """What the step is made with."""

    @property
    def log_every(self) -> int:
        """Steps between logged metrics."""

    @property
    def stop_on_collapse(self) -> int:
        """Logged steps of a collapse that end it, 0 for none."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One pretraining run."""

    recipe: str
    """The named run that this one started from."""
    data: tuple[str, ...] = ()
    """Raw shards: files, folders or quoted globs, local or as URIs such as s3://bucket/folder;
    text in .txt and .jsonl, plain, .gz or .zst, and .parquet; pictures in .tar and .parquet, or
    loose in folders."""
    data_licence: str = ""
    """Licence of the data, to be told in the model card and by the registered version."""
    weights: tuple[float, ...] = ()
    """How often an epoch uses each pattern of --data, one number each: 2 is twice, 0.5 is one
    half, another half in the next epoch; without any, all of it once. Counted in whole blocks of
    64 KiB or more, at least one: of a source as small as that a part is not to be had."""
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
    stop_on_collapse: int = 25
    """After the warm-up of the learning rate, logged steps on end with a collapsed encoder that
    stop the run; 0 never stops it."""
    measure_every: int = 0
    """Steps after which the next commit's held-out figures are logged, as commit/..., while the
    training goes on, and pictures or a table of predictions; 0 for none."""
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
    """Where MLflow tracks and registers. Name and password of a server come from the environment:
    MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD."""
    experiment: str = "rayssl"
    """MLflow experiment."""
    address: str = ""
    """Address of a Ray cluster; without one, a local Ray of workers + 2 CPUs is started."""
    verbose: bool = False
    """Show what Ray says."""

    source: SourceConfig = field(default_factory=SourceConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    text: TextConfig = field(default_factory=TextConfig)
    """How documents become rows, if the objective is one of text."""
    images: ImageConfig = field(default_factory=ImageConfig)
    """How pictures become rows, if the objective is one of images."""
    order: OrderConfig = field(default_factory=OrderConfig)
    objective: Annotated[ObjectiveConfig, Discriminator("kind")]
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "threads_per_worker", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        _check_names(self)
        _check_weights(self)
        for name in ("seed", "stop_on_collapse", "measure_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 1 <= self.workers <= self.order.slots:
            raise ValueError(
                f"workers must be in 1..{self.order.slots}, the slots of this recipe, "
                f"got {self.workers}; more workers need more --order.slots"
            )
        match self.objective:
            case MaskedLanguageConfig():
                _check_text(self, self.objective)
            case ContrastiveConfig() | AutoencoderConfig():
                _check_images(self, self.objective)
            case _:
                assert_never(self.objective)

    @property
    def modality(self) -> Modality:
        """What the run is trained on, and which field says how it becomes rows."""
        match self.objective:
            case MaskedLanguageConfig():
                return "text"
            case ContrastiveConfig() | AutoencoderConfig():
                return "images"
            case _:
                assert_never(self.objective)

    @property
    def masked_language(self) -> MaskedLanguageConfig:
        """The objective of a run on text.

        Raises:
            UserError: If it is another one.
        """
        if not isinstance(self.objective, MaskedLanguageConfig):
            raise UserError(f"recipe {self.recipe} is of {self.modality}: this is for text")
        return self.objective


def _check_names(config: RunConfig) -> None:
    if not RUN_NAME.fullmatch(config.name):
        raise ValueError(f"name {config.name!r}: {RUN_NAME_ADVICE}")
    if not MODEL_NAME.fullmatch(config.register):
        raise ValueError(f"register {config.register!r}: use letters, digits, space and _ . -")
    if holds_secret(config.tracking_uri):
        raise ValueError(SECRET_IN_URI)


def _check_weights(config: RunConfig) -> None:
    if not all(0 < weight < math.inf for weight in config.weights):
        raise ValueError(f"weights must be above 0, got {config.weights}")
    if config.weights and config.data and len(config.weights) != len(config.data):
        raise ValueError(
            f"{len(config.weights)} weights for {len(config.data)} patterns of --data; give one "
            "for each"
        )


def _check_text(config: RunConfig, objective: MaskedLanguageConfig) -> None:
    longest = objective.encoder.max_length
    if config.text.max_length > longest:
        raise ValueError(
            f"text.max_length {config.text.max_length} is more than the encoder's "
            f"{longest}; raise --objective.encoder.max-length"
        )


def _check_images(config: RunConfig, objective: ContrastiveConfig | AutoencoderConfig) -> None:
    images, channels = config.images, objective.encoder.channels
    if images.channels != channels:
        raise ValueError(
            f"images.channels {images.channels} is not the encoder's {channels}; set "
            "--objective.encoder.channels"
        )
    rows = "pairs" if isinstance(objective, ContrastiveConfig) else "single"
    if images.rows != rows:
        raise ValueError(
            f"images.rows {images.rows!r}: the objective {objective.kind} needs {rows!r}"
        )
    if isinstance(objective, AutoencoderConfig) and images.views.size != objective.image_size:
        raise ValueError(
            f"images.views.size {images.views.size} is not the decoder's {objective.image_size}; "
            "set --objective.image-size"
        )
    encoder, size = objective.encoder, images.views.size
    if isinstance(encoder, ViTConfig) and size % encoder.patch_size:
        raise ValueError(
            f"images.views.size {size} is no multiple of the encoder's patches of "
            f"{encoder.patch_size}; set --objective.encoder.patch-size"
        )
    if isinstance(objective, ContrastiveConfig) and config.order.rows_per_slot < 2:
        raise ValueError(
            f"slots of {config.order.rows_per_slot} row: a picture is told from others of its "
            "slot; raise --order.rows-per-step"
        )
    for name in ("init_from", "vocabulary_file"):
        if getattr(config, name):
            raise ValueError(f"{name} is for text: leave it out")


FREE_TO_CHANGE = frozenset(
    {
        "data",
        "data_licence",
        "name",
        "runs",
        "workers",
        "device",
        "checkpoint_every",
        "log_every",
        "stop_on_collapse",
        "measure_every",
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
    """Return the config with a text encoder of so many token ids."""
    objective = config.masked_language
    encoder = replace(objective.encoder, vocab_size=size)
    return replace(config, objective=replace(objective, encoder=encoder))


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
        place = _place(first["loc"], record)
        if first["type"] == "union_tag_not_found":
            raise DataError(f"recorded config: {place}.kind: missing key") from error
        unknown = first["type"] == "unexpected_keyword_argument"
        said = f"unknown key.{nearest(place, _known_keys())}" if unknown else first["msg"]
        raise DataError(f"recorded config: {place}: {said}") from error
    # A key that is not there would take today's default, whatever the run was made with.
    if missing := sorted(to_flat(to_record(config)).keys() - to_flat(record).keys()):
        raise DataError(f"recorded config: {missing[0]}: missing key")
    return config


def _place(parts: Sequence[int | str], record: Any) -> str:
    """Return the dotted key of an error, without the names that pydantic gives to choices."""
    kept = []
    for number, part in enumerate(parts, 1):
        is_there = isinstance(record, dict | list) and (
            part in record if isinstance(record, dict) else isinstance(part, int)
        )
        if is_there or number == len(parts):
            kept.append(str(part))
        record = record[part] if is_there else record
    return ".".join(kept)


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
        f"{name}: {before.get(name, 'not there')} -> {after.get(name, 'not there')}"
        for name in before | after
        if name not in FREE_TO_CHANGE and before.get(name) != after.get(name)
    ]


def _known_keys() -> set[str]:
    """Return the dotted keys of every field that a record can hold."""
    schema = TypeAdapter(RunConfig).json_schema()

    def keys(node: dict[str, Any], prefix: str) -> set[str]:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node
        children = node.get("properties", {})
        nested = [keys(child, f"{prefix}.{name}") for name, child in children.items()]
        nested += [keys(choice, prefix) for choice in node.get("oneOf", node.get("anyOf", []))]
        return set().union(*nested) if nested else {prefix.removeprefix(".")}

    return keys(schema, "")
