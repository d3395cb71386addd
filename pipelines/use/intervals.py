"""How far a measured mean may be from the true one: 95 % intervals."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

NUM_RESAMPLES = 2000
GROUPS = 1024
"""A bootstrap draws items, or so many groups of them."""
NORMAL_97_5 = 1.959964
"""What a normal deviate is below 97.5 % of the time."""


def bootstrap(right: NDArray[Any], pairs: NDArray[Any]) -> tuple[float, float]:
    """Return the 95 % interval of sum(right) / sum(pairs) when documents are drawn anew.

    Each place of the two arrays is one document, or a group of them.
    """
    right, pairs = right[pairs > 0], pairs[pairs > 0]
    if not len(pairs):
        return math.nan, math.nan
    drawn = np.random.default_rng(0).integers(len(pairs), size=(NUM_RESAMPLES, len(pairs)))
    accuracies = right[drawn].sum(axis=1) / pairs[drawn].sum(axis=1)
    low, high = np.quantile(accuracies, [0.025, 0.975])
    return float(low), float(high)


def interval(scores: NDArray[Any]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of scores (seeds, items), both of them drawn anew.

    The variances of the means of seeds and of the means of items add up, and Student's t has the
    degrees of freedom of Welch and Satterthwaite: of few seeds a bootstrap does not know how far
    apart others would be, and covered the truth 79 % of the time for three that differ more than
    items do. One seed is taken for all there is. Of the difference of two methods' scores on the
    same items this is the paired interval.
    """
    mean, parts = float(scores.mean()), []
    for means in (scores.mean(axis=1), scores.mean(axis=0)):
        if len(means) > 1:
            parts.append((float(means.var(ddof=1)) / len(means), len(means) - 1))
    variance = sum(part for part, _ in parts)
    if not variance:
        return mean, mean
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(variance)
    return mean - half, mean + half


def proportion(num_right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, when what is counted is drawn anew.

    Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference: it stays
    within 0 and 1, and has a width where all are right.
    """
    share, squared = num_right / count, NORMAL_97_5**2
    centre = (share + squared / (2 * count)) / (1 + squared / count)
    variance = share * (1 - share) / count + squared / (4 * count**2)
    half = NORMAL_97_5 * math.sqrt(variance) / (1 + squared / count)
    return max(0.0, centre - half), min(1.0, centre + half)
