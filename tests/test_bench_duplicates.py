"""The bench of near-duplicates: who counts as wrong, and what a threshold finds."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.bench.duplicates import (
    CHANGES,
    SMALL,
    Photo,
    _report,
    _threshold,
    measure,
    read_photos,
    scene_of,
    write_small,
)
from pipelines.data.decode import decode
from pipelines.recipes import recipe
from pipelines.use.encoder import Encoder
from ssl_models import build_objective
from tests.pictures import make_blotches, make_picture


@pytest.mark.parametrize(
    ("key", "scene"),
    [
        ("campus-P1070491", "P"),
        ("images-flowers1", "flowers"),
        ("images-building2-3", "building"),
        ("images-walls-l", "walls"),
        ("images-notre-dame", "notre-dame"),
        ("images-tomato_14", "tomato"),
        ("000017", "000017"),
    ],
)
def test_photos_of_a_series_are_one_scene(key: str, scene: str) -> None:
    assert scene_of(key) == scene


def test_the_threshold_is_the_lowest_that_is_precise() -> None:
    values, is_own = np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, True, False, True])
    assert _threshold(values, is_own) == 0.8
    assert _threshold(values, ~is_own) == float("inf")


def test_the_threshold_of_one_half_is_measured_on_the_other() -> None:
    """Scenes 0 and 2 are told apart from 0.6 on, scenes 1 and 3 from 0.8 on."""
    scenes = np.arange(4)
    values = np.full((4, 4), 0.1)
    values[0, 0] = values[2, 2] = 0.6
    values[1, 1] = values[3, 3] = 0.8
    values[1, 3] = 0.7
    report = _report({"mirrored": values}, scenes, np.ones((4, 4), dtype=bool))
    assert report["thresholds"] == [0.6, 0.8]
    # 0 and 2 are missed at 0.8; 1 and 3 are found at 0.6, and so is one wrong pair
    assert report["changes"]["mirrored"]["recall"] == 0.5
    assert report["changes"]["mirrored"]["wrong_pairs"] == 1
    assert report["changes"]["mirrored"]["precision"] == 0.667
    assert report["changes"]["mirrored"]["average_precision"] < 1


def test_all_methods_are_measured_on_the_same_pairs() -> None:
    config = recipe("image-tiny")
    torch.manual_seed(0)
    record = {"images": dataclasses.asdict(config.images)}
    encoder = Encoder(record, None, build_objective(config.objective))
    photos = [Photo(str(number), make_blotches(number)) for number in range(8)]
    result = measure({"tiny": encoder}, photos)
    assert result["pairs_of_each_change"] == {"right": 8, "wrong": 56}
    assert set(result["methods"]) == {
        "dhash",
        "tiny",
        "tiny without the mean",
        "tiny before training",
    }
    for method in result["methods"].values():
        assert set(method["changes"]) == set(CHANGES)
        assert method["changes"]["half the size"]["average_precision"] > 0.9
    found = result["methods"]["dhash"]["changes"]
    assert found["jpeg of quality 30"]["average_precision"] == 1
    assert found["mirrored"]["average_precision"] < 0.5


def test_small_copies_are_shards_of_the_same_photos(tmp_path: Path) -> None:
    photos = [Photo("a", make_picture(0, 2 * SMALL)), Photo("b", make_picture(1, 30))]
    write_small(photos, tmp_path / "small.tar")
    found = read_photos([str(tmp_path / "small.tar")])
    shapes = [np.asarray(decode(photo.data, 3)).shape for photo in found]
    assert shapes == [(SMALL, SMALL, 3), (30, 31, 3)]
