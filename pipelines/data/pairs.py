"""Sentences cut into neighbours A and B, every token once, and honest labels for the pairs.

A document is cut into chunks of whole sentences, and each chunk at one sentence edge into two
neighbouring segments A and B. Chunks of different documents whose Bs are equally long are coupled,
and a coin decides whether the two exchange their Bs (NotNext) or keep them (IsNext): nothing but
the words tells the label.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.data.randomness import Words64, draws, key, uniform
from pipelines.data.spans import Ints, Tokens


class Segments(NamedTuple):
    """Runs of tokens, each within one document, as spans of one flat token array."""

    start: Ints
    length: Ints
    document: Ints

    def take(self, index: Ints) -> "Segments":
        """Return the segments of these indices."""
        return Segments(*(column[index] for column in self))


class Pairs(NamedTuple):
    """The segments A and B of each row."""

    a: Segments
    b: Segments
    """Of length 0 where the row is a single sentence."""


class Chunks(NamedTuple):
    """Units of one document that make a row, and where they are cut in two."""

    edges: Ints
    """Where each unit starts, and where the last one ends, in the flat tokens."""
    document: Ints
    first: Ints
    """The unit that the chunk, and A, starts with."""
    cut: Ints
    """The unit that B starts with; `end` in a chunk of one unit."""
    end: Ints
    """The unit after the chunk."""

    def pairs(self) -> Pairs:
        """Return the two parts of each chunk."""
        start, middle, end = (self.edges[unit] for unit in (self.first, self.cut, self.end))
        return Pairs(
            Segments(start, middle - start, self.document),
            Segments(middle, end - middle, self.document),
        )


def split_long(units: Segments, continues: NDArray[np.bool_], limit: int) -> Segments:
    """Cut units of more than `limit` tokens, before a word where one starts in reach.

    Units follow each other without a gap, here and in what is returned; empty ones are left out.
    """
    overlong = np.flatnonzero(units.length > limit)
    if not len(overlong):
        return units.take(np.flatnonzero(units.length))
    positions = np.arange(len(continues))
    last_word = np.maximum.accumulate(np.where(continues, 0, positions))
    cuts: list[int] = []
    for start, end in zip(
        units.start[overlong].tolist(),
        (units.start + units.length)[overlong].tolist(),
        strict=True,
    ):
        cut = start
        while end - cut > limit:
            word = int(last_word[cut + limit])
            cut = word if word > cut else cut + limit
            cuts.append(cut)
    whole = units.take(np.flatnonzero(units.length))
    start = np.sort(np.concatenate([whole.start, np.array(cuts, dtype=np.int64)]))
    unit = np.searchsorted(whole.start, start, side="right") - 1
    return Segments(start, np.diff(start, append=len(continues)), whole.document[unit])


def target_lengths(document_keys: Words64, limit: int, short_ratio: float) -> Ints:
    """Return how many tokens the chunks of each document are to have: `limit`, or fewer.

    With probability `short_ratio` a document gets any of 2 to `limit`, all equally likely.
    """
    is_short = uniform(draws(key("short"), document_keys)) < short_ratio
    shorter = 2 + (uniform(draws(key("short length"), document_keys)) * (limit - 1)).astype(int)
    return np.where(is_short, shorter, limit)


def cut_chunks(
    units: Segments, document_start: Ints, document_keys: Words64, targets: Ints, limit: int
) -> Chunks:
    """Cut documents into chunks of `targets` tokens, and each chunk at a unit edge into A and B.

    The first chunk of a document has a keyed size, so that the cuts move between epochs.
    """
    half = targets // 2
    at_document = uniform(draws(key("first chunk"), document_keys))
    first_targets = half + (at_document * (targets - half)).astype(np.int64)
    is_first = np.diff(units.document, prepend=-1) > 0
    room = np.where(is_first, first_targets[units.document], targets[units.document])
    # A target below `limit` may be shorter than a sentence; a pair needs two of them all the same.
    first = _fill(units, room, least=1 + (targets < limit)[units.document])
    end = np.append(first, len(units.start))[1:]
    document = units.document[first]
    position = (units.start[first] - document_start[document]).astype(np.uint64)
    at_chunk = uniform(draws(document_keys[document], position))
    cut = first + 1 + (at_chunk * (end - first - 1)).astype(np.int64)
    edges = np.append(units.start, units.start[-1:] + units.length[-1:])
    return Chunks(edges, document, first, cut, end)


def _fill(units: Segments, room: Ints, least: Ints) -> Ints:
    """Return the first unit of each chunk: units of one document, as many as have room.

    `room` and `least` are the tokens and units of a chunk that starts with this unit.
    """
    filled = np.searchsorted(units.start + units.length, units.start + room, side="right")
    document_end = np.searchsorted(units.document, units.document, side="right")
    unfilled = np.arange(len(filled)) + least
    following = np.minimum(np.maximum(filled, unfilled), document_end).tolist()
    firsts: list[int] = []
    unit = 0
    while unit < len(following):
        firsts.append(unit)
        unit = following[unit]
    return np.array(firsts, dtype=np.int64)


def couple(
    pairs: Pairs,
    content: NDArray[np.uint64],
    tokens: Tokens,
    coins: Words64,
    notnext_ratio: float,
) -> tuple[Ints, Ints]:
    """Return whose B each pair takes, and its label: 0 IsNext, 1 NotNext, -1 none.

    Pairs are coupled inside buckets of equal B length, across documents that are not copies
    of each other, before any label is drawn; one coin then labels both. A pair that finds no
    partner keeps its B and has no label, whatever the coin would have said.
    """
    num_pairs = len(content)
    partner = np.arange(num_pairs)
    label = np.full(num_pairs, -1, dtype=np.int64)
    heads = uniform(coins[num_pairs:]) < notnext_ratio
    queue = np.lexsort((coins[:num_pairs], pairs.b.length))
    queue = queue[pairs.b.length[queue] > 0]
    starts, lengths, _ = (column.tolist() for column in pairs.b.take(queue))
    contents, openings = content[queue].tolist(), tokens[pairs.b.start[queue]].tolist()

    def alike(i: int, j: int) -> bool:
        if contents[i] == contents[j]:
            return True
        if openings[i] != openings[j]:  # spares the comparison of most
            return False
        first, second = (tokens[starts[place] :][: lengths[place]] for place in (i, j))
        return bool(np.array_equal(first, second))

    waiting: list[int] = []
    couples: list[tuple[int, int]] = []
    for i in range(len(queue)):
        if waiting and lengths[waiting[-1]] != lengths[i]:
            waiting = []
        # Those that wait together are alike, so the last of them speaks for all.
        if waiting and not alike(i, waiting[-1]):
            couples.append((waiting.pop(), i))
        else:
            waiting.append(i)
    first, second = queue[np.array(couples, dtype=np.int64).reshape(-1, 2)].T
    label[first] = label[second] = heads[second]
    partner[first] = np.where(heads[second], second, first)
    partner[second] = np.where(heads[second], first, second)
    return partner, label
