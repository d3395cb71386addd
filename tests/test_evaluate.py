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

from pipelines.cli import main
from pipelines.config import to_record
from pipelines.data.indexing import build
from pipelines.data.manifest import Manifest
from pipelines.data.plan import Cursor
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.data.text import IGNORED, PAIRED, TextRows
from pipelines.data.vocabulary import Vocabulary
from pipelines.errors import DataError, UserError
from pipelines.recipes import recipe
from pipelines.run import Run, locked, open_run
from pipelines.training.checkpoint import START_DIGEST, Commit
from pipelines.use import evaluate as evaluation_module
from pipelines.use.baselines import Counts, length_accuracy, unigram_loss
from pipelines.use.bundle import write_bundle
from pipelines.use.evaluate import (
    MAX_DOCUMENTS,
    PASSES,
    Evaluation,
    _orders,
    evaluate,
    evaluate_encoder,
)
from pipelines.use.heldout import Held
from pipelines.use.registry import load_encoder
from ssl_models import build_objective
from tests.corpus import serial_map, write_corpus
from tests.labelled import write_text_encoder

COMMIT = Commit(
    step=1,
    attempt=1,
    parent="",
    cursor=Cursor(),
    digests=(START_DIGEST,),
    fates={},
    workers=1,
    manifest_sha256="",
)


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
    encoder = replace(config.masked_language.encoder, vocab_size=vocabulary.size)
    config = replace(config, objective=replace(config.masked_language, encoder=encoder))
    return Run(folder / "run", "key", config, manifest, vocabulary)


def maker_of(run: Run) -> TextRows:
    maker = run.source.maker
    assert isinstance(maker, TextRows)
    return maker


def manifest_of(folder: Path) -> Manifest:
    return build(find_shards([str(folder)]), SourceConfig(heldout_ratio=0.0), serial_map)


def evaluate_untrained(run: Run) -> Evaluation:
    torch.manual_seed(0)
    return evaluate(build_objective(run.config.objective), run)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary) -> Run:
    folder = tmp_path_factory.mktemp("evaluate")
    write_corpus(folder / "corpus", num_documents=60, num_sentences=30)
    return open_without_ray(folder, vocabulary, SourceConfig())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """Return the bundle of an untrained encoder."""
    torch.manual_seed(0)
    record = to_record(run.config)
    folder = tmp_path_factory.mktemp("encoder") / "bundle"
    write_bundle(
        folder,
        config={name: record[name] for name in ("objective", "text")},
        state=build_objective(run.config.objective).state_dict(),
        tokenizer_json=run.vocabulary.json,
        lineage={},
        card="",
    )
    return folder


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
        for name, array in run.text_rows.collate(pa.Table.from_pylist(paired)).items()
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


def test_one_document_has_figures_for_masked_tokens_and_the_reason(
    encoder: Path, tmp_path: Path, vocabulary: Vocabulary
) -> None:
    write_corpus(tmp_path / "corpus", num_documents=1, num_shards=1, num_sentences=40)
    evaluation = evaluate_encoder(load_encoder(str(encoder)), manifest_of(tmp_path / "corpus"))
    assert evaluation.mlm_loss == pytest.approx(math.log(vocabulary.size), rel=0.05)
    assert evaluation.lines()[-1] == (
        "  next sentence: no figures, no pair has a label (one document, or short ones), "
        "or none was learned from"
    )


def test_what_was_not_learned_of_pairs_has_no_figures(
    tmp_path: Path, vocabulary: Vocabulary
) -> None:
    write_corpus(tmp_path / "corpus", num_documents=8, num_shards=1)
    encoder = load_encoder(str(write_text_encoder(tmp_path / "e", vocabulary)))
    encoder.objective.coefficients["nsp"] = 0.0
    evaluation = evaluate_encoder(encoder, manifest_of(tmp_path / "corpus"))
    assert evaluation.nsp_pairs == 0
    assert evaluation.lines()[-1].endswith("or none was learned from")


def test_the_unigram_loss_of_hand_made_counts() -> None:
    """One token seen three times, one never: probabilities (3 + 1) / 5 and 1 / 5."""
    found = unigram_loss(np.array([3, 0]), np.array([2, 1]))
    assert found == pytest.approx(-(2 * math.log(0.8) + math.log(0.2)) / 3)


def count(run: Run, lengths: NDArray[np.int64], labels: NDArray[np.int64]) -> Counts:
    """Count rows of A and B of these lengths."""
    width = np.arange(run.config.text.max_length)
    attended = width < lengths.sum(axis=1)[:, None]
    counts = Counts(maker_of(run))
    counts.add(
        {
            "input_ids": np.where(attended, 7, 0),
            "attention_mask": attended,
            "token_type_ids": (attended & (width >= lengths[:, :1])).astype(np.int64),
            "masked_positions": np.zeros((len(labels), 1), dtype=np.int64),
            "masked_ids": np.full((len(labels), 1), IGNORED),
            "nsp_labels": labels,
        }
    )
    return counts


@pytest.mark.parametrize("leaks", [True, False])
def test_the_length_classifier_finds_a_leak_and_nothing_else(run: Run, leaks: bool) -> None:
    dice = np.random.default_rng(3)
    lengths = dice.integers(4, 14, size=(6000, 2))
    labels = dice.integers(0, 2, size=6000)
    if leaks:  # NotNext segments are longer, as where B comes from a longer document
        lengths[:, 1] += 4 * labels
    halves = [count(run, lengths[half::2], labels[half::2]) for half in (0, 1)]

    accuracy = length_accuracy(halves[::-1], halves)

    if leaks:
        assert accuracy > 0.6
    else:
        assert 0.46 < accuracy < 0.54


def test_a_classifier_told_by_other_documents_is_no_oracle(run: Run) -> None:
    dice = np.random.default_rng(4)
    told_by_itself, told_by_the_other = [], []
    for _ in range(20):
        lengths, labels = dice.integers(4, 16, size=(40, 2)), dice.integers(0, 2, size=40)
        halves = [count(run, lengths[half::2], labels[half::2]) for half in (0, 1)]
        told_by_itself.append(length_accuracy(halves, halves))
        told_by_the_other.append(length_accuracy(halves[::-1], halves))

    assert np.mean(told_by_itself) > 0.7
    assert 0.4 < np.mean(told_by_the_other) < 0.6
    assert math.isnan(length_accuracy([Counts(maker_of(run))], [Counts(maker_of(run))]))


def test_without_a_run_the_baselines_come_from_the_documents_themselves(
    run: Run, evaluation: Evaluation, encoder: Path
) -> None:
    found = evaluate_encoder(load_encoder(str(encoder)), manifest_of(run.dir.parent / "corpus"))
    assert (found.documents, found.all_documents, found.own_baselines) == (60, 60, True)
    assert found.mlm_loss == pytest.approx(math.log(run.vocabulary.size), rel=0.02)
    assert found.unigram_loss < evaluation.unigram_loss
    assert (
        "word frequencies alone in these same documents, a stronger baseline," in found.lines()[1]
    )
    assert abs(found.nsp_length_accuracy - 0.5) < 5 * math.sqrt(0.25 / found.nsp_pairs)


def test_heads_that_were_not_trained_have_no_figures(encoder: Path, corpus_dir: Path) -> None:
    loaded = load_encoder(str(encoder))
    manifest = build(find_shards([str(corpus_dir)]), SourceConfig(heldout_ratio=0.0), serial_map)
    measured = evaluate_encoder(replace(loaded, fresh=("encoder.pooler.dense.weight",)), manifest)
    assert measured.nsp_pairs == 0
    assert not math.isnan(measured.mlm_loss)
    assert measured.lines()[-1].endswith("or none was learned from")
    with pytest.raises(UserError, match=r"without a head for masked tokens: .* --labels"):
        evaluate_encoder(replace(loaded, fresh=("mlm_head.bias",)), manifest)


def test_documents_of_two_folds_are_dealt_out_and_never_paired(run: Run) -> None:
    manifest = manifest_of(run.dir.parent / "corpus")
    orders = list(_orders(Held(manifest, "training", MAX_DOCUMENTS), 2))
    assert [fold for fold, _ in orders] == [0, 1]
    records = [[document.record for document in documents] for _, documents in orders]
    assert records == [list(range(0, 60, 2)), list(range(1, 60, 2))]


def test_orders_bound_what_is_in_memory_and_lose_nothing(
    run: Run, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = list(run.manifest.texts("heldout"))
    monkeypatch.setattr(evaluation_module, "ORDER_CHARS", 2 * max(map(len, texts)))
    orders = list(_orders(Held(run.manifest, "heldout", MAX_DOCUMENTS), 1))
    assert len(orders) > 2
    assert [d.text for _, documents in orders for d in documents] == texts

    bounded = evaluate_untrained(run)
    assert bounded.documents == evaluation.documents
    assert bounded.mlm_loss == pytest.approx(evaluation.mlm_loss, rel=0.01)
    assert bounded.nsp_pairs > evaluation.nsp_pairs / 2


def test_of_too_many_documents_some_blocks_are_evaluated_and_said_to_be(
    run: Run, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_module, "MAX_DOCUMENTS", 1 + evaluation.documents // 2)
    sampled = evaluate_untrained(run)
    assert 0 < sampled.documents < evaluation.documents == sampled.all_documents
    assert sampled.lines()[0] == (
        f"on {sampled.documents} of {evaluation.documents} held-out documents:"
    )


@pytest.mark.usefixtures("ray_session")
def test_documents_that_were_trained_on_are_left_out(
    run: Run, evaluation: Evaluation, tmp_path: Path
) -> None:
    """Known documents in other dress: another case, other white space, another shard."""
    known = list(run.manifest.texts("training"))[:5]
    new = list(run.manifest.texts("heldout"))
    texts = [text.upper().replace(" ", "  ") for text in known] + new
    (tmp_path / "mixed.jsonl").write_text("".join(f"{json.dumps({'text': t})}\n" for t in texts))
    torch.manual_seed(0)
    objective = build_objective(run.config.objective)

    found = evaluate(objective, run, manifest_of(tmp_path))

    assert (found.documents, found.also_trained, found.all_documents) == (
        len(new),
        5,
        len(texts),
    )
    assert found.lines()[:2] == [
        f"5 of {len(texts)} documents were also trained on: left out",
        f"on {len(new)} held-out documents:",
    ]
    assert found.unigram_loss == pytest.approx(evaluation.unigram_loss, rel=0.02)

    (tmp_path / "mixed.jsonl").write_text(json.dumps({"text": known[0]}))
    with pytest.raises(DataError, match="every document was also trained on"):
        evaluate(objective, run, manifest_of(tmp_path))


@pytest.mark.usefixtures("ray_session")
def test_the_command_measures_runs_and_models(
    encoder: Path,
    corpus_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = encoder / "tokenizer.json"
    config = replace(
        recipe("text-tiny"), data=(str(corpus_dir),), name="whales", vocabulary_file=str(tokenizer)
    )
    with locked(config) as run_dir:
        run = open_run(config, run_dir)
    weights = build_objective(run.config.objective).state_dict()
    run.log.save(COMMIT, weights, {})
    write_corpus(tmp_path / "new", num_documents=12, seed=5)
    told: list[tuple[list[str], dict[str, float]]] = []
    for name, *flags in [
        ("whales",),
        ("whales", "--data", "new", str(corpus_dir)),
        (str(encoder), "--data", "new"),
        ("runs/whales/",),
    ]:
        assert main(["evaluate", name, *flags, "--json"]) == 0
        *said, last = capsys.readouterr().out.splitlines()
        told.append((said, json.loads(last)))

    own, other, model, by_folder = (metrics for _, metrics in told)
    assert by_folder == own
    num_heldout = run.manifest.records_where("heldout")
    assert own["heldout/documents"] == num_heldout
    assert other["heldout/documents"] == num_heldout + 12
    assert other["heldout/also_trained"] == 120 - num_heldout
    assert told[1][0][0] == f"{120 - num_heldout} of 132 documents were also trained on: left out"
    assert model["heldout/documents"] == 12
    assert "a stronger baseline" in told[2][0][1]


@pytest.mark.parametrize(
    "refusal",
    [
        (["models:/a@b"], 2, "models:/a@b holds no data to measure it on: name some with --data"),
        (["models:/a@b", "--data", "x"], 65, "there is no registry at "),
        (["absent/bundle", "--data", "x"], 65, "no bundle at absent/bundle"),
        (["bare/bundle", "--data", "x.jsonl"], 65, "the bundle does not tell how its rows"),
    ],
)
@pytest.mark.usefixtures("ray_session")
def test_what_cannot_be_measured_is_said_in_one_line(
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    refusal: tuple[list[str], int, str],
) -> None:
    arguments, code, said = refusal
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"text": "a b"}')
    bare = load_encoder(str(encoder))
    write_bundle(
        tmp_path / "bare" / "bundle",
        config={"objective": bare.config["objective"]},
        state=bare.state,
        tokenizer_json=bare.vocabulary.json,
        lineage={},
        card="",
    )
    assert main(["evaluate", *arguments]) == code
    err = capfd.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


def test_the_lengths_of_honest_pairs_tell_nothing(tmp_path: Path, vocabulary: Vocabulary) -> None:
    write_corpus(tmp_path / "corpus", num_documents=150, num_sentences=60)
    source = SourceConfig(heldout_ratio=0.3)
    evaluation = evaluate_untrained(open_without_ray(tmp_path, vocabulary, source))

    error = math.sqrt(0.25 / evaluation.nsp_pairs)
    assert evaluation.nsp_pairs > 2000
    assert abs(evaluation.nsp_length_accuracy - 0.5) < 5 * error
