"""One field of every record of a block: an id, or a label, which no training ever sees."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from itertools import islice

from pipelines.data import tar
from pipelines.data.filesystems import READ_ERRORS, join, parse, reason
from pipelines.data.manifest import Document, Manifest, Picture
from pipelines.data.parquet import IDS, rows_from
from pipelines.data.records import Form, Record
from pipelines.errors import OutageError

KEY = "key"
"""The field that names a sample of a tar, or a loose picture."""
FOLDER = "folder"
"""The field of a loose picture that holds the name of its folder: often what it shows."""


def field_values(manifest: Manifest, number: int, field: str) -> Iterator[str | None]:
    """Yield a field of every record of a block, or None where it is no string or whole number.

    That is a field of a jsonl line, a column of a parquet shard, and of a sample of a tar the text
    of its file of that extension (`cls`), a field of its json, or its `key`. A loose picture has
    its `key`, the path below the folder of all of them, and the name of its own `folder`.

    Raises:
        OutageError: If the shard cannot be read.
    """
    block = manifest.blocks[number]
    if block.files:
        for path in block.files:
            yield {KEY: path, FOLDER: _folder(join(manifest.root, path))}.get(field)
        return
    shard = manifest.shards[block.shard]
    name = join(manifest.root, shard.path)
    found = manifest.records(number)
    if shard.form.startswith("parquet"):
        found = islice(rows_from(name, field, IDS, block.offset, lambda _: None), block.records)
    try:
        for record in found:
            yield _value(record, shard.form, field)
    except READ_ERRORS as error:
        raise OutageError(f"{name}: cannot read {field!r} ({reason(error)}); try again") from error


def field_of_each(
    manifest: Manifest, number: int, items: Sequence[Document | Picture], field: str
) -> list[str | None]:
    """Return a field of each item that `Manifest.read` found in a block, as `field_values` has it.

    Raises:
        OutageError: If the shard cannot be read.
    """
    values = list(field_values(manifest, number, field))
    first = manifest.blocks[number].first_record
    return [values[item.record - first] for item in items]


def _value(record: Record, form: Form, field: str) -> str | None:
    value: object = None
    data = record.data or b""
    with contextlib.suppress(ValueError, RecursionError):
        if form.startswith("parquet"):
            value = data.decode()
        elif form == "jsonl":
            value = _of_json(data, field)
        elif form == "tar":
            value = record.key or None if field == KEY else _of_sample(data, field)
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    text = str(value)
    if not text:  # no label, and no id
        return None
    # Half of a surrogate pair, which json can spell, is no text.
    return text if text.encode(errors="ignore").decode() == text else None


def _folder(name: str) -> str | None:
    return os.path.basename(os.path.dirname(parse(name).path)) or None


def _of_sample(sample: bytes, field: str) -> object:
    files = tar.files(sample)
    if field in files:
        return files[field].decode("utf-8-sig").strip()
    return _of_json(files["json"], field) if "json" in files else None


def _of_json(data: bytes, field: str) -> object:
    fields = json.loads(data.decode("utf-8-sig"))
    return fields.get(field) if isinstance(fields, dict) else None
