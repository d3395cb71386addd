"""What is hidden in a row: whole words, as many as asked for, anywhere, and the same again."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines.data.masks import Masks, mask, num_predictions
from pipelines.data.randomness import draws, key
from pipelines.data.text_config import TextConfig
from pipelines.data.vocabulary import Vocabulary
from tests.corpus import make_documents

Ints = NDArray[np.int64]
PIECES = TextConfig(whole_words=False)


def check_masks(
    restored: list[int],
    seen: list[int],
    masked: list[int],
    vocabulary: Vocabulary,
    config: TextConfig,
) -> None:
    """Check one row before and after masking, and the places said to be masked."""
    control = {vocabulary.cls, vocabulary.sep}
    text = [place for place, token in enumerate(restored) if token not in control]
    quota = int(num_predictions(np.array([len(text)]), config)[0])
    assert masked == sorted(set(masked))
    assert set(masked) <= set(text)
    assert all(seen[i] == restored[i] for i in range(len(restored)) if i not in masked)
    drawn = {seen[place] for place in masked} - {vocabulary.mask}
    unchanged = {restored[place] for place in masked}
    assert drawn <= set(vocabulary.ordinary.tolist()) | unchanged
    units = units_of(restored, text, vocabulary, quota, whole_words=config.whole_words)
    chosen = [unit for unit in units if unit & set(masked)]
    assert set().union(*chosen) == set(masked)
    assert 1 <= len(masked) <= quota
    if len(chosen) < len(units):
        longest = max(len(unit) for unit in units if unit not in chosen)
        assert len(masked) + longest > quota


def units_of(
    restored: list[int], text: list[int], vocabulary: Vocabulary, quota: int, *, whole_words: bool
) -> list[frozenset[int]]:
    """Return the places of each word, or of each piece of a word longer than the quota."""
    units: list[list[int]] = []
    for place in text:
        goes_on = whole_words and vocabulary.continues[restored[place]] and place - 1 in text
        if goes_on:
            units[-1].append(place)
        else:
            units.append([place])
    pieces: list[frozenset[int]] = []
    for unit in units:
        fits = len(unit) <= quota
        pieces += [frozenset(unit)] if fits else [frozenset([place]) for place in unit]
    return pieces


def chi_square(observed: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


def row_keys(count: int, *address: int | str) -> NDArray[np.uint64]:
    return draws(key(*address), np.arange(count, dtype=np.uint64))


def random_rows(vocabulary: Vocabulary, count: int) -> tuple[NDArray[Any], Ints]:
    """Return rows of 14 and 15 pieces drawn from all ordinary ones, and their lengths."""
    words = draws(key("rows"), np.arange(32 * count, dtype=np.uint64))
    flat = vocabulary.ordinary[words % np.uint64(len(vocabulary.ordinary))].reshape(count, 32)
    flat[:, 0] = vocabulary.cls
    flat[:, [15, 31]] = vocabulary.sep
    return flat.reshape(-1), np.full(count, 32)


def text_rows(vocabulary: Vocabulary, length: int) -> tuple[NDArray[Any], Ints]:
    """Return rows of up to `length` tokens, two halves of text in each."""
    tokens, _ = vocabulary.encode_flat([document.text for document in make_documents(90)])
    parts = np.array_split(tokens, -(-len(tokens) // (length - 3)))
    cut = [(part[: len(part) // 2], part[len(part) // 2 :]) for part in parts]
    return join(vocabulary, [(a.tolist(), b.tolist()) for a, b in cut])


def join(
    vocabulary: Vocabulary, segments: list[tuple[list[int], list[int]]]
) -> tuple[NDArray[Any], Ints]:
    """Return flat rows [CLS] A [SEP] B [SEP] and their lengths."""
    cls, sep = vocabulary.cls, vocabulary.sep
    rows = [[cls, *a, sep, *b, sep] for a, b in segments]
    flat = np.array([token for row in rows for token in row], vocabulary.dtype)
    return flat, np.array([len(row) for row in rows])


def unmasked(flat: NDArray[Any], masks: Masks) -> NDArray[Any]:
    """Return what the model sees."""
    inputs = flat.copy()
    inputs[masks.places] = masks.inputs
    return inputs


pieces = st.lists(st.integers(0, 40), min_size=1, max_size=40)


@given(
    found=st.lists(st.tuples(pieces, pieces), min_size=1, max_size=5),
    ratio=st.sampled_from([0.0, 0.15, 0.5, 1.0]),
    whole_words=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_t3_words_are_hidden_whole_and_never_across_segments(
    vocabulary: Vocabulary,
    found: list[tuple[list[int], list[int]]],
    ratio: float,
    whole_words: bool,
    seed: int,
) -> None:
    """Any pieces in any place: words that are longer than a row may lose, B within a word."""
    words = vocabulary.ordinary[~vocabulary.continues[vocabulary.ordinary]]
    palette = [*words[:10].tolist(), *np.flatnonzero(vocabulary.continues)[:31].tolist()]
    segments = [([palette[i] for i in a], [palette[i] for i in b]) for a, b in found]
    flat, lengths = join(vocabulary, segments)
    config = TextConfig(mask_ratio=ratio, whole_words=whole_words)
    masks = mask(flat, lengths, row_keys(len(lengths), seed), vocabulary, config)
    inputs = unmasked(flat, masks)
    for start, length in zip(np.cumsum(lengths) - lengths, lengths, strict=True):
        row = slice(start, start + length)
        mine = masks.places[(masks.places >= start) & (masks.places < start + length)] - start
        check_masks(flat[row].tolist(), inputs[row].tolist(), mine.tolist(), vocabulary, config)
        if not whole_words:
            assert len(mine) == num_predictions(np.array([length - 3]), config)[0]


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(1, 1), (9, 1), (10, 2), (29, 4), (30, 4), (50, 8), (125, 19)]
)
def test_t3_the_number_of_predictions_is_a_rounded_share(num_tokens: int, expected: int) -> None:
    assert num_predictions(np.array([num_tokens]), TextConfig()).tolist() == [expected]


def test_t3_masks_do_not_depend_on_the_rows_beside(vocabulary: Vocabulary) -> None:
    flat, lengths = text_rows(vocabulary, 32)
    keys = row_keys(len(lengths), 5)
    together = mask(flat, lengths, keys, vocabulary, TextConfig())
    alone = []
    for i, start in enumerate(np.cumsum(lengths) - lengths):
        row = flat[start : start + lengths[i]]
        masks = mask(row, lengths[i : i + 1], keys[i : i + 1], vocabulary, TextConfig())
        alone.append(Masks(start + masks.places, masks.inputs))
    for joined, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert np.array_equal(joined, np.concatenate(parts))


@pytest.mark.parametrize(("masked", "drawn"), [(0.8, 0.1), (0.5, 0.5), (0.0, 1.0), (1.0, 0.0)])
def test_t4_shares_of_mask_random_and_kept(
    vocabulary: Vocabulary, masked: float, drawn: float
) -> None:
    flat, lengths = random_rows(vocabulary, 10_000)
    config = TextConfig(whole_words=False, mask_token_ratio=masked, random_token_ratio=drawn)
    masks = mask(flat, lengths, row_keys(10_000, "shares"), vocabulary, config)
    assert len(masks.places) == 40_000
    is_mask = masks.inputs == vocabulary.mask
    is_same = masks.inputs == flat[masks.places]
    observed = np.array([is_mask.sum(), is_same.sum(), (~is_mask & ~is_same).sum()])
    same_by_chance = drawn / len(vocabulary.ordinary)
    kept = 1 - masked - drawn
    shares = np.array([masked, kept + same_by_chance, drawn - same_by_chance])
    assert np.all(observed[shares == 0] == 0)
    expected = 40_000 * shares[shares > 0]
    assert chi_square(observed[shares > 0], expected) < 18.4  # 2 degrees of freedom, p = 1e-4


def test_t4_random_pieces_are_uniform_over_the_ordinary_ones(vocabulary: Vocabulary) -> None:
    flat, lengths = random_rows(vocabulary, 10_000)
    config = TextConfig(whole_words=False, mask_token_ratio=0.0, random_token_ratio=1.0)
    inputs = mask(flat, lengths, row_keys(10_000, "random"), vocabulary, config).inputs
    counts = np.bincount(inputs, minlength=vocabulary.size)
    control = [0, 1, 2, 3, 4]
    assert counts[control].sum() == 0
    num_ordinary = len(vocabulary.ordinary)
    statistic = chi_square(counts[5:], np.full(num_ordinary, len(inputs) / num_ordinary))
    assert abs(statistic - num_ordinary) < 4.5 * (2 * num_ordinary) ** 0.5


def test_t4_hidden_positions_are_uniform(vocabulary: Vocabulary) -> None:
    flat, lengths = random_rows(vocabulary, 10_000)
    places = mask(flat, lengths, row_keys(10_000, "places"), vocabulary, PIECES).places
    counts = np.bincount(places % 32, minlength=32)
    assert counts[[0, 15, 31]].sum() == 0
    text = np.delete(counts, [0, 15, 31])
    assert chi_square(text, np.full(29, 40_000 / 29)) < 62  # 28 degrees of freedom, p = 1e-4


def test_t4_nearly_as_much_is_hidden_as_was_asked_for(vocabulary: Vocabulary) -> None:
    flat, lengths = text_rows(vocabulary, 128)
    hidden = mask(flat, lengths, row_keys(len(lengths), "much"), vocabulary, TextConfig())
    assert 0.13 < len(hidden.places) / (lengths - 3).sum() < 0.155
