"""Which tokens of a row are to be predicted, and what the model sees in their place.

    row      [CLS] the un ##har ##bour ##ed sea [SEP] it sinks [SEP]
    pieces          7   2   9     4     8    1         5   3            each piece has a draw
    words           7   2                    1         5   3            the draw of its first piece
    spans           7   7                    1         5   5            one draw for several words

Words (or pieces) are taken in the order of their draws for as long as they fit into
`num_predictions`. Only those of small draws can be among them, so only those are sorted; a row
that they do not fill is sorted whole. Rows are worked on in chunks that stay in the cache; a
row's masks depend neither on the chunk nor on the rows beside it.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.data.randomness import Words64, draws, key, streams, uniform
from pipelines.data.spans import Ints, Tokens, spans, starts
from pipelines.data.text_config import TextConfig
from pipelines.data.vocabulary import Vocabulary

Flags = NDArray[np.bool_]

CHUNK_TOKENS = 1 << 16
"""Tokens that are worked on at once, and the most in one row: a place in 16 bits."""
SPREAD = 3.0
"""How many standard deviations more are sorted than a row is expected to need."""
_REPLACE, _RANDOM_PIECE = key("replace"), key("random piece")


class Masks(NamedTuple):
    """What is to be predicted in flat rows of tokens."""

    places: Ints
    """Indices of the chosen tokens, ascending."""
    inputs: Tokens
    """What the model sees at these places."""


def num_predictions(num_tokens: Ints, config: TextConfig) -> Ints:
    """Return how many of a row's text tokens are to be predicted: at least one."""
    rounded: Ints = np.maximum(1, np.rint(config.mask_ratio * num_tokens)).astype(np.int64)
    return rounded


def mask(
    flat: Tokens,
    lengths: Ints,
    row_keys: Words64,
    vocabulary: Vocabulary,
    config: TextConfig,
) -> Masks:
    """Choose tokens of flat rows and what the model sees in their place.

    Rows start and end with a control token. Control tokens are never chosen and never drawn, and
    no word or span goes across one. A word of more pieces than its row may lose is chosen piece
    by piece. Of the last span, the words that fit are taken; a span's words are replaced alike.
    """
    row_starts = starts(lengths)
    places, inputs = [np.zeros(0, np.int64)], [np.zeros(0, vocabulary.dtype)]
    for rows in _chunks(lengths):
        first = int(row_starts[rows.start])
        tokens = flat[first : first + int(lengths[rows].sum())]
        masks = _mask_chunk(tokens, lengths[rows], row_keys[rows], vocabulary, config)
        places.append(masks.places + first)
        inputs.append(masks.inputs)
    return Masks(np.concatenate(places), np.concatenate(inputs))


def _chunks(lengths: Ints) -> Iterator[slice]:
    ends = np.cumsum(lengths)
    first = 0
    while first < len(lengths):
        last = int(np.searchsorted(ends, ends[first] - lengths[first] + CHUNK_TOKENS, "right"))
        yield slice(first, last)
        first = last


def _mask_chunk(
    flat: Tokens, lengths: Ints, row_keys: Words64, vocabulary: Vocabulary, config: TextConfig
) -> Masks:
    is_text = (flat != vocabulary.cls) & (flat != vocabulary.sep)
    num_text = np.add.reduceat(is_text, starts(lengths), dtype=np.int64)
    quota = num_predictions(num_text, config)
    goes_on, sizes = _words(flat, is_text, lengths, quota, vocabulary, config)
    token_draws = streams(row_keys, lengths)
    unit_draws = token_draws
    if config.masking == "spans":
        unit_draws = _share(token_draws, goes_on, is_text, span_lengths(config))
    chosen = np.zeros(len(flat), dtype=bool)
    chosen[_first_that_fit(unit_draws, is_text & ~goes_on, sizes, lengths, quota)] = True
    grown = chosen
    while (grown := grown[:-1] & goes_on[1 - len(grown) :]).any():
        chosen[-len(grown) :] |= grown
    places = np.flatnonzero(chosen)
    fate = uniform(draws(_REPLACE, unit_draws.take(places)))
    is_mask = fate < config.mask_token_ratio
    is_random = ~is_mask & (fate < config.mask_token_ratio + config.random_token_ratio)
    inputs = flat.take(places)
    np.putmask(inputs, is_mask, vocabulary.mask)
    numbers = draws(_RANDOM_PIECE, token_draws[places[is_random]])
    inputs[is_random] = vocabulary.ordinary[numbers % np.uint64(len(vocabulary.ordinary))]
    return Masks(places, inputs)


def _words(
    flat: Tokens,
    is_text: Flags,
    lengths: Ints,
    quota: Ints,
    vocabulary: Vocabulary,
    config: TextConfig,
) -> tuple[Flags, NDArray[np.uint16]]:
    """Return which tokens go on with a word, and where one starts, of how many tokens it is.

    A word of more pieces than the quota of its row is as many words.
    """
    if config.masking == "pieces":
        return np.zeros(len(flat), dtype=bool), np.ones(len(flat), dtype=np.uint16)
    goes_on = vocabulary.continues.take(flat.astype(np.intp))
    goes_on[1:] &= is_text[:-1]  # the token before a segment is a control token
    sizes = np.ones(len(flat), dtype=np.uint16)
    run = goes_on[1:]  # after k turns: whether the k tokens after this one all go on
    while run.any():
        sizes[: len(run)] += run
        run = run[:-1] & goes_on[1 - len(run) :]
    if sizes.max() > quota.min():
        long = np.flatnonzero((sizes > np.repeat(quota, lengths)) & ~goes_on)
        pieces = spans(long, sizes[long].astype(np.int64))
        goes_on[pieces], sizes[pieces] = False, 1
    return goes_on, sizes


def _first_that_fit(
    unit_draws: Words64, begins: Flags, sizes: NDArray[np.uint16], lengths: Ints, quota: Ints
) -> Ints:
    """Return where the words start that fit into the quota of their row, small draws first.

    Draws are compared by their upper 32 bits, equal ones by their places.
    """
    share = quota.sum() / len(begins)
    limit = share + SPREAD * np.sqrt(share / lengths.mean())
    near = unit_draws < np.uint64(min(limit, 1 - 2**-53) * 2.0**64)
    near &= begins
    held = np.add.reduceat(near * sizes, starts(lengths), dtype=np.int64)
    short = held < quota
    if short.any():
        near |= np.repeat(short, lengths) & begins
        held = np.add.reduceat(near * sizes, starts(lengths), dtype=np.int64)
    place = np.flatnonzero(near)
    row = np.repeat(np.arange(len(lengths), dtype=np.uint64) << np.uint64(48), lengths)
    packed = unit_draws.take(place) >> np.uint64(32) << np.uint64(16)
    packed |= row.take(place)
    packed |= place.view(np.uint64)
    packed.sort()
    place = (packed & np.uint64(0xFFFF)).view(np.int64)
    packed >>= np.uint64(48)
    ends = np.cumsum(sizes.take(place), dtype=np.int64)
    row_limit = starts(held) + quota
    return place.take(np.flatnonzero(ends <= row_limit.take(packed.view(np.int64))))


def span_lengths(config: TextConfig) -> NDArray[np.uint8]:
    """Return the 65,536 equally likely lengths of a span, in words.

    A geometric distribution, cut off and scaled: Joshi et al. 2020, SpanBERT, arXiv:1907.10529.
    """
    return _geometric(config.span_stop_ratio, config.span_max_words)


@lru_cache
def _geometric(stop_ratio: float, longest: int) -> NDArray[np.uint8]:
    up_to = 1 - (1 - stop_ratio) ** np.arange(longest + 1)
    counts = np.diff(np.rint(up_to / up_to[-1] * (1 << 16)).astype(np.int64))
    return np.repeat(np.arange(1, longest + 1, dtype=np.uint8), counts)


def _share(
    token_draws: Words64, goes_on: Flags, is_text: Flags, lengths: NDArray[np.uint8]
) -> Words64:
    """Return for each token the draw of the first token of its span.

    The words after one control token, through the next, are cut into spans. The length of their
    j-th span is of the low bits of the j-th draw; the order of spans is of the high bits.
    """
    word = np.flatnonzero(~goes_on)
    control = np.flatnonzero(~is_text.take(word))
    num_words = np.diff(control, prepend=-1)
    first = control + 1 - num_words
    length = lengths.take((token_draws.take(word) & np.uint64(0xFFFF)).view(np.int64))
    start = np.cumsum(length, dtype=np.int64)
    start -= length
    start -= np.repeat(start[first] - first, num_words)
    inside = np.flatnonzero(start <= np.repeat(control, num_words))
    span = word.take(start.take(inside))
    return np.repeat(token_draws[span], np.diff(span, append=len(goes_on)))
