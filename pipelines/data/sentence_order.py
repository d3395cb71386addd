"""Sentence-order prediction: neighbours A and B, shown as they stand (0) or swapped (1).

Lan et al. 2019, ALBERT, arXiv:1909.11942, section 3.1. A coin alone would give the label away: a
chunk that is filled up to a limit starts with longer sentences than it ends with, so the longer
segment is the first one (a histogram over the two lengths told 60 to 63 % of the labels of English
text at 64 tokens). Hence chunks are cut in couples, before any coin is tossed:

    chunk i   | a a a a a a a . b b b b |      cut into 7 and 4 tokens
    chunk j   | c c c c . d d d d d d d |      cut into 4 and 7 tokens

A row of 7 and 4 tokens then is chunk i in order as often as it is chunk j swapped.
"""

import numpy as np

from pipelines.data.pairs import Chunks, Pairs, Segments
from pipelines.data.randomness import Words64, uniform
from pipelines.data.spans import Ints


def mirror(chunks: Chunks, coins: Words64, swapped_ratio: float) -> tuple[Chunks, Ints]:
    """Cut chunks so that couples have mirrored lengths, and label these: 0 in order, 1 swapped.

    Chunks come in keyed order, and each tries its cuts from the given one on, until one mirrors a
    cut of a chunk that waits. Without a partner a chunk keeps the given cut and has label -1.
    """
    num_chunks = len(chunks.first)
    cuts, paired = chunks.cut.tolist(), [False] * num_chunks
    waiting: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i in np.argsort(coins[:num_chunks], kind="stable").tolist():
        first, cut, end = int(chunks.first[i]), cuts[i], int(chunks.end[i])
        lengths = (chunks.edges[first + 1 : end + 1] - chunks.edges[first]).tolist()
        total = lengths.pop()
        for option in [*range(cut, end), *range(first + 1, cut)]:
            others = waiting.get((total, total - lengths[option - first - 1]), [])
            while others and paired[others[-1][0]]:
                others.pop()
            if others:
                j, other = others.pop()
                cuts[i], cuts[j] = option, other
                paired[i] = paired[j] = True
                break
        else:
            for option, length in enumerate(lengths, first + 1):
                waiting.setdefault((total, length), []).append((i, option))
    label = np.where(paired, uniform(coins[num_chunks:]) < swapped_ratio, -1)
    return chunks._replace(cut=np.array(cuts, dtype=np.int64)), label


def swap(pairs: Pairs, swapped: Ints) -> Pairs:
    """Return the pairs with A and B exchanged where `swapped` is 1."""
    first, second = (
        Segments(*(np.where(swapped == 1, x, y) for x, y in zip(other, own, strict=True)))
        for own, other in ((pairs.a, pairs.b), (pairs.b, pairs.a))
    )
    return Pairs(first, second)
