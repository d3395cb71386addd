"""What an encoder has to beat: word frequencies, the lengths of A and B, and chance."""

import math

import numpy as np
from numpy.typing import NDArray

from pipelines.data.batches import ArrayBatch
from pipelines.data.spans import Ints
from pipelines.data.text import IGNORED, TextRows

Floats = NDArray[np.float64]

LENGTH_BIN = 4


class Counts:
    """Counts in rows, of fixed size: their tokens, and their labels by the lengths of A and B."""

    def __init__(self, maker: TextRows) -> None:
        bins = maker.config.max_length // LENGTH_BIN + 1
        self._control = [maker.vocabulary.cls, maker.vocabulary.sep]
        self.tokens = np.zeros(maker.vocabulary.size, dtype=np.int64)
        """How often each token stands in the text, masked or not."""
        self.targets = np.zeros_like(self.tokens)
        """How often each token is to be predicted."""
        self.labels = np.zeros((2, bins, bins), dtype=np.int64)

    def add(self, batch: ArrayBatch) -> None:
        """Count the rows of a batch."""
        attended, labels = batch["attention_mask"], batch["nsp_labels"]
        ids = unmasked(batch)
        self.tokens += np.bincount(ids[attended], minlength=len(self.tokens))
        self.tokens[self._control] = 0
        targets = batch["masked_ids"][batch["masked_ids"] != IGNORED]
        self.targets += np.bincount(targets, minlength=len(self.targets))
        b_length = batch["token_type_ids"].sum(axis=1)
        a_length = attended.sum(axis=1) - b_length
        labelled = labels != IGNORED
        bins = (length[labelled] // LENGTH_BIN for length in (a_length, b_length))
        np.add.at(self.labels, (labels[labelled], *bins), 1)


def unmasked(batch: ArrayBatch) -> Ints:
    """Return the ids of a batch with what is to be predicted in its place."""
    ids: Ints = batch["input_ids"].copy()
    row, prediction = np.nonzero(batch["masked_ids"] != IGNORED)
    ids[row, batch["masked_positions"][row, prediction]] = batch["masked_ids"][row, prediction]
    return ids


def unigram_loss(tokens: Ints, targets: Ints) -> float:
    """Return the mean surprise of the targets under the frequencies of the tokens plus one."""
    surprise = -np.log((tokens + 1) / (tokens + 1).sum())
    return float(surprise @ targets / targets.sum())


def length_accuracy(learned: list[Counts], judged: list[Counts]) -> float:
    """Return how often the more frequent label for (length of A, length of B) is right.

    Each of `judged` is told by what the one at its place in `learned` has; NaN without labels.
    """
    right = num_labels = 0
    for known, asked in zip(learned, judged, strict=True):
        told = known.labels.argmax(axis=0)[None]
        right += int(np.take_along_axis(asked.labels, told, axis=0).sum())
        num_labels += int(asked.labels.sum())
    return right / num_labels if num_labels else math.nan
