"""Which labelled data, and how a classifier is trained; light, for the command reads its flags."""

import math
from dataclasses import dataclass

import tyro

from pipelines.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LabelledData:
    """Where labelled examples are, and which part of them is for what."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """Labelled shards: files, folders or quoted globs, as for pretraining."""
    labels: str
    """Field of a record that holds its label: of a jsonl line, a column of a parquet shard, of a
    tar the extension of a sample's file (cls) or a field of its json, and of loose pictures
    `folder`, the name of the folder that each lies in."""
    text_field: str = "text"
    """Field that holds the text."""
    image_field: str = "image"
    """Column of a parquet shard that holds the bytes of a picture, or a struct with them."""
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

    def __post_init__(self) -> None:
        low, total = min(self.validation_ratio, self.test_ratio), sum(self.ratios)
        if low < 0 or total >= 1:
            raise UserError(
                "validation_ratio and test_ratio must be at least 0 and together below 1, got "
                f"{self.validation_ratio} and {self.test_ratio}"
            )

    @property
    def ratios(self) -> tuple[float, float]:
        """The shares of the data for validation and test."""
        return (
            0.0 if self.validation else self.validation_ratio,
            0.0 if self.test else self.test_ratio,
        )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Full fine-tuning with warm-up, linear decay and early stopping."""

    epochs: int = 10
    """Passes over the training examples, if nothing stops it before."""
    least_steps: int = 300
    """Optimizer steps at least: few examples get more passes."""
    rows_per_step: int = 32
    slots: int = 4
    """Equal parts of a step, one forward pass each; the largest number of workers."""
    evaluations: int = 20
    """How often the validation examples are asked, spread over the steps."""
    patience: int = 5
    """Evaluations in a row without a better one that end the training."""
    learning_rate: float | None = None
    """The peak. By default 5e-4 for pictures, and for text 1e-3 up to a width of 140 and from there
    20 / width^2: 3e-5 at 768, 2e-5 at 1024."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 0.01
    dropout: float = 0.1
    """Probability of dropping a feature before the linear head."""
    balance: bool = False
    """Weigh every class alike, however many examples it has."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "rows_per_step", "slots", "evaluations", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rows_per_step % self.slots:
            raise ValueError(
                f"rows_per_step {self.rows_per_step} is not a multiple of slots {self.slots}"
            )
        for name in ("seed", "least_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("warmup_ratio", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")

    def steps(self, num_examples: int) -> int:
        """Return the optimizer steps for so many training examples."""
        return max(self.least_steps, -(-self.epochs * num_examples // self.rows_per_step))
