"""Held-out figures against hand computations, and the classifier that only sees lengths."""

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray

from pipelines.data.indexing import build
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.data.text import PAIRED
from pipelines.data.vocabulary import Vocabulary
from pipelines.errors import DataError
from pipelines.recipes import recipe
from pipelines.run import Run
from pipelines.use.evaluate import (
    PASSES,
    Evaluation,
    _bootstrap,
    _length_bins,
    _length_classifier,
    evaluate,
)
from ssl_models import build_objective
from tests.corpus import serial_map, write_corpus


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep small matrices on one thread: several of them only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def open_without_ray(folder: Path, vocabulary: Vocabulary, source: SourceConfig) -> Run:
    manifest = build(find_shards([str(folder / "corpus")]), source, serial_map)
    config = replace(recipe("text-tiny"), name="run", source=source)
    encoder = replace(config.objective.encoder, vocab_size=vocabulary.size)
    config = replace(config, objective=replace(config.objective, encoder=encoder))
    return Run(folder / "run", "key", config, manifest, vocabulary)


def evaluate_untrained(run: Run) -> Evaluation:
    torch.manual_seed(0)
    return evaluate(build_objective(run.config.objective), run)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary) -> Run:
    folder = tmp_path_factory.mktemp("evaluate")
    write_corpus(folder / "corpus", num_documents=60, num_sentences=30)
    return open_without_ray(folder, vocabulary, SourceConfig())


@pytest.fixture(scope="module")
def evaluation(run: Run) -> Evaluation:
    return evaluate_untrained(run)


def heldout_rows(run: Run) -> list[dict[str, Any]]:
    documents = [
        document
        for block in run.manifest.blocks_of("heldout")
        for document in run.manifest.read(block, "heldout")
    ]
    made = [
        run.source.maker.rows([d._replace(visit=i) for d in documents], seed=-1, order=i)
        for i in range(PASSES)
    ]
    rows: list[dict[str, Any]] = pa.concat_tables(made).to_pylist()
    return rows


def test_the_unigram_loss_is_that_of_counted_words(run: Run, evaluation: Evaluation) -> None:
    heldout = set(run.manifest.texts("heldout"))
    counts: Counter[int] = Counter()
    num_training = 0
    for path in sorted(Path(run.manifest.root).glob("*.jsonl")):
        for line in path.read_text().splitlines():
            text = json.loads(line)["text"]
            if text not in heldout:
                num_training += 1
                counts.update(run.vocabulary.tokenizer.encode(text, add_special_tokens=False).ids)
    total = counts.total() + run.vocabulary.size
    targets = [target for row in heldout_rows(run) for target in row["masked_ids"]]
    surprises = [-math.log((counts[target] + 1) / total) for target in targets]

    assert num_training + len(heldout) == 60
    assert evaluation.documents == len(heldout) > 5
    assert evaluation.unigram_loss == pytest.approx(sum(surprises) / len(surprises), rel=1e-9)


def test_an_untrained_encoder_knows_nothing(run: Run, evaluation: Evaluation) -> None:
    uniform = math.log(run.vocabulary.size)
    assert evaluation.mlm_loss == pytest.approx(uniform, rel=0.02)
    assert evaluation.entropy == pytest.approx(uniform, rel=0.02)
    assert evaluation.mlm_accuracy < 0.05
    assert evaluation.unigram_loss < uniform
    assert evaluation.nsp_accuracy_low < evaluation.nsp_accuracy < evaluation.nsp_accuracy_high
    assert abs(evaluation.nsp_accuracy - 0.5) < 0.1


def test_accuracies_count_labelled_pairs_alone(run: Run, evaluation: Evaluation) -> None:
    rows = heldout_rows(run)
    paired = [row for row in rows if row["fate"] == PAIRED]
    assert evaluation.nsp_pairs == len(paired) < len(rows)

    batch = {
        name: torch.from_numpy(array)
        for name, array in run.source.maker.collate(pa.Table.from_pylist(paired)).items()
    }
    torch.manual_seed(0)
    objective = build_objective(run.config.objective).eval()
    with torch.no_grad():
        right = objective(batch).metrics["nsp_accuracy"][0]
    assert evaluation.nsp_accuracy == pytest.approx(float(right) / len(paired))


def test_figures_are_the_same_every_time(run: Run, evaluation: Evaluation) -> None:
    assert evaluate_untrained(run) == evaluation


def test_an_encoder_above_chance_is_not_said_to_be_below(evaluation: Evaluation) -> None:
    good = replace(
        evaluation,
        nsp_accuracy=0.8,
        nsp_accuracy_low=0.7,
        nsp_accuracy_high=0.9,
        nsp_length_accuracy=0.6,
    )
    assert "not above chance" not in good.lines()[-1]
    assert "not above chance" in replace(good, nsp_length_accuracy=0.75).lines()[-1]
    assert "not above chance" in replace(good, nsp_accuracy_low=0.49).lines()[-1]


def test_metrics_carry_the_name_of_their_data(evaluation: Evaluation) -> None:
    metrics = evaluation.metrics()
    assert metrics["heldout/mlm_loss"] == evaluation.mlm_loss
    assert all(name.startswith("heldout/") for name in metrics)
    assert all(math.isfinite(value) for value in metrics.values())


def test_without_held_out_documents_there_are_no_figures(run: Run, vocabulary: Vocabulary) -> None:
    folder = run.dir.parent
    everything = open_without_ray(folder, vocabulary, SourceConfig(heldout_ratio=0.0))
    with pytest.raises(DataError, match="no document is held out"):
        evaluate_untrained(everything)


def test_held_out_documents_without_a_pair_still_have_figures(
    tmp_path: Path, vocabulary: Vocabulary
) -> None:
    """One held-out document cannot exchange segments, but its masked tokens count."""
    write_corpus(tmp_path / "corpus", num_documents=8, num_shards=2, num_sentences=9)
    ratios = (ratio / 50 for ratio in range(1, 50))
    runs = (open_without_ray(tmp_path, vocabulary, SourceConfig(heldout_ratio=r)) for r in ratios)
    alone = next(run for run in runs if run.manifest.records_where("heldout") == 1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluation = evaluate_untrained(alone)

    assert (evaluation.documents, evaluation.nsp_pairs) == (1, 0)
    assert evaluation.mlm_loss == pytest.approx(math.log(vocabulary.size), rel=0.05)
    json.dumps(evaluation.metrics(), allow_nan=False)
    assert "heldout/nsp_accuracy" not in evaluation.metrics()
    assert "nan" not in "".join(evaluation.lines())


def test_the_interval_covers_the_true_accuracy() -> None:
    """Documents differ in how easy they are, so the pairs of one document are not independent."""
    dice = np.random.default_rng(1)
    documents = np.repeat(np.arange(60), 8)
    covered = 0
    for _ in range(150):
        ease = dice.beta(7, 3, size=60)
        low, high = _bootstrap(dice.random(len(documents)) < ease[documents], documents)
        covered += low <= 0.7 <= high
    assert 0.88 <= covered / 150 <= 0.995


def test_the_interval_is_as_wide_as_the_documents_make_it() -> None:
    dice = np.random.default_rng(2)
    correct = dice.random(40) < 0.5
    pairs = np.repeat(np.arange(40), 25)

    once = _bootstrap(correct, np.arange(40))
    repeated = _bootstrap(correct[pairs], 7 + 3 * pairs)

    assert repeated == pytest.approx(once)
    assert once[1] - once[0] == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(40), rel=0.2)


def rows_of(lengths: NDArray[np.int64], labels: NDArray[np.int64]) -> pa.Table:
    return pa.table(
        {
            "a_length": lengths[:, 0].astype(np.uint16),
            "input_ids": [np.zeros(total, np.uint16) for total in lengths.sum(axis=1)],
            "nsp_label": labels.astype(np.int8),
        }
    )


@pytest.mark.parametrize("leaks", [True, False])
def test_the_length_classifier_finds_a_leak_and_nothing_else(leaks: bool) -> None:
    dice = np.random.default_rng(3)
    lengths = dice.integers(4, 28, size=(6000, 2))
    labels = dice.integers(0, 2, size=6000)
    if leaks:  # NotNext segments are longer, as where B comes from a longer document
        lengths[:, 1] += 4 * labels
    classifier = _length_classifier(rows_of(lengths[:4000], labels[:4000]))

    told = classifier[_length_bins(rows_of(lengths[4000:], labels[4000:]))]
    accuracy = (told == labels[4000:]).mean()

    if leaks:
        assert accuracy > 0.55
    else:
        assert 0.45 < accuracy < 0.53


def test_the_lengths_of_honest_pairs_tell_nothing(tmp_path: Path, vocabulary: Vocabulary) -> None:
    write_corpus(tmp_path / "corpus", num_documents=150, num_sentences=60)
    source = SourceConfig(heldout_ratio=0.3)
    evaluation = evaluate_untrained(open_without_ray(tmp_path, vocabulary, source))

    error = math.sqrt(0.25 / evaluation.nsp_pairs)
    assert evaluation.nsp_pairs > 2000
    assert abs(evaluation.nsp_length_accuracy - 0.5) < 5 * error
