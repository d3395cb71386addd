"""Bundles of tiny encoders that were drawn, not trained."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from pipelines.data.vocabulary import Vocabulary
from pipelines.recipes import recipe
from pipelines.use.bundle import write_bundle
from ssl_models import ObjectiveConfig, build_objective


def text_bundle(folder: Path, vocabulary: Vocabulary, seed: int = 0) -> Path:
    """Write an encoder of text into a folder, and return it."""
    objective = recipe("text-tiny").masked_language
    encoder = dataclasses.replace(objective.encoder, vocab_size=vocabulary.size)
    return _write(folder, dataclasses.replace(objective, encoder=encoder), seed, vocabulary)


def image_bundle(folder: Path, seed: int = 0, name: str = "image-tiny") -> Path:
    """Write a recipe's encoder of pictures, of 32 pixels, into a folder, and return it."""
    config = recipe(name)
    views = dataclasses.replace(config.images.views, size=32)
    images = dataclasses.asdict(dataclasses.replace(config.images, views=views))
    return _write(folder, config.objective, seed, images=images)


def _write(
    folder: Path,
    objective: ObjectiveConfig,
    seed: int,
    vocabulary: Vocabulary | None = None,
    **config: Any,
) -> Path:
    torch.manual_seed(seed)
    write_bundle(
        folder,
        config={"objective": dataclasses.asdict(objective), **config},
        state=build_objective(objective).state_dict(),
        tokenizer_json=vocabulary.json if vocabulary else None,
        lineage={},
        card="",
    )
    return folder
