"""A pretrained encoder in use: texts, or the bytes of pictures, to embeddings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from tokenizers import Tokenizer
from torch import Tensor

from pipelines.data.images import ImageConfig, ImageRows
from pipelines.data.records import Modality
from pipelines.data.shards import Rejected
from pipelines.data.vocabulary import Vocabulary
from pipelines.errors import DataError, UserError
from ssl_models.classification import Classification
from ssl_models.objective import Batch, Objective

ROWS_PER_BATCH = 64
CHARS_PER_TOKEN = 8
"""So many characters of a text nearly always hold a token."""


@dataclass(frozen=True)
class Encoder:
    """A pretrained encoder, in evaluation mode; its parameters can be trained further."""

    config: dict[str, Any]
    pieces: Vocabulary | None
    """The vocabulary of an encoder of text, None of one of images."""
    objective: Objective
    fresh: tuple[str, ...] = ()
    """Tensors that the model came without, such as heads: freshly drawn, not trained."""

    @property
    def state(self) -> dict[str, Tensor]:
        """The weights that the model came with."""
        state: dict[str, Tensor] = self.objective.state_dict()
        return {name: tensor for name, tensor in state.items() if name not in self.fresh}

    def came_without(self, *heads: str) -> bool:
        """Return whether tensors of heads, by the first parts of their names, were not trained."""
        return any(name.startswith(heads) for name in self.fresh)

    @property
    def modality(self) -> Modality:
        """What it embeds."""
        return "text" if self.pieces else "images"

    @property
    def dimension(self) -> int:
        """Width of an embedding."""
        objective: Any = self.objective  # every one has an encoder that knows its config
        return int(objective.encoder.config.feature_size)

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of an encoder of text.

        Raises:
            UserError: If it is not one of text.
        """
        if self.pieces is None:
            raise UserError("the model is an encoder of images: this is for text")
        return self.pieces

    @property
    def image_config(self) -> ImageConfig:
        """How an encoder of images was shown its pictures."""
        return TypeAdapter(ImageConfig).validate_python(self.config["images"], extra="forbid")

    @property
    def image_rows(self) -> ImageRows:
        """What makes the pixels of an encoder of images."""
        return ImageRows(self.image_config)

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest row of the pretraining, control tokens included."""
        rows = self.config.get("text") or self.config["objective"]["encoder"]
        return int(rows["max_length"])

    def refuse_classifier(self) -> None:
        """See that the model has learned from no labels.

        Raises:
            UserError: If it is a classifier.
        """
        if isinstance(self.objective, Classification):
            raise UserError(
                "the model is a classifier, and this is for encoders that have seen no labels: its "
                "own figures stand in its model card and its MLflow run"
            )

    @property
    def tokenizer(self) -> Tokenizer:
        """Splits raw text and knows no control tokens; `vocabulary` has their ids."""
        return self.vocabulary.tokenizer

    def encode(self, items: Sequence[str | bytes]) -> NDArray[np.float32]:
        """Return the embeddings float32 (items, dimension), without dropout.

        Items are texts, or the bytes of pictures, as the encoder is of text or images. A text is
        cut to the longest row of the pretraining; texts of like length share a batch. Of a picture
        the largest square of its middle is seen, in the size of the pretraining.

        Raises:
            DataError: If an item is no picture, with its place and the reason.
        """
        features, rejected = self.encode_readable(items)
        for i, reason in rejected.items():
            raise DataError(f"picture {i} of {len(items)}: {reason}; leave it out")
        return features

    def encode_readable(
        self, items: Sequence[str | bytes]
    ) -> tuple[NDArray[np.float32], dict[int, str]]:
        """Return the embeddings of `encode`, zeros for what is no picture, and the reasons why."""
        features = np.zeros((len(items), self.dimension), dtype=np.float32)
        rejected: dict[int, str] = {}
        was_training = self.objective.training
        self.objective.eval()
        with torch.no_grad():
            for places, rows in self._batches(items):
                found = dict(zip(places, rows, strict=True))
                rejected |= {i: row.reason for i, row in found.items() if isinstance(row, Rejected)}
                if used := [i for i in places if i not in rejected]:
                    batch = self._batch([found[i] for i in used])
                    features[used] = self.objective.encode(batch).cpu().numpy()
        self.objective.train(was_training)
        return features, rejected

    def _batches(self, items: Sequence[Any]) -> Iterator[tuple[Sequence[int], list[Any]]]:
        """Yield the places of items that share a batch, and their rows."""
        if self.pieces:
            rows = self.first_ids(items, self.max_tokens - 2)  # [CLS] and [SEP] are two
            by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
            for alike in _parts(by_length):
                yield alike, [rows[i] for i in alike]
            return
        maker = self.image_rows
        for places in _parts(range(len(items))):  # of pixels only those of a batch are held
            yield places, [maker.plain(items[i]) for i in places]

    def first_ids(self, texts: Sequence[str], limit: int) -> list[NDArray[Any]]:
        """Return the first `limit` ids of each text, without tokenising all of a long one.

        What stands before a space is tokenised the same, whatever follows it.
        """
        ends = [text.find(" ", limit * CHARS_PER_TOKEN) for text in texts]
        found = self.vocabulary.encode(
            [text if end < 0 else text[:end] for text, end in zip(texts, ends, strict=True)]
        )
        for i, end in enumerate(ends):
            if end >= 0 and len(found[i]) < limit:  # long words, or much that is no token
                found[i] = self.vocabulary.encode([texts[i]])[0]
        return [ids[:limit] for ids in found]

    def _batch(self, rows: list[Any]) -> Batch:
        device = next(self.objective.parameters()).device
        if not self.pieces:
            return {"image": torch.from_numpy(np.stack(rows)).to(device)}
        shape = len(rows), max(len(row) for row in rows) + 2
        input_ids = torch.full(shape, self.vocabulary.pad)
        attention_mask = torch.zeros(shape, dtype=torch.bool)
        input_ids[:, 0] = self.vocabulary.cls
        for i, row in enumerate(rows):
            input_ids[i, 1 : len(row) + 1] = torch.from_numpy(row.astype(np.int64))
            input_ids[i, len(row) + 1] = self.vocabulary.sep
            attention_mask[i, : len(row) + 2] = True
        return {
            "input_ids": input_ids.to(device),
            "token_type_ids": torch.zeros_like(input_ids, device=device),
            "attention_mask": attention_mask.to(device),
        }


def _parts(places: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(places), ROWS_PER_BATCH):
        yield places[start : start + ROWS_PER_BATCH]
