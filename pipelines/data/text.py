"""Documents to sentences to tokens to pairs to masked rows to arrays. Pure functions, no ray.

document 7:  [s0 s1 | s2] [s3 | s4 s5]        document 9:  [t0 | t1] ...     pairs.py
couple:      7[s0 s1 | s2] with 9[t0 | t1], len(s2) == len(t1)
heads:       [CLS] s0 s1 [SEP] t1 [SEP]       [CLS] t0 [SEP] s2 [SEP]       both NotNext
mask:        [CLS] s0 [MASK] [SEP] t1 [SEP]                                  masks.py
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.data.manifest import Document
from pipelines.data.masks import Masks, mask, num_predictions
from pipelines.data.pairs import Pairs, Units, couple, cut_pairs, split_long
from pipelines.data.randomness import Words64, draws, key
from pipelines.data.sentences import split_sentences
from pipelines.data.spans import Ints, Tokens, spans, starts
from pipelines.data.text_config import TextConfig
from pipelines.data.vocabulary import Vocabulary

IGNORED = -100
"""Target of what has no loss; `torch.nn.functional.cross_entropy` skips it."""

PAIRED, ONE_SEGMENT, NO_PARTNER = range(3)
FATES = ("paired", "one segment: no next-sentence label", "no partner: no next-sentence label")


class TextRows:
    """Makes the rows of a work order, and the batches of a slot, from text."""

    fates = FATES

    def __init__(self, config: TextConfig, vocabulary: Vocabulary) -> None:
        self.config = config
        self.vocabulary = vocabulary

    def rows(self, documents: Sequence[Document], *, seed: int, order: int) -> pa.Table:
        """Return the rows of a work order, in the order of its documents.

        Columns: `input_ids` (masked), `a_length` (tokens through the first [SEP]),
        `masked_positions`, `masked_ids`, `nsp_label` (0 IsNext, 1 NotNext), `fate` (index into
        `fates`: only paired rows have a label), and where A and B come from: `a_record`,
        `a_position`, `b_record`, `b_position` (positions in tokens of the document).
        """
        limit = self.config.max_length - 3
        tokens, units, document_start = self._tokenize(documents, limit)
        records = np.array([document.record for document in documents], dtype=np.uint64)
        pairs = cut_pairs(units, document_start, limit, _document_keys(documents, seed, "cut"))
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
        mask_keys = _document_keys(documents, seed, "mask")[pairs.document]
        row_keys = draws(mask_keys, a_position.astype(np.uint64))
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
        tokens, lengths = self.vocabulary.encode_flat(sentences)
        document_of = np.repeat(np.arange(len(documents)), counts)
        document_lengths = np.bincount(document_of, weights=lengths, minlength=len(documents))
        units = split_long(
            Units(starts(lengths), lengths, document_of),
            self.vocabulary.continues[tokens],
            limit // 2,
        )
        return tokens, units, starts(document_lengths.astype(np.int64))


def _document_keys(documents: Sequence[Document], seed: int, op: str) -> Words64:
    """Return the key of each document for an operation: a new one in each visit."""
    visits, which = np.unique(
        np.array([document.visit for document in documents], dtype=np.int64), return_inverse=True
    )
    keys = np.array([key(seed, visit, op) for visit in visits.tolist()], dtype=np.uint64)
    records = np.array([document.record for document in documents], dtype=np.uint64)
    return draws(keys[which], records)


def _join(
    tokens: Tokens, pairs: Pairs, partner: Ints, vocabulary: Vocabulary
) -> tuple[Tokens, Ints]:
    """Return flat rows [CLS] A [SEP] B [SEP], or [CLS] A [SEP] where B is empty, and lengths."""
    a_length, b_length = pairs.a_length, pairs.b_length[partner]
    lengths = 2 + a_length + b_length + (b_length > 0)
    start = starts(lengths)
    flat = np.full(int(lengths.sum()), vocabulary.sep, dtype=vocabulary.dtype)
    flat[start] = vocabulary.cls
    flat[spans(start + 1, a_length)] = tokens[spans(pairs.a_start, a_length)]
    flat[spans(start + 2 + a_length, b_length)] = tokens[spans(pairs.b_start[partner], b_length)]
    return flat, lengths


def _table(flat: Tokens, lengths: Ints, masks: Masks, **columns: NDArray[Any]) -> pa.Table:
    """Return rows as Arrow columns: nested where flat, one value a row otherwise."""
    row = np.repeat(np.arange(len(lengths)), lengths)[masks.places]
    counts = np.bincount(row, minlength=len(lengths))
    positions = masks.places - starts(lengths)[row]
    inputs = flat.copy()
    inputs[masks.places] = masks.inputs
    nested = {
        "input_ids": _nest(inputs, lengths),
        "masked_positions": _nest(positions.astype(np.uint16), counts),
        "masked_ids": _nest(flat[masks.places], counts),
    }
    return pa.table(nested | {name: pa.array(column) for name, column in columns.items()})


def _nest(values: NDArray[Any], lengths: Ints) -> pa.ListArray:
    offsets = np.append(starts(lengths), lengths.sum()).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, values)


def _unnest(column: pa.ChunkedArray) -> tuple[NDArray[Any], Ints]:
    nested = column.combine_chunks()
    lengths = np.diff(nested.offsets.to_numpy()).astype(np.int64)
    return nested.flatten().to_numpy(), lengths
