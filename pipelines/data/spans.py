"""Spans of one flat array: the shape in which texts, sentences and rows are held."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Tokens = NDArray[Any]
"""Ids, uint16 or uint32 as the vocabulary needs."""


def starts(lengths: Ints) -> Ints:
    """Return where each of the consecutive spans of these lengths starts."""
    return np.cumsum(lengths) - lengths


def spans(firsts: Ints, lengths: Ints) -> Ints:
    """Return the joined `range(first, first + length)` of every span."""
    return np.arange(int(lengths.sum())) + np.repeat(firsts - starts(lengths), lengths)
