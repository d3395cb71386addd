"""How well examples are told apart: accuracy, each class, and what is taken for what."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.tables import table
from pipelines.use.intervals import proportion

MOST_COLUMNS = 12
"""Classes of which the terminal shows the whole confusion matrix."""
SIDE_INCHES, MOST_INCHES = 0.45, 20.0
"""Of a class in the picture of the confusion matrix, and of all of them."""


@dataclass(frozen=True, kw_only=True)
class ClassificationFigures:
    """Figures on test examples."""

    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Examples of each class, by what they are told to be."""
    accuracy: float
    low: float
    high: float
    """95 % interval of the accuracy, when examples are drawn anew."""
    loss: float
    """Mean cross entropy in nats."""
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    f1: tuple[float, ...]
    """Of each class; 0 where it is never told, or has no example."""

    @property
    def macro_f1(self) -> float:
        """Mean of the F1 of all classes."""
        return float(np.mean(self.f1))

    @property
    def examples(self) -> int:
        """How many were told."""
        return sum(map(sum, self.confusion))

    def metrics(self) -> dict[str, float]:
        """Return the figures by the names they are logged under."""
        return {
            "test/accuracy": self.accuracy,
            "test/accuracy_low": self.low,
            "test/accuracy_high": self.high,
            "test/macro_f1": self.macro_f1,
            "test/loss": self.loss,
            "test/examples": float(self.examples),
        }

    def lines(self) -> list[str]:
        """Return the figures in words and tables."""
        frequent = max(map(sum, self.confusion)) / self.examples
        head = (
            f"on {self.examples} test examples: accuracy {self.accuracy:.1%}, 95 % interval "
            f"{self.low:.1%} to {self.high:.1%}, macro F1 {self.macro_f1:.3f}; the most frequent "
            f"class is {frequent:.1%} of them"
        )
        per_class = [
            (name, f"{p:.3f}", f"{r:.3f}", f"{f:.3f}", str(sum(row)))
            for name, p, r, f, row in zip(
                self.classes, self.precision, self.recall, self.f1, self.confusion, strict=True
            )
        ]
        return [
            head,
            table(("class", "precision", "recall", "F1", "examples"), per_class),
            self._confusions(),
        ]

    def draw(self, path: Path) -> None:
        """Write the confusion matrix as a PNG: each row adds up to 1."""
        from matplotlib.figure import Figure

        shares = np.array(self.confusion) / np.maximum(1, np.sum(self.confusion, axis=1))[:, None]
        inches = min(SIDE_INCHES, MOST_INCHES / len(self.classes))
        side = 2.5 + inches * len(self.classes)
        figure = Figure(figsize=(side, side), layout="constrained")
        axes = figure.subplots()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        places = range(len(self.classes))
        points = 10 * inches / SIDE_INCHES
        axes.set_xticks(places, self.classes, rotation=90, fontsize=points)
        axes.set_yticks(places, self.classes, fontsize=points)
        axes.set_xlabel("told to be")
        axes.set_ylabel("is")
        for i, row in enumerate(self.confusion):
            for j, count in enumerate(row):
                if count and inches == SIDE_INCHES:
                    dark = shares[i, j] > 0.5
                    colour = "white" if dark else "black"
                    axes.text(j, i, str(count), ha="center", va="center", fontsize=7, color=colour)
        figure.savefig(path, format="png", dpi=120)

    def _confusions(self) -> str:
        """Return the whole matrix, or of many classes the pairs that are taken for each other."""
        if len(self.classes) <= MOST_COLUMNS:
            rows = [
                (name, *map(str, row))
                for name, row in zip(self.classes, self.confusion, strict=True)
            ]
            return table(("is \\ told to be", *self.classes), rows)
        counts = np.array(self.confusion)
        np.fill_diagonal(counts, 0)
        worst = np.argsort(-counts, axis=None, kind="stable")[:MOST_COLUMNS].tolist()
        places = [divmod(place, len(self.classes)) for place in worst]
        rows = [(self.classes[i], self.classes[j], str(counts[i, j])) for i, j in places]
        return table(("most often wrong: is", "told to be", "examples"), rows)


def figures(
    classes: Sequence[str], labels: NDArray[np.int64], probabilities: NDArray[np.float32]
) -> ClassificationFigures:
    """Return the figures of probabilities (examples, classes) where `labels` are the truth."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    told = probabilities.argmax(axis=1)
    numbers = range(len(classes))
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, told, labels=numbers, zero_division=0.0
    )
    right = (told == labels).astype(np.int64)
    low, high = proportion(int(right.sum()), len(right))
    truth = probabilities[np.arange(len(labels)), labels]
    return ClassificationFigures(
        classes=tuple(classes),
        confusion=tuple(map(tuple, confusion_matrix(labels, told, labels=numbers).tolist())),
        accuracy=float(right.mean()),
        low=low,
        high=high,
        loss=float(-np.log(np.maximum(truth, np.finfo(np.float32).tiny)).mean()),
        precision=tuple(precision.tolist()),
        recall=tuple(recall.tolist()),
        f1=tuple(f1.tolist()),
    )
