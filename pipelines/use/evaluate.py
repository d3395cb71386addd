"""What a text encoder has learned, on held-out documents, beside what it has to beat.

Memory is bounded: documents come order by order, and only counts are kept of their rows.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError

from pipelines.data.batches import ArrayBatch, RowSource
from pipelines.data.manifest import Document, Manifest
from pipelines.data.spans import Ints
from pipelines.data.text import IGNORED, TextRows
from pipelines.data.text_config import TextConfig
from pipelines.errors import UserError
from pipelines.run import Run
from pipelines.use.baselines import Counts, Floats, length_accuracy, unigram_loss
from pipelines.use.bundle import BundleError
from pipelines.use.encoder import Encoder
from pipelines.use.heldout import SEED, Held, NothingHeldOutError, without_copies
from pipelines.use.intervals import GROUPS, bootstrap
from ssl_models.masked_language import MaskedLanguage
from ssl_models.objective import Objective

PASSES = 4
"""How often the documents are cut, paired and masked anew."""
MAX_DOCUMENTS = 20_000
"""Of more documents every n-th block is evaluated."""
ORDER_CHARS = 4_000_000
"""Documents are paired among so many characters of text."""
ROWS_PER_BATCH = 64
ROWS_PER_COUNT = 1024
TRAINING_ORDERS = 8
"""Work orders of training rows that the baselines learn from; a small corpus has no more."""
PAIR_HEADS = ("nsp_head.", "encoder.pooler.")
"""Tensors without which nothing is told of pairs."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures on held-out documents; losses in nats per predicted token."""

    documents: int
    mlm_loss: float
    mlm_accuracy: float
    entropy: float
    p_true: float
    unigram_loss: float
    """Loss of predicting every token by its frequency in the training documents."""
    nsp_pairs: int
    nsp_accuracy: float
    nsp_accuracy_low: float
    nsp_accuracy_high: float
    """95 % interval by bootstrap over documents."""
    nsp_length_accuracy: float
    """Accuracy of a classifier that sees only the lengths of A and B."""
    all_documents: int
    """Held-out documents, those left out included."""
    also_trained: int = 0
    """Documents left out because they were trained on."""
    own_baselines: bool = False
    """Whether the baselines learned from the evaluated documents, for want of the training ones."""
    asked: str = "next sentence"
    """What is told of a pair."""

    def metrics(self) -> dict[str, float]:
        """Return the figures by the names they are logged under, but for what no pair gave."""
        return {
            f"heldout/{name}": float(value)
            for name, value in asdict(self).items()
            if name != "asked" and not (name.startswith("nsp_") and math.isnan(value))
        }

    def lines(self) -> list[str]:
        """Return the figures in words."""
        sampled = f" of {self.all_documents}" if self._num_sampled_out else ""
        own = " in these same documents, a stronger baseline," if self.own_baselines else ""
        lines = [
            f"on {self.documents}{sampled} held-out documents:",
            f"  masked tokens: loss {self.mlm_loss:.3f} where word frequencies alone{own} give "
            f"{self.unigram_loss:.3f}; accuracy {self.mlm_accuracy:.1%}",
            self._pairs_line(),
        ]
        if self.also_trained:
            num_seen = self.documents + self.also_trained
            lines.insert(
                0, f"{self.also_trained} of {num_seen} documents were also trained on: left out"
            )
        return lines

    @property
    def _num_sampled_out(self) -> int:
        return self.all_documents - self.documents - self.also_trained

    def _pairs_line(self) -> str:
        if not self.nsp_pairs:
            why = "no pair has a label (one document, or short ones), or none was learned from"
            return f"  {self.asked}: no figures, {why}"
        low, high = self.nsp_accuracy_low, self.nsp_accuracy_high
        beaten = low > max(0.5, self.nsp_length_accuracy)
        return (
            f"  {self.asked}: accuracy {self.nsp_accuracy:.1%}, 95 % interval {low:.1%} to "
            f"{high:.1%} over {self.nsp_pairs} pairs; lengths alone give "
            f"{self.nsp_length_accuracy:.1%}" + ("" if beaten else ": not above chance")
        )


def evaluate(objective: Objective, run: Run, data: Manifest | None = None) -> Evaluation:
    """Return the figures of a run's objective on its held-out documents, or on other data.

    Other data is one manifest with nothing held out, and needs Ray; what of it the run was
    trained on is left out. The baselines learn from the first work orders of the training.

    Raises:
        DataError: If no document is left to evaluate on.
        UserError: If the run is not on text.
    """
    maker = run.text_rows
    held = Held(run.manifest, "heldout", MAX_DOCUMENTS)
    if data is not None:
        held = without_copies(Held(data, "training", MAX_DOCUMENTS), run.manifest)
    measured = measure(objective, maker, held, folds=1)
    return _figures(maker, measured, held, [_training_counts(run.source, maker)])


def evaluate_encoder(encoder: Encoder, data: Manifest) -> Evaluation:
    """Return the figures of an encoder without its run, on data that it was not trained on.

    The frequencies of words are those of the evaluated documents. The classifier by lengths is
    cross-fitted: documents are dealt into two halves that exchange no segments, and each is told
    by what the other half taught.

    Raises:
        BundleError: If the bundle does not tell how its rows were made.
        UserError: If the encoder is not one of text, is a classifier, or fills no masks.
    """
    if encoder.came_without("mlm_head."):
        raise UserError(
            "the model came without a head for masked tokens: what it is worth is told by --labels"
        )
    held = Held(data, "training", MAX_DOCUMENTS)
    maker = TextRows(text_config(encoder), encoder.vocabulary)
    measured = measure(encoder.objective, maker, held, folds=2)
    if encoder.came_without(*PAIR_HEADS):
        measured = measured._replace(pairs=np.zeros_like(measured.pairs))
    evaluation = _figures(maker, measured, held, measured.folds[::-1])
    return replace(evaluation, own_baselines=True)


def text_config(encoder: Encoder) -> TextConfig:
    """Return how the rows of an encoder's pretraining were made.

    Raises:
        BundleError: If the bundle does not tell.
        UserError: If the encoder is not one of text, or is a classifier.
    """
    encoder.refuse_classifier()
    _ = encoder.vocabulary
    try:
        return TypeAdapter(TextConfig).validate_python(encoder.config.get("text"), extra="forbid")
    except ValidationError as error:
        said = str(error).splitlines()[2].strip()
        raise BundleError(
            f"config.json: text: {said}; the bundle does not tell how its rows were made: "
            "register it anew"
        ) from error


class Measured(NamedTuple):
    """What is kept of the rows."""

    sums: dict[str, Any]
    """(sum, weight) of each metric."""
    folds: list[Counts]
    losses: Floats
    predictions: Floats
    """Summed losses of masked tokens, and how many there are, of each group of documents."""
    right: Floats
    pairs: Floats
    """Labelled pairs told right, and how many there are, of each group of documents."""
    documents: int


def _figures(maker: TextRows, measured: Measured, held: Held, learned: list[Counts]) -> Evaluation:
    num_kept, num_pairs = measured.documents, int(measured.pairs.sum())
    means = {
        name: float(total[0] / total[1]) for name, total in measured.sums.items() if total[1] > 0
    }
    low, high = bootstrap(measured.right, measured.pairs)
    return Evaluation(
        documents=num_kept,
        mlm_loss=means["mlm_loss"],
        mlm_accuracy=means["mlm_accuracy"],
        entropy=means["entropy"],
        p_true=means["p_true"],
        unigram_loss=unigram_loss(
            np.sum([counts.tokens for counts in learned], axis=0),
            np.sum([counts.targets for counts in measured.folds], axis=0),
        ),
        nsp_pairs=num_pairs,
        nsp_accuracy=float(measured.right.sum()) / num_pairs if num_pairs else math.nan,
        nsp_accuracy_low=low,
        nsp_accuracy_high=high,
        nsp_length_accuracy=length_accuracy(learned, measured.folds),
        all_documents=held.num_records,
        also_trained=held.num_left_out,
        asked="sentence order" if maker.config.pairing == "sentence-order" else "next sentence",
    )


def measure(objective: Objective, maker: TextRows, held: Held, folds: int) -> Measured:
    """Give the rows of every order to the objective.

    Raises:
        DataError: If there is no document.
    """
    assert isinstance(objective, MaskedLanguage)
    tells_pairs = objective.coefficients["nsp"] > 0
    sums: dict[str, Any] = {}
    counts = [Counts(maker) for _ in range(folds)]
    by_group = np.zeros((4, GROUPS))
    num_documents = 0
    objective.eval()
    for number, (fold, documents) in enumerate(_orders(held, folds)):
        for part in _rows(maker, documents, number):
            batch = maker.collate(part)
            counts[fold].add(batch)
            loss, told = _give(objective, batch, sums)
            records = np.array([document.record for document in documents])
            group = (num_documents + np.searchsorted(records, part["a_record"])) % GROUPS
            chosen = (batch["masked_ids"] != IGNORED).sum(axis=1)
            labelled = (batch["nsp_labels"] != IGNORED) & tells_pairs
            correct = labelled & (told == batch["nsp_labels"])
            for total, rows in zip(by_group, (loss, chosen, correct, labelled), strict=True):
                total += np.bincount(group, weights=rows, minlength=GROUPS)
        num_documents += len(documents)
    if not num_documents:
        raise NothingHeldOutError(
            "every document was also trained on: name other --data"
            if held.left_out
            else "no document is held out; set --source.heldout-ratio above 0"
        )
    losses, predictions, right, pairs = by_group
    return Measured(sums, counts, losses, predictions, right, pairs, num_documents)


def _give(
    objective: MaskedLanguage, batch: ArrayBatch, sums: dict[str, Any]
) -> tuple[Floats, Ints]:
    """Add to the sums of the metrics; return the summed losses of each row, and its label told."""
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    masked_ids = tensors["masked_ids"]
    with torch.no_grad():
        scores = objective.score(tensors)
        for name, pair in objective.judge(scores, tensors).metrics.items():
            sums[name] = sums.get(name, 0) + torch.stack(pair).double()
        losses = F.nll_loss(
            scores.mlm, masked_ids.flatten(), ignore_index=IGNORED, reduction="none"
        )
        by_row = losses.reshape(masked_ids.shape).double().sum(dim=1)
        return by_row.numpy(), scores.nsp.argmax(dim=1).numpy()


def _orders(held: Held, folds: int) -> Iterator[tuple[int, list[Document]]]:
    """Yield documents that are paired with each other, and their fold; dealt out in turn."""
    waiting: list[list[Document]] = [[] for _ in range(folds)]
    num_chars = [0] * folds
    for number, document in enumerate(held.items()):
        fold = number % folds
        waiting[fold].append(document)
        num_chars[fold] += len(document.text)
        if num_chars[fold] >= ORDER_CHARS:
            yield fold, waiting[fold]
            waiting[fold], num_chars[fold] = [], 0
    for fold, documents in enumerate(waiting):
        if documents:
            yield fold, documents


def _rows(maker: TextRows, documents: Sequence[Document], number: int) -> Iterator[pa.Table]:
    """Yield the rows of an order, made anew in each pass, a batch at a time."""
    for i in range(PASSES):
        visited = [document._replace(visit=i) for document in documents]
        rows = maker.rows(visited, seed=SEED, order=number * PASSES + i)
        yield from _parts(rows, ROWS_PER_BATCH)


def _parts(rows: pa.Table, size: int) -> Iterator[pa.Table]:
    for start in range(0, rows.num_rows, size):
        yield rows.slice(start, size).combine_chunks()


def _training_counts(source: RowSource, maker: TextRows) -> Counts:
    counts = Counts(maker)
    for number in range(min(TRAINING_ORDERS, source.plan.orders_per_epoch)):
        for part in _parts(source.table(source.plan.order(number)), ROWS_PER_COUNT):
            counts.add(maker.collate(part))
    return counts
