"""Which embeddings lie near each other: exact, by cosine, in tiles, never all against all at once.

Shapes: n embeddings of D numbers, q queries, k neighbours.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Vectors = NDArray[np.float32]
Numbers = NDArray[np.int64]

TILE = 4096
"""Embeddings on either side of a tile of similarities: 64 MB."""
ROUNDING = 1e-6
"""By which the similarity of equal embeddings may miss 1."""


class Pairs(NamedTuple):
    """Pairs of embeddings by their numbers, the lesser first."""

    first: Numbers
    second: Numbers
    similarity: Vectors


class Found(NamedTuple):
    """Every pair that is alike, in short."""

    pairs: Pairs
    """The most alike, in falling order."""
    num_pairs: int
    """How many there are, kept or not."""
    groups_n: Numbers
    """Number of the group of each embedding; two that are joined by pairs have the same."""


def on_sphere(vectors_nD: Vectors) -> Vectors:
    """Return the embeddings at length 1, zeros as they are.

    Their mean is left in, though features that come out of a ReLU all point one way. Without it
    autoencoders told some copies of photos better, encoders of triplets less well, as infra/bench
    has it, and encoders of text less well, too; how alike two items are would depend on the rest.
    """
    length_n1 = np.linalg.norm(vectors_nD, axis=1, keepdims=True)
    unit_nD: Vectors = vectors_nD / np.maximum(length_n1, np.finfo(np.float32).tiny)
    return unit_nD


def find_pairs(unit_nD: Vectors, threshold: float, max_pairs: int) -> Found:
    """Return the pairs whose cosine is at least `threshold`, and the groups that they make.

    All pairs make groups and are counted; the `max_pairs` most alike are kept. The memory is that
    of some tiles and of what is kept.
    """
    none = np.zeros(0, np.int64)
    kept = Pairs(none, none, np.zeros(0, np.float32))
    groups_n = np.arange(len(unit_nD))
    num_pairs = 0
    for found in _tiles(unit_nD, threshold):
        groups_n = _joined(groups_n, found)
        num_pairs += len(found.first)
        kept = _most_alike(_both(kept, found), max_pairs)
    order = np.lexsort((kept.second, kept.first, -kept.similarity))
    return Found(_taken(kept, order), num_pairs, groups_n)


def nearest(unit_nD: Vectors, query_qD: Vectors, k: int) -> tuple[Numbers, Vectors]:
    """Return the numbers (q, k) of the embeddings nearest to each query, and their cosines."""
    numbers = np.zeros((len(query_qD), 0), np.int64)
    cosines = np.zeros((len(query_qD), 0), np.float32)
    for start in range(0, len(unit_nD), TILE):
        tile_qt = query_qD @ unit_nD[start : start + TILE].T
        places = np.broadcast_to(np.arange(start, start + tile_qt.shape[1]), tile_qt.shape)
        numbers, cosines = np.hstack([numbers, places]), np.hstack([cosines, tile_qt])
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        numbers = np.take_along_axis(numbers, best, axis=1)
        cosines = np.take_along_axis(cosines, best, axis=1)
    return numbers, np.minimum(cosines, 1)


def _tiles(unit_nD: Vectors, threshold: float) -> Iterator[Pairs]:
    """Yield the pairs of each tile that has any."""
    for top in range(0, len(unit_nD), TILE):
        for left in range(top, len(unit_nD), TILE):
            tile = unit_nD[top : top + TILE] @ unit_nD[left : left + TILE].T
            is_alike = tile >= threshold - ROUNDING
            row, column = np.nonzero(np.triu(is_alike, k=1) if left == top else is_alike)
            if len(row):
                yield Pairs(row + top, column + left, np.minimum(tile[row, column], 1))


def _joined(groups_n: Numbers, pairs: Pairs) -> Numbers:
    edges = groups_n[pairs.first], groups_n[pairs.second]
    size = len(groups_n)
    graph = coo_array((np.ones(len(edges[0]), np.float32), edges), shape=(size, size))
    numbers: Numbers = connected_components(graph, directed=False)[1]
    return numbers[groups_n].astype(np.int64)


def _both(some: Pairs, more: Pairs) -> Pairs:
    return Pairs(
        np.concatenate([some.first, more.first]),
        np.concatenate([some.second, more.second]),
        np.concatenate([some.similarity, more.similarity]),
    )


def _most_alike(pairs: Pairs, count: int) -> Pairs:
    if len(pairs.first) <= count:
        return pairs
    return _taken(pairs, np.argpartition(-pairs.similarity, count)[:count])


def _taken(pairs: Pairs, places: Numbers) -> Pairs:
    return Pairs(pairs.first[places], pairs.second[places], pairs.similarity[places])
