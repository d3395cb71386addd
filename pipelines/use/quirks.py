"""The quirks of a corpus, and of the rows that a pairing makes of it, on a bounded sample.

The sample is the first work orders of the run: its rows are those of the first steps. Figures of
an epoch are scaled up from it.
"""

from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.data.batches import RowSource
from pipelines.data.manifest import Document
from pipelines.data.plan import Plan, WorkOrder
from pipelines.data.sentences import split_sentences
from pipelines.data.spans import starts
from pipelines.data.text import IGNORED, TextRows
from pipelines.data.vocabulary import Vocabulary
from pipelines.use.baselines import unmasked

SAMPLE_BYTES = 4_000_000
ROWS_PER_BATCH = 1024
UNKNOWN_WORDS = 8


class Sample(NamedTuple):
    """The beginning of a run's data."""

    orders: list[WorkOrder]
    """Work orders; the last may lack blocks."""
    documents: list[Document]
    ratio: float
    """Share of the bytes of an epoch."""


@dataclass(frozen=True, kw_only=True)
class CorpusReport:
    """What the documents of a sample are like."""

    documents: int
    sentences_per_document: float
    """The median."""
    one_sentence_documents: int
    copies: int
    """Documents with the words of an earlier one."""
    tokens: int
    unknown_ratio: float
    """Share of tokens that the vocabulary has no pieces for."""
    unknown_words: dict[str, int]
    """The most frequent of them."""


@dataclass(frozen=True, kw_only=True)
class PairReport:
    """What one pairing makes of a sample."""

    rows: int
    fates: dict[str, int]
    notnext_ratio: float
    """Share of labelled rows that are NotNext, or swapped."""
    forced_ratio: float
    """Share of rows whose label no coin decided."""
    cut_ratio: float
    """Share of IsNext rows whose B does not begin where A ends: truncation took the junction."""
    own_notnext_ratio: float
    """Share of NotNext rows whose B is of the document of A, or of a copy of it."""
    padding_ratio: float
    """Share of the places of a batch."""
    masked_ratio: float
    """Share of the text tokens that are to be predicted."""
    repetition: float
    """How often the rows hold a token of the documents."""
    tokens_per_epoch: int
    steps_per_epoch: float


def take_sample(plan: Plan) -> Sample:
    """Return the first work orders of a plan, up to some megabytes or an epoch."""
    manifest, num_taken, num_bytes = plan.manifest, 0, 0
    orders: list[WorkOrder] = []
    documents: list[Document] = []
    for number in range(plan.orders_per_epoch):
        taken = []
        for visit in plan.order(number).blocks:
            size = manifest.blocks[visit.block].bytes
            num_bytes += size
            if num_taken < SAMPLE_BYTES:
                taken.append(visit)
                documents += manifest.read(visit.block, "training")
                num_taken += size
        if taken:
            orders.append(WorkOrder(number, tuple(taken)))
    return Sample(orders, documents, num_taken / num_bytes)


def describe_corpus(sample: Sample, language: str, vocabulary: Vocabulary) -> CorpusReport:
    """Return what the documents of a sample are like."""
    documents = sample.documents
    split = [split_sentences(language, document.text) for document in documents]
    sentences = [sentence for found in split for sentence in found]
    ids, lengths = vocabulary.encode_flat(sentences)
    unknown = np.flatnonzero(ids == vocabulary.unknown)
    holders = np.unique(np.searchsorted(starts(lengths), unknown, side="right") - 1)
    words: Counter[str] = Counter()
    for holder in holders.tolist():
        encoding = vocabulary.tokenizer.encode(sentences[holder], add_special_tokens=False)
        for piece, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if piece == vocabulary.unknown:
                words[sentences[holder][start:end]] += 1
    return CorpusReport(
        documents=len(documents),
        sentences_per_document=median(len(found) for found in split),
        one_sentence_documents=sum(len(found) == 1 for found in split),
        copies=len({document.record for document in documents})
        - len({document.content for document in documents}),
        tokens=len(ids),
        unknown_ratio=len(unknown) / len(ids),
        unknown_words=dict(words.most_common(UNKNOWN_WORDS)),
    )


def describe_pairs(
    source: RowSource, sample: Sample, num_tokens: int, rows_per_step: int
) -> PairReport:
    """Return what a pairing makes of a sample whose documents have `num_tokens` tokens."""
    maker = source.maker
    assert isinstance(maker, TextRows)
    fates: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    content = {document.record: document.content for document in sample.documents}
    for order in sample.orders:
        rows = source.table(order)
        fates.update(maker.fates[fate] for fate in rows["fate"].to_pylist())
        for start in range(0, rows.num_rows, ROWS_PER_BATCH):
            counts.update(
                _count(maker, rows.slice(start, ROWS_PER_BATCH).combine_chunks(), content)
            )
    rows_in_all = fates.total()

    def ratio(part: int, whole: int) -> float:
        return part / whole if whole else 0.0

    return PairReport(
        rows=rows_in_all,
        fates={fate: fates[fate] for fate in maker.fates},
        notnext_ratio=ratio(counts["notnext"], counts["notnext"] + counts["next"]),
        forced_ratio=ratio(sum(n for fate, n in fates.items() if "forced" in fate), rows_in_all),
        cut_ratio=ratio(counts["cut"], counts["next"]),
        own_notnext_ratio=ratio(counts["own notnext"], counts["notnext"]),
        padding_ratio=ratio(counts["padding"], counts["places"]),
        masked_ratio=ratio(counts["masked"], counts["text"]),
        repetition=ratio(counts["text"], num_tokens),
        tokens_per_epoch=round(counts["text"] / sample.ratio),
        steps_per_epoch=rows_in_all / sample.ratio / rows_per_step,
    )


def _count(maker: TextRows, rows: pa.Table, content: dict[int, int]) -> dict[str, int]:
    """Count what is in some rows."""
    batch = maker.collate(rows)
    attended, labels, ids = batch["attention_mask"], batch["nsp_labels"], unmasked(batch)
    is_text = attended & ~np.isin(ids, [maker.vocabulary.cls, maker.vocabulary.sep])
    place: dict[str, Any] = {
        name: rows[name].to_numpy().astype(np.int64)
        for name in ("a_record", "a_position", "a_length", "b_record", "b_position")
    }
    a_end = place["a_position"] + place["a_length"] - 2
    joined = (place["a_record"] == place["b_record"]) & (place["b_position"] == a_end)
    own = [
        content[a] == content[b]
        for a, b in zip(place["a_record"].tolist(), place["b_record"].tolist(), strict=True)
    ]
    found = {
        "next": labels == 0,
        "notnext": labels == 1,
        "cut": (labels == 0) & ~joined,
        "own notnext": (labels == 1) & np.array(own),
        "places": np.ones_like(attended),
        "padding": ~attended,
        "text": is_text,
        "masked": batch["masked_ids"] != IGNORED,
    }
    return {name: int(places.sum()) for name, places in found.items()}
