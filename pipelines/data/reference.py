"""BERT's own pairs and masks, instance by instance, with all their quirks.

What `create_pretraining_data.py` of google-research/bert makes out of one `random.Random`, draw
for draw, on spans instead of lists. Its quirks are kept: a chunk of one sentence is always NotNext,
so NotNext is more than half; a B may come from the same document, and from a copy of it; truncation
cuts the junction of many IsNext pairs; text repeats; control tokens count towards the share that is
masked and are drawn as random words; with whole words, a B that starts within a word joins the last
word of A; a row of words too long for its quota hides nothing.

Devlin et al. 2019, BERT, arXiv:1810.04805, section A.1.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipelines.data.pairs import Segments
from pipelines.data.spans import Tokens
from pipelines.data.vocabulary import Vocabulary

NOTNEXT_RATIO = 0.5
MASK_TOKEN_RATIO = 0.8
RANDOM_TOKEN_RATIO = 0.1
KEPT_OF_THE_REST = 0.5
"""Share of what [MASK] does not replace that stays as it is; the rest is random."""
ATTEMPTS = 10
"""How often another document is drawn; the last one drawn may be the same document."""

Span = tuple[int, int]
"""Start and end in the flat tokens."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The numbers of `create_pretraining_data.py`."""

    max_length: int
    """`max_seq_length`, at least 5."""
    max_predictions: int
    """`max_predictions_per_seq`."""
    short_ratio: float = 0.1
    """`short_seq_prob`."""
    mask_ratio: float = 0.15
    """`masked_lm_prob`."""
    whole_words: bool = False
    """`do_whole_word_mask`."""


class Pair(NamedTuple):
    """Segments A and B."""

    a: Span
    b: Span
    is_notnext: bool
    is_forced: bool
    """The chunk was one sentence, so no coin was tossed."""


class Instance(NamedTuple):
    """One training instance: [CLS] A [SEP] B [SEP], and what is hidden in it."""

    pair: Pair
    hidden: dict[int, int]
    """What the model sees at each position that is to be predicted, ascending; may be empty."""


def make_instances(
    tokens: Tokens,
    sentences: Segments,
    rng: random.Random,
    numbers: Numbers,
    vocabulary: Vocabulary,
) -> list[Instance]:
    """Return the instances of one pass over the documents.

    `sentences` are spans of `tokens` that follow each other; empty ones do not count.
    """
    hider = _Hider(rng, numbers, vocabulary)
    documents = _documents(sentences)
    rng.shuffle(documents)
    instances = []
    for index in range(len(documents)):
        # The generator pauses after each pair, so that its draws and those of its mask alternate.
        for pair in _pairs(documents, index, rng, numbers):
            a, b = (tokens[slice(*span)].tolist() for span in (pair.a, pair.b))
            row = [vocabulary.cls, *a, vocabulary.sep, *b, vocabulary.sep]
            instances.append(Instance(pair, hider.hide(row)))
    rng.shuffle(instances)
    return instances


def _documents(sentences: Segments) -> list[list[int]]:
    """Return each document as the edges of its sentences: one more than it has of them."""
    kept = sentences.take(np.flatnonzero(sentences.length))
    if not len(kept.start):
        return []
    cuts = np.flatnonzero(np.diff(kept.document)) + 1
    ends = kept.start + kept.length
    return [
        [*start.tolist(), int(end[-1])]
        for start, end in zip(np.split(kept.start, cuts), np.split(ends, cuts), strict=True)
    ]


def _pairs(
    documents: list[list[int]], index: int, rng: random.Random, numbers: Numbers
) -> Iterator[Pair]:
    """Yield the pairs of one document."""
    edges, limit = documents[index], numbers.max_length - 3
    target = rng.randint(2, limit) if rng.random() < numbers.short_ratio else limit
    first = 0
    while first + 1 < len(edges):
        end = _fill(edges, first, target)
        is_forced = end == first + 1
        cut = end if is_forced else rng.randint(first + 1, end - 1)
        is_notnext = is_forced or rng.random() < NOTNEXT_RATIO
        a, b = (edges[first], edges[cut]), (edges[cut], edges[end])
        if is_notnext:
            b = _elsewhere(documents, index, rng, target - (a[1] - a[0]))
        yield Pair(*_truncate(a, b, limit, rng), is_notnext, is_forced)
        # Sentences that gave way to others open the next chunk.
        first = cut if is_notnext else end


def _fill(edges: list[int], first: int, target: int) -> int:
    """Return the end of the fewest sentences from `first` on that have `target` tokens."""
    end = first + 1
    while end + 1 < len(edges) and edges[end] - edges[first] < target:
        end += 1
    return end


def _elsewhere(documents: list[list[int]], index: int, rng: random.Random, target: int) -> Span:
    """Return sentences of another document, from a random one on."""
    for _ in range(ATTEMPTS):
        other = rng.randint(0, len(documents) - 1)
        if other != index:
            break
    edges = documents[other]
    first = rng.randint(0, len(edges) - 2)
    return edges[first], edges[_fill(edges, first, target)]


def _truncate(a: Span, b: Span, limit: int, rng: random.Random) -> tuple[Span, Span]:
    """Return what is left of A and B when the longer loses tokens, at a random end each."""
    (a_start, a_end), (b_start, b_end) = a, b
    while (a_end - a_start) + (b_end - b_start) > limit:
        at_front = rng.random() < 0.5
        if a_end - a_start > b_end - b_start:
            a_start, a_end = a_start + at_front, a_end - (not at_front)
        else:
            b_start, b_end = b_start + at_front, b_end - (not at_front)
    return (a_start, a_end), (b_start, b_end)


class _Hider:
    """Draws what is hidden in a row."""

    def __init__(self, rng: random.Random, numbers: Numbers, vocabulary: Vocabulary) -> None:
        self.rng = rng
        self.numbers = numbers
        self.vocabulary = vocabulary
        self.joins = (vocabulary.continues & numbers.whole_words).tolist()

    def hide(self, row: list[int]) -> dict[int, int]:
        """Return what the model sees at the places that are chosen, which ascend."""
        quota = max(1, round(len(row) * self.numbers.mask_ratio))
        quota = min(quota, self.numbers.max_predictions)
        words = self._words(row)
        self.rng.shuffle(words)
        hidden: dict[int, int] = {}
        for word in words:
            if len(hidden) == quota:
                break
            if len(hidden) + len(word) <= quota:
                hidden |= {place: self._replacement(row[place]) for place in word}
        return dict(sorted(hidden.items()))

    def _words(self, row: list[int]) -> list[list[int]]:
        """Return the places of each word, or of each piece."""
        words: list[list[int]] = []
        for place, token in enumerate(row):
            if token in (self.vocabulary.cls, self.vocabulary.sep):
                continue
            if words and self.joins[token]:
                words[-1].append(place)
            else:
                words.append([place])
        return words

    def _replacement(self, token: int) -> int:
        if self.rng.random() < MASK_TOKEN_RATIO:
            return self.vocabulary.mask
        if self.rng.random() < KEPT_OF_THE_REST:
            return token
        return self.rng.randint(0, self.vocabulary.size - 1)
