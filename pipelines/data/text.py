"""Documents to sentences to tokens to pairs to masked rows to arrays. Pure functions, no ray.

document 7:  [s0 s1 | s2] [s3 | s4 s5]        document 9:  [t0 | t1] ...     pairs.py
couple:      7[s0 s1 | s2] with 9[t0 | t1], len(s2) == len(t1)
heads:       [CLS] s0 s1 [SEP] t1 [SEP]       [CLS] t0 [SEP] s2 [SEP]       both NotNext
mask:        [CLS] s0 [MASK] [SEP] t1 [SEP]                                  masks.py

Other pairings: BERT's own in reference.py, swapped neighbours in sentence_order.py.
"""

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.data.manifest import Document
from pipelines.data.masks import Masks, mask, num_predictions
from pipelines.data.pairs import Pairs, Segments, couple, cut_chunks, split_long, target_lengths
from pipelines.data.randomness import Words64, draws, key
from pipelines.data.reference import Numbers, make_instances
from pipelines.data.sentence_order import mirror, swap
from pipelines.data.sentences import split_sentences
from pipelines.data.spans import Ints, Tokens, spans, starts
from pipelines.data.text_config import Pairing, TextConfig
from pipelines.data.vocabulary import Vocabulary

IGNORED = -100
"""Label or target of what has no loss; `torch.nn.functional.cross_entropy` skips it."""

PAIRED, ONE_SEGMENT, NO_PARTNER = range(3)
FORCED = 1
FATES: dict[Pairing, tuple[str, ...]] = {
    "honest": (
        "paired",
        "one segment: no next-sentence label",
        "no partner: no next-sentence label",
    ),
    "reference": ("paired", "one sentence: NotNext forced"),
    "sentence-order": (
        "paired",
        "one segment: no sentence-order label",
        "no partner of mirrored lengths: no sentence-order label",
    ),
}
"""What can become of a row, by its index in the column `fate`."""


class Text(NamedTuple):
    """The documents of a work order in tokens."""

    tokens: Tokens
    sentences: Segments
    start: Ints
    """Where each document starts in `tokens`."""
    record: NDArray[np.uint64]
    content: NDArray[np.uint64]


class Rows(NamedTuple):
    """The rows of a work order, flat and not yet masked, and what is to be masked."""

    pairs: Pairs
    label: Ints
    fate: Ints
    flat: Tokens
    lengths: Ints
    masks: Masks


class TextRows:
    """Makes the rows of a work order, and the batches of a slot, from text."""

    rows_at_once = 0  # the pairs of an order exchange their second segments

    def __init__(self, config: TextConfig, vocabulary: Vocabulary) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.fates = FATES[config.pairing]

    def rows(self, documents: Sequence[Document], *, seed: int, order: int) -> pa.Table:
        """Return the rows of a work order: a function of these arguments alone.

        Columns: `input_ids` (masked), `a_length` (tokens through the first [SEP]),
        `masked_positions`, `masked_ids`, `nsp_label` (0 IsNext, 1 NotNext or swapped, IGNORED
        where there is no label), `fate` (index into `fates`), and where A and B, as they stand in
        the row, come from: `a_record`, `a_position`, `b_record`, `b_position` (positions in tokens
        of the document).
        """
        text = self._tokenize(documents)
        if self.config.pairing == "reference":
            return _table(text, self._reference(text, random.Random(key(seed, order, "reference"))))
        cut_keys, mask_keys = (_document_keys(documents, seed, op) for op in ("cut", "mask"))
        return _table(text, self._neighbours(text, cut_keys, mask_keys, key(seed, order, "couple")))

    def collate(
        self, table: pa.Table, *, seed: int = 0, step: int = 0, slot: int = 0
    ) -> dict[str, NDArray[Any]]:
        """Return the batch that the model is given: int64 arrays padded to fixed shapes."""
        del seed, step, slot  # nothing is drawn here
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
        return {
            "input_ids": input_ids,
            "token_type_ids": (segment & attended).astype(np.int64),
            "attention_mask": attended,
            "masked_positions": masked_positions,
            "masked_ids": masked_ids,
            "nsp_labels": table["nsp_label"].to_numpy().astype(np.int64),
        }

    def _max_predictions(self) -> int:
        if self.config.pairing == "reference":
            return self._numbers.max_predictions
        return int(num_predictions(np.array([self.config.max_length - 2]), self.config)[0])

    @property
    def _numbers(self) -> Numbers:
        """The numbers of BERT's own code, with as many predictions as its README advises."""
        config = self.config
        return Numbers(
            max_length=config.max_length,
            max_predictions=math.ceil(config.max_length * config.mask_ratio),
            short_ratio=config.short_probability,
            mask_ratio=config.mask_ratio,
            whole_words=config.masking == "words",
        )

    def _tokenize(self, documents: Sequence[Document]) -> Text:
        sentences: list[str] = []
        counts: list[int] = []
        for document in documents:
            found = split_sentences(self.config.language, document.text)
            sentences += found
            counts.append(len(found))
        tokens, lengths = self.vocabulary.encode_flat(sentences)
        document_of = np.repeat(np.arange(len(documents)), counts)
        document_lengths = np.bincount(document_of, weights=lengths, minlength=len(documents))
        return Text(
            tokens,
            Segments(starts(lengths), lengths, document_of),
            starts(document_lengths.astype(np.int64)),
            record=np.array([document.record for document in documents], dtype=np.uint64),
            content=np.array([document.content for document in documents], dtype=np.uint64),
        )

    def _neighbours(
        self, text: Text, cut_keys: Words64, mask_keys: Words64, couple_key: int
    ) -> Rows:
        """Return rows that use every token once, of neighbours that are exchanged or swapped."""
        config, limit = self.config, self.config.max_length - 3
        units = split_long(text.sentences, self.vocabulary.continues[text.tokens], limit // 2)
        targets = target_lengths(cut_keys, limit, config.short_probability)
        chunks = cut_chunks(units, text.start, cut_keys, targets, limit)
        document = chunks.document
        coins = draws(couple_key, np.arange(2 * len(document), dtype=np.uint64))
        if config.pairing == "sentence-order":
            chunks, label = mirror(chunks, coins, config.notnext_ratio)
            pairs = swap(chunks.pairs(), label)
        else:
            pairs = chunks.pairs()
            partner, label = couple(
                pairs, text.content[document], text.tokens, coins, config.notnext_ratio
            )
            pairs = pairs._replace(b=pairs.b.take(partner))
        flat, lengths = _join(text.tokens, pairs, self.vocabulary)
        position = (chunks.edges[chunks.first] - text.start[document]).astype(np.uint64)
        masks = mask(flat, lengths, draws(mask_keys[document], position), self.vocabulary, config)
        fate = np.where(pairs.b.length == 0, ONE_SEGMENT, np.where(label < 0, NO_PARTNER, PAIRED))
        return Rows(pairs, np.where(label < 0, IGNORED, label), fate, flat, lengths, masks)

    def _reference(self, text: Text, rng: random.Random) -> Rows:
        """Return the rows that BERT's own code would make of these documents, in its order."""
        instances = make_instances(text.tokens, text.sentences, rng, self._numbers, self.vocabulary)
        made = [instance.pair for instance in instances]
        pairs = Pairs(
            _segments(text, [pair.a for pair in made]), _segments(text, [pair.b for pair in made])
        )
        flat, lengths = _join(text.tokens, pairs, self.vocabulary)
        counts = np.array([len(instance.hidden) for instance in instances], dtype=np.int64)
        places = np.array([place for i in instances for place in i.hidden], dtype=np.int64)
        inputs = [token for i in instances for token in i.hidden.values()]
        return Rows(
            pairs,
            np.array([pair.is_notnext for pair in made], dtype=np.int64),
            np.where([pair.is_forced for pair in made], FORCED, PAIRED),
            flat,
            lengths,
            Masks(
                places + np.repeat(starts(lengths), counts),
                np.array(inputs, dtype=self.vocabulary.dtype),
            ),
        )


def _document_keys(documents: Sequence[Document], seed: int, op: str) -> Words64:
    """Return the key of each document for an operation: a new one in each visit."""
    visits, which = np.unique(
        np.array([document.visit for document in documents], dtype=np.int64), return_inverse=True
    )
    keys = np.array([key(seed, visit, op) for visit in visits.tolist()], dtype=np.uint64)
    records = np.array([document.record for document in documents], dtype=np.uint64)
    return draws(keys[which], records)


def _segments(text: Text, ends: list[tuple[int, int]]) -> Segments:
    """Return spans of the flat tokens, given by start and end, as segments of their documents."""
    start, end = np.array(ends, dtype=np.int64).reshape(-1, 2).T
    return Segments(start, end - start, np.searchsorted(text.start, start, side="right") - 1)


def _join(tokens: Tokens, pairs: Pairs, vocabulary: Vocabulary) -> tuple[Tokens, Ints]:
    """Return flat rows [CLS] A [SEP] B [SEP], or [CLS] A [SEP] where B is empty, and lengths."""
    (a_start, a_length, _), (b_start, b_length, _) = pairs
    lengths = 2 + a_length + b_length + (b_length > 0)
    start = starts(lengths)
    flat = np.full(int(lengths.sum()), vocabulary.sep, dtype=vocabulary.dtype)
    flat[start] = vocabulary.cls
    flat[spans(start + 1, a_length)] = tokens[spans(a_start, a_length)]
    flat[spans(start + 2 + a_length, b_length)] = tokens[spans(b_start, b_length)]
    return flat, lengths


def _table(text: Text, rows: Rows) -> pa.Table:
    """Return rows as Arrow columns: nested where flat, one value a row otherwise."""
    pairs, label, fate, flat, lengths, masks = rows
    row = np.repeat(np.arange(len(lengths)), lengths)[masks.places]
    counts = np.bincount(row, minlength=len(lengths))
    positions = masks.places - starts(lengths)[row]
    inputs = flat.copy()
    inputs[masks.places] = masks.inputs
    return pa.table(
        {
            "input_ids": _nest(inputs, lengths),
            "masked_positions": _nest(positions.astype(np.uint16), counts),
            "masked_ids": _nest(flat[masks.places], counts),
            "a_length": (pairs.a.length + 2).astype(np.uint16),
            "nsp_label": label.astype(np.int8),
            "fate": fate.astype(np.int8),
            "a_record": text.record[pairs.a.document].astype(np.int64),
            "a_position": pairs.a.start - text.start[pairs.a.document],
            "b_record": text.record[pairs.b.document].astype(np.int64),
            "b_position": pairs.b.start - text.start[pairs.b.document],
        }
    )


def _nest(values: NDArray[Any], lengths: Ints) -> pa.ListArray:
    offsets = np.append(starts(lengths), lengths.sum()).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, values)


def _unnest(column: pa.ChunkedArray) -> tuple[NDArray[Any], Ints]:
    nested = column.combine_chunks()
    lengths = np.diff(nested.offsets.to_numpy()).astype(np.int64)
    return nested.flatten().to_numpy(), lengths
