"""Vocabularies trained on a corpus: words are counted by Ray Data where the text lies.

    blocks -> a task counts some and deals its words out to parts, by a hash of the word
           -> a part sums its words and keeps the most frequent ones
           -> the driver keeps the most frequent ones of all, and learns pieces from them

A word lies in one part, so its count is whole there, and the result is a function of the text
alone, however that is cut into shards, blocks, tasks and parts.
"""

import zlib
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from pipelines.cluster import unwrap
from pipelines.data.manifest import Manifest
from pipelines.data.vocabulary import CONTROL_TOKENS, Vocabulary, VocabularyConfig, bert_tokenizer
from pipelines.data.word_counts import SCHEMA, count_words, most_frequent
from pipelines.data.wordpiece_training import learn_pieces

BYTES_PER_TASK = 32 << 20
"""Text that a task counts at least: a corpus of one task is counted here, without Ray Data."""
MAX_TASKS = 2048
TASKS_PER_PART = 8


def train_vocabulary(texts: Iterable[str], config: VocabularyConfig) -> Vocabulary:
    """Return the vocabulary of these texts, whatever their order."""
    return _learn(most_frequent(count_words(texts, lowercase=config.lowercase)), config)


def train_on_corpus(manifest: Manifest, config: VocabularyConfig) -> Vocabulary:
    """Return the vocabulary of the documents for training, their words counted in parallel.

    It is the one that `train_vocabulary` returns for them. Needs a Ray to run on.

    Raises:
        DataError: If a shard changed since it was indexed.
    """
    tasks = _tasks(manifest)
    if len(tasks) == 1:
        return train_vocabulary(manifest.texts("training"), config)
    return _learn(_count_in_parallel(manifest, tasks, config.lowercase), config)


def _learn(words: pa.Table, config: VocabularyConfig) -> Vocabulary:
    learned = learn_pieces(
        words,
        size=config.size - len(CONTROL_TOKENS),
        alphabet=config.alphabet,
        min_frequency=config.min_frequency,
    )
    pieces = [*CONTROL_TOKENS, *learned]
    return Vocabulary(bert_tokenizer(pieces, lowercase=config.lowercase).to_str())


def _tasks(manifest: Manifest) -> list[list[int]]:
    """Return the blocks that each task counts."""
    numbers = manifest.blocks_of("training")
    total = sum(manifest.blocks[number].bytes for number in numbers)
    size = max(BYTES_PER_TASK, total // MAX_TASKS)
    tasks: list[list[int]] = [[]]
    filled = 0
    for number in numbers:
        if filled >= size:
            tasks.append([])
            filled = 0
        tasks[-1].append(number)
        filled += manifest.blocks[number].bytes
    return tasks


def _count_in_parallel(manifest: Manifest, tasks: list[list[int]], lowercase: bool) -> pa.Table:
    """Return the most frequent words of the blocks that the tasks count."""
    num_parts = len(tasks) // TASKS_PER_PART + 2
    # With fewer blocks than tasks Ray would cut ours.
    counted = ray.data.range(len(tasks), override_num_blocks=len(tasks)).map_batches(
        partial(_count_task, ray.put((manifest, tasks)), lowercase, num_parts),
        batch_size=None,
        batch_format="pyarrow",
    )
    parts = counted.groupby("part", num_partitions=num_parts).map_groups(
        _sum_part, batch_format="pyarrow"
    )
    best = SCHEMA.empty_table()
    try:
        batches: Any = parts.iter_batches(batch_size=None, batch_format="pyarrow")
        for part in batches:
            best = most_frequent(pa.concat_tables([best, part.cast(SCHEMA)]))
    except Exception as error:
        raise unwrap(error) from error
    return best


def _count_task(
    job: "ray.ObjectRef[tuple[Manifest, list[list[int]]]]",
    lowercase: bool,
    num_parts: int,
    batch: pa.Table,
) -> pa.Table:
    """Return one row a part, with those words of the task that belong to it."""
    manifest, tasks = ray.get(job)
    blocks = [number for task in batch["id"].to_pylist() for number in tasks[task]]
    texts = (found.text for number in blocks for found in manifest.read(number, "training"))
    words = count_words(texts, lowercase=lowercase)
    # Python's own hash differs from process to process.
    hashes = [zlib.crc32(word.encode()) for word in words["word"].to_pylist()]
    part_of = np.array(hashes, dtype=np.int64) % num_parts
    order = np.argsort(part_of, kind="stable")
    offsets = pa.array(np.searchsorted(part_of[order], np.arange(num_parts + 1)), pa.int32())
    dealt = words.take(order).combine_chunks()
    columns = {
        name: pa.ListArray.from_arrays(offsets, dealt[name].combine_chunks())
        for name in SCHEMA.names
    }
    return pa.table({"part": np.arange(num_parts)} | columns)


def _sum_part(part: pa.Table) -> pa.Table:
    """Return the most frequent words of a part, each with its count in all tasks."""
    words = pa.table([part[name].combine_chunks().flatten() for name in SCHEMA.names], SCHEMA.names)
    summed = words.group_by("word").aggregate([("count", "sum")])
    return most_frequent(summed.select(["word", "count_sum"]).rename_columns(SCHEMA.names))
