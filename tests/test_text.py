"""Rows of text: what they are made of, what is hidden in them, and what can tell their label."""

import hashlib
import json
import pickle
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines.data.manifest import Document, content_hash
from pipelines.data.masks import num_predictions
from pipelines.data.pairs import Pairs, couple
from pipelines.data.randomness import draws, key
from pipelines.data.text import FATES, IGNORED, NO_PARTNER, ONE_SEGMENT, PAIRED, TextRows
from pipelines.data.text_config import TextConfig
from pipelines.data.vocabulary import CONTROL_TOKENS, Vocabulary
from tests.corpus import make_documents
from tests.test_masks import check_masks

SHORT = TextConfig(max_length=32)
NEXT, NOT_NEXT = 0, 1

words = st.sampled_from(
    ["sea", "harbour", "unharboured", "The", "x", "7", "\u4e2d\u6587", "a" * 120, "qzqzqzqzqzqzqz"]
    + [f"{token} is text" for token in CONTROL_TOKENS]
)
ends = st.sampled_from([" ", " ", " ", ". ", "! ", ".\n", "\n\n", ", ", "\u3000"])
texts = st.lists(st.tuples(words, ends), min_size=1, max_size=60).map(
    lambda parts: "".join(word + end for word, end in parts)
)


class Row(NamedTuple):
    """One row with its labels put back."""

    seen: list[int]
    restored: list[int]
    a: list[int]
    b: list[int]
    masked: list[int]
    label: int
    fate: int
    a_place: tuple[int, int]
    """Record, and position in the tokens of its document."""
    b_place: tuple[int, int]


def unpack(table: pa.Table) -> list[Row]:
    rows = []
    for fields in table.to_pylist():
        restored = list(fields["input_ids"])
        for place, token in zip(fields["masked_positions"], fields["masked_ids"], strict=True):
            restored[place] = token
        cut = fields["a_length"]
        rows.append(
            Row(
                seen=fields["input_ids"],
                restored=restored,
                a=restored[1 : cut - 1],
                b=restored[cut:-1],
                masked=fields["masked_positions"],
                label=fields["nsp_label"],
                fate=fields["fate"],
                a_place=(fields["a_record"], fields["a_position"]),
                b_place=(fields["b_record"], fields["b_position"]),
            )
        )
    return rows


def from_texts(*texts: str) -> list[Document]:
    return [Document(i, content_hash(text), text) for i, text in enumerate(texts)]


def tokens_of(vocabulary: Vocabulary, documents: list[Document]) -> dict[int, list[int]]:
    """Return the tokens of each document as a whole, which knows of no sentences."""
    encoded = vocabulary.encode([document.text for document in documents])
    return {d.record: ids.tolist() for d, ids in zip(documents, encoded, strict=True)}


def make(
    vocabulary: Vocabulary,
    documents: list[Document],
    config: TextConfig = SHORT,
    *,
    seed: int = 0,
    epoch: int = 0,
    order: int = 0,
) -> list[Row]:
    maker = TextRows(config, vocabulary)
    return unpack(maker.rows(documents, seed=seed, epoch=epoch, order=order))


def digest(table: pa.Table) -> str:
    return hashlib.sha256(json.dumps(table.to_pydict()).encode()).hexdigest()


# What holds for every row


def check_shape(row: Row, vocabulary: Vocabulary, max_length: int) -> None:
    assert len(row.seen) <= max_length
    assert row.restored[0] == vocabulary.cls
    assert row.restored[-1] == vocabulary.sep
    assert row.a
    assert row.a_place[0] >= 0
    expected = [vocabulary.cls, *row.a, vocabulary.sep]
    if row.fate == ONE_SEGMENT:
        assert not row.b
    else:
        assert row.b
        expected += [*row.b, vocabulary.sep]
    assert row.restored == expected
    control = {vocabulary.pad, vocabulary.cls, vocabulary.sep, vocabulary.mask}
    assert not control & {*row.a, *row.b}


def check_origin(row: Row, tokens: dict[int, list[int]], contents: dict[int, int]) -> None:
    """B directly follows A, or is of a document with other words."""
    (a_record, a_position), (b_record, b_position) = row.a_place, row.b_place
    assert tokens[a_record][a_position : a_position + len(row.a)] == row.a
    assert tokens[b_record][b_position : b_position + len(row.b)] == row.b
    if row.label == NOT_NEXT:
        assert row.fate == PAIRED
        assert contents[a_record] != contents[b_record]
        own = a_position + len(row.a)
        assert tokens[a_record][own : own + len(row.b)] != row.b
    else:
        assert (b_record, b_position) == (a_record, a_position + len(row.a))


def check_conservation(rows: list[Row], tokens: dict[int, list[int]]) -> None:
    """Every token of every document is in exactly one A or B."""
    used: Counter[tuple[int, int]] = Counter()
    for row in rows:
        for (record, position), segment in ((row.a_place, row.a), (row.b_place, row.b)):
            used.update((record, position + i) for i in range(len(segment)))
    everything = ((record, i) for record, ids in tokens.items() for i in range(len(ids)))
    assert used == Counter(everything)


# What a row is made of


@given(
    found=st.lists(texts, min_size=1, max_size=8),
    copies=st.integers(0, 3),
    max_length=st.sampled_from([16, 17, 31, 64]),
    seed=st.integers(0, 1000),
    notnext_ratio=st.sampled_from([0.0, 0.3, 1.0]),
)
@example(["a. " * 9, "A.  a. " * 9], 1, 16, 0, 1.0)
@example(["Vitamin B\u3000. is text. The sea."], 1, 16, 0, 1.0)
@settings(max_examples=150, deadline=None)
def test_t2_t3_t6_rows_are_their_documents_cut_exchanged_and_masked(
    vocabulary: Vocabulary,
    found: list[str],
    copies: int,
    max_length: int,
    seed: int,
    notnext_ratio: float,
) -> None:
    documents = from_texts(*found, *(text.upper() for text in found[:copies]))
    config = TextConfig(max_length=max_length, notnext_ratio=notnext_ratio)
    rows = make(vocabulary, documents, config, seed=seed)
    tokens = tokens_of(vocabulary, documents)
    contents = {document.record: document.content for document in documents}
    for row in rows:
        check_shape(row, vocabulary, max_length)
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
    assert all(row.label == NEXT for row in rows)
    batch = TextRows(SHORT, vocabulary).collate(
        TextRows(SHORT, vocabulary).rows(documents, seed=0, epoch=0, order=0)
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
    assert len(FATES) == 3
    fates = Counter(row.fate for row in make(vocabulary, make_documents(120)))
    assert fates[PAIRED] > 0.9 * (fates[PAIRED] + fates[NO_PARTNER])
    assert fates[NO_PARTNER] + fates[ONE_SEGMENT] > 0


seconds = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2))


@given(found=st.lists(seconds, max_size=25), seed=st.integers(0, 99), ratio=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_t2_couples_are_equally_long_and_of_different_words(
    found: list[tuple[int, int, int]], seed: int, ratio: float
) -> None:
    count = len(found)
    content, length, word = np.array(found, dtype=np.int64).reshape(-1, 3).T
    flat = np.repeat(word, length).astype(np.uint16)
    zeros = np.zeros(count, dtype=np.int64)
    pairs = Pairs(content, zeros, zeros, np.cumsum(length) - length, length)
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


def labels_and_lengths(vocabulary: Vocabulary, ratio: float) -> list[NDArray[np.int64]]:
    """Return (length of A, length of B, label) of the labelled rows of 40 work orders."""
    documents = make_documents(60)
    config = replace(SHORT, notnext_ratio=ratio)
    found = []
    for order in range(40):
        rows = make(vocabulary, documents, config, epoch=order, order=order)
        labelled = [(len(row.a), len(row.b), row.label) for row in rows if row.fate == PAIRED]
        found.append(np.array(labelled))
    return found


@pytest.mark.parametrize("ratio", [0.5, 0.3])
def test_t4_notnext_is_as_frequent_as_asked_for(vocabulary: Vocabulary, ratio: float) -> None:
    labels = np.concatenate(labels_and_lengths(vocabulary, ratio))[:, 2]
    couples = len(labels) // 2  # both rows of a couple have the label of one coin
    assert couples > 5000
    heads = int(labels.sum()) // 2
    assert abs(heads - ratio * couples) < 4 * (couples * ratio * (1 - ratio)) ** 0.5


def test_t4_lengths_cannot_tell_the_label(vocabulary: Vocabulary) -> None:
    """A histogram over (length of A, length of B) of some orders is at chance on others."""
    orders = labels_and_lengths(vocabulary, 0.5)
    known, asked = np.concatenate(orders[::2]), np.concatenate(orders[1::2])
    votes = np.zeros((32, 32))
    np.add.at(votes, (known[:, 0], known[:, 1]), 2 * known[:, 2] - 1)
    guesses = votes[asked[:, 0], asked[:, 1]] > 0
    accuracy = float((guesses == asked[:, 2]).mean())
    couples = len(asked) / 2
    assert couples > 2500
    assert abs(accuracy - 0.5) < 4 * (0.25 / couples) ** 0.5 < 0.04


# The same again


def test_t5_rows_are_a_function_of_their_address(vocabulary: Vocabulary) -> None:
    documents = make_documents(12)
    maker = TextRows(SHORT, vocabulary)
    first = maker.rows(documents, seed=3, epoch=1, order=4)
    travelled = pickle.loads(pickle.dumps(maker))
    travelled.rows(documents[:3], seed=9, epoch=9, order=9)
    assert digest(travelled.rows(documents, seed=3, epoch=1, order=4)) == digest(first)
    others = [
        maker.rows(documents, seed=4, epoch=1, order=4),
        maker.rows(documents, seed=3, epoch=2, order=4),
        maker.rows(documents, seed=3, epoch=1, order=5),
    ]
    assert len({digest(table) for table in [first, *others]}) == 4


def test_t5_golden_rows_hold_for_ever(vocabulary: Vocabulary) -> None:
    made = TextRows(SHORT, vocabulary).rows(make_documents(12), seed=0, epoch=0, order=0)
    assert digest(made) == "fb885fedf42984436968e48e0ddf3074f58a27b266f783851921622a395487fa"


def hidden_tokens(vocabulary: Vocabulary, seed: int, epoch: int) -> set[tuple[int, int]]:
    config = replace(SHORT, notnext_ratio=0.0, masking="pieces")
    found = set()
    for row in make(vocabulary, make_documents(120), config, seed=seed, epoch=epoch):
        for place in row.masked:
            in_b = place > len(row.a)
            found.add((row.a_place[0], row.a_place[1] + place - 1 - in_b))
    return found


def test_t5_epochs_and_seeds_hide_unrelated_tokens(vocabulary: Vocabulary) -> None:
    num_tokens = sum(map(len, tokens_of(vocabulary, make_documents(120)).values()))
    first = hidden_tokens(vocabulary, 0, 0)
    share = len(first) / num_tokens
    assert 0.12 < share < 0.17
    for seed, epoch in ((1, 0), (0, 1), (2, 0)):
        both = len(first & hidden_tokens(vocabulary, seed, epoch)) / num_tokens
        assert abs(both - share**2) < 5 * (share**2 / num_tokens) ** 0.5


def test_t5_order_decides_partners_but_neither_cuts_nor_hidden_places_of_a(
    vocabulary: Vocabulary,
) -> None:
    documents = make_documents(30)
    first, second = (make(vocabulary, documents, order=order) for order in (0, 1))
    assert [(row.a_place, row.a) for row in first] == [(row.a_place, row.a) for row in second]
    partners = [
        {(row.a_place, row.b_place) for row in rows if row.label == NOT_NEXT}
        for rows in (first, second)
    ]
    assert len(partners[0] & partners[1]) < 0.2 * len(partners[0])


# What the model is given


@pytest.mark.parametrize("masking", ["words", "pieces", "spans"])
def test_a_batch_holds_every_value_of_its_rows(
    vocabulary: Vocabulary, masking: Literal["words", "pieces", "spans"]
) -> None:
    config = TextConfig(max_length=40, masking=masking)
    maker = TextRows(config, vocabulary)
    documents = [*make_documents(20), *from_texts("It")]
    table = maker.rows(documents, seed=0, epoch=0, order=0)
    batch = maker.collate(table)
    width = int(num_predictions(np.array([38]), config)[0])
    assert {name: (str(array.dtype), array.shape[1:]) for name, array in batch.items()} == {
        "input_ids": ("int64", (40,)),
        "token_type_ids": ("int64", (40,)),
        "attention_mask": ("bool", (40,)),
        "masked_positions": ("int64", (width,)),
        "masked_ids": ("int64", (width,)),
        "nsp_labels": ("int64", ()),
    }
    rows = unpack(table)
    fates = Counter(row.fate for row in rows)
    assert set(fates) == {PAIRED, ONE_SEGMENT, NO_PARTNER}
    for i, row in enumerate(rows):
        mine = {name: array[i].tolist() for name, array in batch.items()}
        rest = 40 - len(row.seen)
        assert mine["input_ids"] == [*row.seen, *[vocabulary.pad] * rest]
        assert mine["attention_mask"] == [True] * len(row.seen) + [False] * rest
        second = len(row.seen) - len(row.a) - 2
        assert mine["token_type_ids"] == [0] * (len(row.a) + 2) + [1] * second + [0] * rest
        places, unused = row.masked, width - len(row.masked)
        assert mine["masked_positions"] == [*places, *[0] * unused]
        assert mine["masked_ids"] == [*(row.restored[p] for p in places), *[IGNORED] * unused]
        assert mine["nsp_labels"] == (row.label if row.fate == PAIRED else IGNORED)


@given(cuts=st.lists(st.integers(0, 60), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_a_batch_of_a_slice_is_that_slice_of_the_batch(
    vocabulary: Vocabulary, cuts: list[int]
) -> None:
    maker = TextRows(SHORT, vocabulary)
    table = maker.rows(make_documents(8), seed=0, epoch=0, order=0)
    whole = maker.collate(table)
    edges = sorted([0, *cuts, table.num_rows])
    slices = [table.slice(a, b - a) for a, b in pairwise(edges)]
    for name, array in maker.collate(pa.concat_tables(slices)).items():
        assert np.array_equal(array, whole[name])
    for start, part in zip(edges, slices, strict=False):
        for name, array in maker.collate(part).items():
            assert np.array_equal(array, whole[name][start : start + part.num_rows])


def test_rows_travel_in_narrow_types(vocabulary: Vocabulary) -> None:
    table = TextRows(SHORT, vocabulary).rows(make_documents(8), seed=0, epoch=0, order=0)
    kinds = {name: table.schema.field(name).type for name in table.column_names}
    assert kinds["input_ids"] == pa.list_(pa.uint16())
    assert kinds["masked_positions"] == pa.list_(pa.uint16())
    assert kinds["masked_ids"] == pa.list_(pa.uint16())
    assert (kinds["a_length"], kinds["nsp_label"]) == (pa.uint16(), pa.int8())


def test_monstrous_documents_give_rows(vocabulary: Vocabulary) -> None:
    monsters = from_texts(
        "a" * 1_000_000, "sea " * 50_000, "\u4e2d" * 20_000, "A. " * 20_000, "\0a"
    )
    rows = make(vocabulary, monsters)
    tokens = tokens_of(vocabulary, monsters)
    assert tokens[0] == [vocabulary.unknown]
    check_conservation(rows, tokens)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_length": 15}, r"max_length must be in 16\.\.4096, got 15"),
        ({"max_length": 5000}, "got 5000"),
        ({"notnext_ratio": 1.1}, r"notnext_ratio must be in 0\.\.1, got 1\.1"),
        ({"mask_ratio": -0.1}, r"mask_ratio must be in 0\.\.1, got -0\.1"),
        ({"span_stop_ratio": 0.0}, "span_stop_ratio must be in 0..1, not 0, got 0.0"),
        ({"span_max_words": 256}, r"span_max_words must be in 1\.\.255, got 256"),
        ({"random_token_ratio": 0.3}, r"must be at most 1, got 0\.8 \+ 0\.3"),
    ],
)
def test_an_impossible_config_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TextConfig(**fields)
