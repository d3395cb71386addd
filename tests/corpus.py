"""A made-up English corpus: each document has one topic, so that its parts belong together."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from pipelines.data import indexing
from pipelines.data.manifest import Document, Manifest, content_hash
from pipelines.data.shards import SourceConfig, find_shards

Item = TypeVar("Item")
Result = TypeVar("Result")

TOPICS = {
    "sea": (
        "sailor captain harbour anchor tide island lighthouse storm reef compass",
        "sails drifts anchors navigates sinks returns",
        "salty stormy foggy distant wooden",
    ),
    "kitchen": (
        "baker oven dough butter recipe kettle pepper onion apron supper",
        "bakes boils stirs tastes burns serves",
        "buttery sweet bitter roasted crisp",
    ),
    "court": (
        "judge lawyer witness verdict jury appeal sentence clerk contract statute",
        "argues objects testifies rules appeals settles",
        "guilty solemn lawful disputed sworn",
    ),
    "garden": (
        "gardener rose orchard spade hedge tulip beetle compost greenhouse seedling",
        "plants waters prunes blooms withers digs",
        "leafy thorny blossoming muddy sunlit",
    ),
    "space": (
        "astronaut rocket planet orbit telescope comet galaxy satellite crater launch",
        "orbits launches observes lands measures explodes",
        "lunar cosmic weightless frozen radiant",
    ),
    "music": (
        "pianist violin orchestra melody rehearsal chorus trumpet concert drummer ballad",
        "plays tunes conducts sings rehearses composes",
        "loud gentle rhythmic solemn famous",
    ),
}
TEMPLATES = (
    "The {adjective} {noun} {verb} near the {noun}.",
    "Every {noun} {verb}, but the {noun} never {verb} before the {adjective} {noun}.",
    "In {year} a {noun} and a {noun} were {adjective}!",
    "Who {verb} with the {adjective} {noun}?",
    "When the {noun} {verb}, the {adjective} {noun} {verb} and the old {noun} {verb} again "
    "because nobody remembers {year} {noun}s.",
    "It {verb}.",
    "A {noun}, a {noun} and a {adjective} {noun} wait for the {noun} of {year}.",
)


def make_text(number: int, num_sentences: int, seed: int = 0) -> str:
    """Return document `number`: sentences of one topic in paragraphs of ten."""
    dice = random.Random(f"{seed} {number}")
    topic = list(TOPICS)[number % len(TOPICS)]
    sentences = [_sentence(dice, topic) for _ in range(num_sentences)]
    return "\n".join(" ".join(sentences[i : i + 10]) for i in range(0, num_sentences, 10))


def make_documents(count: int, num_sentences: int = 12, seed: int = 0) -> list[Document]:
    """Return documents of uneven lengths as a manifest would, numbered from 0."""
    texts = [make_text(i, max(1, num_sentences * (1 + i % 5) // 3), seed) for i in range(count)]
    return [Document(i, content_hash(text), text) for i, text in enumerate(texts)]


def write_corpus(
    folder: Path,
    *,
    num_documents: int = 120,
    num_shards: int = 6,
    num_sentences: int = 60,
    seed: int = 0,
) -> list[Path]:
    """Write documents as jsonl shards, dealt out in turn; return the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"part-{shard}.jsonl" for shard in range(num_shards)]
    for shard, path in enumerate(paths):
        lines = [
            json.dumps({"id": i, "text": make_text(i, num_sentences, seed)})
            for i in range(shard, num_documents, num_shards)
        ]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return paths


def serial_map(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return the function's results for all items, made in this process."""
    return [function(item) for item in items]


def build_manifest(
    paths: Sequence[Path], *, block_bytes: int = 4000, heldout_ratio: float = 0.0
) -> Manifest:
    """Return a manifest of small blocks, so that a small corpus has many of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "MIN_BLOCK_BYTES", block_bytes)
        source = SourceConfig(heldout_ratio=heldout_ratio)
        return indexing.build(find_shards([str(path) for path in paths]), source, serial_map)


def _sentence(dice: random.Random, topic: str) -> str:
    nouns, verbs, adjectives = (words.split() for words in TOPICS[topic])
    words = dice.choice(TEMPLATES)
    while "{" in words:
        words = words.replace("{noun}", dice.choice(nouns), 1)
        words = words.replace("{verb}", dice.choice(verbs), 1)
        words = words.replace("{adjective}", dice.choice(adjectives), 1)
        words = words.replace("{year}", str(dice.randint(1700, 2020)), 1)
    return words[0].upper() + words[1:]
