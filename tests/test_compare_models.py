"""Encoders of pictures side by side: can they tell one view of a picture by another?"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.config import to_record
from pipelines.data.indexing import build
from pipelines.data.manifest import Manifest
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.data.vocabulary import Vocabulary
from pipelines.errors import UserError
from pipelines.recipes import recipe
from pipelines.use import compare_models
from pipelines.use.compare_models import compare, reciprocal_ranks
from pipelines.use.comparison import judge
from pipelines.use.encoder import Encoder
from ssl_models import build_objective
from tests.corpus import serial_map
from tests.pictures import write_pictures

NUM_PICTURES = 90


def manifest_of(folder: Path) -> Manifest:
    return build(find_shards([str(folder)]), SourceConfig(heldout_ratio=0.0), serial_map)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("heldout")
    write_pictures(folder, NUM_PICTURES)
    return manifest_of(folder)


def encoder_of(name: str, size: int = 16) -> Encoder:
    """Return an untrained encoder: what it sees of colours still tells pictures apart."""
    config = recipe(name)
    config = replace(config, images=replace(config.images, views=replace(VIEWS, size=size)))
    torch.manual_seed(0)
    objective = build_objective(config.objective).eval()
    return Encoder(to_record(config), None, objective)


VIEWS = replace(recipe("image-tiny").images.views, crop_scale=(0.6, 1.0), hue=0.0, greyscale=0.0)


def blind(encoder: Encoder) -> Encoder:
    """Return an encoder to which all pictures are one."""
    for parameter in encoder.objective.parameters():
        torch.nn.init.zeros_(parameter)
    return encoder


def by_hand(first: Any, second: Any, content: Any) -> list[float]:
    ranks = []
    for i, one in enumerate(first):
        cosines = [one @ other / np.linalg.norm(one) / np.linalg.norm(other) for other in second]
        others = [cosines[j] for j in range(len(first)) if content[j] != content[i]]
        ranks.append(1 / (1 + sum(cosine > cosines[i] for cosine in others)))
    return ranks


def test_ranks_are_those_of_a_hand_computation() -> None:
    dice = np.random.default_rng(0)
    first = dice.normal(size=(40, 5))
    second = first + dice.normal(size=(40, 5))
    content = dice.integers(30, size=40)  # some are copies of others

    ranks = reciprocal_ranks(torch.from_numpy(np.stack([first, second])), content)

    np.testing.assert_allclose(ranks, by_hand(first, second, content))
    assert 0.1 < ranks.mean() < 0.9


def test_an_encoder_to_which_all_is_one_gets_no_more_than_chance() -> None:
    ranks = reciprocal_ranks(torch.ones(2, 100, 4), np.arange(100))
    chance = (1 / np.arange(1, 101)).mean()
    assert (ranks < chance).all()
    assert np.isnan(reciprocal_ranks(torch.full((2, 100, 4), torch.nan), np.arange(100))).all()


def test_a_first_champion_has_to_beat_chance(
    pictures: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_models, "GALLERY", 32)  # the last of three galleries is a short one
    passed = []
    for encoder in (encoder_of("image-tiny"), blind(encoder_of("image-tiny"))):
        (comparison,) = compare(encoder, None, pictures).comparisons
        assert comparison.num_items == NUM_PICTURES
        passed.append(judge([comparison], [0.0])[0].passed)
    assert passed == [True, False]
    by_chance = [(1 / np.arange(1, size + 1)).mean() for size in (32, 26)]
    np.testing.assert_allclose(comparison.reference, [by_chance[0]] * 64 + [by_chance[1]] * 26)


def test_encoders_of_other_objectives_and_sizes_can_be_compared(pictures: Manifest) -> None:
    champion = encoder_of("image-tiny")
    for candidate in (encoder_of("image-tiny-autoencoder"), encoder_of("image-tiny", size=24)):
        (comparison,) = compare(candidate, champion, pictures).comparisons
        (finding,) = judge([comparison], [-0.5])
        assert finding.passed
        assert finding.candidate > 2 * (1 / np.arange(1, NUM_PICTURES + 1)).mean()
    (same,) = compare(champion, champion, pictures).comparisons
    np.testing.assert_array_equal(same.candidate, same.reference)
    (worse,) = compare(blind(encoder_of("image-tiny")), champion, pictures).comparisons
    assert judge([worse], [0.0])[0].high < 0


def test_pictures_that_cannot_be_read_do_not_count(tmp_path: Path) -> None:
    (shard,) = write_pictures(tmp_path / "some", 40, num_shards=1)
    data = shard.read_bytes()
    where = data.index(b"\xff\xd8\xff")
    shard.write_bytes(data[: where + 20] + bytes(60) + data[where + 80 :])
    (comparison,) = compare(
        encoder_of("image-tiny"), None, manifest_of(tmp_path / "some")
    ).comparisons
    assert comparison.num_items == 39


def test_text_and_pictures_are_not_mixed(pictures: Manifest, vocabulary: Vocabulary) -> None:
    champion = replace(encoder_of("image-tiny"), pieces=vocabulary)
    with pytest.raises(UserError, match="the candidate is of images, the champion of text: regis"):
        compare(encoder_of("image-tiny"), champion, pictures)
