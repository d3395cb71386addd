"""Documents to sentences to tokens to pairs to masked rows. Pure functions, no ray.

A document is cut into chunks of whole sentences, and each chunk at one sentence edge into two
neighbouring segments A and B, so that every token is used once an epoch. Chunks of different
documents whose Bs are equally long are coupled, and a coin decides whether the two exchange
their Bs (NotNext) or keep them (IsNext): neither lengths nor partners can tell the label.

    document 7:  [s0 s1 | s2] [s3 | s4 s5]        document 9:  [t0 | t1] ...
    couple:      7[s0 s1 | s2] with 9[t0 | t1], len(s2) == len(t1)
    heads:       [CLS] s0 s1 [SEP] t1 [SEP]       [CLS] t0 [SEP] s2 [SEP]       both NotNext
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.manifest import Document
from pipelines.randomness import Words64, draws, key, uniform
from pipelines.sentences import split_sentences
from pipelines.vocabulary import Vocabulary

Ints = NDArray[np.int64]
Tokens = NDArray[Any]
"""Ids, uint16 or uint32 as the vocabulary needs."""

IGNORED = -100
"""Target of what has no loss; `torch.nn.functional.cross_entropy` skips it."""

PAIRED, ONE_SEGMENT, NO_PARTNER = range(3)
FATES = ("paired", "one segment: no next-sentence label", "no partner: no next-sentence label")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How documents become masked sentence pairs.

    Devlin et al. 2019, BERT, arXiv:1810.04805, sections 3.1 and A.1.
    """

    kind: Literal["text"] = "text"
    language: str = "en"
    """Whose rules split sentences (ISO 639-1)."""
    max_length: int = 128
    """Tokens of a row, control tokens included."""
    notnext_ratio: float = 0.5
    """Probability that B is not the next segment."""
    mask_ratio: float = 0.15
    """Share of a row's text tokens that are to be predicted."""
    mask_token_ratio: float = 0.8
    """Share of those that are replaced by [MASK]."""
    random_token_ratio: float = 0.1
    """Share of those that are replaced by a random piece; the rest stay as they are."""
    whole_words: bool = True
    """Choose words rather than pieces."""

    def __post_init__(self) -> None:
        if not 16 <= self.max_length <= 4096:
            raise ValueError(f"max_length must be in 16..4096, got {self.max_length}")
        for name in ("notnext_ratio", "mask_ratio", "mask_token_ratio", "random_token_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")
        if self.mask_token_ratio + self.random_token_ratio > 1:
            raise ValueError(
                "mask_token_ratio + random_token_ratio must be at most 1, got "
                f"{self.mask_token_ratio} + {self.random_token_ratio}"
            )


class Units(NamedTuple):
    """Sentences, or pieces of overlong ones, as spans of one flat token array."""

    start: Ints
    length: Ints
    document: Ints


class Pairs(NamedTuple):
    """Segments A and B of each chunk, as spans of one flat token array."""

    document: Ints
    a_start: Ints
    a_length: Ints
    b_start: Ints
    b_length: Ints
    """0 where the chunk is a single sentence."""


class Masks(NamedTuple):
    """What is to be predicted in flat rows of tokens."""

    places: Ints
    """Indices of the chosen tokens, ascending."""
    inputs: Tokens
    """What the model sees at these places."""


class TextRows:
    """Makes the rows of a work order, and the batches of a slot, from text."""

    fates = FATES

    def __init__(self, config: TextConfig, vocabulary: Vocabulary) -> None:
        self.config = config
        self.vocabulary = vocabulary

    def rows(self, documents: Sequence[Document], *, seed: int, epoch: int, order: int) -> pa.Table:
        """Return the rows of a work order, in the order of its documents.

        Columns: `input_ids` (masked), `a_length` (tokens through the first [SEP]),
        `masked_positions`, `masked_ids`, `nsp_label` (0 IsNext, 1 NotNext), `fate` (index into
        `fates`: only paired rows have a label), and where A and B come from: `a_record`,
        `a_position`, `b_record`, `b_position` (positions in tokens of the document).
        """
        limit = self.config.max_length - 3
        tokens, units, document_start = self._tokenize(documents, limit)
        records = np.array([document.record for document in documents], dtype=np.uint64)
        document_keys = draws(key(seed, epoch, "cut"), records)
        pairs = _cut_pairs(units, document_start, limit, document_keys)
        content = np.array([document.content for document in documents], dtype=np.uint64)
        coins = draws(
            key(seed, order, "couple"), np.arange(2 * len(pairs.document), dtype=np.uint64)
        )
        partner, label = couple(
            pairs, content[pairs.document], tokens, coins, self.config.notnext_ratio
        )
        fate = np.where(pairs.b_length == 0, ONE_SEGMENT, np.where(label < 0, NO_PARTNER, PAIRED))
        flat, lengths = _join(tokens, pairs, partner, self.vocabulary)
        a_position = pairs.a_start - document_start[pairs.document]
        row_keys = draws(
            draws(key(seed, epoch, "mask"), records[pairs.document]), a_position.astype(np.uint64)
        )
        masks = mask(flat, lengths, row_keys, self.vocabulary, self.config)
        b_document = pairs.document[partner]
        return _table(
            flat,
            lengths,
            masks,
            a_length=(pairs.a_length + 2).astype(np.uint16),
            nsp_label=np.maximum(label, 0).astype(np.int8),
            fate=fate.astype(np.int8),
            a_record=records[pairs.document].astype(np.int64),
            a_position=a_position,
            b_record=records[b_document].astype(np.int64),
            b_position=pairs.b_start[partner] - document_start[b_document],
        )

    def collate(self, table: pa.Table) -> dict[str, NDArray[Any]]:
        """Return the batch that the model is given: int64 arrays padded to fixed shapes."""
        num_rows, width = table.num_rows, self.config.max_length
        ids, lengths = _unnest(table["input_ids"])
        attended = np.arange(width) < lengths[:, None]
        input_ids = np.full((num_rows, width), self.vocabulary.pad, dtype=np.int64)
        input_ids[attended] = ids
        segment = np.arange(width) >= table["a_length"].to_numpy()[:, None]
        positions, counts = _unnest(table["masked_positions"])
        predicted = np.arange(self._max_predictions()) < counts[:, None]
        masked_positions = np.zeros(predicted.shape, dtype=np.int64)
        masked_positions[predicted] = positions
        masked_ids = np.full(predicted.shape, IGNORED, dtype=np.int64)
        masked_ids[predicted] = _unnest(table["masked_ids"])[0]
        labelled = table["fate"].to_numpy() == PAIRED
        return {
            "input_ids": input_ids,
            "token_type_ids": (segment & attended).astype(np.int64),
            "attention_mask": attended,
            "masked_positions": masked_positions,
            "masked_ids": masked_ids,
            "nsp_labels": np.where(labelled, table["nsp_label"].to_numpy(), IGNORED).astype(
                np.int64
            ),
        }

    def _max_predictions(self) -> int:
        return int(num_predictions(np.array([self.config.max_length - 2]), self.config)[0])

    def _tokenize(self, documents: Sequence[Document], limit: int) -> tuple[Tokens, Units, Ints]:
        """Return the flat tokens, their units, and where each document starts."""
        sentences: list[str] = []
        counts: list[int] = []
        for document in documents:
            found = split_sentences(self.config.language, document.text)
            sentences += found
            counts.append(len(found))
        encoded = self.vocabulary.encode(sentences)
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
        tokens = np.concatenate([np.zeros(0, self.vocabulary.dtype), *encoded])
        document_of = np.repeat(np.arange(len(documents)), counts)
        document_lengths = np.bincount(document_of, weights=lengths, minlength=len(documents))
        units = _split_long(
            Units(_starts(lengths), lengths, document_of),
            self.vocabulary.continues[tokens],
            limit // 2,
        )
        return tokens, units, _starts(document_lengths.astype(np.int64))


def couple(
    pairs: Pairs,
    content: NDArray[np.uint64],
    tokens: Tokens,
    coins: Words64,
    notnext_ratio: float,
) -> tuple[Ints, Ints]:
    """Return whose B each pair takes, and its label: 0 IsNext, 1 NotNext, -1 none.

    Pairs are coupled inside buckets of equal B length, across documents that are not copies
    of each other, before any label is drawn; one coin then labels both. A pair that finds no
    partner keeps its B and has no label, whatever the coin would have said.
    """
    num_pairs = len(pairs.document)
    partner = np.arange(num_pairs)
    label = np.full(num_pairs, -1, dtype=np.int64)
    heads = uniform(coins[num_pairs:]) < notnext_ratio

    def second(pair: int) -> bytes:
        return tokens[pairs.b_start[pair] :][: pairs.b_length[pair]].tobytes()

    waiting: list[int] = []
    order = np.lexsort((coins[:num_pairs], pairs.b_length))
    for i in order[pairs.b_length[order] > 0].tolist():
        if waiting and pairs.b_length[waiting[-1]] != pairs.b_length[i]:
            waiting = []
        # Those that wait together are of one document, so the last of them speaks for all.
        j = waiting[-1] if waiting else i
        if content[i] == content[j] or second(i) == second(j):
            waiting.append(i)
            continue
        waiting.pop()
        label[[i, j]] = int(heads[i])
        if heads[i]:
            partner[i], partner[j] = j, i
    return partner, label


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

    Words (or pieces) of a row are taken in keyed order for as long as they fit into
    `num_predictions`. Control tokens are never chosen and never drawn.
    """
    row = np.repeat(np.arange(len(lengths)), lengths)
    column = np.arange(len(flat)) - np.repeat(_starts(lengths), lengths)
    is_text = (flat != vocabulary.cls) & (flat != vocabulary.sep)
    places = np.flatnonzero(is_text)
    new_unit = np.ones(len(places), dtype=bool)
    if config.whole_words:
        # The token before the first of a segment is a control token: words never cross it.
        new_unit = ~(vocabulary.continues[flat[places]] & is_text[places - 1])
    quota = num_predictions(np.bincount(row[places], minlength=len(lengths)), config)
    unit = np.cumsum(new_unit) - 1
    # A word of more pieces than a row may lose is chosen piece by piece.
    new_unit |= np.bincount(unit)[unit] > quota[row[places]]
    unit = np.cumsum(new_unit) - 1
    unit_row, unit_length = row[places[new_unit]], np.bincount(unit)
    token_draws = draws(row_keys[row[places]], column[places].astype(np.uint64))

    order = np.lexsort((token_draws[new_unit], unit_row))
    ends = np.cumsum(unit_length[order])
    first_of_row = np.concatenate([[True], np.diff(unit_row[order]) > 0])[: len(order)]
    before_row = np.maximum.accumulate(np.where(first_of_row, ends - unit_length[order], 0))
    taken = np.zeros(len(order), dtype=bool)
    taken[order] = ends - before_row <= quota[unit_row[order]]

    chosen = taken[unit]
    places = places[chosen]
    fate = uniform(draws(key("replace"), token_draws[chosen]))
    random_ids = vocabulary.ordinary[
        draws(key("random piece"), token_draws[chosen]) % np.uint64(len(vocabulary.ordinary))
    ]
    inputs = np.where(
        fate < config.mask_token_ratio,
        vocabulary.dtype.type(vocabulary.mask),
        np.where(
            fate < config.mask_token_ratio + config.random_token_ratio, random_ids, flat[places]
        ),
    )
    return Masks(places, inputs)


def _split_long(units: Units, continues: NDArray[np.bool_], limit: int) -> Units:
    """Cut units of more than `limit` tokens, before a word where one starts in reach."""
    pieces: list[tuple[int, int, int]] = []
    for start, length, document in zip(*(column.tolist() for column in units), strict=True):
        end = start + length
        while end - start > limit:
            word_starts = np.flatnonzero(~continues[start + 1 : start + limit + 1])
            cut = start + (int(word_starts[-1]) + 1 if len(word_starts) else limit)
            pieces.append((start, cut - start, document))
            start = cut
        if end > start:
            pieces.append((start, end - start, document))
    return Units(*np.array(pieces, dtype=np.int64).reshape(-1, 3).T)


def _chunk(units: Units, limit: int, first_limits: NDArray[np.float64]) -> Ints:
    """Return the first unit of each chunk: units of one document, `limit` tokens at most.

    `first_limits` are the smaller limits of each document's first chunk.
    """
    firsts: list[int] = []
    current, room = -1, 0.0
    for i, (length, document) in enumerate(
        zip(units.length.tolist(), units.document.tolist(), strict=True)
    ):
        if document != current:
            current, room = document, first_limits[document]
            firsts.append(i)
        elif length > room:
            room = limit
            firsts.append(i)
        room -= length
    return np.array(firsts, dtype=np.int64)


def _cut_pairs(units: Units, document_start: Ints, limit: int, document_keys: Words64) -> Pairs:
    """Cut documents into chunks, and each chunk at a unit edge into A and B.

    The first chunk of a document has a keyed size, so that the cuts move between epochs.
    """
    at_document = uniform(draws(key("first chunk"), document_keys))
    firsts = _chunk(units, limit, limit // 2 + at_document * (limit - limit // 2))
    num_units = np.diff(np.append(firsts, len(units.start)))
    start, document = units.start[firsts], units.document[firsts]
    end = np.append(units.start + units.length, 0)[firsts + num_units - 1]
    position = (start - document_start[document]).astype(np.uint64)
    at_chunk = uniform(draws(document_keys[document], position))
    cut = firsts + 1 + (at_chunk * (num_units - 1)).astype(np.int64)
    middle = np.where(num_units > 1, np.append(units.start, 0)[cut], end)
    return Pairs(document, start, middle - start, middle, end - middle)


def _join(
    tokens: Tokens, pairs: Pairs, partner: Ints, vocabulary: Vocabulary
) -> tuple[Tokens, Ints]:
    """Return flat rows [CLS] A [SEP] B [SEP], or [CLS] A [SEP] where B is empty, and lengths."""
    a_length, b_length = pairs.a_length, pairs.b_length[partner]
    lengths = 2 + a_length + b_length + (b_length > 0)
    start = _starts(lengths)
    flat = np.full(int(lengths.sum()), vocabulary.sep, dtype=vocabulary.dtype)
    flat[start] = vocabulary.cls
    flat[_spans(start + 1, a_length)] = tokens[_spans(pairs.a_start, a_length)]
    flat[_spans(start + 2 + a_length, b_length)] = tokens[_spans(pairs.b_start[partner], b_length)]
    return flat, lengths


def _table(flat: Tokens, lengths: Ints, masks: Masks, **columns: NDArray[Any]) -> pa.Table:
    """Return rows as Arrow columns: nested where flat, one value a row otherwise."""
    row = np.repeat(np.arange(len(lengths)), lengths)[masks.places]
    counts = np.bincount(row, minlength=len(lengths))
    positions = masks.places - _starts(lengths)[row]
    inputs = flat.copy()
    inputs[masks.places] = masks.inputs
    nested = {
        "input_ids": _nest(inputs, lengths),
        "masked_positions": _nest(positions.astype(np.uint16), counts),
        "masked_ids": _nest(flat[masks.places], counts),
    }
    return pa.table(nested | {name: pa.array(column) for name, column in columns.items()})


def _nest(values: NDArray[Any], lengths: Ints) -> pa.ListArray:
    offsets = np.append(_starts(lengths), lengths.sum()).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, values)


def _unnest(column: pa.ChunkedArray) -> tuple[NDArray[Any], Ints]:
    nested = column.combine_chunks()
    lengths = np.diff(nested.offsets.to_numpy()).astype(np.int64)
    return nested.flatten().to_numpy(), lengths


def _starts(lengths: Ints) -> Ints:
    """Return where each of the consecutive spans of these lengths starts."""
    return np.cumsum(lengths) - lengths


def _spans(starts: Ints, lengths: Ints) -> Ints:
    """Return the joined `range(start, start + length)` of every span."""
    return np.arange(int(lengths.sum())) + np.repeat(starts - _starts(lengths), lengths)
