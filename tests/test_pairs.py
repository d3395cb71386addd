"""Honest pairs: cut and exchanged, every token once, and only the words tell the label."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.data.pairs import Pairs, Segments, couple, split_long, target_lengths
from pipelines.data.randomness import draws, key
from pipelines.data.text import IGNORED, NO_PARTNER, ONE_SEGMENT, PAIRED, TextRows
from pipelines.data.text_config import TextConfig
from pipelines.data.vocabulary import Vocabulary
from tests.corpus import make_documents
from tests.test_masks import check_masks, chi_square
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

NEXT, NOT_NEXT = 0, 1


def check_origin(row: Row, tokens: dict[int, list[int]], contents: dict[int, int]) -> None:
    """B directly follows A, or is of a document with other words."""
    (a_record, a_position), (b_record, b_position) = row.a_place, row.b_place
    check_segments(row, tokens)
    if row.label == NOT_NEXT:
        assert row.fate == PAIRED
        assert contents[a_record] != contents[b_record]
        own = a_position + len(row.a)
        assert tokens[a_record][own : own + len(row.b)] != row.b
    else:
        assert (b_record, b_position) == (a_record, a_position + len(row.a))


# What a row is made of


configs = st.builds(
    TextConfig,
    max_length=st.sampled_from([16, 17, 31, 64]),
    notnext_ratio=st.sampled_from([0.0, 0.3, 1.0]),
    short_ratio=st.sampled_from([None, 0.5, 1.0]),
)


@given(
    found=st.lists(texts, min_size=1, max_size=8),
    copies=st.integers(0, 3),
    config=configs,
    seed=st.integers(0, 1000),
)
@example(["a. " * 9, "A.  a. " * 9], 1, TextConfig(max_length=16, notnext_ratio=1.0), 0)
@example(["Vitamin B\u3000. is text. The sea."], 1, TextConfig(max_length=16), 0)
@settings(max_examples=150, deadline=None)
def test_t2_t3_t6_rows_are_their_documents_cut_exchanged_and_masked(
    vocabulary: Vocabulary, found: list[str], copies: int, config: TextConfig, seed: int
) -> None:
    documents = from_texts(*found, *(text.upper() for text in found[:copies]))
    rows = make(vocabulary, documents, config, seed=seed)
    tokens = tokens_of(vocabulary, documents)
    contents = {document.record: document.content for document in documents}
    for row in rows:
        check_shape(row, vocabulary, config.max_length)
        assert (row.fate == ONE_SEGMENT) == (not row.b)
        assert (row.label == IGNORED) == (row.fate != PAIRED)
        check_origin(row, tokens, contents)
        check_masks(row.restored, row.seen, row.masked, vocabulary, config)
    check_conservation(rows, tokens)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_t2_partners_exchange_their_seconds(vocabulary: Vocabulary, ratio: float) -> None:
    documents = make_documents(60)
    rows = make(vocabulary, documents, replace(SHORT, notnext_ratio=ratio))
    owner = {(row.a_place[0], row.a_place[1] + len(row.a)): row for row in rows if row.b}
    exchanged = [row for row in rows if row.label == NOT_NEXT]
    for row in exchanged:
        partner = owner[row.b_place]
        assert partner is not row
        assert owner[partner.b_place] is row
        assert len(partner.b) == len(row.b)
    labelled = [row for row in rows if row.fate == PAIRED]
    assert len(labelled) > 200
    if ratio in (0, 1):
        assert len(exchanged) == ratio * len(labelled)
    else:
        assert 0 < len(exchanged) < len(labelled)


def test_t2_exchanging_changes_no_length_and_no_partner(vocabulary: Vocabulary) -> None:
    documents = make_documents(60)
    kept, swapped = (
        make(vocabulary, documents, replace(SHORT, notnext_ratio=ratio)) for ratio in (0.0, 1.0)
    )
    shape = [(row.a_place, len(row.a), len(row.b), row.fate) for row in kept]
    assert [(row.a_place, len(row.a), len(row.b), row.fate) for row in swapped] == shape
    assert [row.a for row in swapped] == [row.a for row in kept]
    assert sorted(row.b for row in swapped) == sorted(row.b for row in kept)
    assert [row.b for row in swapped] != [row.b for row in kept]


def test_t2_the_cut_depends_on_the_document_alone(vocabulary: Vocabulary) -> None:
    documents = make_documents(30)
    together = make(vocabulary, documents)
    alone = [row for document in documents for row in make(vocabulary, [document], order=9)]
    shape = [(row.a_place, len(row.a), len(row.b)) for row in together]
    assert [(row.a_place, len(row.a), len(row.b)) for row in alone] == shape
    other_places = [document._replace(record=document.record + 7) for document in documents]
    moved = make(vocabulary, other_places)
    assert [(row.a_place[1], len(row.a)) for row in moved] != [(p[1], n) for p, n, _ in shape]


def test_t2_segments_are_cut_where_sentences_end(vocabulary: Vocabulary) -> None:
    documents = from_texts(*(" ".join(["The sea. A captain drifts!"] * 20) for _ in range(4)))
    ends = set(vocabulary.encode([".!"])[0].tolist())
    for row in make(vocabulary, documents):
        assert row.a[-1] in ends
        assert not row.b or row.b[-1] in ends


def test_t2_a_long_sentence_is_cut_before_a_word(vocabulary: Vocabulary) -> None:
    documents = from_texts(*(f"{i} unharboured harbours " * 80 for i in range(3)))
    rows = make(vocabulary, documents)
    assert all(len(row.a) > 5 for row in rows)
    for row in rows:
        assert not vocabulary.continues[row.a[0]]
        assert not row.b or not vocabulary.continues[row.b[0]]


def test_t2_first_chunks_vary_so_that_cuts_move(vocabulary: Vocabulary) -> None:
    documents = from_texts(*("The sea drifts. " * 100 for _ in range(40)))
    rows = make(vocabulary, documents, TextConfig(max_length=64))
    first = [len(row.a) + len(row.b) for row in rows if row.a_place[1] == 0]
    later = [len(row.a) + len(row.b) for row in rows if row.a_place[1] > 0]
    assert min(first) < 40
    assert len(set(first)) > 4
    assert Counter(later).most_common(1)[0][0] > 56


# Who gets a label


def test_a_document_without_others_gets_no_label(vocabulary: Vocabulary) -> None:
    documents = make_documents(1, num_sentences=90)
    rows = make(vocabulary, documents, replace(SHORT, notnext_ratio=1.0))
    assert {row.fate for row in rows} == {NO_PARTNER, ONE_SEGMENT}
    assert all(row.label == IGNORED for row in rows)
    batch = TextRows(SHORT, vocabulary).collate(
        TextRows(SHORT, vocabulary).rows(documents, seed=0, order=0)
    )
    assert set(batch["nsp_labels"].tolist()) == {IGNORED}


def test_copies_of_a_document_are_no_partners(vocabulary: Vocabulary) -> None:
    text = make_documents(1, num_sentences=60)[0].text
    documents = from_texts(text, text.upper(), text.replace(" ", "\n"), text)
    rows = make(vocabulary, documents, replace(SHORT, notnext_ratio=1.0))
    assert {row.fate for row in rows} == {NO_PARTNER, ONE_SEGMENT}


def test_other_documents_with_the_same_sentences_are_no_source_of_false_labels(
    vocabulary: Vocabulary,
) -> None:
    """A B that equals the true one word for word is the true one."""
    documents = from_texts(*(f"{name}. " + "It sinks. " * 40 for name in ("sea", "reef", "tide")))
    rows = make(vocabulary, documents, replace(SHORT, notnext_ratio=1.0))
    own = {row.a_place[0]: tokens_of(vocabulary, documents)[row.a_place[0]] for row in rows}
    for row in rows:
        if row.label == NOT_NEXT:
            start = row.a_place[1] + len(row.a)
            assert own[row.a_place[0]][start : start + len(row.b)] != row.b


def test_a_document_of_one_sentence_is_one_segment(vocabulary: Vocabulary) -> None:
    documents = from_texts("The sea", "A reef drifts.")
    rows = make(vocabulary, documents)
    assert [(row.fate, row.b) for row in rows] == [(ONE_SEGMENT, [])] * 2
    assert [row.a for row in rows] == list(tokens_of(vocabulary, documents).values())


def test_most_rows_of_many_documents_get_a_label(vocabulary: Vocabulary) -> None:
    fates = Counter(row.fate for row in make(vocabulary, make_documents(120)))
    assert fates[PAIRED] > 0.9 * (fates[PAIRED] + fates[NO_PARTNER])
    assert fates[NO_PARTNER] + fates[ONE_SEGMENT] > 0


ends_of_pairs = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2))


@given(found=st.lists(ends_of_pairs, max_size=25), seed=st.integers(0, 99), ratio=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_t2_couples_are_equally_long_and_of_different_words(
    found: list[tuple[int, int, int]], seed: int, ratio: float
) -> None:
    count = len(found)
    content, length, word = np.array(found, dtype=np.int64).reshape(-1, 3).T
    flat = np.repeat(word, length).astype(np.uint16)
    zeros = np.zeros(count, dtype=np.int64)
    seconds = Segments(np.cumsum(length) - length, length, content)
    pairs = Pairs(Segments(zeros, zeros, content), seconds)
    coins = draws(key(seed), np.arange(2 * count, dtype=np.uint64))
    partner, label = couple(pairs, content.astype(np.uint64), flat, coins, ratio)
    for i in range(count):
        j = int(partner[i])
        assert partner[j] == i
        assert label[i] in ((1,) if i != j else (-1, 0))
        assert label[j] == label[i]
        if i != j:
            assert content[i] != content[j]
            assert length[i] == length[j] > 0
            assert word[i] != word[j]
    assert np.all(label[length == 0] == -1)
    for value in np.unique(length):
        assert np.count_nonzero(label[length == value] >= 0) % 2 == 0
    with_label = label >= 0
    assert np.array_equal(
        with_label, couple(pairs, content.astype(np.uint64), flat, coins, 1.0)[1] >= 0
    )


# What can tell the label


def labelled_orders(vocabulary: Vocabulary, ratio: float) -> list[list[Row]]:
    """Return the labelled rows of 40 work orders."""
    documents = make_documents(60)
    config = replace(SHORT, notnext_ratio=ratio)
    orders = (make(vocabulary, documents, config, epoch=i, order=i) for i in range(40))
    return [[row for row in rows if row.fate == PAIRED] for rows in orders]


@pytest.mark.parametrize("ratio", [0.5, 0.3])
def test_t4_notnext_is_as_frequent_as_asked_for(vocabulary: Vocabulary, ratio: float) -> None:
    labels = [row.label for rows in labelled_orders(vocabulary, ratio) for row in rows]
    couples = len(labels) // 2  # both rows of a couple have the label of one coin
    assert couples > 5000
    heads = sum(labels) // 2
    assert abs(heads - ratio * couples) < 4 * (couples * ratio * (1 - ratio)) ** 0.5


def test_t4_lengths_cannot_tell_the_label(vocabulary: Vocabulary) -> None:
    """A histogram over (length of A, length of B) of some orders is at chance on others."""
    accuracy, asked = length_accuracy(labelled_orders(vocabulary, 0.5))
    couples = asked / 2
    assert couples > 2500
    assert abs(accuracy - 0.5) < 4 * (0.25 / couples) ** 0.5 < 0.04


# Shorter rows


def test_t4_documents_are_short_as_often_as_asked_and_of_every_length_alike() -> None:
    keys = draws(key("documents"), np.arange(20_000, dtype=np.uint64))
    assert set(target_lengths(keys, 29, 0.0).tolist()) == {29}
    targets = target_lengths(keys, 29, 0.2)
    counts = np.bincount(targets, minlength=30)
    expected = np.full(28, 20_000 * 0.2 / 28)
    expected[-1] += 20_000 * 0.8
    assert counts[:2].sum() == 0
    assert chi_square(counts[2:], expected) < 62  # 27 degrees of freedom, p = 1e-4


def test_short_documents_give_shorter_pairs_that_still_have_labels(vocabulary: Vocabulary) -> None:
    documents = make_documents(200, num_sentences=20)
    config = TextConfig(max_length=128, short_ratio=0.3)
    lengths: dict[int, list[int]] = {}
    rows = make(vocabulary, documents, config)
    for row in rows:
        lengths.setdefault(row.a_place[0], []).append(len(row.a) + len(row.b))
    full = make(vocabulary, documents, replace(config, short_ratio=None))
    assert max(len(row.a) + len(row.b) for row in full) > 110
    short = [record for record, found in lengths.items() if len(found) > 2 and max(found) < 90]
    assert 0.1 < len(short) / len(lengths) < 0.3
    paired = [row for row in rows if row.a_place[0] in short]
    assert sum(row.fate != ONE_SEGMENT for row in paired) > 0.8 * len(paired)
    check_conservation(rows, tokens_of(vocabulary, documents))


# Pieces of long sentences


@given(
    found=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), max_size=8),
    joined=st.lists(st.booleans(), min_size=320, max_size=320),
    limit=st.integers(1, 9),
)
@settings(max_examples=150, deadline=None)
def test_t2_long_sentences_fall_into_the_longest_pieces_that_start_with_words(
    found: list[tuple[int, int]], joined: list[bool], limit: int
) -> None:
    length = np.array([n for n, _ in found], dtype=np.int64)
    units = Segments(
        np.cumsum(length) - length, length, np.cumsum([d for _, d in found], dtype=int)
    )
    continues = np.array(joined[: int(length.sum())], dtype=bool)
    pieces = split_long(units, continues, limit)
    expected = []
    for start, size, document in zip(*(column.tolist() for column in units), strict=True):
        end = start + size
        while end - start > limit:
            words = [i for i in range(start + 1, start + limit + 1) if not continues[i]]
            cut = words[-1] if words else start + limit
            expected.append((start, cut - start, document))
            start = cut
        if end > start:
            expected.append((start, end - start, document))
    assert list(zip(*(column.tolist() for column in pieces), strict=True)) == expected
