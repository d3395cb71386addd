"""Documents or pictures to embeddings: Parquet files with ids, each once, whatever is killed.

    manifest -> units of whole blocks -> Ray Data -> workers that hold the encoder -> a file a unit

A unit and the batches in it depend on the manifest alone, so the files do not tell how many
workers made them, or how often they died. A picture that cannot be decoded has no embedding; the
file of its unit names it instead, with the reason.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch

from pipelines.cluster import unwrap
from pipelines.console import PLAIN_LINES_EVERY_SECONDS, say
from pipelines.data.batches import MAX_READ_TASKS, numbered_blocks
from pipelines.data.fields import KEY, field_of_each
from pipelines.data.manifest import Document, Manifest, Picture, Quarantined
from pipelines.data.records import THINGS
from pipelines.data.shards import unit_of
from pipelines.errors import DataError, UserError
from pipelines.storage import held, write_file
from pipelines.use.encoder import Encoder

PREFIX = "rayssl."
"""Of the keys in the schema of a file."""
QUARANTINED = f"{PREFIX}quarantined"
"""The key, in files of pictures alone, of those that have no embedding."""
UNITS_PER_CORPUS = 64
"""At least, but for small corpora: a unit is what one worker makes at a time."""
MAX_UNIT_BYTES = 64 * 1024 * 1024
"""Of raw data, all of which is held; with less, the files of a large corpus would be too many."""
TASKS_PER_WORKER = 16
"""More tasks cost Ray's time where units are small, fewer leave workers idle at the end."""
NAMES = pa.schema({"id": pa.string(), "shard": pa.string(), "record": pa.int64()})


@dataclass(frozen=True, eq=False, kw_only=True)
class EmbedJob:
    """What every worker is told."""

    encoder: Encoder
    model: str
    """URI of the encoder, with its version."""
    bundle_sha256: str
    """Of the manifest.json of its bundle, or of the files of a model of transformers."""
    manifest: Manifest
    """Of the corpus, with nothing held out."""
    out: Path
    """Folder of the files; on a cluster, one that every node sees."""
    id_field: str = ""
    """Field of a record that holds its id; without one an id is SHARD:RECORD, or the path of a
    loose picture."""

    @property
    def metadata(self) -> dict[str, str]:
        """What the schema of every file tells of where its embeddings come from."""
        told = {
            "model": self.model,
            "bundle_sha256": self.bundle_sha256,
            "fingerprint": self.manifest.fingerprint,
            "id_field": self.id_field,
            "files": str(len(self.units)),
        }
        return {f"{PREFIX}{name}": value for name, value in told.items()}

    @property
    def things(self) -> str:
        """What is embedded, in words."""
        return f"{THINGS[self.encoder.modality]}s"

    @property
    def dimension(self) -> int:
        """Width of an embedding."""
        return self.encoder.dimension

    @cached_property
    def units(self) -> list[range]:
        """The blocks of each unit: consecutive ones, so many that units are few and not small."""
        found: list[range] = []
        first = num_bytes = 0
        blocks = self.manifest.blocks
        share = sum(block.bytes for block in blocks) // UNITS_PER_CORPUS
        enough = max(self.manifest.block_bytes, min(share, MAX_UNIT_BYTES))
        for number, block in enumerate(blocks):
            num_bytes += block.bytes
            if num_bytes >= enough or number + 1 == len(blocks):
                found.append(range(first, number + 1))
                first, num_bytes = number + 1, 0
        return found

    @cached_property
    def first_records(self) -> dict[int, int]:
        """The number in the corpus of the first record of each shard."""
        first: dict[int, int] = {}
        for block in self.manifest.blocks:
            first.setdefault(block.shard, block.first_record)
        return first

    def path(self, unit: int) -> Path:
        """Return the file of a unit."""
        return self.out / f"unit-{unit:06d}.parquet"


@dataclass(frozen=True, kw_only=True)
class EmbedReport:
    """What one call did."""

    embedded: int
    """Documents or pictures, by this call and by those before it."""
    quarantined: tuple[Quarantined, ...]
    """Pictures that cannot be decoded."""
    files: int
    found_files: int
    """Files that were there already."""
    dimension: int
    seconds: float
    rows_per_second: float
    """Of this call."""


def embed(job: EmbedJob, workers: int) -> EmbedReport:
    """Embed every readable record once; what earlier calls have finished is not made again.

    Raises:
        UserError: If the folder is in use, or holds embeddings of another model or corpus, or if
            the cluster has not a CPU for each worker.
        DataError: If a shard has changed since it was indexed, or a record has no id.
        StorageError: If a file cannot be written, or the store of a shard fails.
    """
    if workers > (cpus := int(ray.cluster_resources().get("CPU", 0))) or workers < 1:
        raise UserError(f"workers must be in 1..{cpus}, the CPUs of the cluster, got {workers}")
    with held(job.out, f"another process embeds into {job.out}: wait for it"):
        for remains in job.out.glob(".unit-*.tmp"):
            remains.unlink()
        found = _finished(job)
        pending = [unit for unit in range(len(job.units)) if unit not in found]
        started = time.perf_counter()
        if pending:
            _run(job, pending, workers)
        seconds = time.perf_counter() - started
        units = _finished(job)
    embedded = sum(unit.rows for unit in units.values())
    quarantined = tuple(entry for unit in units.values() for entry in unit.quarantined)
    made, expected = embedded + len(quarantined), job.manifest.records_where("training")
    if made != expected:
        raise DataError(
            f"{job.out} holds {made} embeddings of {expected} {job.things}: its files were "
            "altered; choose another folder"
        )
    return EmbedReport(
        embedded=embedded,
        quarantined=quarantined,
        files=len(job.units),
        found_files=len(found),
        dimension=job.dimension,
        seconds=seconds,
        rows_per_second=(embedded - sum(unit.rows for unit in found.values())) / seconds,
    )


def write_unit(job: EmbedJob, unit: int) -> int:
    """Embed what a unit holds into its file; return how many embeddings there are."""
    blocks = {number: job.manifest.read(number, "training") for number in job.units[unit]}
    names = [_names(job, number, found) for number, found in blocks.items()]
    items = [item for found in blocks.values() for item in found]
    features, reasons = job.encoder.encode_readable([_content(item) for item in items])
    vectors = pa.FixedSizeListArray.from_arrays(features.reshape(-1), job.dimension)
    table = pa.concat_tables(names).append_column("embedding", vectors)
    metadata = job.metadata
    if reasons:
        table = table.filter(pa.array([i not in reasons for i in range(len(items))]))
        told = {items[i].record: reason for i, reason in reasons.items()}
        quarantined = [asdict(entry) for number in blocks for entry in _places(job, number, told)]
        metadata[QUARANTINED] = json.dumps(quarantined)
    table = table.replace_schema_metadata(metadata)
    write_file(job.path(unit), lambda aside: pq.write_table(table, aside, use_dictionary=["shard"]))
    return len(items) - len(reasons)


def _content(item: Document | Picture) -> str | bytes:
    return item.text if isinstance(item, Document) else item.data


def _places(job: EmbedJob, number: int, reasons: Mapping[int, str]) -> list[Quarantined]:
    """Return where the records of a block lie that have a reason, by their number."""
    block = job.manifest.blocks[number]
    path, offset = job.manifest.shards[block.shard].path, block.offset
    found = []
    for i, record in enumerate(job.manifest.records(number)):
        if reason := reasons.get(block.first_record + i):
            place = (block.files[i], 0) if block.files else (path, offset)
            found.append(
                Quarantined(path=place[0], offset=place[1], bytes=record.bytes, reason=reason)
            )
        offset += 1 if unit_of(path) == "row" else record.bytes
    return found


def _names(job: EmbedJob, number: int, items: Sequence[Document | Picture]) -> pa.Table:
    """Return id, shard and record of what is used of a block."""
    block = job.manifest.blocks[number]
    path = job.manifest.shards[block.shard].path
    first = job.first_records[block.shard]
    records_in_shard = [item.record - first for item in items]
    if field := job.id_field or (KEY if block.files else ""):
        ids: list[Any] = field_of_each(job.manifest, number, items, field)
    else:
        ids = [f"{path}:{record}" for record in records_in_shard]
    for name, record in zip(ids, records_in_shard, strict=True):
        if name is None:
            raise DataError(
                f"record {record} of {path} has no string or whole number {job.id_field!r}: name "
                "a field that every record has with --id-field"
            )
    columns = {"id": ids, "shard": [path] * len(ids), "record": records_in_shard}
    return pa.table(columns, schema=NAMES)


class _Unit(NamedTuple):
    rows: int
    quarantined: tuple[Quarantined, ...]


def _finished(job: EmbedJob) -> dict[int, _Unit]:
    """Return what each finished unit holds.

    Raises:
        UserError: If a file of the folder is not of this embedding.
    """
    units = {job.path(unit): unit for unit in range(len(job.units))}
    # Another alias or folder of the same bytes is the same model.
    wanted = {name: told for name, told in job.metadata.items() if name != f"{PREFIX}model"}
    found: dict[int, _Unit] = {}
    for path in sorted(job.out.glob("*.parquet")):
        try:
            footer = pq.read_metadata(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path} is no Parquet file ({error!s:.80}): remove it") from error
        told = {name.decode(): value.decode() for name, value in (footer.metadata or {}).items()}
        for name, value in wanted.items():
            if told.get(name) != value:
                raise UserError(
                    f"{path} has {name.removeprefix(PREFIX)} {told.get(name)!r}, not {value!r}: "
                    "it is of another model, corpus or --id-field; choose another --out"
                )
        if path not in units:
            raise UserError(f"{path} is no file of this embedding: choose another --out")
        without = tuple(Quarantined(**entry) for entry in json.loads(told.get(QUARANTINED, "[]")))
        found[units[path]] = _Unit(footer.num_rows, without)
    return found


def _run(job: EmbedJob, pending: Sequence[int], workers: int) -> None:
    """Write the files of the pending units; what a dead worker had begun is begun again."""
    size = -(-len(pending) // min(MAX_READ_TASKS, TASKS_PER_WORKER * workers))
    tasks = [pending[start : start + size] for start in range(0, len(pending), size)]
    counts = numbered_blocks(tasks).map_batches(
        _write_units,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"job_ref": ray.put(job)},
        compute=ray.data.TaskPoolStrategy(size=min(workers, len(tasks))),
    )
    try:
        made = counts.iter_batches(batch_size=None, batch_format="numpy")
        _show(made, len(pending), job.things)
    except Exception as error:
        raise unwrap(error) from error


def _show(counts: Iterable[Any], num_files: int, things: str) -> None:
    """Say how it goes on, as files are finished."""
    rows = files = 0
    printed = started = time.perf_counter()
    for made in counts:
        rows += int(made["rows"].sum())
        files += len(made["rows"])
        now = time.perf_counter()
        if now - printed > PLAIN_LINES_EVERY_SECONDS:
            printed = now
            rate = rows / (now - started)
            say(f"file {files}/{num_files}  {rows} {things}  {rate:.0f} {things}/s")


def _write_units(units: pa.Table, job_ref: "ray.ObjectRef[EmbedJob]") -> pa.Table:
    """Return how many rows each unit has."""
    job = _fetch(job_ref)
    rows = [write_unit(job, unit) for unit in units["number"].to_pylist()]
    return pa.table({"rows": pa.array(rows, pa.int64())})


@lru_cache(maxsize=1)
def _fetch(job_ref: "ray.ObjectRef[EmbedJob]") -> EmbedJob:
    """Return the job; a worker process holds its encoder for the units to come."""
    torch.set_num_threads(1)  # others have the other cores
    return ray.get(job_ref)
