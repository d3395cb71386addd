"""Is one model better than another, or not worse? Paired scores, an interval, and a rule.

A scorer gives both models the same items (documents, pictures) and returns a `Comparison` for each
thing it has measured; `judge` says what the gate makes of them. Nothing here knows what a model is.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from pipelines.errors import DataError
from pipelines.tables import table
from pipelines.use.baselines import Floats
from pipelines.use.intervals import GROUPS, bootstrap

MIN_ITEMS = 30
"""Fewer items give an interval that is too narrow, and so let too much pass."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Scores of two models on the same items; a higher one is better.

    The score of a model is the sum over its items / the sum of the weights.
    """

    name: str
    """What was measured, and its unit."""
    candidate: Floats
    """(items,), summed over what an item holds."""
    reference: Floats
    """(items,), of the champion or of a baseline."""
    weight: Floats
    """(items,), how much an item holds: its predictions, its pairs, or 1; 0 leaves it out."""

    @property
    def num_items(self) -> int:
        """How many items count."""
        return int((self.weight > 0).sum())

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of candidate - reference when items are drawn anew.

        Paired: both models are scored on the items that are drawn. A score that is not finite
        makes both ends NaN, which lies above nothing.
        """
        gain = self.candidate - self.reference
        if not np.isfinite(gain).all():
            return float("nan"), float("nan")
        group = np.arange(len(gain)) % GROUPS
        return bootstrap(np.bincount(group, gain), np.bincount(group, self.weight))


class Compared(NamedTuple):
    """What two models were scored on."""

    comparisons: list[Comparison]
    """The first is the one that a superior candidate has to win."""
    notes: list[str]
    """What a reader of the scores has to know."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the gate makes of one comparison."""

    name: str
    items: int
    candidate: float
    reference: float
    difference: float
    low: float
    high: float
    """The 95 % interval of the difference."""
    above: float
    """What the interval must lie above."""
    passed: bool

    def record(self) -> dict[str, Any]:
        """Return it as plain JSON values; what is not finite is null."""
        return {
            name: None if isinstance(value, float) and not np.isfinite(value) else value
            for name, value in asdict(self).items()
        }


def judge(comparisons: Sequence[Comparison], bounds: Sequence[float]) -> list[Finding]:
    """Return whether the interval of each comparison lies above its bound.

    All of them have to: as none may fail, testing several does not make a pass more likely.

    Raises:
        DataError: If a comparison has too few items for an interval.
    """
    findings = []
    for comparison, above in zip(comparisons, bounds, strict=True):
        if comparison.num_items < MIN_ITEMS:
            raise DataError(
                f"{comparison.name}: {comparison.num_items} items are too few for an interval; "
                f"name --data with at least {MIN_ITEMS}"
            )
        low, high = comparison.interval()
        total = comparison.weight.sum()
        candidate = float(comparison.candidate.sum() / total)
        reference = float(comparison.reference.sum() / total)
        findings.append(
            Finding(
                name=comparison.name,
                items=comparison.num_items,
                candidate=candidate,
                reference=reference,
                difference=candidate - reference,
                low=low,
                high=high,
                above=above,
                passed=low > above,
            )
        )
    return findings


def findings_table(findings: Sequence[Finding], against: str) -> str:
    """Return findings in columns for people."""
    head = ("", "items", "candidate", against, "difference", "95 % interval", "to be above", "")
    rows = [
        (
            found.name,
            str(found.items),
            f"{found.candidate:.4f}",
            f"{found.reference:.4f}",
            f"{found.difference:+.4f}",
            f"{found.low:+.4f} to {found.high:+.4f}",
            f"{found.above:+.4f}",
            "passed" if found.passed else "FAILED",
        )
        for found in findings
    ]
    return table(head, rows)
