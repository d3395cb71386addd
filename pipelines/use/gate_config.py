"""What the gate demands of a candidate. A module of its own: flags come without heavy imports."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """When a candidate takes the place of a champion.

    Margins are in the units of the scores: nats for a masked token (0.02 are 2 % of perplexity),
    and shares for an accuracy (0.02 are two points in a hundred).
    """

    rule: Literal["non-inferior", "superior"] = "non-inferior"
    """`non-inferior`: every 95 % interval of candidate - champion lies above -margin. `superior`:
    the first of them also lies above the gain."""
    margin: float = 0.02
    """How much worse a candidate may be."""
    gain: float = 0.0
    """How much better a superior candidate must at least be in the first comparison."""

    labels: str = ""
    """Field of --data that holds a label: how well a linear probe tells it from frozen features is
    compared first, and alone where models have too little in common. The probe learns from one half
    of --data and is asked for the other."""

    def __post_init__(self) -> None:
        for name in ("margin", "gain"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)}")

    def bounds(self, count: int) -> list[float]:
        """Return what the interval of each of so many comparisons must lie above."""
        first = self.gain if self.rule == "superior" else -self.margin
        return [first, *[-self.margin] * (count - 1)]
