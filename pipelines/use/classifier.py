"""A fine-tuned classifier in use: texts, pairs of texts or pictures to labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.errors import UserError
from pipelines.use.encoder import Encoder
from pipelines.use.inputs import Inputs, Item, batches, inputs_of
from ssl_models.classification import Classification


class Predictions(NamedTuple):
    """What is told of some items."""

    labels: list[str]
    """The most probable class of each."""
    probabilities: NDArray[np.float32]
    """(items, classes); each row adds up to 1."""


@dataclass(frozen=True)
class Classifier:
    """A classifier, which is an encoder with a head."""

    encoder: Encoder

    def __post_init__(self) -> None:
        if not isinstance(self.encoder.objective, Classification):
            raise UserError("the model is an encoder without classes: finetune it on labels first")

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels that it knows."""
        return tuple(self.encoder.config["classes"])

    @property
    def takes_pairs(self) -> bool:
        """Whether an item is a pair of texts."""
        return bool(self.encoder.config["pairs"])

    def predict(self, items: Sequence[Item]) -> Predictions:
        """Return labels and probabilities of texts, pairs of texts, or the bytes of pictures.

        Raises:
            UserError: If the items are not of the kind that it was trained on.
            DataError: If an item is no picture, with its place and the reason.
        """
        kind = tuple if self.takes_pairs else str if self.encoder.pieces else bytes
        for number, item in enumerate(items):
            if not isinstance(item, kind):
                asked = {tuple: "pairs of texts", str: "texts", bytes: "bytes of pictures"}[kind]
                raise UserError(f"item {number} is {type(item).__name__}: give {asked}")
        objective = self.encoder.objective
        assert isinstance(objective, Classification)
        inputs = inputs_of(self.encoder)
        found = probabilities(objective, inputs, inputs.rows(items))
        return Predictions([self.classes[i] for i in found.argmax(axis=1)], found)


def probabilities(
    objective: Classification, inputs: Inputs, rows: Sequence[Any]
) -> NDArray[np.float32]:
    """Return the probability of each class for each row, float32 (rows, classes)."""
    found = np.zeros((len(rows), objective.config.num_classes), dtype=np.float32)
    was_training = objective.training
    objective.eval()
    with torch.no_grad():
        device = next(objective.parameters()).device
        for places, arrays in batches(inputs, rows):
            batch = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
            found[places] = objective.logits(batch).softmax(dim=1).cpu().numpy()
    objective.train(was_training)
    return found
