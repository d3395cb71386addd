"""Labelled data: examples read once from raw shards, and dealt into three parts.

An example is in a part by the hash of its content, as held-out documents are, so copies of one
are always on the same side. What pretraining of the same shards held out comes first: with a test
ratio up to its `heldout_ratio`, no test example was pretrained on.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray

from pipelines.cluster import parallel_map
from pipelines.console import say
from pipelines.data.decode import decode
from pipelines.data.fields import field_of_each
from pipelines.data.gate import check
from pipelines.data.manifest import Manifest, Picture
from pipelines.data.shards import Rejected, SourceConfig
from pipelines.errors import DataError, UserError
from pipelines.run import index
from pipelines.use.encoder import Encoder
from pipelines.use.finetune_config import LabelledData
from pipelines.use.inputs import Item

PARTS = ("training", "validation", "test")
COPIES_HELD = 4
"""Of examples: by the driver, by Ray's object store, and by the workers."""


class Example(NamedTuple):
    """One labelled item."""

    item: Item
    content: int
    """64-bit hash of its text (of a pair the first) or picture."""
    label: str


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Where records hold what is to be learned."""

    label: str
    text_pair: str = ""
    """The second text of a pair; empty where there is one text, or a picture."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Labelled:
    """The examples of each part, and their classes."""

    classes: tuple[str, ...]
    """Sorted; their number is their place."""
    training: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    def numbers(self, examples: Sequence[Example]) -> list[int]:
        """Return the number of the class of each example."""
        places = {name: number for number, name in enumerate(self.classes)}
        return [places[example.label] for example in examples]

    def line(self) -> str:
        """Return the sizes in words."""
        sizes = ", ".join(f"{len(getattr(self, part))} {part}" for part in PARTS)
        return f"{sizes} examples of {len(self.classes)} classes"


def read(source: LabelledData, encoder: Encoder, runs: Path) -> tuple[Labelled, tuple[str, ...]]:
    """Return the examples of a source, and the fingerprints of its data; needs Ray.

    Raises:
        UserError: If there is no label to learn, or the data is not what the encoder is for.
        DataError: If records lack labels, a class has no training example, or the data is broken.
    """
    if source.text_pair_field and encoder.modality == "images":
        raise UserError("--text-pair-field is for text: leave it out")
    fields = Fields(label=source.labels, text_pair=source.text_pair_field)
    reading = SourceConfig(
        text_field=source.text_field, image_field=source.image_field, heldout_ratio=0.0
    )
    parts: dict[str, list[Example]] = {}
    fingerprints = []
    patterns = {"data": source.data, "validation": source.validation, "test": source.test}
    for part, given in patterns.items():
        if part != "data" and not given:
            continue
        cache = runs / ".index" / f"finetune-{part}.json"
        manifest = index(given, reading, cache, encoder.modality)
        check(manifest)
        fingerprints.append(manifest.fingerprint)
        parts[part] = read_examples(manifest, fields)
    training, validation, test = deal(parts["data"], *source.ratios)
    made = labelled(training, parts.get("validation", validation), parts.get("test", test))
    num_read = sum(len(examples) for examples in parts.values())
    if num_copies := num_read - sum(len(getattr(made, part)) for part in PARTS):
        say(
            f"{num_copies} of {num_read} examples are left out: copies of others, or what shares "
            "its text, of a pair the first, with validation or test"
        )
    return made, tuple(fingerprints)


def read_examples(manifest: Manifest, fields: Fields) -> list[Example]:
    """Return every example of a manifest that holds nothing out, read in parallel.

    Pictures that cannot be decoded are left out, and said to be.

    Raises:
        UserError: If no record has the field of the label, or of the second text, or all of them
            are too much to hold.
        DataError: If some records lack one, or a shard has changed since it was indexed.
    """
    num_bytes, room = sum(block.bytes for block in manifest.blocks), room_for_examples()
    if num_bytes > room:
        raise UserError(
            f"{num_bytes / 1e9:.1f} GB of labelled data are too much: they are held in memory, and "
            f"more than once: this machine has room for {room / 1e9:.1f}; name a part of them"
        )
    found: list[Example] = []
    num_unreadable = 0
    missing: dict[str, list[str]] = {fields.label: [], fields.text_pair: []}
    told = ray.put(manifest)
    read = partial(_read_block, told, fields)
    for examples, lacking, unreadable in parallel_map(read, manifest.blocks_of("training")):
        found += examples
        num_unreadable += unreadable
        for name, places in lacking.items():
            missing[name] += places
    total = manifest.records_where("training")
    for name, places in missing.items():
        if places and len(places) == total:
            raise UserError(
                f"no record has a string or whole number {name!r}, such as {places[0]}: name the "
                "field, the column or the file of a sample that holds it"
            )
        if places:
            raise DataError(
                f"{len(places)} of {total} records have no {name!r}, the first is {places[0]}: "
                "add it, or leave them out"
            )
    if num_unreadable:
        say(f"{num_unreadable} of {total} pictures cannot be decoded: left out")
    return found


def room_for_examples() -> int:
    """Return how many bytes of raw data this machine can hold as often as workers need them."""
    return int(psutil.virtual_memory().total) // COPIES_HELD


def deal(
    examples: Sequence[Example], validation_ratio: float, test_ratio: float
) -> tuple[list[Example], list[Example], list[Example]]:
    """Return the examples for training, validation and test, chosen by their content."""
    parts: tuple[list[Example], list[Example], list[Example]] = ([], [], [])
    for example in examples:
        share = example.content / 2**64
        place = 2 if share < test_ratio else 1 if share < test_ratio + validation_ratio else 0
        parts[place].append(example)
    return parts


def labelled(
    training: Sequence[Example], validation: Sequence[Example], test: Sequence[Example]
) -> Labelled:
    """Return the parts: of copies the first, and no text, of a pair the first, in two of them.

    Raises:
        UserError: If a part is empty, or there is one class.
        DataError: If a class has no example for training.
    """
    test_contents = {example.content for example in test}
    judged = test_contents | {example.content for example in validation}
    made = Labelled(
        classes=tuple(sorted({example.label for example in training})),
        training=_distinct([e for e in training if e.content not in judged]),
        validation=_distinct([e for e in validation if e.content not in test_contents]),
        test=_distinct(test),
    )
    for part in PARTS:
        if not getattr(made, part):
            raise UserError(
                f"no example is left for {part}: name --{part} data, or raise --{part}-ratio"
                if part != "training"
                else "no example is left for training: lower --test-ratio and --validation-ratio; "
                "what shares its text, of a pair the first, with test data is not learned from"
            )
    if len(made.classes) < 2:
        raise UserError(f"every training example is {made.classes[0]!r}: one class is no question")
    known = {example.label for example in made.training}
    for part in PARTS[1:]:
        unknown = Counter(e.label for e in getattr(made, part) if e.label not in known)
        for name, count in unknown.most_common(1):
            raise DataError(
                f"{count} {part} examples are {name!r}, a class without an example for training: "
                "add some, or leave the class out"
            )
    return made


def _distinct(examples: Sequence[Example]) -> tuple[Example, ...]:
    """Return the first example of each item: copies are no labels and no test of their own."""
    first: dict[Any, Example] = {}
    for example in examples:
        second = example.item[1] if isinstance(example.item, tuple) else ""
        first.setdefault((example.content, second), example)
    return tuple(first.values())


def _read_block(
    told: "ray.ObjectRef[Manifest]", fields: Fields, number: int
) -> tuple[list[Example], dict[str, list[str]], int]:
    """Return examples, the places of records that lack a field, and how many are no pictures."""
    manifest = ray.get(told)
    items = manifest.read(number, "training")
    path, pair = manifest.shards[manifest.blocks[number].shard].path, fields.text_pair
    labels = field_of_each(manifest, number, items, fields.label)
    seconds = field_of_each(manifest, number, items, pair) if pair else labels
    examples = []
    num_unreadable = 0
    lacking: dict[str, list[str]] = {fields.label: [], pair: []}
    for found, label, second in zip(items, labels, seconds, strict=True):
        for name, value in ((fields.label, label), (pair, second)):
            if name and value is None:
                lacking[name].append(f"record {found.record} of the data, in {path}")
        item: Any = found.data if isinstance(found, Picture) else found.text
        if isinstance(found, Picture) and isinstance(decode(found.data, 3), Rejected):
            num_unreadable += 1
        elif label is not None and second is not None:
            examples.append(Example((item, second) if pair else item, found.content, label))
    return examples, lacking, num_unreadable
