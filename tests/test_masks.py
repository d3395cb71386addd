"""What is hidden in a row: whole words, as many as asked for, anywhere, and the same again."""

from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines.data import masks as module
from pipelines.data.masks import Masks, mask, num_predictions, span_lengths
from pipelines.data.randomness import draws, key, uniform
from pipelines.data.text_config import TextConfig
from pipelines.data.vocabulary import Vocabulary
from tests.corpus import make_documents

Ints = NDArray[np.int64]
Masking = Literal["words", "pieces", "spans"]
MASKINGS: tuple[Masking, ...] = ("words", "pieces", "spans")
PIECES = TextConfig(masking="pieces")
SPANS = TextConfig(masking="spans")


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
    words = [set(word) for word in words_of(restored, vocabulary, config)]
    chosen = [word for word in words if word & set(masked)]
    assert set().union(*chosen) == set(masked)
    assert 1 <= len(masked) <= quota
    if len(chosen) < len(words):
        longest = max(len(word) for word in words if word not in chosen)
        assert len(masked) + longest > quota


def words_of(row: list[int], vocabulary: Vocabulary, config: TextConfig) -> list[list[int]]:
    """Return the places of each word, or of each piece of a word longer than the quota."""
    control = {vocabulary.cls, vocabulary.sep}
    text = [place for place, token in enumerate(row) if token not in control]
    quota = int(num_predictions(np.array([len(text)]), config)[0])
    words: list[list[int]] = []
    for place in text:
        goes_on = vocabulary.continues[row[place]] and row[place - 1] not in control
        if goes_on and config.masking != "pieces":
            words[-1].append(place)
        else:
            words.append([place])
    return [
        part
        for word in words
        for part in ([word] if len(word) <= quota else [[place] for place in word])
    ]


def spans_of(words: list[list[int]], low_bits: list[int], config: TextConfig) -> list[list[int]]:
    """Return which words are in each span; every segment's lengths are of its own draws."""
    edges = [0, *(i for i in range(1, len(words)) if words[i][0] > words[i - 1][-1] + 1)]
    spans = []
    for first, end in pairwise([*edges, len(words)]):
        start, j = first, first
        while start < end:
            length = int(span_lengths(config)[low_bits[j]])
            spans.append([*range(start, min(start + length, end))])
            start, j = start + length, j + 1
    return spans


def plain(
    row: list[int], row_key: int, vocabulary: Vocabulary, config: TextConfig
) -> tuple[list[int], list[int]]:
    """Return the places and inputs of one row, word by word as the rule says it."""
    drawn = draws(row_key, np.arange(len(row), dtype=np.uint64)).tolist()
    words = words_of(row, vocabulary, config)
    first = [drawn[word[0]] for word in words]
    shared = list(first)
    if config.masking == "spans":
        for span in spans_of(words, [draw & 0xFFFF for draw in first], config):
            for word in span:
                shared[word] = first[span[0]]
    num_text = sum(map(len, words))
    room = int(num_predictions(np.array([num_text]), config)[0])
    found = {}
    for i in sorted(range(len(words)), key=lambda i: (shared[i] >> 32, i)):
        room -= len(words[i])
        if room < 0:
            break
        for place in words[i]:
            own = shared[i] if config.masking == "spans" else drawn[place]
            found[place] = fate(row[place], own, drawn[place], vocabulary, config)
    return sorted(found), [found[place] for place in sorted(found)]


def fate(token: int, own: int, drawn: int, vocabulary: Vocabulary, config: TextConfig) -> int:
    """Return what the model sees in place of a chosen token."""
    at = uniform(draws(key("replace"), np.array([own], np.uint64)))[0]
    if at < config.mask_token_ratio:
        return vocabulary.mask
    if at < config.mask_token_ratio + config.random_token_ratio:
        number = draws(key("random piece"), np.array([drawn], np.uint64)).tolist()[0]
        return int(vocabulary.ordinary[number % len(vocabulary.ordinary)])
    return token


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


def any_rows(
    vocabulary: Vocabulary, found: list[tuple[list[int], list[int]]]
) -> tuple[NDArray[Any], Ints]:
    """Return rows of any pieces in any place: endless words, B within a word."""
    words = vocabulary.ordinary[~vocabulary.continues[vocabulary.ordinary]]
    palette = [*words[:20].tolist(), *np.flatnonzero(vocabulary.continues)[:21].tolist()]
    return join(vocabulary, [([palette[i] for i in a], [palette[i] for i in b]) for a, b in found])


def by_row(masks: Masks, lengths: Ints) -> list[tuple[list[int], list[int]]]:
    """Return the places in the row, and the inputs, of each row."""
    ends = np.cumsum(lengths)
    cuts = np.searchsorted(masks.places, ends)
    return [
        ((masks.places[i:j] - end + length).tolist(), masks.inputs[i:j].tolist())
        for i, j, end, length in zip([0, *cuts], cuts, ends, lengths, strict=False)
    ]


pieces = st.lists(st.integers(0, 40), min_size=1, max_size=60)


# Which tokens


@given(
    found=st.lists(st.tuples(pieces, pieces), min_size=1, max_size=6),
    ratio=st.sampled_from([0.0, 0.15, 0.5, 1.0]),
    masking=st.sampled_from(MASKINGS),
    replaced=st.sampled_from([(0.8, 0.1), (0.3, 0.4), (0.0, 1.0), (0.0, 0.0)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_t3_words_are_hidden_whole_and_never_across_segments(
    vocabulary: Vocabulary,
    found: list[tuple[list[int], list[int]]],
    ratio: float,
    masking: Masking,
    replaced: tuple[float, float],
    seed: int,
) -> None:
    flat, lengths = any_rows(vocabulary, found)
    config = TextConfig(
        mask_ratio=ratio,
        masking=masking,
        mask_token_ratio=replaced[0],
        random_token_ratio=replaced[1],
    )
    keys = row_keys(len(lengths), seed)
    masks = mask(flat, lengths, keys, vocabulary, config)
    rows = np.split(flat, np.cumsum(lengths)[:-1])
    views = np.split(unmasked(flat, masks), np.cumsum(lengths)[:-1])
    for i, (places, inputs) in enumerate(by_row(masks, lengths)):
        row = rows[i].tolist()
        check_masks(row, views[i].tolist(), places, vocabulary, config)
        if masking == "pieces":
            assert len(places) == num_predictions(lengths[i : i + 1] - 3, config)[0]
        assert (places, inputs) == plain(row, int(keys[i]), vocabulary, config)


@pytest.mark.parametrize("masking", MASKINGS)
def test_t3_english_is_hidden_as_the_rule_says_however_it_is_sorted_and_chunked(
    vocabulary: Vocabulary, masking: Masking, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TextConfig(masking=masking)
    flat, lengths = text_rows(vocabulary, 64)
    keys = row_keys(len(lengths), "english")
    rows = np.split(flat, np.cumsum(lengths)[:-1])
    expected = [plain(row.tolist(), int(keys[i]), vocabulary, config) for i, row in enumerate(rows)]
    for spread, tokens in ((3.0, 1 << 16), (0.0, 1 << 16), (99.0, 1000), (3.0, 64)):
        monkeypatch.setattr(module, "SPREAD", spread)
        monkeypatch.setattr(module, "CHUNK_TOKENS", tokens)
        masks = mask(flat, lengths, keys, vocabulary, config)
        assert by_row(masks, lengths) == expected


def test_no_rows_have_no_masks(vocabulary: Vocabulary) -> None:
    empty = np.zeros(0, dtype=np.int64)
    masks = mask(empty.astype(np.uint16), empty, row_keys(0), vocabulary, TextConfig())
    assert (len(masks.places), len(masks.inputs)) == (0, 0)


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_nothing_asked_for_is_one_token_and_everything_is_every_token(
    vocabulary: Vocabulary, masking: Masking, ratio: float
) -> None:
    flat, lengths = text_rows(vocabulary, 40)
    config = TextConfig(masking=masking, mask_ratio=ratio)
    places = mask(flat, lengths, row_keys(len(lengths)), vocabulary, config).places
    if ratio:
        assert np.array_equal(
            places, np.flatnonzero((flat != vocabulary.cls) & (flat != vocabulary.sep))
        )
    else:
        assert len(places) == len(lengths)


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(1, 1), (9, 1), (10, 2), (29, 4), (30, 4), (50, 8), (125, 19)]
)
def test_t3_the_number_of_predictions_is_a_rounded_share(num_tokens: int, expected: int) -> None:
    assert num_predictions(np.array([num_tokens]), TextConfig()).tolist() == [expected]


# What the model sees


@pytest.mark.parametrize(
    ("masked", "drawn"), [(0.8, 0.1), (0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)]
)
def test_t4_shares_of_mask_random_and_kept(
    vocabulary: Vocabulary, masked: float, drawn: float
) -> None:
    flat, lengths = random_rows(vocabulary, 10_000)
    config = TextConfig(masking="pieces", mask_token_ratio=masked, random_token_ratio=drawn)
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
    config = TextConfig(masking="pieces", mask_token_ratio=0.0, random_token_ratio=1.0)
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


@pytest.mark.parametrize("masking", MASKINGS)
def test_t4_nearly_as_much_is_hidden_as_was_asked_for(
    vocabulary: Vocabulary, masking: Masking
) -> None:
    flat, lengths = text_rows(vocabulary, 128)
    config = TextConfig(masking=masking)
    hidden = mask(flat, lengths, row_keys(len(lengths), "much"), vocabulary, config)
    assert 0.14 < len(hidden.places) / (lengths - 3).sum() < 0.155


# Spans


def word_rows(vocabulary: Vocabulary, count: int, length: int) -> tuple[NDArray[Any], Ints]:
    """Return rows of two segments of words of one piece each."""
    words = vocabulary.ordinary[~vocabulary.continues[vocabulary.ordinary]]
    numbers = draws(key("words"), np.arange(count * length, dtype=np.uint64))
    flat = words[numbers % np.uint64(len(words))].reshape(count, length)
    flat[:, 0] = vocabulary.cls
    flat[:, [length // 2, length - 1]] = vocabulary.sep
    return flat.reshape(-1), np.full(count, length)


def runs(places: Ints) -> list[NDArray[np.int64]]:
    """Return the indices of each run of neighbouring places."""
    return np.split(np.arange(len(places)), np.flatnonzero(np.diff(places) > 1) + 1)


@pytest.mark.parametrize(
    ("stop", "longest", "mean"), [(0.2, 10, 3.797), (0.5, 3, 1.571), (1, 9, 1)]
)
def test_t4_span_lengths_are_geometric_and_cut_off(stop: float, longest: int, mean: float) -> None:
    """SpanBERT, section 3.1: Geo(0.2) of at most 10 words has a mean of 3.8."""
    config = TextConfig(masking="spans", span_stop_ratio=stop, span_max_words=longest)
    lengths = span_lengths(config)
    assert len(lengths) == 1 << 16
    assert lengths.mean() == pytest.approx(mean, abs=1e-3)
    shares = np.bincount(lengths, minlength=longest + 1)[1:] / len(lengths)
    weights = stop * (1 - stop) ** np.arange(longest)
    assert np.abs(shares - weights / weights.sum()).max() < 1e-5


def test_t4_far_apart_spans_are_runs_of_these_lengths(vocabulary: Vocabulary) -> None:
    """Few spans in long rows, so that they hardly touch and few are cut."""
    flat, lengths = word_rows(vocabulary, 120, 4096)
    config = replace(SPANS, mask_ratio=0.02)
    places = mask(flat, lengths, row_keys(120, "far"), vocabulary, config).places
    assert len(places) == 120 * num_predictions(np.array([4093]), config)[0]
    found = np.array([len(run) for run in runs(places)])
    assert len(found) > 2400
    assert abs(found.mean() - 3.797) < 0.25
    counts = np.bincount(np.minimum(found, 11), minlength=12)[1:11] / len(found)
    expected = np.bincount(span_lengths(config))[1:] / (1 << 16)
    assert np.abs(counts - expected).max() < 0.03


def test_t4_a_span_is_replaced_as_one_and_spans_are_as_often_as_asked_for(
    vocabulary: Vocabulary,
) -> None:
    flat, lengths = word_rows(vocabulary, 120, 4096)
    config = replace(SPANS, mask_ratio=0.02)
    masks = mask(flat, lengths, row_keys(120, "alike"), vocabulary, config)
    is_mask = masks.inputs == vocabulary.mask
    is_same = masks.inputs == flat[masks.places]
    fates = np.where(is_mask, 0, np.where(is_same, 2, 1))
    found = [fates[run] for run in runs(masks.places)]
    alike = [run[0] for run in found if len(set(run.tolist())) == 1]
    assert len(alike) > 0.96 * len(found)  # those that touch another span are not
    observed = np.bincount(alike, minlength=3)
    assert chi_square(observed, len(alike) * np.array([0.8, 0.1, 0.1])) < 18.4
    drawn = masks.inputs[fates == 1]
    assert len(np.unique(drawn)) > 0.5 * min(len(drawn), len(vocabulary.ordinary))


def test_t4_spans_hide_every_place_of_a_segment_about_equally(vocabulary: Vocabulary) -> None:
    """The first words of a segment somewhat more: what is cut off a span is its end."""
    flat, lengths = word_rows(vocabulary, 6000, 64)
    places = mask(flat, lengths, row_keys(6000, "edges"), vocabulary, SPANS).places
    shares = np.bincount(places % 64, minlength=64) / 6000
    assert shares[[0, 32, 63]].sum() == 0
    text = np.delete(shares, [0, 32, 63])
    assert text.min() > 0.11
    assert text.max() < 0.2


def test_spans_of_one_word_are_as_many_as_words(vocabulary: Vocabulary) -> None:
    flat, lengths = text_rows(vocabulary, 64)
    keys = row_keys(len(lengths))
    ones = mask(flat, lengths, keys, vocabulary, replace(SPANS, span_max_words=1))
    assert np.array_equal(ones.places, mask(flat, lengths, keys, vocabulary, TextConfig()).places)


# The same again


@pytest.mark.parametrize("masking", MASKINGS)
def test_t5_masks_do_not_depend_on_the_rows_beside(
    vocabulary: Vocabulary, masking: Masking
) -> None:
    flat, lengths = text_rows(vocabulary, 32)
    config = TextConfig(masking=masking)
    keys = row_keys(len(lengths), 5)
    together = by_row(mask(flat, lengths, keys, vocabulary, config), lengths)
    for i, row in enumerate(np.split(flat, np.cumsum(lengths)[:-1])):
        alone = mask(row, lengths[i : i + 1], keys[i : i + 1], vocabulary, config)
        assert (alone.places.tolist(), alone.inputs.tolist()) == together[i]


@pytest.mark.parametrize("masking", MASKINGS)
def test_t5_neighbouring_keys_hide_unrelated_tokens(
    vocabulary: Vocabulary, masking: Masking
) -> None:
    flat, lengths = word_rows(vocabulary, 2000, 64)
    config = TextConfig(masking=masking)
    keys = np.arange(2001, dtype=np.uint64)
    here, beside = (mask(flat, lengths, k, vocabulary, config) for k in (keys[:-1], keys[1:]))
    num_text = 61 * 2000
    share = len(here.places) / num_text
    both = len(np.intersect1d(here.places, beside.places)) / num_text
    clump = 5 if masking == "spans" else 1
    assert abs(both - share**2) < 5 * (clump * share**2 / num_text) ** 0.5


@pytest.mark.parametrize(
    ("masking", "places", "inputs"),
    [
        ("words", [2, 8, 13, 20, 26, 33, 34, 35, 36, 48], [4, 4, 4, 4, 4, 4, 93, 4, 4, 4]),
        ("pieces", [2, 8, 9, 13, 17, 20, 23, 26, 33, 40, 48], [4, 4, 55, 4, 15, 4, 16, 4, 4, 4, 4]),
        ("spans", [20, 21, 22, 23, 24, 25, 26, 48], [4, 4, 4, 4, 4, 4, 4, 4]),
    ],
)
def test_t5_golden_masks_hold_for_ever(
    vocabulary: Vocabulary, masking: Masking, places: list[int], inputs: list[int]
) -> None:
    flat, lengths = any_rows(
        vocabulary, [([i * 7 % 41 for i in range(40)], [30, 2]), ([3, 22, 5], [23, 1])]
    )
    config = TextConfig(masking=masking, mask_ratio=0.25, mask_token_ratio=0.5)
    masks = mask(flat, lengths, row_keys(2, 0, "golden"), vocabulary, config)
    assert (masks.places.tolist(), masks.inputs.tolist()) == (places, inputs)
