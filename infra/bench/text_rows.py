"""How fast one core makes raw text into masked pairs, against HF `tokenizers` alone.

    python -m infra.bench.text_rows samples/wikipedia

Both run in this process on the same documents, in turn, several times; medians count. The ratio
is what carries over to other machines.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from pipelines.data.manifest import Document, build
from pipelines.data.masks import mask
from pipelines.data.randomness import draws
from pipelines.data.sentences import split_sentences
from pipelines.data.shards import find_shards
from pipelines.data.text import TextRows
from pipelines.data.vocabulary_training import train_vocabulary
from pipelines.recipes import text_mini

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure, print the result and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    config = text_mini()
    source = replace(config.source, heldout_ratio=0.0)
    manifest = build(find_shards(given.data), source, lambda index, paths: [*map(index, paths)])
    texts = list(manifest.texts("training"))
    vocabulary = train_vocabulary(texts, config.vocabulary)
    documents = [Document(i, i, text) for i, text in enumerate(texts)]
    maker = TextRows(config.text, vocabulary)
    sentences = [part for text in texts for part in split_sentences("en", text)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    rows = maker.rows(documents, seed=0, epoch=0, order=0)
    nested = rows["input_ids"].combine_chunks()
    flat, lengths = nested.flatten().to_numpy(), np.diff(nested.offsets.to_numpy()).astype(np.int64)
    row_keys = draws(0, np.arange(len(lengths), dtype=np.uint64))

    seconds = _measure(
        given.repeats,
        {
            "rows": lambda: maker.rows(documents, seed=0, epoch=0, order=0),
            "tokens_alone": lambda: vocabulary.encode_flat(sentences),
            "tokenizers_alone": lambda: [*vocabulary.tokenizer.encode_batch_fast(texts)],
            "sentences_alone": lambda: [split_sentences("en", text) for text in texts],
            "masks_alone": lambda: mask(flat, lengths, row_keys, vocabulary, config.text),
        },
    )
    result = {
        "what": "raw text to masked pairs, one core, one process",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"tokenizers": tokenizers.__version__, "numpy": np.__version__},
        "repeats": given.repeats,
        "text_megabytes": round(megabytes, 2),
        "rows_mb_per_second": _rates(megabytes, seconds["rows"]),
        "tokens_alone_mb_per_second": _rates(megabytes, seconds["tokens_alone"]),
        "tokenizers_alone_mb_per_second": _rates(megabytes, seconds["tokenizers_alone"]),
        "sentences_alone_mb_per_second": _rates(megabytes, seconds["sentences_alone"]),
        "masks_million_tokens_per_second": _rates(len(flat) / 1e6, seconds["masks_alone"]),
        "rows_to_tokenizers_ratio": _ratio(seconds["tokenizers_alone"], seconds["rows"]),
        "tokens_to_tokenizers_ratio": _ratio(seconds["tokenizers_alone"], seconds["tokens_alone"]),
    }
    text = json.dumps(result, indent=1)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"text_rows_{result['date']}.json").write_text(text + "\n")
    print(text)


def _measure(repeats: int, what: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Return the CPU seconds of each function, all of them in turn in every repeat."""
    seconds: dict[str, list[float]] = {name: [] for name in what}
    for _ in range(repeats):
        for name, function in what.items():
            start = time.process_time()
            function()
            seconds[name].append(time.process_time() - start)
    return seconds


def _ratio(slow: list[float], fast: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 3)


def _rates(amount: float, seconds: list[float]) -> dict[str, float]:
    rates = [amount / value for value in seconds]
    return {
        "median": round(statistics.median(rates), 3),
        "min": round(min(rates), 3),
        "max": round(max(rates), 3),
    }


if __name__ == "__main__":
    main()
