"""What the model will see: the truth stands under its place, and the figures add up."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.text import Text

from pipelines.cli import main
from pipelines.data.batches import RowSource
from pipelines.data.manifest import Document, Manifest, content_hash
from pipelines.data.plan import Plan
from pipelines.data.text import TextRows
from pipelines.data.vocabulary import Vocabulary, VocabularyConfig
from pipelines.data.vocabulary_training import train_vocabulary
from pipelines.recipes import recipe
from pipelines.use import quirks
from pipelines.use.drawing import DrawnRow, draw
from pipelines.use.quirks import Sample, describe_corpus, describe_pairs, take_sample
from tests.bundles import text_bundle
from tests.corpus import build_manifest, make_documents, write_corpus

NOTHING_HELD_OUT = ("--source.heldout-ratio", "0")


def ids_of(pieces: str, vocabulary: Vocabulary) -> list[int]:
    known = vocabulary.tokenizer.get_vocab()
    return [known[piece] for piece in pieces.split()]


def lines_of(row: DrawnRow, vocabulary: Vocabulary, width: int) -> list[str]:
    return [line.plain for line in draw(row, vocabulary, width)]


def test_the_truth_stands_under_its_place(vocabulary: Vocabulary) -> None:
    """A [MASK], a word kept as it is, and a random word, all three to be predicted."""
    row = DrawnRow(
        ids_of("[CLS] the [MASK] a ##s ##a [SEP] old tide judge [SEP]", vocabulary),
        ids_of("[CLS] the harbour a ##s ##a [SEP] old tide rose [SEP]", vocabulary),
        frozenset({2, 8, 9}),
        a_length=7,
    )
    assert lines_of(row, vocabulary, 100) == [
        "  A  [CLS] the [MASK]   asa [SEP]",
        "               ^harbour",
        "  B  old tide  judge [SEP]",
        "         ^tide ^rose",
    ]
    upper, *_, last, _ = draw(row, vocabulary, 100)
    styles = {upper.plain[span.start : span.end]: span.style for span in upper.spans}
    assert styles["[CLS]"] == styles["[SEP]"] == "dim"
    assert styles["[MASK]"] == "bold yellow"
    assert styles["the"] == "cyan"
    assert {last.plain[span.start : span.end]: span.style for span in last.spans}["old"] == (
        "magenta"
    )


def test_the_rest_of_a_masked_word_is_seen_to_be_one(vocabulary: Vocabulary) -> None:
    row = DrawnRow(
        ids_of("[CLS] [MASK] ##s [SEP]", vocabulary),
        ids_of("[CLS] a ##s [SEP]", vocabulary),
        frozenset({1}),
        a_length=4,
    )
    assert lines_of(row, vocabulary, 100) == ["  A  [CLS] [MASK] ##s [SEP]", "           ^a"]


@pytest.mark.parametrize("width", [40, 60, 100])
def test_long_rows_are_wrapped_and_every_truth_stays_under_its_place(
    vocabulary: Vocabulary, width: int
) -> None:
    config = recipe("text-mini").text
    table = TextRows(config, vocabulary).rows(make_documents(20), seed=0, order=0)
    for row in table.slice(0, 40).to_pylist():
        truth = dict(zip(row["masked_positions"], row["masked_ids"], strict=True))
        seen = row["input_ids"]
        true = [truth.get(i, piece) for i, piece in enumerate(seen)]
        drawn = lines_of(DrawnRow(seen, true, frozenset(truth), row["a_length"]), vocabulary, width)

        assert all(len(line) <= width for line in drawn)
        told = []
        for above, below in pairwise([*drawn, ""]):
            for mark in re.finditer(r"\^\S+", below if "^" in below else ""):
                told.append((above[mark.start() :].split()[0], mark.group()[1:]))
        pieces = vocabulary.tokenizer.id_to_token
        assert told == [(pieces(seen[i]), pieces(truth[i])) for i in sorted(truth)]


def test_quirks_of_documents_are_counted(vocabulary: Vocabulary) -> None:
    texts = [
        "The tide is old. The tide is old. The rose is old.",
        "One sentence of the tide",
        "the TIDE is old.  The tide is old. The rose is old.",
        "The \u6f22 and the \u6f22 and the \u5b57. The tide.",
    ]
    documents = [Document(i, content_hash(text), text) for i, text in enumerate(texts)]

    report = describe_corpus(Sample([], documents, 1.0), "en", vocabulary)

    assert (report.documents, report.one_sentence_documents, report.copies) == (4, 1, 1)
    visited = describe_corpus(Sample([], documents * 3, 1.0), "en", vocabulary)
    assert visited.copies == 1  # what is visited again is no copy
    assert report.sentences_per_document == 2.5
    assert report.tokens == sum(len(ids) for ids in vocabulary.encode(texts))
    assert report.unknown_words == {"\u6f22": 2, "\u5b57": 1}
    assert report.unknown_ratio == 3 / report.tokens


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return build_manifest(write_corpus(tmp_path_factory.mktemp("preview"), num_documents=40))


def test_figures_of_rows_add_up(manifest: Manifest, vocabulary: Vocabulary) -> None:
    config = recipe("text-tiny")
    plan = Plan(manifest, 0, config.order.blocks_per_order)
    source = RowSource(plan, TextRows(config.text, vocabulary))
    sample = take_sample(plan)
    corpus = describe_corpus(sample, "en", vocabulary)

    report = describe_pairs(source, sample, corpus.tokens, config.order.rows_per_step)

    rows = pa.concat_tables([source.table(plan.order(i)) for i in range(plan.orders_per_epoch)])
    fates, labels = rows["fate"].to_numpy(), rows["nsp_label"].to_numpy()
    assert sample.ratio == 1.0
    assert len(sample.documents) == 40
    assert list(report.fates) == list(source.maker.fates)
    assert list(report.fates.values()) == np.bincount(fates, minlength=3).tolist()
    assert sum(report.fates.values()) == report.rows == rows.num_rows
    assert report.notnext_ratio == labels[fates == 0].mean()
    assert report.steps_per_epoch == rows.num_rows / config.order.rows_per_step
    assert report.tokens_per_epoch == corpus.tokens
    assert report.repetition == 1.0
    lengths = pa.compute.list_value_length(rows["input_ids"]).to_numpy()
    num_places = len(lengths) * config.text.max_length
    assert report.padding_ratio == pytest.approx(1 - lengths.sum() / num_places)
    masked = pa.compute.list_value_length(rows["masked_ids"]).to_numpy().sum()
    assert report.masked_ratio == masked / corpus.tokens
    assert (report.forced_ratio, report.cut_ratio, report.own_notnext_ratio) == (0, 0, 0)


def test_quirks_of_pairs_are_told_by_where_their_segments_come_from(
    vocabulary: Vocabulary,
) -> None:
    """Rows: IsNext, two with a gap, NotNext of the own document, of a copy, of another."""
    maker = TextRows(recipe("text-tiny").text, vocabulary)
    rows = maker.rows(make_documents(3), seed=0, order=0).slice(0, 6)
    end = rows["a_position"].to_numpy() + rows["a_length"].to_numpy() - 2
    changed = {
        "fate": pa.array([0] * 6, pa.int8()),
        "nsp_label": pa.array([0, 0, 0, 1, 1, 1], pa.int8()),
        "a_record": pa.array([0] * 6),
        "b_record": pa.array([0, 0, 0, 0, 1, 2]),
        "b_position": pa.array(end + np.array([0, 1, -1, 9, 0, 0])),
    }
    for name, column in changed.items():
        rows = rows.set_column(rows.column_names.index(name), name, column)

    counts = quirks._count(maker, rows.combine_chunks(), {0: 7, 1: 7, 2: 8})

    names = ("next", "cut", "notnext", "own notnext")
    assert [counts[name] for name in names] == [3, 2, 3, 2]


def test_the_sample_is_bounded_and_scaled_up(
    manifest: Manifest, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe("text-tiny")
    plan = Plan(manifest, 0, config.order.blocks_per_order)
    source = RowSource(plan, TextRows(config.text, vocabulary))
    whole = describe_pairs(source, take_sample(plan), 1, config.order.rows_per_step)
    monkeypatch.setattr(quirks, "SAMPLE_BYTES", 30_000)

    sample = take_sample(plan)
    report = describe_pairs(source, sample, 1, config.order.rows_per_step)

    num_bytes = sum(manifest.blocks[v.block].bytes for order in sample.orders for v in order.blocks)
    assert 30_000 <= num_bytes < 40_000
    assert sample.orders[0] == plan.order(0)
    assert report.rows < whole.rows / 2
    assert report.steps_per_epoch == pytest.approx(whole.steps_per_epoch, rel=0.2)
    assert report.tokens_per_epoch == pytest.approx(whole.tokens_per_epoch, rel=0.2)


@pytest.mark.usefixtures("ray_session")
def test_the_command_shows_rows_and_report_with_and_without_colour(
    corpus_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    order = ["preview", "text-tiny", "--data", str(corpus_dir), "--seed", "3", "--json"]

    assert main(order) == 0
    plain = capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    assert main(order) == 0
    coloured = capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(order) == 0
    assert capsys.readouterr().out == plain

    assert "\x1b" not in plain
    assert "\x1b[36m" in coloured
    assert Text.from_ansi(coloured).plain.split() == plain.split()
    *shown, last = plain.splitlines()
    assert max(map(len, shown)) <= 100
    report = json.loads(last)
    assert next(iter(report["pairings"])) == "honest"
    honest = report["pairings"]["honest"]
    heads = [line for line in shown if "% of rows: " in line]
    for fate, count in honest["fates"].items():
        assert bool(count) == any(line.endswith(f"% of rows: {fate}") for line in heads)
    assert any(line.startswith("IsNext, ") for line in heads)
    assert any(line.startswith("NotNext, ") for line in heads)
    assert sum(line.count("[CLS]") for line in shown) == 2 * 2 + len(heads) - 2
    assert report["sample_ratio"] == 1.0
    documents = report["corpus"]["documents"]
    assert f"all {documents} training documents ({120 - documents} heldout)" in shown
    counts = [f"{pairs['rows']:,}" for pairs in report["pairings"].values()]
    assert [*map(str.split, shown)].count(["rows", *counts]) == 1


@pytest.mark.usefixtures("ray_session")
def test_the_figures_are_those_of_the_vocabulary_that_the_run_starts_with(
    corpus_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    source = text_bundle(
        tmp_path / "source", train_vocabulary(["a tide"] * 9, VocabularyConfig(size=300)), seed=0
    )
    order = ["preview", "text-tiny", "--data", str(corpus_dir), "--json"]
    reports = []
    for flags in (["--init-from", str(source)], ["--vocabulary-file", f"{source}/tokenizer.json"]):
        assert main([*order, *flags]) == 0
        *shown, last = capsys.readouterr().out.splitlines()
        assert any(line.endswith(f" pieces of {flags[1]}") for line in shown)
        reports.append(json.loads(last))
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["text-tny"], "no recipe 'text-tny'. Did you mean 'text-tiny'?"),
        (["text-tiny"], "no data: name raw shards with --data"),
        (["text-tiny", "--data", "absent/*.jsonl"], "no shards match 'absent/*.jsonl'"),
        (
            ["text-tiny", "--data", "a.jsonl", *NOTHING_HELD_OUT, "--vocabulary-file", "v"],
            "no vocabulary at v",
        ),
    ],
)
@pytest.mark.usefixtures("ray_session")
def test_what_cannot_be_shown_is_said_in_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "The tide. The rose."}\n{"text": "A"}\n')
    assert main(["preview", *arguments]) == 2
    err = capfd.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
