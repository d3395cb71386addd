"""Honest pairs: every token once an epoch, and nothing but the words tells the label.

A document is cut into chunks of whole sentences, and each chunk at one sentence edge into two
neighbouring segments A and B. Chunks of different documents whose Bs are equally long are coupled,
and a coin decides whether the two exchange their Bs (NotNext) or keep them (IsNext).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.data.randomness import Words64, draws, key, uniform
from pipelines.data.spans import Ints, Tokens


class Units(NamedTuple):
    """Sentences, or pieces of overlong ones, as spans of one flat token array."""

    start: Ints
    length: Ints
    document: Ints


class Pairs(NamedTuple):
    """Segments A and B of each chunk, as spans of one flat token array."""

    document: Ints
    a_start: Ints
    a_length: Ints
    b_start: Ints
    b_length: Ints
    """0 where the chunk is a single sentence."""


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
    num_pairs = len(pairs.document)
    partner = np.arange(num_pairs)
    label = np.full(num_pairs, -1, dtype=np.int64)
    heads = uniform(coins[num_pairs:]) < notnext_ratio

    def second(pair: int) -> bytes:
        return tokens[pairs.b_start[pair] :][: pairs.b_length[pair]].tobytes()

    waiting: list[int] = []
    order = np.lexsort((coins[:num_pairs], pairs.b_length))
    for i in order[pairs.b_length[order] > 0].tolist():
        if waiting and pairs.b_length[waiting[-1]] != pairs.b_length[i]:
            waiting = []
        # Those that wait together are of one document, so the last of them speaks for all.
        j = waiting[-1] if waiting else i
        if content[i] == content[j] or second(i) == second(j):
            waiting.append(i)
            continue
        waiting.pop()
        label[[i, j]] = int(heads[i])
        if heads[i]:
            partner[i], partner[j] = j, i
    return partner, label


def split_long(units: Units, continues: NDArray[np.bool_], limit: int) -> Units:
    """Cut units of more than `limit` tokens, before a word where one starts in reach."""
    pieces: list[tuple[int, int, int]] = []
    for start, length, document in zip(*(column.tolist() for column in units), strict=True):
        end = start + length
        while end - start > limit:
            wordstarts = np.flatnonzero(~continues[start + 1 : start + limit + 1])
            cut = start + (int(wordstarts[-1]) + 1 if len(wordstarts) else limit)
            pieces.append((start, cut - start, document))
            start = cut
        if end > start:
            pieces.append((start, end - start, document))
    return Units(*np.array(pieces, dtype=np.int64).reshape(-1, 3).T)


def _chunk(units: Units, limit: int, first_limits: NDArray[np.float64]) -> Ints:
    """Return the first unit of each chunk: units of one document, `limit` tokens at most.

    `first_limits` are the smaller limits of each document's first chunk.
    """
    firsts: list[int] = []
    current, room = -1, 0.0
    for i, (length, document) in enumerate(
        zip(units.length.tolist(), units.document.tolist(), strict=True)
    ):
        if document != current:
            current, room = document, first_limits[document]
            firsts.append(i)
        elif length > room:
            room = limit
            firsts.append(i)
        room -= length
    return np.array(firsts, dtype=np.int64)


def cut_pairs(units: Units, document_start: Ints, limit: int, document_keys: Words64) -> Pairs:
    """Cut documents into chunks, and each chunk at a unit edge into A and B.

    The first chunk of a document has a keyed size, so that the cuts move between epochs.
    """
    at_document = uniform(draws(key("first chunk"), document_keys))
    firsts = _chunk(units, limit, limit // 2 + at_document * (limit - limit // 2))
    num_units = np.diff(np.append(firsts, len(units.start)))
    start, document = units.start[firsts], units.document[firsts]
    end = np.append(units.start + units.length, 0)[firsts + num_units - 1]
    position = (start - document_start[document]).astype(np.uint64)
    at_chunk = uniform(draws(document_keys[document], position))
    cut = firsts + 1 + (at_chunk * (num_units - 1)).astype(np.int64)
    middle = np.where(num_units > 1, np.append(units.start, 0)[cut], end)
    return Pairs(document, start, middle - start, middle, end - middle)
