"""The folder of a run: its record, its manifest, its vocabulary, and who may write to it."""

import contextlib
import fcntl
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.cluster import parallel_map
from pipelines.config import RunConfig, changed, from_record, to_record
from pipelines.data import manifest as manifests
from pipelines.data.batches import RowSource
from pipelines.data.manifest import Manifest
from pipelines.data.plan import Plan
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.data.text import TextRows
from pipelines.data.vocabulary import Vocabulary, load_vocabulary
from pipelines.data.vocabulary_training import train_on_corpus
from pipelines.errors import DataError, UserError, nearest
from pipelines.storage import sha256_of, write_json, write_text
from pipelines.training.checkpoint import CommitLog

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Run:
    """A run that has a record: everything that decides its batches is settled."""

    dir: Path
    key: str
    """Identifies the run for ever, whatever its folder is called."""
    config: RunConfig
    manifest: Manifest
    vocabulary: Vocabulary

    @property
    def log(self) -> CommitLog:
        """The commits of the run."""
        return CommitLog(self.dir)

    @property
    def source(self) -> RowSource:
        """What makes the rows of the run."""
        plan = Plan(self.manifest, self.config.seed, self.config.order.blocks_per_order)
        return RowSource(plan, TextRows(self.config.text, self.vocabulary))


@contextlib.contextmanager
def locked(config: RunConfig) -> Iterator[Path]:
    """Hold the folder of a run; the lock goes with the process, however it ends.

    Raises:
        UserError: If another process trains this run, or the folder cannot be written.
    """
    run_dir = Path(config.runs) / config.name
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / "lock").open("a")
    except OSError as error:
        raise UserError(f"cannot write to {run_dir}: {error.strerror}; choose --runs") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"run {config.name!r} is being trained by another process; "
                "wait for it, or choose another --name"
            ) from error
        yield run_dir


def open_run(config: RunConfig, run_dir: Path) -> Run:
    """Return the run of this folder, made anew from the config where there is none.

    Raises:
        UserError: If the run was started with another recipe or other data.
    """
    if not (run_dir / "run.json").exists():
        return _create(config, run_dir)
    run = load_run(run_dir)
    size = run.config.objective.encoder.vocab_size
    settled = replace(config, objective=_with_vocabulary(config, size).objective)
    if different := changed(run.config, settled):
        raise UserError(
            f"run {config.name!r} was started otherwise ({'; '.join(different)}): "
            "go on with what it was started with, or choose another --name"
        )
    if config.data:
        _refuse_other_data(run, find_shards(config.data))
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
        names = ("format_version", "key", "fingerprint", "tokenizer_sha256", "config")
        version, key, fingerprint, tokenizer, config = (record[name] for name in names)
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
    if not pieces.is_file() or sha256_of(pieces) != tokenizer:
        raise DataError(f"{pieces} is not the one the run was started with; restore it")
    vocabulary = load_vocabulary(pieces)
    return Run(run_dir, key, from_record(config), manifest, vocabulary)


def index(patterns: Sequence[str], source: SourceConfig, cache: Path) -> Manifest:
    """Return the manifest of the shards, from the cache if no shard has changed since.

    Raises:
        UserError: If a pattern matches nothing.
        DataError: If a shard is cut, or there is nothing to train on.
    """
    paths = find_shards(patterns)
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    state = json.dumps([stamps, vars(source)])
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no cache, or a broken one
        cached = json.loads(cache.read_text())
        if cached["state"] == state:
            return Manifest.from_json(cached["manifest"])
    manifest = manifests.build(paths, source, parallel_map)
    write_json(cache, {"state": state, "manifest": manifest.to_json()})
    return manifest


def _create(config: RunConfig, run_dir: Path) -> Run:
    """Settle what the config leaves open and record the run; run.json is written last."""
    if not config.data:
        raise UserError("no data: name raw shards with --data 'corpus/*.jsonl'")
    manifest = index(config.data, config.source, Path(config.runs) / ".index" / "manifest.json")
    _refuse_single_document(config, manifest)
    if config.vocabulary_file:
        lowercase = config.vocabulary.lowercase
        vocabulary = load_vocabulary(Path(config.vocabulary_file), lowercase=lowercase)
    else:
        vocabulary = train_on_corpus(manifest, config.vocabulary)
    settled = _with_vocabulary(config, vocabulary.size)
    write_text(run_dir / "manifest.json", manifest.to_json())
    write_text(run_dir / "tokenizer.json", vocabulary.json)
    run = Run(run_dir, uuid.uuid4().hex, settled, manifest, vocabulary)
    record = {
        "format_version": FORMAT_VERSION,
        "key": run.key,
        "fingerprint": manifest.fingerprint,
        "tokenizer_sha256": sha256_of(run_dir / "tokenizer.json"),
        "config": to_record(settled),
    }
    write_json(run_dir / "run.json", record)
    return run


def _with_vocabulary(config: RunConfig, size: int) -> RunConfig:
    encoder = replace(config.objective.encoder, vocab_size=size)
    return replace(config, objective=replace(config.objective, encoder=encoder))


def _refuse_single_document(config: RunConfig, manifest: Manifest) -> None:
    documents = manifest.records_where("training")
    if documents < 2 and config.objective.nsp_coefficient > 0:
        raise DataError(
            f"{documents} document for training: next sentence prediction needs a second one to "
            "take NotNext segments from; add documents, separate them with --source.txt-documents "
            "blank-line, or train on masked tokens alone with --objective.nsp-coefficient 0"
        )


def _refuse_other_data(run: Run, paths: Sequence[Path]) -> None:
    root = Path(run.manifest.root)
    recorded = {str((root / shard.path).resolve()) for shard in run.manifest.shards}
    given = {str(path) for path in paths}
    if given != recorded:
        odd = sorted(given ^ recorded)[0]
        raise UserError(
            f"run {run.dir.name!r} was started with other shards ({odd} is in only one of the "
            "two); give it the same --data, or choose another --name"
        )
