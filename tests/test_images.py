"""Tests of image rows: each picture's views are its own, and so is its partner."""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from pipelines.data.decode import decode
from pipelines.data.images import FATES, USED, ImageConfig, ImageRows, partners
from pipelines.data.manifest import Picture
from pipelines.data.shards import Rejected
from pipelines.data.views import ViewConfig, apply_view
from tests.test_decode import encode, scene

CONFIG = ImageConfig(views=ViewConfig(size=16, rotation=0.5, inversion=0.3, blur=0.3))


def pictures(count: int = 12) -> list[Picture]:
    forms = ("JPEG", "PNG", "WEBP")
    return [
        Picture(100 + i, 7 * i, encode(scene(40 + i, 60, seed=i), forms[i % 3]))
        for i in range(count)
    ]


def rows_of(found: list[Picture], config: ImageConfig = CONFIG, **given: Any) -> pa.Table:
    return ImageRows(config).rows(found, **({"seed": 0, "order": 0} | given))


def view_bytes(table: pa.Table, name: str) -> list[bytes]:
    shape = (table.num_rows, -1)
    values: NDArray[np.uint8] = table[name].combine_chunks().flatten().to_numpy().reshape(shape)
    return [row.tobytes() for row in values]


def test_rows_are_the_views_that_are_told() -> None:
    maker = ImageRows(CONFIG)
    table = rows_of(pictures())
    for i, picture in enumerate(pictures()):
        pixels = maker.decoded(picture, 0)
        assert not isinstance(pixels, Rejected)
        for name, view in zip(("first", "second"), maker.views(picture, pixels, 0), strict=True):
            expected = apply_view(pixels, view, 16).transpose(2, 0, 1)
            assert view_bytes(table, name)[i] == expected.tobytes()


def test_a_large_jpeg_is_decoded_at_a_fraction_that_enlarges_no_crop() -> None:
    maker, heights = ImageRows(replace(CONFIG, views=ViewConfig(size=48))), set()
    data = encode(scene(300, 400), "JPEG")
    whole = decode(data, 3)
    assert not isinstance(whole, Rejected)
    for picture in (Picture(i, i, data) for i in range(40)):
        pixels = maker.decoded(picture, 0)
        assert not isinstance(pixels, Rejected)
        part = round(300 / len(pixels))
        sides = [min(v.width, v.height) for v in maker.views(picture, whole, 0)]
        assert part * 48 <= min(sides)
        assert part == 8 or 2 * part * 48 > min(sides)
        for small, large in zip(
            maker.views(picture, pixels, 0), maker.views(picture, whole, 0), strict=True
        ):
            assert np.abs(part * np.array(small[:4]) - large[:4]).max() <= 2 * part
            assert small[4:] == large[4:]
        heights.add(len(pixels))
    assert heights == {150, 75}


def test_views_depend_on_the_record_the_visit_and_the_seed_alone() -> None:
    found = pictures()
    table = rows_of(found)
    backwards = rows_of(found[::-1], order=5)
    for name in ("first", "second"):
        assert view_bytes(table, name) == view_bytes(backwards, name)[::-1]
        for other in (
            rows_of([picture._replace(visit=1) for picture in found]),
            rows_of(found, seed=1),
            rows_of([picture._replace(record=picture.record + 50) for picture in found]),
        ):
            assert not set(view_bytes(table, name)) & set(view_bytes(other, name))


def test_the_two_views_of_a_picture_differ() -> None:
    table = rows_of(pictures())
    assert not set(view_bytes(table, "first")) & set(view_bytes(table, "second"))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_has_the_shapes_and_types_the_model_expects(channels: Any) -> None:
    config = replace(CONFIG, channels=channels)
    batch = ImageRows(config).collate(rows_of(pictures(), config), seed=0, step=3, slot=1)
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        "first": (np.uint8, (12, channels, 16, 16)),
        "second": (np.uint8, (12, channels, 16, 16)),
        "weight": (np.float32, (12,)),
        "negative": (np.int64, (12,)),
        "group": (np.int64, (12,)),
    }
    assert (batch["weight"] == 1).all()


def test_single_rows_have_one_view_and_a_corrupted_one_where_asked_for() -> None:
    config = replace(CONFIG, rows="single")
    batch = ImageRows(config).collate(rows_of(pictures(), config), seed=0, step=0, slot=0)
    assert sorted(batch) == ["image", "weight"]
    noisy = replace(config, corruption=0.3)
    corrupted = ImageRows(noisy).collate(rows_of(pictures(), noisy), seed=0, step=0, slot=0)
    assert (corrupted["image"] == batch["image"]).all()
    differs = (corrupted["corrupted"] != batch["image"]).any(axis=1)
    assert 0.25 < differs.mean() < 0.32
    assert (corrupted["corrupted"].max(axis=1)[differs] == 0).all()


def test_what_cannot_be_decoded_is_black_and_has_no_weight() -> None:
    found = pictures()
    found[3] = found[3]._replace(data=b"<html>")
    found[6] = found[6]._replace(data=found[6].data[:-200])
    table = rows_of(found)
    fates = [FATES[fate] for fate in table["fate"].to_pylist()]
    assert fates[3] == "quarantined:not-an-image"
    assert fates[6] in ("quarantined:cut-image", "quarantined:bad-image")
    assert fates.count(FATES[USED]) == 10
    batch = ImageRows(CONFIG).collate(table, seed=0, step=0, slot=0)
    assert batch["weight"].tolist() == [0.0 if i in (3, 6) else 1.0 for i in range(12)]
    assert not batch["first"][[3, 6]].any()
    assert not set(batch["negative"][batch["weight"] > 0]) & {3, 6}


def test_partners_are_others_and_no_copies() -> None:
    content = np.array([1, 1, 2, 3, 3, 3, 4, 5], dtype=np.uint64)
    used = np.array([True] * 7 + [False])
    for number in range(200):
        partner = partners(content, used, number)
        assert partner[7] == -1
        for i in range(7):
            assert content[partner[i]] != content[i]
            assert used[partner[i]]


def test_partners_are_uniform_over_those_allowed() -> None:
    content, used = np.arange(8, dtype=np.uint64), np.ones(8, dtype=bool)
    counts = np.zeros((8, 8))
    for number in range(3000):
        counts[np.arange(8), partners(content, used, number)] += 1
    assert (np.diag(counts) == 0).all()
    expected = 3000 / 7
    chi_square = ((counts + np.eye(8) * expected - expected) ** 2 / expected).sum()
    assert chi_square < 84  # 48 degrees of freedom, p = 0.001


@pytest.mark.parametrize("content", [[5], [5, 5, 5]])
def test_without_another_picture_there_is_no_partner(content: list[int]) -> None:
    alone = partners(np.array(content, np.uint64), np.ones(len(content), dtype=bool), 0)
    assert (alone == -1).all()


def test_partners_depend_on_seed_step_and_slot() -> None:
    table, maker = rows_of(pictures()), ImageRows(CONFIG)
    address = {"seed": 0, "step": 0, "slot": 0}
    first = maker.collate(table, **address)["negative"].tolist()
    assert maker.collate(table, **address)["negative"].tolist() == first
    for name in address:
        assert maker.collate(table, **(address | {name: 1}))["negative"].tolist() != first


def test_golden_rows_hold_for_ever() -> None:
    """Pixels of lossless pictures of our own; what a JPEG decoder rounds is not ours."""
    board = (np.indices((24, 30)).sum(axis=0)[..., None] * [3, 5, 7] % 256).astype(np.uint8)
    found = [Picture(i, i, encode(np.roll(board, i, axis=1), "PNG"), visit=i) for i in range(4)]
    table = rows_of(found, replace(CONFIG, views=ViewConfig(size=8)), seed=11)
    digest = hashlib.sha256(b"".join(view_bytes(table, "first") + view_bytes(table, "second")))
    assert digest.hexdigest() == (
        "7bcfa495ef0592340e20ad693d5e4099de161fa386bee1377ceed3b6e49cfa96"
    )


@pytest.mark.parametrize("fields", [{"corruption": 1.0}, {"corruption": 0.5, "rows": "pairs"}])
def test_what_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="corruption"):
        replace(CONFIG, **fields)
