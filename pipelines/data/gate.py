"""Whether a corpus may be used: too much that is broken stops a run before it starts."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from pipelines.data.manifest import CUT, DUPLICATE, Entry, Manifest, Quarantined
from pipelines.data.records import MAX_RECORD_BYTES, THINGS
from pipelines.data.shards import TOO_LONG, unit_of
from pipelines.data.tar import MAX_SAMPLE_BYTES
from pipelines.errors import DataError
from pipelines.tables import table

EXAMPLES_PER_REASON = 3
_FIELD_FLAGS = {"text": "--source.text-field", "images": "--source.image-field"}
_ADVICE = {
    "quarantined:no-text-field": "--source.text-field names the field or column of the documents",
    "quarantined:no-image-field": "--source.image-field names the column of the pictures, which "
    "holds their bytes: a path alone is no picture",
    "quarantined:several-pictures": "the adjacent files of a .tar whose names are one up to the "
    "first dot are one sample, which holds one picture: 000001.jpg, 000002.jpg and so on",
    DUPLICATE: "the files of a sample of a .tar, whose names are one up to the first dot, are "
    "adjacent: `tar --sort=name` packs them so",
    TOO_LONG: f"a document may have {MAX_RECORD_BYTES >> 20} MiB: --source.txt-documents "
    "blank-line cuts a large .txt at its empty lines; a sample of a .tar may have "
    f"{MAX_SAMPLE_BYTES >> 20}: it is the adjacent files whose names are one up to the first dot",
    "quarantined:bad-json": "a .jsonl shard holds one JSON object on each line, nothing else",
    "quarantined:bad-utf8": "shards are UTF-8; `iconv -t UTF-8` converts others",
    CUT: "fetch or pack these shards again, or leave them out whole with "
    "--source.cut-shards quarantine",
}


def check(manifest: Manifest) -> None:
    """Refuse a corpus that cannot be trusted.

    Raises:
        DataError: If more records are quarantined than `max_quarantined_ratio` allows, a shard
            is cut and `cut_shards` refuses that, or nothing is left to train on. The message is
            a page that shows what is wrong, where, and what to do.
    """
    source, ledger = manifest.source, manifest.ledger
    cut = manifest.records_where(CUT)
    records = manifest.records_where("") - cut
    broken = manifest.records_where("quarantined") - cut
    wrong = []
    if cut and source.cut_shards == "refuse":
        wrong.append(f"{cut} of {len(manifest.shards)} shards cannot be read to the end")
    if broken > source.max_quarantined_ratio * records:
        wrong.append(
            f"{broken} of {records} records are broken ({broken / records:.2%}, where "
            f"{source.max_quarantined_ratio:.2%} are allowed)"
        )
    if wrong:
        bad = {fate: entry for fate, entry in ledger.items() if fate.startswith("quarantined")}
        advice = [f"- {said}" for fate, said in _ADVICE.items() if fate in bad]
        if broken:
            ratio = math.ceil(broken / records * 1000) / 1000
            advice.append(
                f"- mend these records, or leave them out with --source.max-quarantined-ratio "
                f"{ratio:g}"
            )
        page = [ledger_table(bad), "\n".join(_examples(manifest.quarantined)), "\n".join(advice)]
        raise DataError("\n\n".join([" and ".join(wrong), *page]))
    if not manifest.records_where("training"):
        raise DataError(
            f"none of {records} records is a {THINGS[manifest.modality]} for training "
            f"({', '.join(ledger)}); check "
            f"{_FIELD_FLAGS[manifest.modality]}, --source.heldout-ratio and the data"
        )


def ledger_table(ledger: Mapping[str, Entry]) -> str:
    """Return the ledger in columns, with its total."""
    rows = [(fate, entry.records, entry.bytes) for fate, entry in ledger.items()]
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    return table(("", "records", "bytes"), [(name, str(n), f"{size:,}") for name, n, size in rows])


def place_of(entry: Quarantined) -> str:
    """Return where a quarantined record lies and why it is there."""
    if entry.reason == CUT:
        return f"{entry.path}: cannot be read to its end ({entry.detail})"
    unit = unit_of(entry.path)
    return f"{entry.path} at {unit} {entry.offset}, {entry.bytes} bytes: {entry.reason}"


def _examples(quarantined: Iterable[Quarantined]) -> list[str]:
    shown: dict[str, list[str]] = defaultdict(list)
    for entry in quarantined:
        if len(shown[entry.reason]) < EXAMPLES_PER_REASON:
            shown[entry.reason].append(place_of(entry))
    return [line for lines in shown.values() for line in lines]
