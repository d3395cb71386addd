"""What the model will see, before any training: masked pairs, and a report of their quirks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, get_args

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.cluster import cluster
from pipelines.config import RunConfig
from pipelines.data.batches import RowSource
from pipelines.data.manifest import Manifest
from pipelines.data.plan import Plan
from pipelines.data.text import IGNORED, TextRows
from pipelines.data.text_config import Pairing, TextConfig
from pipelines.data.vocabulary import Vocabulary
from pipelines.data.vocabulary_training import train_vocabulary
from pipelines.run import index_data
from pipelines.training.start import given_vocabulary
from pipelines.use.baselines import unmasked
from pipelines.use.drawing import HEAD, DrawnRow, draw, open_console
from pipelines.use.quirks import (
    CorpusReport,
    PairReport,
    Sample,
    describe_corpus,
    describe_pairs,
    take_sample,
)
from pipelines.use.registry import load_encoder

SHOWN_OF_A_LABEL = 2
LEGEND = "what the model sees of A and B, and under a place what it has to tell there: ^truth\n"
LABELS = {"sentence-order": ("in order", "swapped")}
"""Of label 0 and 1, where they are not IsNext and NotNext."""


def preview(config: RunConfig) -> dict[str, Any]:
    """Print masked pairs and the report of a run that has not begun; return the report.

    Raises:
        UserError: If there is no data, the vocabulary is missing, or the recipe is not of text.
        DataError: If the data cannot be trusted, or the encoder to start from.
    """
    _ = config.masked_language
    with cluster(config.address, 1, verbose=config.verbose):
        manifest = index_data(config)
    plan = Plan(manifest, config.seed, config.order.blocks_per_order, config.weights)
    sample = take_sample(plan)
    vocabulary = _vocabulary(config, sample)
    sources = {
        name: RowSource(plan, TextRows(text, vocabulary))
        for name, text in _pairings(config.text).items()
    }
    corpus = describe_corpus(sample, config.text.language, vocabulary)
    reports = {
        name: describe_pairs(source, sample, corpus.tokens, config.order.rows_per_step)
        for name, source in sources.items()
    }
    console = open_console()
    console.print(LEGEND, soft_wrap=True)
    chosen = next(iter(sources))
    for line in _drawn(sources[chosen], sample, LABELS.get(chosen, ("IsNext", "NotNext")), console):
        console.print(line, soft_wrap=True)
    console.print(_about(config, manifest, sample, vocabulary), soft_wrap=True)
    console.print(_corpus_table(corpus))
    console.print(_pair_table(reports))
    return {
        "recipe": config.recipe,
        "sample_ratio": sample.ratio,
        "corpus": asdict(corpus),
        "pairings": {name: asdict(report) for name, report in reports.items()},
    }


def _vocabulary(config: RunConfig, sample: Sample) -> Vocabulary:
    source = load_encoder(config.init_from, config.tracking_uri) if config.init_from else None
    return given_vocabulary(config, source) or train_vocabulary(
        (document.text for document in sample.documents), config.vocabulary
    )


def _pairings(text: TextConfig) -> dict[Pairing, TextConfig]:
    """Return the config with each pairing that goes with its other numbers, its own first."""
    found = {text.pairing: text}
    for pairing in get_args(Pairing):
        try:
            found.setdefault(pairing, replace(text, pairing=pairing))
        except ValueError:  # numbers that this pairing has not
            continue
    return found


def _drawn(
    source: RowSource, sample: Sample, labels: Sequence[str], console: Console
) -> Iterator[Text]:
    """Yield a handful of rows of the first work order, of every kind, the frequent ones first."""
    maker = source.maker
    assert isinstance(maker, TextRows)
    table = source.table(sample.orders[0])
    batch = maker.collate(table)
    fates, told = table["fate"].to_numpy(), batch["nsp_labels"]
    kinds, counts = np.unique(np.stack([fates, told]), axis=1, return_counts=True)
    true = unmasked(batch)
    for kind in np.argsort(-counts):
        fate, label = kinds[:, kind].tolist()
        of_kind = np.flatnonzero((fates == fate) & (told == label))
        name = "no label" if label == IGNORED else labels[label]
        share = counts[kind] / table.num_rows
        yield Text(f"{name}, {share:.1%} of rows: {maker.fates[fate]}", HEAD)
        shown = 1 if label == IGNORED else SHOWN_OF_A_LABEL
        for row in of_kind[:shown].tolist():
            yield from draw(_row(table, true, row), maker.vocabulary, console.width)
            yield Text()


def _row(table: pa.Table, true: Any, number: int) -> DrawnRow:
    seen = table["input_ids"][number].as_py()
    return DrawnRow(
        seen,
        true[number, : len(seen)].tolist(),
        frozenset(table["masked_positions"][number].as_py()),
        table["a_length"][number].as_py(),
    )


def _about(config: RunConfig, manifest: Manifest, sample: Sample, vocabulary: Vocabulary) -> Text:
    """Say what was looked at."""
    num_training = manifest.records_where("training")
    num_seen = len({document.record for document in sample.documents})
    whole = num_seen == num_training
    which = (
        f"all {num_training} training documents"
        if whole
        else f"the first {num_seen} of {num_training} training documents in the order of the run"
    )
    pieces = f"{vocabulary.size} pieces"
    origin = (
        f"of {given}"
        if (given := config.init_from or config.vocabulary_file)
        else "trained on them" + ("" if whole else "; the run trains it on all of them")
    )
    others = ", ".join(
        f"{entry.records} {fate}" for fate, entry in manifest.ledger.items() if fate != "training"
    )
    return Text(f"{which} ({others or 'no others'})\nvocabulary: {pieces} {origin}\n")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style=HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _corpus_table(report: CorpusReport) -> Table:
    table = _table("documents", f"{report.documents:,}")
    words = ", ".join(f"{word} ({count})" for word, count in report.unknown_words.items())
    rows = {
        "sentences of a document, median": f"{report.sentences_per_document:g}",
        "documents of one sentence": f"{report.one_sentence_documents}",
        "exact copies of an earlier document": f"{report.copies}",
        "tokens": f"{report.tokens:,}",
        "of them unknown to the vocabulary": f"{report.unknown_ratio:.2%}",
        "most frequent unknown words": words or "none",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    table.add_row()
    return table


def _pair_table(reports: Mapping[Pairing, PairReport]) -> Table:
    """Return the report of each pairing beside the others."""
    table = _table("pairing", *reports)
    table.add_row("rows", *(f"{report.rows:,}" for report in reports.values()))
    for fate in dict.fromkeys(fate for report in reports.values() for fate in report.fates):
        shares = (
            f"{report.fates[fate] / report.rows:.1%}" if fate in report.fates else ""
            for report in reports.values()
        )
        table.add_row(f"  {fate}", *shares)
    figures: dict[str, Callable[[PairReport], str]] = {
        "NotNext or swapped, of labelled rows": lambda r: f"{r.notnext_ratio:.1%}",
        "  of them, B is of A's document or its copy": lambda r: f"{r.own_notnext_ratio:.1%}",
        "label forced, by no coin": lambda r: f"{r.forced_ratio:.1%}",
        "IsNext whose junction was cut away": lambda r: f"{r.cut_ratio:.1%}",
        "padding at max_length": lambda r: f"{r.padding_ratio:.1%}",
        "text tokens to be predicted": lambda r: f"{r.masked_ratio:.1%}",
        "times a token is used": lambda r: f"{r.repetition:.2f}",
        "tokens per epoch": lambda r: f"{r.tokens_per_epoch:,}",
        "steps per epoch": lambda r: f"{r.steps_per_epoch:,.1f}",
    }
    for name, figure in figures.items():
        table.add_row(name, *(figure(report) for report in reports.values()))
    return table
