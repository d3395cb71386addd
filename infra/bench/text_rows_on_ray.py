"""What Ray Data costs over the same functions in one process, and the memory that it takes.

    python -m infra.bench.text_rows_on_ray samples/state-of-the-union

A pass makes the travelling blocks of one epoch with the run's own dataset, and one iterator takes
them. CPU seconds are those of the processes, as /proc tells, once the workers have started; the
pure functions and HF `tokenizers` alone are measured in turn with the passes. Memory is that of
one pass over the corpus and of one over ten copies of it, before anything else is measured.
"""

import argparse
import shutil
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from infra.bench.measure import Watch, cpu_seconds, in_turn, keep, rates, ratio
from infra.bench.text_rows import Corpus, open_corpus
from pipelines.cluster import SPARE_CPUS, cluster
from pipelines.data.batches import ray_blocks
from pipelines.data.plan import Cursor
from pipelines.data.shards import find_shards

COPIES = 10


def main() -> None:
    """Measure, print the result and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cpus", type=int, default=2)
    given = parser.parse_args()
    corpus = open_corpus(given.data)
    with TemporaryDirectory() as folder, cluster("", given.cpus - SPARE_CPUS, verbose=False):
        for path in [Path(file.name) for file in find_shards(given.data)]:
            for copy in range(COPIES):
                shutil.copy(path, Path(folder) / f"{copy}-{path.name}")
        larger = open_corpus([folder], corpus.vocabulary)
        warm_up(corpus)
        memory = {"corpus": measure_memory(corpus), f"{COPIES} copies": measure_memory(larger)}
        result = measure(corpus, given.repeats)
    keep("text_rows_on_ray", result | {"cpus": given.cpus, "memory_megabytes": memory})


def make_rows_on_ray(corpus: Corpus) -> int:
    """Make the rows of one epoch with Ray Data; return how many."""
    tasks = [range(n, n + 1) for n in range(corpus.plan.orders_per_epoch)]
    blocks = ray_blocks(corpus.source, corpus.order, Cursor(), tasks)
    return sum(block.num_rows for block in blocks)


def warm_up(corpus: Corpus) -> None:
    """Start the workers, and check that Ray makes the rows that the pure functions make."""
    made, expected = make_rows_on_ray(corpus), corpus.make_rows()
    if made != expected:
        raise RuntimeError(f"Ray made {made} rows of {expected}")


def measure_memory(corpus: Corpus) -> dict[str, Any]:
    """Return the memory of the driver and of its workers, as sampled in one pass."""
    with Watch() as watch:
        make_rows_on_ray(corpus)
    (driver,) = watch.peak_megabytes("driver")
    return {
        "text": round(corpus.megabytes, 1),
        "driver": driver,
        "workers": watch.peak_megabytes("workers"),
    }


def measure(corpus: Corpus, repeats: int) -> dict[str, Any]:
    """Return the speed of Ray's workers, and of all of Ray, beside that of the pure functions."""
    texts, megabytes = corpus.texts, corpus.megabytes
    tokenizer = corpus.vocabulary.tokenizer
    watches: list[Watch] = []

    def on_ray() -> float:
        with Watch() as watch:
            make_rows_on_ray(corpus)
        watches.append(watch)
        return watch.cpu_seconds("workers")

    seconds = in_turn(
        repeats,
        {
            "workers": on_ray,
            "pure": partial(cpu_seconds, corpus.make_rows),
            "tokenizers": lambda: cpu_seconds(lambda: [*tokenizer.encode_batch_fast(texts)]),
        },
    )
    everything = [watch.cpu_seconds("workers", "driver", "ray") for watch in watches]
    return {
        "what": "raw text to travelling blocks of masked pairs through Ray Data, CPU seconds",
        "repeats": repeats,
        "text_megabytes": round(megabytes, 2),
        "vocabulary": corpus.vocabulary.size,
        "row_tokens": corpus.text.max_length,
        "workers_mb_per_second": rates(megabytes, seconds["workers"]),
        "all_processes_mb_per_second": rates(megabytes, everything),
        "pure_mb_per_second": rates(megabytes, seconds["pure"]),
        "tokenizers_alone_mb_per_second": rates(megabytes, seconds["tokenizers"]),
        "workers_to_pure_cpu_ratio": ratio(seconds["workers"], seconds["pure"]),
        "all_processes_to_pure_cpu_ratio": ratio(everything, seconds["pure"]),
        "pure_to_tokenizers_speed_ratio": ratio(seconds["tokenizers"], seconds["pure"]),
        "workers_to_tokenizers_speed_ratio": ratio(seconds["tokenizers"], seconds["workers"]),
    }


if __name__ == "__main__":
    main()
