"""How fast one core makes raw text into masked pairs, against HF `tokenizers` alone.

    python -m infra.bench.text_rows samples/state-of-the-union

All of it runs in this process on the same documents, in turn, several times, on one thread; what
counts are its CPU seconds and their medians. The ratio is what carries over to other machines.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from infra.bench.measure import cpu_seconds, in_turn, keep, rates, ratio
from pipelines.data.batches import RowSource
from pipelines.data.indexing import build
from pipelines.data.masks import mask
from pipelines.data.plan import OrderConfig, Plan
from pipelines.data.randomness import draws
from pipelines.data.sentences import split_sentences
from pipelines.data.shards import find_shards
from pipelines.data.text import TextRows
from pipelines.data.text_config import TextConfig
from pipelines.data.vocabulary import Vocabulary
from pipelines.data.vocabulary_training import train_vocabulary
from pipelines.recipes import text_mini

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

MASKINGS: tuple[Literal["words", "pieces", "spans"], ...] = ("words", "pieces", "spans")
ROW_LENGTHS = (64, 128, 512)


class Corpus(NamedTuple):
    """Raw shards as a run of the recipe text-mini reads them, all of them for training."""

    plan: Plan
    text: TextConfig
    order: OrderConfig
    vocabulary: Vocabulary

    @property
    def source(self) -> RowSource:
        """What makes its rows: read, check the hash, split, tokenize, pair, mask, shuffle."""
        return RowSource(self.plan, TextRows(self.text, self.vocabulary))

    @property
    def texts(self) -> list[str]:
        """Its documents."""
        return list(self.plan.manifest.texts("training"))

    @property
    def megabytes(self) -> float:
        """The UTF-8 bytes of its documents, without the JSON around them."""
        return sum(len(text.encode()) for text in self.plan.manifest.texts("training")) / 1e6

    def make_rows(self) -> int:
        """Make the rows of one epoch in this process; return how many."""
        orders = range(self.plan.orders_per_epoch)
        return sum(self.source.table(self.plan.order(n)).num_rows for n in orders)


def main() -> None:
    """Measure, print the result and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    keep("text_rows", measure(open_corpus(given.data), given.repeats))


def open_corpus(data: Sequence[str], vocabulary: Vocabulary | None = None) -> Corpus:
    """Return the corpus of some shards, with a vocabulary trained on it if none is given."""
    config = text_mini()
    source = replace(config.source, heldout_ratio=0.0)
    manifest = build(find_shards(data), source, lambda index, paths: [*map(index, paths)])
    plan = Plan(manifest, config.seed, config.order.blocks_per_order)
    if vocabulary is None:
        vocabulary = train_vocabulary(manifest.texts("training"), config.vocabulary)
    return Corpus(plan, config.text, config.order, vocabulary)


def measure(corpus: Corpus, repeats: int) -> dict[str, Any]:
    """Return the speed of the pure functions."""
    texts, megabytes = corpus.texts, corpus.megabytes
    tokenizer = corpus.vocabulary.tokenizer
    sentences = [part for text in texts for part in split_sentences("en", text)]
    seconds = in_turn(
        repeats,
        {
            "rows": lambda: cpu_seconds(corpus.make_rows),
            "tokens": lambda: cpu_seconds(lambda: corpus.vocabulary.encode_flat(sentences)),
            "tokenizers": lambda: cpu_seconds(lambda: [*tokenizer.encode_batch_fast(texts)]),
            "sentences": lambda: cpu_seconds(lambda: [split_sentences("en", t) for t in texts]),
        },
    )
    return {
        "what": "raw text to masked pairs, CPU seconds of one process on one thread",
        "repeats": repeats,
        "text_megabytes": round(megabytes, 2),
        "vocabulary": corpus.vocabulary.size,
        "row_tokens": corpus.text.max_length,
        "rows_mb_per_second": rates(megabytes, seconds["rows"]),
        "tokens_alone_mb_per_second": rates(megabytes, seconds["tokens"]),
        "tokenizers_alone_mb_per_second": rates(megabytes, seconds["tokenizers"]),
        "sentences_alone_mb_per_second": rates(megabytes, seconds["sentences"]),
        "rows_to_tokenizers_ratio": ratio(seconds["tokenizers"], seconds["rows"]),
        "tokens_to_tokenizers_ratio": ratio(seconds["tokenizers"], seconds["tokens"]),
        "masks_million_tokens_per_second": {
            f"rows of {length}": measure_masks(corpus, length, repeats) for length in ROW_LENGTHS
        },
    }


def measure_masks(corpus: Corpus, length: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return the speed of each masking alone, on the rows of one epoch."""
    flat, lengths = unmasked_rows(corpus, length)
    keys = draws(0, np.arange(len(lengths), dtype=np.uint64))

    calls: dict[str, Callable[[], float]] = {}
    for masking in MASKINGS:
        config = replace(corpus.text, masking=masking)
        masked = partial(mask, flat, lengths, keys, corpus.vocabulary, config)
        calls[masking] = partial(cpu_seconds, masked)
    seconds = in_turn(repeats, calls)
    return {masking: rates(len(flat) / 1e6, found) for masking, found in seconds.items()}


def unmasked_rows(corpus: Corpus, length: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the flat tokens, and the length, of the rows of one epoch."""
    shown = replace(corpus.text, max_length=length, mask_token_ratio=0.0, random_token_ratio=0.0)
    source = corpus._replace(text=shown).source
    orders = range(corpus.plan.orders_per_epoch)
    columns = [source.table(corpus.plan.order(n))["input_ids"].combine_chunks() for n in orders]
    flat = np.concatenate([column.flatten().to_numpy() for column in columns])
    lengths = np.concatenate([np.diff(column.offsets.to_numpy()) for column in columns])
    return flat, lengths.astype(np.int64)


if __name__ == "__main__":
    main()
