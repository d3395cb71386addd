"""Labelled corpora and untrained encoders, for tests of what learns from labels."""

import io
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.config import RunConfig, to_record, with_vocab_size
from pipelines.data.manifest import content_hash
from pipelines.data.vocabulary import Vocabulary
from pipelines.recipes import recipe
from pipelines.use.bundle import write_bundle
from pipelines.use.labelled import Example
from ssl_models import build_objective
from tests.corpus import TOPICS, make_text
from tests.pictures import make_tar


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    """Write a jsonl shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def topics(count: int, num_topics: int = 3) -> list[dict[str, Any]]:
    """Return short texts, each labelled with its topic."""
    names = list(TOPICS)
    wanted = [i for i in range(len(names) * count) if i % len(names) < num_topics][:count]
    return [{"text": make_text(i, 3), "topic": names[i % len(names)], "id": i} for i in wanted]


def pairs(count: int) -> list[dict[str, Any]]:
    """Return pairs of texts labelled `same` or `other`: neither of the two tells which."""
    dice = random.Random(0)
    nouns = ["anchor", "oven", "judge", "rose"]
    lines = []
    for i in range(count):
        first = nouns[i % 4]
        same = (i // 4) % 2 == 0
        second = first if same else dice.choice([noun for noun in nouns if noun != first])
        text = f"{first} {dice.choice(('anchor', 'the'))} {i}"
        lines.append({"text": text, "second": second, "label": "same" if same else "other"})
    return lines


def examples_of(lines: list[dict[str, Any]], label: str, second: str = "") -> list[Example]:
    """Return lines as examples are read from them."""
    return [
        Example(
            (line["text"], line[second]) if second else line["text"],
            content_hash(line["text"]),
            line[label],
        )
        for line in lines
    ]


def write_text_encoder(folder: Path, vocabulary: Vocabulary) -> Path:
    """Write the bundle of an untrained tiny text encoder."""
    config = with_vocab_size(recipe("text-tiny"), vocabulary.size)
    encoder = replace(config.masked_language.encoder, initializer_range=0.2)
    config = replace(config, objective=replace(config.masked_language, encoder=encoder))
    return _write(folder, config, vocabulary.json)


def write_shades(path: Path, count: int) -> dict[bytes, str]:
    """Write dark and light pictures as a tar shard; return the label of each."""
    dice = np.random.default_rng(0)
    labels: dict[bytes, str] = {}
    members = []
    for i in range(count):
        pixels = dice.integers(0, 120, (18, 18, 3), dtype=np.uint8) + 135 * (i % 2)
        out = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(out, "PNG")
        labels[out.getvalue()] = ("dark", "light")[i % 2]
        members += [(f"{i}.png", out.getvalue()), (f"{i}.cls", ("dark", "light")[i % 2].encode())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(make_tar(members))
    return labels


def write_loose(folder: Path, labels: dict[bytes, str]) -> None:
    """Write pictures into a folder of their label."""
    for number, (picture, label) in enumerate(labels.items()):
        path = folder / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)


def write_image_encoder(folder: Path) -> Path:
    """Write the bundle of an untrained tiny image encoder."""
    return _write(folder, recipe("image-tiny"), None)


def _write(folder: Path, config: RunConfig, tokenizer_json: str | None) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        objective = build_objective(config.objective)
    record = to_record(config)
    write_bundle(
        folder,
        config={name: record[name] for name in ("objective", config.modality, "recipe")},
        state={
            name: tensor
            for name, tensor in objective.state_dict().items()
            if not name.startswith(objective.pretraining_only)
        },
        tokenizer_json=tokenizer_json,
        lineage={},
        card="",
    )
    return folder
