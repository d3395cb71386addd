"""Sentence order: neighbours as they stand or swapped, and only the words tell which."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.pairs import Chunks
from pipelines.data.randomness import draws, key
from pipelines.data.sentence_order import mirror, swap
from pipelines.data.text import IGNORED, NO_PARTNER, ONE_SEGMENT, PAIRED
from pipelines.data.text_config import TextConfig
from pipelines.data.vocabulary import Vocabulary
from tests.corpus import make_documents
from tests.test_masks import check_masks
from tests.text_rows import (
    SHORT,
    Row,
    check_conservation,
    check_segments,
    check_shape,
    from_texts,
    length_accuracy,
    make,
    texts,
    tokens_of,
)

ORDER = replace(SHORT, pairing="sentence-order")
IN_ORDER, SWAPPED = 0, 1

configs = st.builds(
    TextConfig,
    pairing=st.just("sentence-order"),
    max_length=st.sampled_from([16, 17, 31, 64]),
    notnext_ratio=st.sampled_from([0.0, 0.3, 1.0]),
    short_ratio=st.sampled_from([None, 0.5, 1.0]),
)


@given(found=st.lists(texts, max_size=8), config=configs, seed=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_t2_t3_t6_rows_are_neighbours_that_stand_in_order_or_swapped(
    vocabulary: Vocabulary, found: list[str], config: TextConfig, seed: int
) -> None:
    documents = from_texts(*found)
    rows = make(vocabulary, documents, config, seed=seed)
    tokens = tokens_of(vocabulary, documents)
    for row in rows:
        check_shape(row, vocabulary, config.max_length)
        check_segments(row, tokens)
        check_masks(row.restored, row.seen, row.masked, vocabulary, config)
        assert (row.fate == ONE_SEGMENT) == (not row.b)
        assert (row.label == IGNORED) == (row.fate != PAIRED)
        (record, a), (b_record, b) = row.a_place, row.b_place
        assert record == b_record
        assert a == b + len(row.b) if row.label == SWAPPED else b == a + len(row.a)
    check_conservation(rows, tokens)


chunked = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=6), max_size=20)


@given(found=chunked, seed=st.integers(0, 99), ratio=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_t2_swapping_every_label_leaves_the_lengths_as_they_are(
    found: list[list[int]], seed: int, ratio: float
) -> None:
    edges = np.cumsum([0, *(n for lengths in found for n in lengths)])
    end = np.cumsum([len(lengths) for lengths in found], dtype=np.int64)
    first = np.append(0, end)[:-1].astype(np.int64)
    chunks = Chunks(edges, np.zeros_like(first), first, first + 1, end)
    coins = draws(key(seed), np.arange(2 * len(found), dtype=np.uint64))
    (kept, tails), (swapped, heads) = (mirror(chunks, coins, value) for value in (0.0, 1.0))
    assert np.array_equal(kept.cut, swapped.cut)
    assert set(tails.tolist()) <= {IN_ORDER, -1}
    assert np.array_equal(heads >= 0, tails >= 0)
    assert np.count_nonzero(heads >= 0) % 2 == 0
    paired = tails >= 0
    lengths = []
    for label in (tails, heads):
        pairs = swap(kept.pairs(), label)
        lengths.append(sorted(zip(pairs.a.length[paired], pairs.b.length[paired], strict=True)))
    assert lengths[0] == lengths[1]
    unpaired = (tails < 0) & (chunks.end > chunks.cut)
    assert np.array_equal(kept.cut[unpaired], chunks.cut[unpaired])
    assert np.all((first < kept.cut) & (kept.cut <= end))
    # Nobody waits whom another could have taken.
    options: set[tuple[int, int]] = set()
    for i in np.flatnonzero(unpaired):
        inner = edges[first[i] + 1 : end[i]] - edges[first[i]]
        total = edges[end[i]] - edges[first[i]]
        assert not options & {(total, total - length) for length in inner}
        options |= {(total, length) for length in inner}
    assert set(mirror(chunks, coins, ratio)[1].tolist()) <= {IN_ORDER, SWAPPED, -1}


def test_one_document_is_enough_and_most_of_its_rows_get_a_label(vocabulary: Vocabulary) -> None:
    fates = [row.fate for row in make(vocabulary, make_documents(1, num_sentences=3000), ORDER)]
    assert set(fates) == {PAIRED, ONE_SEGMENT, NO_PARTNER}
    assert fates.count(PAIRED) > 0.6 * len(fates) > 200


def orders_of(vocabulary: Vocabulary, config: TextConfig, count: int) -> list[list[Row]]:
    """Return rows with a B of documents whose chunks start with longer sentences than they end."""
    tail = "It sinks. It burns. It settles. "
    long = "When the sailor drifts, the salty harbour sinks near the old lighthouse of the island. "
    documents = from_texts(*(f"{(long + tail) * 12}{i}. {tail}" for i in range(30)))
    orders = (make(vocabulary, documents, config, epoch=i, order=i) for i in range(count))
    return [[row for row in rows if row.b] for rows in orders]


def test_t4_lengths_cannot_tell_the_order(vocabulary: Vocabulary) -> None:
    """Not even where a coin for each pair would let them."""
    dice = random.Random(0)
    neighbours = orders_of(vocabulary, replace(SHORT, notnext_ratio=0.0), 10)
    tossed = [
        [
            dice.choice([row._replace(label=0), row._replace(label=1, a=row.b, b=row.a)])
            for row in rows
        ]
        for rows in neighbours
    ]
    assert length_accuracy(tossed)[0] > 0.6
    orders = orders_of(vocabulary, ORDER, 16)
    accuracy, asked = length_accuracy([[r for r in rows if r.fate == PAIRED] for rows in orders])
    assert asked > 1500
    assert abs(accuracy - 0.5) < 4 * (0.25 / asked) ** 0.5 < 0.06


@pytest.mark.parametrize("ratio", [0.5, 0.3])
def test_t4_each_is_swapped_by_a_coin_of_its_own(ratio: float) -> None:
    """Chunks of two sentences of equal lengths: all of them are mirrors of each other."""
    edges = np.arange(0, 4 * 5000 + 1, 2)
    first = np.arange(0, 10_000, 2)
    chunks = Chunks(edges, np.zeros_like(first), first, first + 1, first + 2)
    coins = draws(key("coins"), np.arange(10_000, dtype=np.uint64))
    labels = mirror(chunks, coins, ratio)[1]
    assert set(labels.tolist()) == {IN_ORDER, SWAPPED}
    assert abs(labels.sum() - ratio * 5000) < 4 * (5000 * ratio * (1 - ratio)) ** 0.5
