"""What a text encoder has learned, on held-out documents, beside what it has to beat."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipelines.data.text import IGNORED, TextRows
from pipelines.errors import DataError
from pipelines.run import Run
from ssl_models.masked_language import MaskedLanguage
from ssl_models.objective import Objective

PASSES = 4
"""How often the held-out documents are cut, paired and masked anew."""
ROWS_PER_BATCH = 64
NUM_RESAMPLES = 2000
LENGTH_BIN = 4
TRAINING_ORDERS = 8
"""Work orders of training rows that the length classifier learns from."""


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

    def metrics(self) -> dict[str, float]:
        """Return the figures by the names they are logged under, but for what no pair gave."""
        return {
            f"heldout/{name}": float(value)
            for name, value in asdict(self).items()
            if not (name.startswith("nsp_") and math.isnan(value))
        }

    def lines(self) -> list[str]:
        """Return the figures in words."""
        low, high = self.nsp_accuracy_low, self.nsp_accuracy_high
        beaten = low > max(0.5, self.nsp_length_accuracy)
        masked_tokens = [
            f"on {self.documents} held-out documents:",
            f"  masked tokens: loss {self.mlm_loss:.3f} where word frequencies alone give "
            f"{self.unigram_loss:.3f}; accuracy {self.mlm_accuracy:.1%}",
        ]
        if not self.nsp_pairs:
            return masked_tokens
        return [
            *masked_tokens,
            f"  next sentence: accuracy {self.nsp_accuracy:.1%}, 95 % interval {low:.1%} to "
            f"{high:.1%} over {self.nsp_pairs} pairs; lengths alone give "
            f"{self.nsp_length_accuracy:.1%}" + ("" if beaten else ": not above chance"),
        ]


def evaluate(objective: Objective, run: Run) -> Evaluation:
    """Return the figures of a trained objective on the held-out documents of its run.

    Raises:
        DataError: If no document is held out.
    """
    assert isinstance(objective, MaskedLanguage)
    source, maker = run.source, run.source.maker
    assert isinstance(maker, TextRows)
    documents = [
        document
        for block in run.manifest.blocks_of("heldout")
        for document in run.manifest.read(block, "heldout")
    ]
    if not documents:
        raise DataError("no document is held out; set --source.heldout-ratio above 0")
    rows = pa.concat_tables(
        # A seed that no run can have: training rows never share a draw with these.
        [
            maker.rows([document._replace(visit=i) for document in documents], seed=-1, order=i)
            for i in range(PASSES)
        ]
    ).combine_chunks()
    means, nsp_correct = _measure(objective, maker, rows)
    paired = rows["nsp_label"].to_numpy() != IGNORED
    labels, records = (rows[name].to_numpy()[paired] for name in ("nsp_label", "a_record"))
    low, high = _bootstrap(nsp_correct[paired], records)
    training = pa.concat_tables(
        [
            source.table(source.plan.order(number))
            for number in range(min(TRAINING_ORDERS, source.plan.orders_per_epoch))
        ]
    )
    by_length = _length_classifier(
        training.filter(pa.compute.not_equal(training["nsp_label"], IGNORED))
    )
    return Evaluation(
        documents=len(documents),
        mlm_loss=means["mlm_loss"],
        mlm_accuracy=means["mlm_accuracy"],
        entropy=means["entropy"],
        p_true=means["p_true"],
        unigram_loss=_unigram_loss(run, rows),
        nsp_pairs=int(paired.sum()),
        nsp_accuracy=_share(nsp_correct[paired]),
        nsp_accuracy_low=low,
        nsp_accuracy_high=high,
        nsp_length_accuracy=_share(by_length[_length_bins(rows.filter(paired))] == labels),
    )


def _measure(
    objective: MaskedLanguage, maker: TextRows, rows: pa.Table
) -> tuple[dict[str, float], NDArray[np.bool_]]:
    """Return the mean of every metric, and for each row whether its label was told."""
    totals: dict[str, Any] = {}
    correct: list[NDArray[np.bool_]] = []
    objective.eval()
    with torch.no_grad():
        for part in _parts(rows):
            arrays = maker.collate(part)
            batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
            for name, pair in objective(batch).metrics.items():
                totals[name] = totals.get(name, 0) + torch.stack(pair)
            told = objective.nsp_logits(batch).argmax(dim=1).numpy()
            correct.append(told == arrays["nsp_labels"])
    means = {name: float(total[0] / total[1]) for name, total in totals.items() if total[1] > 0}
    return means, np.concatenate(correct)


def _parts(rows: pa.Table) -> Iterator[pa.Table]:
    for start in range(0, rows.num_rows, ROWS_PER_BATCH):
        yield rows.slice(start, ROWS_PER_BATCH).combine_chunks()


def _unigram_loss(run: Run, rows: pa.Table) -> float:
    """Return the mean surprise of the held-out targets under training frequencies plus one."""
    counts = np.ones(run.vocabulary.size)
    for text in run.manifest.texts("training"):
        counts += np.bincount(run.vocabulary.encode([text])[0], minlength=run.vocabulary.size)
    targets = rows["masked_ids"].combine_chunks().flatten().to_numpy()
    return float(-np.log(counts / counts.sum())[targets].mean())


def _share(correct: NDArray[np.bool_]) -> float:
    """Return the share that is right; NaN where there is nothing to judge."""
    return float(correct.mean()) if len(correct) else math.nan


def _bootstrap(correct: NDArray[np.bool_], documents: NDArray[np.int64]) -> tuple[float, float]:
    """Return the 95 % interval of `_share` when documents are drawn anew."""
    if not len(correct):
        return math.nan, math.nan
    _, index = np.unique(documents, return_inverse=True)
    right, pairs = np.bincount(index, weights=correct), np.bincount(index)
    drawn = np.random.default_rng(0).integers(len(pairs), size=(NUM_RESAMPLES, len(pairs)))
    accuracies = right[drawn].sum(axis=1) / pairs[drawn].sum(axis=1)
    low, high = np.quantile(accuracies, [0.025, 0.975])
    return float(low), float(high)


def _length_bins(rows: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    a_length = rows["a_length"].to_numpy().astype(np.int64)
    b_length = pa.compute.list_value_length(rows["input_ids"]).to_numpy() - a_length
    return a_length // LENGTH_BIN, b_length // LENGTH_BIN


def _length_classifier(rows: pa.Table) -> NDArray[np.int64]:
    """Return the more frequent label for each bin of (length of A, length of B)."""
    votes = np.zeros((2, 4096 // LENGTH_BIN, 4096 // LENGTH_BIN), dtype=np.int64)
    np.add.at(votes, (rows["nsp_label"].to_numpy(), *_length_bins(rows)), 1)
    labels: NDArray[np.int64] = votes.argmax(axis=0)
    return labels
