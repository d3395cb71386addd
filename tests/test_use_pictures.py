"""What a run draws of its pictures: true crops and views, what the objective draws, a true map."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines.cli import main
from pipelines.config import RunConfig
from pipelines.data import indexing
from pipelines.data.decode import decode
from pipelines.data.images import ImageRows
from pipelines.data.manifest import Manifest, Picture
from pipelines.data.plan import Plan
from pipelines.data.shards import Rejected, SourceConfig, find_shards
from pipelines.recipes import recipe
from pipelines.run import Run
from pipelines.use import preview_images
from pipelines.use.pictures import (
    SHOWN,
    Slot,
    changes,
    draw_rows,
    principal_components,
    reconstructed,
    write_pictures,
)
from pipelines.use.preview_images import describe_pictures, first_slot
from pipelines.use.sheet import COLOURS, GAP, LINE, MAP, PANEL, THUMBNAIL, Cell, draw_cell
from ssl_models import build_objective
from ssl_models.autoencoder import Autoencoder
from tests.corpus import serial_map
from tests.pictures import make_picture, make_tar
from tests.pictures import write_pictures as write_shards

pytestmark = pytest.mark.usefixtures("one_thread")
TOP = LINE + GAP
"""Where the first row of a sheet starts."""


def index(folder: Path, heldout_ratio: float = 0.1) -> Manifest:
    source = SourceConfig(heldout_ratio=heldout_ratio, max_quarantined_ratio=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "MIN_BLOCK_BYTES", 8000)
        return indexing.build(find_shards([str(folder)]), source, serial_map)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("pictures")
    write_shards(folder)
    return index(folder)


def slot_of(config: RunConfig, num_pictures: int = 10) -> tuple[ImageRows, Slot]:
    maker = ImageRows(config.images)
    pictures = [Picture(i, i, make_picture(i, 40)) for i in range(num_pictures)]
    rows = maker.rows(pictures, seed=3, order=0)
    return maker, Slot(pictures, maker.collate(rows, seed=3, step=0, slot=0), 3)


def panel(sheet: Image.Image, column: int, top: int = TOP) -> NDArray[np.uint8]:
    left = GAP + column * (PANEL + GAP)
    return np.asarray(sheet)[top : top + PANEL, left : left + PANEL]


def as_drawn(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(draw_cell(Cell(pixels.transpose(1, 2, 0))))


def test_a_sheet_shows_the_crops_the_views_and_the_partner_of_each_row() -> None:
    maker, slot = slot_of(recipe("image-tiny"))
    sheet = draw_rows(maker, slot)
    assert sheet.size[0] == GAP + 4 * (PANEL + GAP)
    assert sheet.size[1] > SHOWN * (PANEL + GAP)
    partner = slot.batch["first"][slot.batch["negative"][0]]
    for column, view in enumerate((slot.batch["first"][0], slot.batch["second"][0], partner), 1):
        assert np.array_equal(panel(sheet, column), as_drawn(view))
    pixels = decode(slot.pictures[0].data, 3)
    assert not isinstance(pixels, Rejected)
    views = maker.views(slot.pictures[0], pixels, slot.seed)
    scale = PANEL / max(pixels.shape[:2])
    drawn = panel(sheet, 0)
    for view, colour in zip(views[::-1], COLOURS[::-1], strict=True):  # the last is on top
        left, top = round(view.left * scale), round(view.top * scale)
        right, bottom = (view.left + view.width) * scale, (view.top + view.height) * scale
        corners = ((left, top), (round(right) - 1, top), (left, round(bottom) - 1))
        seen = [tuple(drawn[y, x].tolist()) for x, y in corners]
        assert seen == [colour] * 3 or (colour == COLOURS[0] and set(seen) <= set(COLOURS))
    assert drawn.std() > 10


def test_rows_without_weight_are_not_on_the_sheet() -> None:
    maker, slot = slot_of(recipe("image-tiny"), 3)
    slot.batch["weight"][0] = 0
    sheet = draw_rows(maker, slot)
    assert np.array_equal(panel(sheet, 1), as_drawn(slot.batch["first"][1]))
    assert sheet.size[1] < 3 * (PANEL + GAP)


def test_reconstructions_and_their_losses_are_those_of_the_objective() -> None:
    config = recipe("image-tiny-autoencoder")
    config = replace(config, images=replace(config.images, corruption=0.3))
    maker, slot = slot_of(config, 4)
    torch.manual_seed(0)
    objective = build_objective(config.objective)
    assert isinstance(objective, Autoencoder)
    batch = {name: torch.from_numpy(array) for name, array in slot.batch.items()}

    column = reconstructed(objective, slot.batch)

    with torch.no_grad():
        drawn = objective.reconstruct(batch).numpy()
        total, weight = objective(batch).terms["reconstruction"]
    assert np.array_equal(column.pixels, drawn)
    losses = [float(line.removeprefix("mse ")) for (line,) in column.lines]
    assert np.mean(losses) == pytest.approx(float(total / weight), abs=1e-4)
    assert len(set(losses)) == 4
    sheet = draw_rows(maker, slot, objective)
    columns = (slot.batch["image"][0], slot.batch["corrupted"][0], drawn[0])
    for number, pixels in enumerate(columns, 1):
        assert np.array_equal(panel(sheet, number), as_drawn(pixels))


def test_principal_components_are_the_axes_of_the_largest_variance() -> None:
    dice = np.random.default_rng(0)
    axes, _ = np.linalg.qr(dice.normal(size=(6, 6)))
    scales = np.array([9.0, 4.0, 0.3, 0.2, 0.1, 0.1])
    scores = dice.normal(size=(500, 6)) * scales
    places, ratio = principal_components(scores @ axes.T + 7)
    for number in (0, 1):
        correlation = np.corrcoef(places[:, number], scores[:, number])[0, 1]
        assert abs(correlation) > 0.99
    assert ratio == pytest.approx((places**2).sum() / ((scores - scores.mean(axis=0)) ** 2).sum())
    assert principal_components(np.ones((3, 5)))[1] == 0
    assert principal_components(np.ones((3, 1)))[0].shape == (3, 2)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("image-tiny", ["triplets.png", "map.png"]),
        ("image-tiny-autoencoder", ["reconstructions.png", "map.png"]),
    ],
)
def test_a_run_draws_its_held_out_pictures(
    manifest: Manifest, tmp_path: Path, name: str, files: list[str]
) -> None:
    config = recipe(name)
    run = Run(tmp_path, "key", config, manifest, None)
    objective = build_objective(config.objective)
    written = write_pictures(objective, run, tmp_path / "drawn")
    assert [path.relative_to(tmp_path) for path in written] == [Path("drawn", f) for f in files]
    sheet, drawn_map = (Image.open(path) for path in written)
    assert np.asarray(sheet).std() > 30
    heldout = [p.data for b in manifest.blocks_of("heldout") for p in manifest.read(b, "heldout")]
    assert len(heldout) >= SHOWN
    crops = []
    for data in heldout:
        pixels = decode(data, 3)
        assert not isinstance(pixels, Rejected)
        crops.append(np.asarray(draw_cell(Cell(pixels))))
    shown = panel(sheet, 0)
    alike = [(shown[: crop.shape[0], : crop.shape[1]] == crop).all(axis=2).mean() for crop in crops]
    assert sorted(alike)[-1] > 0.9 > sorted(alike)[-2]  # all but the boxes
    pixels = np.asarray(drawn_map).copy()
    top = 2 * GAP + LINE
    inside = pixels[top : top + MAP, GAP : GAP + MAP]
    assert (inside != 255).any(axis=2).sum() > 3 * THUMBNAIL**2
    inside[:] = 255
    assert (pixels[top + MAP + 1 :] == 255).all()  # below the frame
    assert (pixels[top:, : GAP - 1] == 255).all()


def test_of_large_pictures_few_are_held(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for i in range(60):
        pixels = noise.integers(0, 256, (250, 250, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.bmp")
    config = recipe("image-tiny")
    run = Run(tmp_path, "key", config, index(tmp_path, 0.0), None)
    tracemalloc.start()
    write_pictures(build_objective(config.objective), run, tmp_path / "drawn")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 0.7 * 60 * 250 * 250 * 3  # of all, and the sheet and the map are in it


def test_changes_are_named_with_their_strength() -> None:
    maker, slot = slot_of(recipe("image-tiny"), 1)
    pixels = decode(slot.pictures[0].data, 3)
    assert not isinstance(pixels, Rejected)
    view = maker.views(slot.pictures[0], pixels, 3)[0]._replace(
        flip=True, degrees=-12.4, brightness=1.25, contrast=1.0, saturation=0.8, hue=0.05
    )
    view = view._replace(greyscale=True, blur_sigma=1.26, solarise=True, invert=True)
    always = {"flip": "", "rotation": "-12", "brightness": "1.25"}
    after = {"blur": "1.3", "solarisation": "", "inversion": ""}
    colour = {"saturation": "0.80", "hue": "+0.05", "greyscale": ""}
    assert changes(view, 3) == always | colour | after
    assert changes(view, 1) == always | after


def test_the_first_slot_is_the_one_that_the_run_starts_with(manifest: Manifest) -> None:
    config = recipe("image-tiny")
    plan, maker = Plan(manifest, 5, 1), ImageRows(config.images)
    num_rows = len(manifest.read(plan.order(0).blocks[0].block, "training")) + 3  # two orders
    slot = first_slot(plan, maker, num_rows)
    assert len(slot.pictures) == len(slot.batch["first"]) == num_rows
    for row in (0, num_rows - 1):
        made = maker.rows([slot.pictures[row]], seed=5, order=0)
        alone = maker.collate(made, seed=0, step=0, slot=0)
        assert np.array_equal(alone["first"][0], slot.batch["first"][row])


def test_the_report_counts_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [(f"{i:03}.{'png' if i % 2 else 'jpeg'}", make_picture(i, 20)) for i in range(20)]
    members.append(("copy.png", make_picture(1, 20)))
    members.append(("cut.jpeg", make_picture(0, 60)[:900]))
    (tmp_path / "a.tar").write_bytes(make_tar(members))
    manifest = index(tmp_path, heldout_ratio=0.0)
    config = recipe("image-tiny").images
    config = replace(config, views=replace(config.views, rotation=1.0, flip=0.0, jitter=0.0))
    plan, maker = Plan(manifest, 0, 4), ImageRows(config)

    report = describe_pictures(plan, maker)

    assert (report.pictures, report.copies, report.views) == (22, 1, 42)
    assert report.formats == {"PNG": 11, "JPEG": 10}
    assert report.broken == {"a.tar: cut": "quarantined:cut-image"}
    assert report.sides == ((20, 20.0, 20), (20, 21.0, 22))
    assert report.changed["rotation"] == 1
    assert 0.1 < report.changed["greyscale"] < 0.4
    assert report.changed.keys() == {"rotation", "greyscale"}
    assert 0.2 < report.median_crop < 1
    # Visited three times an epoch, a picture is no copy of itself.
    assert describe_pictures(replace(plan, weights=(3.0,)), maker).copies == 1
    monkeypatch.setattr(preview_images, "SAMPLE_PICTURES", 3)
    assert 3 <= describe_pictures(plan, maker).pictures < 22


@pytest.mark.parametrize("is_loose", [True, False])
def test_a_broken_picture_without_a_key_is_named_by_its_path_or_row(
    tmp_path: Path, is_loose: bool
) -> None:
    data = [make_picture(i, 20) for i in range(8)]
    data[5] = data[5][:-40]
    if is_loose:
        for i, picture in enumerate(data):
            (tmp_path / f"{i}.png").write_bytes(picture)
    else:
        pq.write_table(pa.table({"image": data}), tmp_path / "a.parquet")
    files = find_shards([str(tmp_path)])
    manifest = indexing.build(files, SourceConfig(heldout_ratio=0.0), serial_map, "images")
    report = describe_pictures(Plan(manifest, 0, 4), ImageRows(recipe("image-tiny").images))
    assert list(report.broken) == ["5.png" if is_loose else "a.parquet: row 5"]


@pytest.mark.usefixtures("ray_session")
def test_the_command_writes_a_sheet_and_prints_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "shards", 80)
    assert main(["preview", "image-tiny", "--data", str(tmp_path / "shards"), "--json"]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert report["sheet"] == "preview-image-tiny.png"
    with Image.open(tmp_path / report["sheet"]) as sheet:
        assert sheet.size[0] == GAP + 4 * (PANEL + GAP)
        assert np.asarray(sheet).std() > 30
    training = report["rows_per_epoch"]
    assert training == report["pictures"] < 80
    assert report["steps_per_epoch"] == training / 16
    words = [" ".join(line.split()) for line in shown]
    for said in (
        f"pictures looked at {training}",
        "shorter side in pixels 24 to 24, median 24",
        "broken none",
        f"rows per epoch {training}",
        f"views looked at {2 * training}",
        "preview-image-tiny.png: the first rows of the run, as the model sees them",
    ):
        assert said in words
    assert [line.split()[1] for line in words if line.startswith("training ")] == [str(training)]
    assert {"flip", "greyscale", "brightness"} <= {line.split()[0] for line in words if line}
