"""The folder of a run: its record, its manifest, its vocabulary, and who may write to it."""

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.cluster import parallel_map
from pipelines.config import RunConfig, changed, from_record, to_record, with_vocab_size
from pipelines.data.batches import RowMaker, RowSource
from pipelines.data.filesystems import File
from pipelines.data.gate import check
from pipelines.data.images import ImageRows
from pipelines.data.indexing import build
from pipelines.data.manifest import GATES, Manifest
from pipelines.data.plan import Plan
from pipelines.data.records import Modality
from pipelines.data.shards import SourceConfig, find_shards, identity
from pipelines.data.text import TextRows
from pipelines.data.vocabulary import Vocabulary, load_vocabulary
from pipelines.data.vocabulary_training import train_on_corpus
from pipelines.errors import DataError, UserError, nearest
from pipelines.storage import held, sha256_of, write_json, write_text
from pipelines.training.checkpoint import CommitLog
from pipelines.training.start import commit_start, given_vocabulary, load_start

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Run:
    """A run that has a record: everything that decides its batches is settled."""

    dir: Path
    key: str
    """Identifies the run for ever, whatever its folder is called."""
    config: RunConfig
    manifest: Manifest
    pieces: Vocabulary | None
    """The vocabulary of a run on text, None of another."""
    started_from: str = ""
    """The encoder whose weights it started with, models:/NAME/VERSION or a folder; empty if the
    weights were drawn."""

    @property
    def log(self) -> CommitLog:
        """The commits of the run."""
        return CommitLog(self.dir)

    @property
    def source(self) -> RowSource:
        """What makes the rows of the run."""
        config = self.config
        plan = Plan(self.manifest, config.seed, config.order.blocks_per_order, config.weights)
        return RowSource(plan, self.maker)

    @property
    def maker(self) -> RowMaker:
        """What makes rows of what the shards hold."""
        return self.text_rows if self.pieces else ImageRows(self.config.images)

    @property
    def text_rows(self) -> TextRows:
        """What makes rows of documents.

        Raises:
            UserError: If the run is not on text.
        """
        return TextRows(self.config.text, self.vocabulary)

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of a run on text.

        Raises:
            UserError: If the run is not on text.
        """
        if self.pieces is None:
            raise UserError(f"run {self.dir.name!r} is of {self.config.modality}: this is for text")
        return self.pieces


@contextlib.contextmanager
def locked(config: RunConfig) -> Iterator[Path]:
    """Hold the folder of a run; the lock goes with the process, however it ends.

    Raises:
        UserError: If another process trains this run, or the folder cannot be written.
    """
    run_dir = Path(config.runs) / config.name
    busy = (
        f"run {config.name!r} is being trained by another process; "
        "wait for it, or choose another --name"
    )
    with held(run_dir, busy):
        yield run_dir


def open_run(config: RunConfig, run_dir: Path) -> Run:
    """Return the run of this folder, made anew from the config where there is none.

    Raises:
        UserError: If the run was started with another recipe, vocabulary or other data.
        DataError: If there are attempts of a run that has lost its record.
    """
    if not (run_dir / "run.json").exists():
        return _create(config, run_dir)
    run = load_run(run_dir)
    settled = config
    if run.pieces and config.modality == "text":
        settled = with_vocab_size(config, run.config.masked_language.encoder.vocab_size)
    if different := changed(run.config, settled):
        raise UserError(
            f"run {config.name!r} was started otherwise ({'; '.join(different)}): "
            "go on with what it was started with, or choose another --name"
        )
    given = given_vocabulary(settled, None)
    if given and given.json != run.vocabulary.json:
        raise UserError(
            f"run {config.name!r} was started with another vocabulary than {config.vocabulary_file}"
            ": leave --vocabulary-file out, or choose another --name"
        )
    if config.data:
        files = find_shards(config.data, config.modality, separate=bool(config.weights))
        _refuse_other_data(run, files)
    return replace(run, config=settled)


def load_run(run_dir: Path) -> Run:
    """Return a recorded run.

    Raises:
        UserError: If there is no run of this name; the nearest one is named.
        DataError: If its record cannot be read.
    """
    path = run_dir / "run.json"
    if not path.exists():
        others = [found.parent.name for found in run_dir.parent.glob("*/run.json")]
        hint = nearest(run_dir.name, others) if others else " There are no runs yet."
        raise UserError(f"no run {run_dir.name!r} in {run_dir.parent}.{hint}")
    try:
        record = json.loads(path.read_text())
        names = ("format_version", "key", "fingerprint", "tokenizer_sha256")
        version, key, fingerprint, tokenizer = (record[name] for name in names)
        config, started_from = record["config"], record["started_from"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not the record of a run: {error!r}; restore it") from error
    if version != FORMAT_VERSION:
        raise DataError(f"{path} has format {version}, not {FORMAT_VERSION}")
    listing = run_dir / "manifest.json"
    try:
        manifest = Manifest.from_json(listing.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{listing} is not a manifest: {str(error).splitlines()[0]}") from error
    if manifest.fingerprint != fingerprint:
        raise DataError(f"{listing} is not the one the run was started with")
    pieces = run_dir / "tokenizer.json"
    if tokenizer and (not pieces.is_file() or sha256_of(pieces) != tokenizer):
        raise DataError(f"{pieces} is not the one the run was started with; restore it")
    vocabulary = load_vocabulary(pieces) if tokenizer else None
    return Run(run_dir, key, from_record(config), manifest, vocabulary, started_from)


def index(
    patterns: Sequence[str],
    source: SourceConfig,
    cache: Path,
    modality: Modality | None = None,
    *,
    separate: bool = False,
) -> Manifest:
    """Return the manifest of the shards, from the cache if no shard has changed since.

    Without a modality it is what the names of the shards tell, and parquet is read as text. With
    `separate`, each pattern is a source of its own. Whether the corpus may be used is for
    `gate.check` to say.

    Raises:
        UserError: If a pattern matches nothing, a store cannot be reached, or a shard does not
            hold what the modality asks for.
        DataError: If a shard cannot be read, but for one that is cut.
    """
    files = find_shards(patterns, modality, separate=separate)
    reading = {name: value for name, value in vars(source).items() if name not in GATES}
    state = json.dumps([files, reading, modality or "text"])
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no cache, or a broken one
        cached = json.loads(cache.read_text())
        if cached["state"] == state:
            return replace(Manifest.from_json(cached["manifest"]), source=source)
    manifest = build(files, source, parallel_map, modality or "text")
    write_json(cache, {"state": state, "manifest": manifest.to_json()})
    return manifest


def index_data(config: RunConfig) -> Manifest:
    """Return the manifest of the data of a run that has not begun.

    Raises:
        UserError: If there is no data, a pattern matches nothing, or the data is not what the
            objective is for.
        DataError: If the data cannot be trusted, or a source has a weight but no documents.
    """
    if not config.data:
        raise UserError("no data: name raw shards with --data 'corpus/*.jsonl'")
    cache, separate = Path(config.runs) / ".index" / "manifest.json", bool(config.weights)
    manifest = index(config.data, config.source, cache, config.modality, separate=separate)
    check(manifest)
    _refuse_idle_source(config, manifest)
    return manifest


def _create(config: RunConfig, run_dir: Path) -> Run:
    """Settle what the config leaves open and record the run; run.json is written last."""
    if any((run_dir / "attempts").glob("*.json")):
        raise DataError(f"{run_dir} has lost its run.json: restore it, or choose another --name")
    if (run_dir / "finetune.json").exists():
        raise UserError(f"run {config.name!r} is a fine-tuning: choose another --name")
    for remains in ("commits", "checkpoints"):  # of a start that was killed before the record
        shutil.rmtree(run_dir / remains, ignore_errors=True)
    start = load_start(config) if config.init_from else None
    manifest = index_data(config)
    vocabulary, tokenizer = None, ""
    if config.modality == "text":
        _refuse_single_document(config, manifest)
        given = start.vocabulary if start else given_vocabulary(config, None)
        vocabulary = given or train_on_corpus(manifest, config.vocabulary)
        config = with_vocab_size(config, start.vocab_size if start else vocabulary.size)
        write_text(run_dir / "tokenizer.json", vocabulary.json)
        tokenizer = sha256_of(run_dir / "tokenizer.json")
    write_text(run_dir / "manifest.json", manifest.to_json())
    started_from = start.source if start else ""
    run = Run(run_dir, uuid.uuid4().hex, config, manifest, vocabulary, started_from)
    if start:
        commit_start(run.log, start.weights)
    record = {
        "format_version": FORMAT_VERSION,
        "key": run.key,
        "fingerprint": manifest.fingerprint,
        "tokenizer_sha256": tokenizer,
        "started_from": run.started_from,
        "config": to_record(config),
    }
    write_json(run_dir / "run.json", record)
    return run


def _refuse_single_document(config: RunConfig, manifest: Manifest) -> None:
    documents = manifest.records_where("training")
    pairing, coefficient = config.text.pairing, config.masked_language.nsp_coefficient
    if documents < 2 and pairing != "sentence-order" and coefficient > 0:
        raise DataError(
            f"{documents} document for training: next sentence prediction ({pairing} pairing) "
            "needs a second one to take NotNext segments from; add documents, separate them with "
            "--source.txt-documents blank-line, tell the order of sentences instead with "
            "--text.pairing sentence-order, or train on masked tokens alone with "
            "--objective.nsp-coefficient 0"
        )


def _refuse_idle_source(config: RunConfig, manifest: Manifest) -> None:
    blocks = manifest.blocks_of("training")
    used = {manifest.shards[manifest.blocks[block].shard].source for block in blocks}
    for number, pattern in enumerate(config.data[: len(config.weights)]):
        if number not in used:
            raise DataError(f"{pattern!r} has a weight but nothing for training; leave it out")


def _refuse_other_data(run: Run, files: Sequence[File]) -> None:
    recorded = {(identity(name), source) for name, source in run.manifest.files()}
    given = {(identity(file.name), file.source) for file in files}
    if given != recorded:
        odd, _ = sorted(given ^ recorded)[0]
        raise UserError(
            f"run {run.dir.name!r} was started with other shards ({odd} is in only one of the "
            "two, or in another source); give it the same --data, or choose another --name"
        )
