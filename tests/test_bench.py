"""The benchmarks measure what they say, on a corpus that takes seconds."""

import os
from pathlib import Path

import pytest

from infra.bench import text_rows, text_rows_on_ray
from infra.bench.measure import Watch, processes, ratio, spread
from infra.bench.text_rows import Corpus, open_corpus
from pipelines.data.vocabulary import Vocabulary


@pytest.fixture
def corpus(corpus_dir: Path, vocabulary: Vocabulary) -> Corpus:
    return open_corpus([str(corpus_dir)], vocabulary)


def test_pure_functions_are_measured(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rows, "ROW_LENGTHS", (64,))
    result = text_rows.measure(corpus, repeats=1)
    assert result["text_megabytes"] == pytest.approx(0.4, abs=0.1)
    assert set(result["masks_million_tokens_per_second"]["rows of 64"]) == {*text_rows.MASKINGS}
    assert result["rows_mb_per_second"]["median"] > 0
    flat, lengths = text_rows.unmasked_rows(corpus, 64)
    assert corpus.vocabulary.mask not in flat
    assert len(lengths) == corpus.make_rows()


def test_a_watch_sees_this_process_alone_where_it_has_started_none() -> None:
    with Watch() as watch:
        while watch.cpu_seconds("driver") < 0.1:
            sum(range(100_000))
            watch.look()
    found = processes()[os.getpid()]
    assert found.role == "driver"
    assert len(watch.peak_megabytes("driver")) == 1
    assert 0 < watch.cpu_seconds("driver", "workers") <= found.cpu_seconds


def test_spreads_and_ratios_are_of_pairs() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert ratio([1.0, 9.0], [2.0, 3.0]) == {"median": 1.75, "min": 0.5, "max": 3.0}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_ray_makes_the_rows_of_the_pure_functions_and_its_workers_are_measured(
    corpus: Corpus,
) -> None:
    text_rows_on_ray.warm_up(corpus)
    memory = text_rows_on_ray.measure_memory(corpus)
    assert memory["driver"] > 50
    assert max(memory["workers"]) > 50
    result = text_rows_on_ray.measure(corpus, repeats=1)
    speeds = [result[f"{name}_mb_per_second"]["median"] for name in ("workers", "all_processes")]
    assert speeds[0] > speeds[1] > 0
