"""Models as MLflow serves them: the generic `python_function` flavour, and what it says of faults.

A request that cannot be answered is the fault of who asked, in one line: HTTP status 400.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError, UserError
from pipelines.use.classifier import Classifier
from pipelines.use.encoder import Encoder

EXAMPLES: dict[str, tuple[str, str, Any]] = {
    "text": ("string", "text", "A sentence to embed."),
    "images": ("binary", "image", b"P5 2 2 255\n\x00\xff\xff\x00"),  # four grey pixels, as PGM
}
"""Type and name of the input column, and an input."""


class ServedEncoder:
    """An encoder."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> NDArray[np.float32]:
        """Embed the column `text` or `image` of a DataFrame, or a list; there are no params.

        Raises:
            MlflowException: If an item is not of the column's type, or no picture.
        """
        del params
        column = EXAMPLES[self._encoder.modality][1]
        items = list(data[column] if hasattr(data, "columns") else data)
        with _told_to_who_asked():
            _check(items, self._encoder.modality)
            return self._encoder.encode(items)


class ServedClassifier:
    """A classifier."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Return label and probabilities for each row of a DataFrame; there are no params.

        Its columns are `text`, of pairs also `text_pair`, or `image`.

        Raises:
            MlflowException: If an item is not of its column's type, or no picture.
        """
        del params
        modality = self._classifier.encoder.modality
        columns = [list(data[EXAMPLES[modality][1]])]
        if self._classifier.takes_pairs:
            columns.append(list(data["text_pair"]))
        with _told_to_who_asked():
            for column in columns:
                _check(column, modality)
            items = list(zip(*columns, strict=True)) if len(columns) > 1 else columns[0]
            labels, found = self._classifier.predict(items)
        return [
            {"label": label, "probabilities": row}
            for label, row in zip(labels, found.tolist(), strict=True)
        ]


def _check(items: list[Any], modality: str) -> None:
    kind, column, example = EXAMPLES[modality]
    for place, item in enumerate(items):
        if not isinstance(item, type(example)):
            raise UserError(f"{column} {place} of {len(items)} is no {kind}: {item!r:.40}")


@contextmanager
def _told_to_who_asked() -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except DataError as error:
        hint = "in JSON, base64 is read in dataframe_split and dataframe_records alone"
        raise MlflowException.invalid_parameter_value(f"{error}; {hint}") from error
    except UserError as error:
        raise MlflowException.invalid_parameter_value(str(error)) from error
