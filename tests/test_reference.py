"""BERT's own instances: equal to an oracle one by one, and as often as its numbers say."""

import random
from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.data.pairs import Segments
from pipelines.data.reference import Numbers, make_instances
from pipelines.data.text import FORCED, PAIRED
from pipelines.data.text_config import TextConfig
from pipelines.data.vocabulary import Vocabulary
from tests import bert_oracle
from tests.bert_oracle import Example, Flags
from tests.corpus import make_documents
from tests.test_masks import chi_square
from tests.text_rows import Row, check_segments, check_shape, from_texts, make, tokens_of

REFERENCE = TextConfig(max_length=32, pairing="reference")

Corpus = list[list[list[int]]]


class Case(NamedTuple):
    """One corpus of documents of sentences of ids, and the numbers it is made with."""

    corpus: Corpus
    numbers: Numbers
    seed: int


def cases(vocabulary: Vocabulary, count: int) -> list[Case]:
    """Return tiny corpora of every shape: no document, one, empty ones, one sentence, one token."""
    dice = random.Random(0)
    ordinary = vocabulary.ordinary.tolist()

    def sentence() -> list[int]:
        return dice.choices(ordinary, k=dice.choice([0, 1, 1, 2, 5, 9, 40]))

    def document() -> list[list[int]]:
        return [sentence() for _ in range(dice.choice([0, 1, 1, 2, 4, 12]))]

    found = []
    for seed in range(count):
        corpus = [document() for _ in range(dice.choice([0, 1, 1, 2, 3, 6]))]
        numbers = Numbers(
            max_length=dice.choice([5, 6, 7, 10, 16, 33, 128]),
            max_predictions=dice.choice([1, 3, 20]),
            short_ratio=dice.choice([0.0, 0.1, 1.0]),
            mask_ratio=dice.choice([0.15, 0.15, 0.6, 1.0]),
            whole_words=dice.random() < 0.5,
        )
        found.append(Case(corpus, numbers, seed))
    return found


def made(case: Case, vocabulary: Vocabulary) -> list[Example]:
    """Return the instances of the code under test in the form of the oracle's."""
    sentences = [(i, s) for i, document in enumerate(case.corpus) for s in document]
    tokens = np.array([token for _, s in sentences for token in s], vocabulary.dtype)
    lengths = np.array([len(s) for _, s in sentences], dtype=np.int64)
    documents = np.array([i for i, _ in sentences], dtype=np.int64)
    spans = Segments(np.cumsum(lengths) - lengths, lengths, documents)
    dice = random.Random(case.seed)
    examples = []
    for pair, hidden in make_instances(tokens, spans, dice, case.numbers, vocabulary):
        a, b = (tokens[slice(*span)].tolist() for span in (pair.a, pair.b))
        row = [vocabulary.cls, *a, vocabulary.sep, *b, vocabulary.sep]
        seen = [hidden.get(place, token) for place, token in enumerate(row)]
        segments = [0] * (len(a) + 2) + [1] * (len(b) + 1)
        labels = [row[place] for place in hidden]
        examples.append(Example(seen, segments, list(hidden), labels, pair.is_notnext))
    return examples


def expected(case: Case, vocabulary: Vocabulary) -> list[Example]:
    flags = Flags(
        **vars(case.numbers),
        cls=vocabulary.cls,
        sep=vocabulary.sep,
        mask=vocabulary.mask,
        num_ids=vocabulary.size,
        continuations=set(np.flatnonzero(vocabulary.continues).tolist()),
    )
    return bert_oracle.examples(case.corpus, random.Random(case.seed), flags)


def test_t1_instances_are_berts_one_by_one(vocabulary: Vocabulary) -> None:
    found = cases(vocabulary, 400)
    told = [expected(case, vocabulary) for case in found]
    assert [made(case, vocabulary) for case in found] == told
    assert {len(case.corpus) for case in found} >= {0, 1, 2, 6}
    assert sum(map(len, told)) > 1500
    labels = Counter(example.is_random_next for examples in told for example in examples)
    assert min(labels.values()) > 100


def test_t1_a_lonely_token_is_its_own_random_next(vocabulary: Vocabulary) -> None:
    token = int(vocabulary.ordinary[0])
    numbers = Numbers(max_length=5, max_predictions=9)
    (told,) = made(Case([[[token]], []], numbers, seed=1), vocabulary)
    assert (told.is_random_next, told.segments, told.labels) == (True, [0, 0, 0, 1, 1], [token])


def test_rows_carry_the_instances_of_their_order(vocabulary: Vocabulary) -> None:
    """The order of instances, where they come from, and one generator for each work order."""
    documents = make_documents(20)
    tokens = tokens_of(vocabulary, documents)
    rows = make(vocabulary, documents, REFERENCE, seed=4, order=7)
    for row in rows:
        check_shape(row, vocabulary, 32)
        check_segments(row, tokens)
        assert row.b
        assert row.label == int(row.a_place[0] != row.b_place[0])
        assert row.label == 1 or row.fate == PAIRED
        assert row.masked == sorted(set(row.masked))
        assert {row.restored[place] for place in row.masked} <= set(vocabulary.ordinary.tolist())
        assert len(row.masked) <= max(1, round(0.15 * len(row.seen)))
    assert {row.fate for row in rows} == {PAIRED, FORCED}
    again = make(vocabulary, documents, REFERENCE, seed=4, epoch=9, order=7)
    assert again == rows
    places = [row.a_place for row in rows]
    assert places != sorted(places)


def test_documents_without_words_and_alone_give_rows_too(vocabulary: Vocabulary) -> None:
    assert make(vocabulary, from_texts(" ", "\n"), REFERENCE) == []
    (row,) = make(vocabulary, from_texts(" ", "The sea.", ""), REFERENCE)
    assert (row.a_place, row.b_place) == ((1, 0), (1, 0))
    assert (row.label, row.fate) == (1, FORCED)


# How often


def many(vocabulary: Vocabulary, config: TextConfig, num_orders: int = 12) -> list[Row]:
    documents = make_documents(60, num_sentences=20)
    return [row for i in range(num_orders) for row in make(vocabulary, documents, config, order=i)]


@pytest.fixture(scope="module")
def pieces(vocabulary: Vocabulary) -> list[Row]:
    """Return rows whose pieces are hidden one by one."""
    return many(vocabulary, replace(REFERENCE, max_length=48, masking="pieces"))


def test_t4_the_coin_is_fair_where_it_is_tossed(pieces: list[Row]) -> None:
    tossed = [row.label for row in pieces if row.fate == PAIRED]
    assert len(tossed) > 3000
    assert abs(sum(tossed) - len(tossed) / 2) < 4 * (len(tossed) / 4) ** 0.5
    assert all(row.label == 1 for row in pieces if row.fate == FORCED)


def test_t4_shares_of_mask_random_and_kept(vocabulary: Vocabulary, pieces: list[Row]) -> None:
    pairs = [(row.seen[i], row.restored[i]) for row in pieces for i in row.masked]
    masked = sum(seen == vocabulary.mask for seen, _ in pairs)
    same = sum(seen == true for seen, true in pairs)
    observed = np.array([masked, same, len(pairs) - masked - same])
    by_chance = 0.1 / vocabulary.size
    shares = np.array([0.8 + by_chance, 0.1 + by_chance, 0.1 - 2 * by_chance])
    assert len(pairs) > 15_000
    assert chi_square(observed, len(pairs) * shares) < 18.4  # 2 degrees of freedom, p = 1e-4


def test_t4_random_ids_are_uniform_over_all_even_control_tokens(
    vocabulary: Vocabulary, pieces: list[Row]
) -> None:
    drawn = [
        row.seen[i]
        for row in pieces
        for i in row.masked
        if row.seen[i] not in (vocabulary.mask, row.restored[i])
    ]
    counts = np.bincount(drawn, minlength=vocabulary.size)
    assert counts[vocabulary.mask] == 0  # told apart by nothing from the 80 %
    counts = np.delete(counts, vocabulary.mask)
    statistic = chi_square(counts, np.full(len(counts), counts.mean()))
    assert abs(statistic - len(counts)) < 4.5 * (2 * len(counts)) ** 0.5
    assert counts[:4].sum() > 0


def test_t4_hidden_positions_are_uniform(pieces: list[Row]) -> None:
    """Among the places of text of rows of one shape."""
    shape, count = Counter((len(row.a), len(row.b)) for row in pieces).most_common(1)[0]
    hidden = Counter(
        place for row in pieces if (len(row.a), len(row.b)) == shape for place in row.masked
    )
    a, b = shape
    places = [*range(1, a + 1), *range(a + 2, a + b + 2)]
    assert count > 40
    assert set(hidden) <= set(places)
    counts = np.array([hidden[place] for place in places])
    statistic = chi_square(counts, np.full(len(places), counts.mean()))
    assert abs(statistic - len(places)) < 4.5 * (2 * len(places)) ** 0.5


def equal_documents(
    vocabulary: Vocabulary, count: int, lengths: list[int]
) -> tuple[NDArray[Any], Segments]:
    """Return documents of sentences of these lengths, all of one token."""
    length = np.array(lengths * count, dtype=np.int64)
    document = np.arange(count).repeat(len(lengths))
    tokens = np.full(int(length.sum()), vocabulary.ordinary[0])
    return tokens, Segments(np.cumsum(length) - length, length, document)


def test_t4_documents_are_short_as_often_as_asked(vocabulary: Vocabulary) -> None:
    """Sentences of one token: the first chunk of a document has just its target of 2 to 30."""
    numbers = Numbers(max_length=33, max_predictions=5, short_ratio=0.3)
    tokens, sentences = equal_documents(vocabulary, 3000, [1] * 31)
    instances = make_instances(tokens, sentences, random.Random(0), numbers, vocabulary)
    first = [pair for pair, _ in instances if pair.a[0] % 31 == 0 and not pair.is_notnext]
    counts = np.bincount([pair.b[1] - pair.a[0] for pair in first], minlength=31)
    shares = np.full(29, 0.3 / 29)
    shares[-1] += 0.7
    assert counts[:2].sum() == 0
    assert len(first) > 1300
    assert chi_square(counts[2:], len(first) * shares) < 64  # 28 degrees of freedom, p = 1e-4


def test_t4_segments_lose_either_end_alike(vocabulary: Vocabulary) -> None:
    """A and B of 60 tokens each lose 46 of them, a coin for each."""
    numbers = Numbers(max_length=31, max_predictions=1, short_ratio=0.0)
    tokens, sentences = equal_documents(vocabulary, 300, [60])
    instances = make_instances(tokens, sentences, random.Random(3), numbers, vocabulary)
    front = np.array([span[0] % 60 for pair, _ in instances for span in (pair.a, pair.b)])
    assert len(front) == 600
    assert all(end - start == 14 for pair, _ in instances for start, end in (pair.a, pair.b))
    assert abs(front.mean() - 23) < 4 * (46 / 4 / 600) ** 0.5
    assert abs(front.var() / (46 / 4) - 1) < 4 * (2 / 600) ** 0.5
