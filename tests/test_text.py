"""Rows and batches of text: what the model is given, and that it is given the same again."""

import pickle
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.masks import num_predictions
from pipelines.data.text import FATES, IGNORED, PAIRED, TextRows
from pipelines.data.text_config import Pairing, TextConfig
from pipelines.data.vocabulary import Vocabulary
from tests.corpus import make_documents
from tests.text_rows import SHORT, check_conservation, digest, from_texts, make, tokens_of, unpack

NOT_NEXT = 1

# The same again


@pytest.mark.parametrize("pairing", FATES)
def test_t5_rows_are_a_function_of_their_address(vocabulary: Vocabulary, pairing: Pairing) -> None:
    documents = make_documents(12)
    maker = TextRows(TextConfig(max_length=32, pairing=pairing), vocabulary)
    first = maker.rows(documents, seed=3, order=4)
    travelled = pickle.loads(pickle.dumps(maker))
    travelled.rows(documents[:3], seed=9, order=9)
    assert digest(travelled.rows(documents, seed=3, order=4)) == digest(first)
    others = [
        maker.rows(documents, seed=4, order=4),
        maker.rows([document._replace(visit=1) for document in documents], seed=3, order=5),
        maker.rows(documents, seed=3, order=6),
        maker.rows(documents[:-1], seed=3, order=4),
    ]
    assert len({digest(table) for table in [first, *others]}) == 5


def test_t5_honest_rows_differ_between_epochs(vocabulary: Vocabulary) -> None:
    rows = [make(vocabulary, make_documents(12), epoch=epoch) for epoch in (0, 1)]
    assert rows[0] != rows[1]


@pytest.mark.parametrize(
    ("pairing", "expected"),
    [
        ("honest", "d02d3d1ede7802d4c180b9314a6a7d9eef5126ccf6da1711f4a6b73aeb9dd5ab"),
        ("reference", "fffa066b43c3ff50f4f092936086c18e8cc9f9320a06b94341e16e1fd0fcc5b5"),
        ("sentence-order", "9433edfca95eeb6fd0a046e221e50d47a834ae150322ec551b3409a5e2fec5c2"),
    ],
)
def test_t5_golden_rows_hold_for_ever(
    vocabulary: Vocabulary, pairing: Pairing, expected: str
) -> None:
    maker = TextRows(replace(SHORT, pairing=pairing), vocabulary)
    assert digest(maker.rows(make_documents(12), seed=0, order=0)) == expected


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


@pytest.mark.parametrize("masking", ["words", "pieces"])
@pytest.mark.parametrize("pairing", FATES)
def test_a_batch_holds_every_value_of_its_rows(
    vocabulary: Vocabulary, pairing: Pairing, masking: Any
) -> None:
    config = TextConfig(max_length=40, pairing=pairing, masking=masking)
    maker = TextRows(config, vocabulary)
    documents = [*make_documents(20), *from_texts("It")]
    table = maker.rows(documents, seed=0, order=0)
    batch = maker.collate(table)
    width = 6 if pairing == "reference" else int(num_predictions(np.array([38]), config)[0])
    assert {name: (str(array.dtype), array.shape[1:]) for name, array in batch.items()} == {
        "input_ids": ("int64", (40,)),
        "token_type_ids": ("int64", (40,)),
        "attention_mask": ("bool", (40,)),
        "masked_positions": ("int64", (width,)),
        "masked_ids": ("int64", (width,)),
        "nsp_labels": ("int64", ()),
    }
    rows = unpack(table)
    assert {row.fate for row in rows} == set(range(len(maker.fates)))
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
        assert mine["nsp_labels"] == row.label
        labelled = pairing == "reference" or row.fate == PAIRED
        assert row.label in ((0, 1) if labelled else (IGNORED,))


@given(cuts=st.lists(st.integers(0, 60), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_a_batch_of_a_slice_is_that_slice_of_the_batch(
    vocabulary: Vocabulary, cuts: list[int]
) -> None:
    maker = TextRows(SHORT, vocabulary)
    table = maker.rows(make_documents(8), seed=0, order=0)
    whole = maker.collate(table)
    edges = sorted([0, *cuts, table.num_rows])
    slices = [table.slice(a, b - a) for a, b in pairwise(edges)]
    for name, array in maker.collate(pa.concat_tables(slices)).items():
        assert np.array_equal(array, whole[name])
    for start, part in zip(edges, slices, strict=False):
        for name, array in maker.collate(part).items():
            assert np.array_equal(array, whole[name][start : start + part.num_rows])


def test_rows_travel_in_narrow_types(vocabulary: Vocabulary) -> None:
    table = TextRows(SHORT, vocabulary).rows(make_documents(8), seed=0, order=0)
    kinds = {name: table.schema.field(name).type for name in table.column_names}
    assert kinds["input_ids"] == pa.list_(pa.uint16())
    assert kinds["masked_positions"] == pa.list_(pa.uint16())
    assert kinds["masked_ids"] == pa.list_(pa.uint16())
    assert (kinds["a_length"], kinds["nsp_label"]) == (pa.uint16(), pa.int8())


@pytest.mark.parametrize("pairing", FATES)
def test_monstrous_documents_give_rows(vocabulary: Vocabulary, pairing: Pairing) -> None:
    monsters = from_texts(
        "a" * 1_000_000, "sea " * 50_000, "\u4e2d" * 20_000, "A. " * 20_000, "\0a"
    )
    rows = make(vocabulary, monsters, replace(SHORT, pairing=pairing))
    tokens = tokens_of(vocabulary, monsters)
    assert tokens[0] == [vocabulary.unknown]
    if pairing == "reference":
        assert {row.a_place[0] for row in rows} == set(range(5))
    else:
        check_conservation(rows, tokens)


@pytest.mark.parametrize("pairing", FATES)
def test_no_documents_give_no_rows(vocabulary: Vocabulary, pairing: Pairing) -> None:
    maker = TextRows(replace(SHORT, pairing=pairing), vocabulary)
    for documents in ([], from_texts(" ")):
        table = maker.rows(documents, seed=0, order=0)
        assert table.num_rows == 0
        full = maker.rows(make_documents(3), seed=0, order=0)
        assert table.schema == full.schema


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_length": 15}, r"max_length must be in 16\.\.4096, got 15"),
        ({"max_length": 5000}, "got 5000"),
        ({"notnext_ratio": 1.1}, r"notnext_ratio must be in 0\.\.1, got 1\.1"),
        ({"mask_ratio": -0.1}, r"mask_ratio must be in 0\.\.1, got -0\.1"),
        ({"random_token_ratio": 0.3}, r"must be at most 1, got 0\.8 \+ 0\.3"),
        ({"short_ratio": 2.0}, r"short_ratio must be in 0\.\.1, got 2\.0"),
        ({"pairing": "reference", "masking": "spans"}, "masking spans is not in BERT's own code"),
        (
            {"pairing": "reference", "notnext_ratio": 0.4},
            r"notnext_ratio is 0\.5 in reference pairing, which is BERT's own, got 0\.4",
        ),
        ({"pairing": "reference", "mask_token_ratio": 0.7}, r"mask_token_ratio is 0\.8 in"),
    ],
)
def test_an_impossible_config_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TextConfig(**fields)
