"""WordPiece pieces out of word counts: byte-pair merges whose ties are broken by rule.

    words    hug 10, pug 5, hugs 5            ->  h ##u ##g | p ##u ##g | h ##u ##g ##s
    pairs    (##u, ##g) 20, (h, ##u) 15, ...  ->  the most frequent one becomes ##ug
    again    until the vocabulary is full, or no pair is frequent enough

Sennrich et al. 2016, arXiv:1508.07909, algorithm 1, with the marks of Wu et al. 2016,
arXiv:1609.08144. The `WordPieceTrainer` of `tokenizers` does the same merges, and the tests hold
the two equal, but it takes texts alone, counts pairs in 32 bits and numbers some pieces at random.
"""

from collections.abc import Iterator
from heapq import heappop, heappush
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.data.spans import Ints
from pipelines.data.word_counts import can_continue

MARK = "##"
"""Starts a piece that continues a word."""

BOUNDARY, MERGED = -1, -2
"""In place of a piece: between words, and where a piece became part of the one before it."""

PIECE_BITS = 32
"""A pair is one integer, so that pairs sort as their first and then their second pieces do."""


def learn_pieces(words: pa.Table, *, size: int, alphabet: int, min_frequency: int) -> list[str]:
    """Return at most `size` pieces, as they were found; a function of the counts alone.

    Args:
        words: Columns `word` and `count`, every word once and in any order.
        size: Most pieces.
        alphabet: Most characters, the most frequent ones, ties by code point. Each takes up to
            two pieces: one that starts a word and one that continues it.
        min_frequency: How often a pair must be seen to become a piece.
    """
    texts, counts = words["word"].to_pylist(), words["count"].to_numpy()
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32)
    letters = _alphabet(codes, np.repeat(counts, lengths), min(alphabet, size // 2))
    pieces = [MARK + letter for letter in letters if can_continue(letter)] + letters
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = _Merges(*_spelled(codes, lengths, ids), counts, min_frequency)
    for pair in merges:
        if len(pieces) >= size:
            break
        piece = pieces[pair >> PIECE_BITS] + pieces[pair % (1 << PIECE_BITS)].removeprefix(MARK)
        if piece not in ids:
            ids[piece] = len(pieces)
            pieces.append(piece)
        merges.merge(pair, ids[piece])
    return pieces


class _Merges:
    """The words as pieces in one flat array, how often each pair of neighbours is seen, and where.

    Words are apart by a boundary. Neighbours are linked, because merged pieces leave gaps.
    """

    def __init__(self, pieces: Ints, word: Ints, counts: Ints, min_frequency: int) -> None:
        places = np.arange(len(pieces)) + word + 1  # a boundary goes before each word
        size = len(pieces) + len(counts) + 1
        self._piece = np.full(size, BOUNDARY, dtype=np.int64)
        self._piece[places] = pieces
        self._seen = np.zeros(size, dtype=np.int64)
        """How often the word that holds a place was seen."""
        self._seen[places] = counts[word]
        self._after = np.arange(1, size + 1)
        self._before = np.arange(-1, size - 1)
        self._least = max(1, min_frequency)
        self._counts: dict[int, int] = {}
        self._places: dict[int, Ints] = {}
        """Where the first piece of each pair lies, ascending; some may have merged since."""
        self._heap: list[tuple[int, int]] = []
        self._add(places)

    def __iter__(self) -> Iterator[int]:
        """Yield the most frequent pair, the smallest of several, until none is frequent enough."""
        while self._heap:
            count, pair = heappop(self._heap)
            current = self._counts.get(pair, 0)
            if current == -count:
                yield pair
            elif current >= self._least:
                heappush(self._heap, (-current, pair))

    def merge(self, pair: int, piece: int) -> None:
        """Put the piece in the place of the pair, from left to right in every word."""
        first, second = pair >> PIECE_BITS, pair % (1 << PIECE_BITS)
        at = self._places.pop(pair)
        at = at[(self._piece[at] == first) & (self._piece[self._after[at]] == second)]
        if first == second:
            at = at[_every_other(at, self._after[at])]
        right = self._after[at]
        # Where two merges touch, the pair between them ends once.
        self._remove(np.unique(np.concatenate([self._before[at], right])))
        del self._counts[pair]
        self._piece[at], self._piece[right] = piece, MERGED
        self._after[at] = self._after[right]
        self._before[self._after[at]] = at
        self._add(np.unique(np.concatenate([self._before[at], at])))

    def _remove(self, places: Ints) -> None:
        for pair, count, _ in self._pairs(places):
            if pair in self._counts:
                self._counts[pair] -= count

    def _add(self, places: Ints) -> None:
        for pair, count, where in self._pairs(places):
            # A pair is complete when it appears, so a rare one stays rare.
            if count >= self._least:
                self._counts[pair], self._places[pair] = count, where
                heappush(self._heap, (-count, pair))

    def _pairs(self, places: Ints) -> Iterator[tuple[int, int, Ints]]:
        """Yield the pairs that start at these places, how often each was seen, and its places."""
        first, second = self._piece[places], self._piece[self._after[places]]
        inside = (first >= 0) & (second >= 0)
        places, pairs = places[inside], (first[inside] << PIECE_BITS) | second[inside]
        order = np.argsort(pairs, kind="stable")
        places, pairs = places[order], pairs[order]
        edges = np.flatnonzero(np.diff(pairs, prepend=-1))
        if not len(edges):
            return
        counts = np.add.reduceat(self._seen[places], edges)
        ends = np.append(edges[1:], len(places))
        columns = (pairs[edges], counts, edges, ends)
        for pair, count, start, end in zip(*(c.tolist() for c in columns), strict=True):
            yield pair, count, places[start:end]


def _alphabet(codes: NDArray[Any], seen: Ints, size: int) -> list[str]:
    """Return the characters that were seen most often, ties and result by code point."""
    letters, which = np.unique(codes, return_inverse=True)
    totals = np.zeros(len(letters), dtype=np.int64)
    np.add.at(totals, which, seen)
    most = np.argsort(-totals, kind="stable")[:size]
    return [chr(code) for code in np.sort(letters[most])]


def _spelled(codes: NDArray[Any], lengths: Ints, ids: dict[str, int]) -> tuple[Ints, Ints]:
    """Return the characters as pieces, and the word of each; those without a piece are left out."""
    letters, which = np.unique(codes, return_inverse=True)
    begins = np.array([ids.get(chr(code), -1) for code in letters], dtype=np.int64)
    continues = np.array([ids.get(MARK + chr(code), -1) for code in letters], dtype=np.int64)
    ends = np.cumsum(lengths)
    pieces = continues[which]
    firsts = (ends - lengths)[lengths > 0]
    pieces[firsts] = begins[which[firsts]]
    spelled = np.flatnonzero(pieces >= 0)
    return pieces[spelled], np.repeat(np.arange(len(lengths)), lengths)[spelled]


def _every_other(at: Ints, right: Ints) -> NDArray[np.bool_]:
    """Return which of the pairs of one piece with itself merge: those that share no piece."""
    starts_run = np.append(True, at[1:] != right[:-1])
    run_start = np.flatnonzero(starts_run)[np.cumsum(starts_run) - 1]
    return np.asarray((np.arange(len(at)) - run_start) % 2 == 0)
