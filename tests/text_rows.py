"""Rows of text taken apart, and what has to hold for each of them."""

import hashlib
import json
from collections import Counter
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from pipelines.data.manifest import Document, content_hash
from pipelines.data.text import TextRows
from pipelines.data.text_config import TextConfig
from pipelines.data.vocabulary import CONTROL_TOKENS, Vocabulary

SHORT = TextConfig(max_length=32)

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
    visited = [document._replace(visit=epoch) for document in documents]
    return unpack(maker.rows(visited, seed=seed, order=order))


def digest(table: pa.Table) -> str:
    return hashlib.sha256(json.dumps(table.to_pydict()).encode()).hexdigest()


def check_shape(row: Row, vocabulary: Vocabulary, max_length: int) -> None:
    assert len(row.seen) <= max_length
    assert row.restored[0] == vocabulary.cls
    assert row.restored[-1] == vocabulary.sep
    assert row.a
    assert row.a_place[0] >= 0
    expected = [vocabulary.cls, *row.a, vocabulary.sep]
    if row.b:
        expected += [*row.b, vocabulary.sep]
    assert row.restored == expected
    control = {vocabulary.pad, vocabulary.cls, vocabulary.sep, vocabulary.mask}
    assert not control & {*row.a, *row.b}


def check_segments(row: Row, tokens: dict[int, list[int]]) -> None:
    """A and B stand in their documents as they stand in the row."""
    for (record, position), segment in ((row.a_place, row.a), (row.b_place, row.b)):
        assert tokens[record][position : position + len(segment)] == segment


def check_conservation(rows: list[Row], tokens: dict[int, list[int]]) -> None:
    """Every token of every document is in exactly one A or B."""
    used: Counter[tuple[int, int]] = Counter()
    for row in rows:
        for (record, position), segment in ((row.a_place, row.a), (row.b_place, row.b)):
            used.update((record, position + i) for i in range(len(segment)))
    everything = ((record, i) for record, ids in tokens.items() for i in range(len(ids)))
    assert used == Counter(everything)


def length_accuracy(orders: list[list[Row]]) -> tuple[float, int]:
    """Return how often lengths tell the label, and of how many rows.

    A histogram over both lengths is made of every other order and asked for the rest.
    """
    found = [np.array([(len(row.a), len(row.b), row.label) for row in rows]) for rows in orders]
    known, asked = np.concatenate(found[::2]), np.concatenate(found[1::2])
    longest = 1 + max(int(known[:, :2].max()), int(asked[:, :2].max()))
    votes = np.zeros((longest, longest))
    np.add.at(votes, (known[:, 0], known[:, 1]), 2 * known[:, 2] - 1)
    guesses = votes[asked[:, 0], asked[:, 1]] > 0
    return float((guesses == asked[:, 2]).mean()), len(asked)
