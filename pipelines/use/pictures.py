"""What happens to pictures, for the eye: sheets of rows and reconstructions, a map of features."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.batches import ArrayBatch
from pipelines.data.images import ImageRows
from pipelines.data.manifest import Manifest, Picture, Split
from pipelines.data.shards import Rejected
from pipelines.data.views import View
from pipelines.run import Run
from pipelines.use.heldout import SEED
from pipelines.use.sheet import COLOURS, Cell, Head, draw_map, draw_sheet, write_png
from ssl_models.autoencoder import Autoencoder
from ssl_models.objective import Objective

SHOWN = 8
"""Rows of a sheet."""
MAPPED = 400
"""Pictures of a map."""
ROWS_PER_BATCH = 64
LINE_CHARACTERS = 26
NO_BREAK = "\xa0"


class Slot(NamedTuple):
    """The rows of one slot, and the pictures that they were made of."""

    pictures: Sequence[Picture]
    batch: ArrayBatch
    seed: int


class Column(NamedTuple):
    """One picture of each row, and what is said below it."""

    head: Head
    pixels: NDArray[np.uint8]
    """(rows, channels, height, width)."""
    lines: Sequence[Sequence[str]]

    def cell(self, row: int) -> Cell:
        """Return the cell of one row."""
        return Cell(self.pixels[row].transpose(1, 2, 0), self.lines[row])


def write_pictures(objective: Objective, run: Run, folder: Path) -> list[Path]:
    """Draw held-out pictures, or training ones where those are too few; return the files.

    In the folder: `triplets.png`, or of an autoencoder `reconstructions.png`, and `map.png`.
    """
    maker = ImageRows(run.config.images)
    split: Split = "heldout" if run.manifest.records_where("heldout") >= SHOWN else "training"
    pictures = list(_pictures(run.manifest, split, SHOWN))
    rows = maker.rows(pictures, seed=SEED, order=0)
    slot = Slot(pictures, maker.collate(rows, seed=SEED, step=0, slot=0), SEED)
    name, autoencoder = "triplets.png", None
    if isinstance(objective, Autoencoder):
        name, autoencoder = "reconstructions.png", objective
    drawn = {
        name: draw_rows(maker, slot, autoencoder),
        "map.png": draw_features(objective, maker, _pictures(run.manifest, split, MAPPED)),
    }
    return [write_png(folder / file, image) for file, image in drawn.items()]


def draw_rows(maker: ImageRows, slot: Slot, autoencoder: Autoencoder | None = None) -> Image.Image:
    """Return a sheet of the first rows of a slot that have a weight.

    Each row shows the picture with the crops of its views, the views as the model sees them, and of
    pairs x2, of single rows the corrupted view and what an autoencoder draws, with its loss.
    """
    shown = np.flatnonzero(slot.batch["weight"])[:SHOWN]
    batch = {name: array[shown] for name, array in slot.batch.items()}
    drawn = [_cropped(maker, slot.pictures[row], slot.seed) for row in shown.tolist()]
    cells, words = [cell for cell, _ in drawn], [told for _, told in drawn]
    nothing: list[list[str]] = [[]] * len(shown)
    if "negative" in batch:
        other = slot.batch["first"][batch["negative"]]
        columns = [
            Column(Head("x1, a view", COLOURS[0]), batch["first"], [told[0] for told in words]),
            Column(Head("x1', another", COLOURS[1]), batch["second"], [told[1] for told in words]),
            Column(Head("x2, of the same slot"), other, nothing),
        ]
    else:
        head = Head("x, a view", COLOURS[0])
        columns = [Column(head, batch["image"], [told[0] for told in words])]
    if "corrupted" in batch:
        columns.append(Column(Head("x, corrupted"), batch["corrupted"], nothing))
    if autoencoder is not None:
        columns.append(reconstructed(autoencoder, batch))
    rows = [[cell, *(column.cell(row) for column in columns)] for row, cell in enumerate(cells)]
    return draw_sheet([Head("picture"), *(column.head for column in columns)], rows)


def reconstructed(autoencoder: Autoencoder, batch: ArrayBatch) -> Column:
    """Return what is drawn of each row, and under it its loss, as in training."""
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    losses = []
    autoencoder.eval()
    with torch.no_grad():
        drawn = autoencoder.reconstruct(tensors).numpy()
        for row in range(len(drawn)):
            one = {name: tensor[row : row + 1] for name, tensor in tensors.items()}
            total, weight = autoencoder(one).terms["reconstruction"]
            losses.append([f"{autoencoder.config.distance} {float(total / weight):.4f}"])
    return Column(Head("D(E(x))"), drawn, losses)


def draw_features(
    objective: Objective, maker: ImageRows, pictures: Iterable[Picture]
) -> Image.Image:
    """Return a map of pictures at the first two principal components of their features."""
    plain = [maker.plain(picture.data) for picture in pictures]
    seen = [pixels for pixels in plain if not isinstance(pixels, Rejected)]
    objective.eval()
    with torch.no_grad():
        batches = [
            {"image": torch.from_numpy(np.stack(seen[start : start + ROWS_PER_BATCH]))}
            for start in range(0, len(seen), ROWS_PER_BATCH)
        ]
        features_nD = torch.cat([objective.encode(batch) for batch in batches])
    places_n2, ratio = principal_components(features_nD.double().numpy())
    head = (
        f"features of {len(seen)} pictures at their first two of {features_nD.shape[1]} principal "
        f"components, {ratio:.0%} of the variance"
    )
    return draw_map(places_n2, [pixels.transpose(1, 2, 0) for pixels in seen], head)


def principal_components(
    features_nD: NDArray[np.float64],
) -> tuple[NDArray[np.float64], float]:
    """Return the first two principal components of rows, (n, 2), and their share of variance."""
    centred_nD = features_nD - features_nD.mean(axis=0)
    left, values, _ = np.linalg.svd(centred_nD, full_matrices=False)
    places = np.zeros((len(features_nD), 2))
    places[:, : len(values[:2])] = (left * values)[:, :2]
    total = float(np.square(values).sum())
    return places, float(np.square(values[:2]).sum()) / total if total else 0.0


def changes(view: View, channels: int) -> dict[str, str]:
    """Return the changes that a view makes beside its crop, and how strong each is."""
    factors = {
        "brightness": view.brightness,
        "contrast": view.contrast,
        "saturation": view.saturation if channels == 3 else 1.0,
    }
    return (
        ({"flip": ""} if view.flip else {})
        | ({"rotation": f"{view.degrees:+.0f}"} if view.degrees else {})
        | {name: f"{factor:.2f}" for name, factor in factors.items() if factor != 1}
        | ({"hue": f"{view.hue:+.2f}"} if view.hue and channels == 3 else {})
        | ({"greyscale": ""} if view.greyscale and channels == 3 else {})
        | ({"blur": f"{view.blur_sigma:.1f}"} if view.blur_sigma else {})
        | ({"solarisation": ""} if view.solarise else {})
        | ({"inversion": ""} if view.invert else {})
    )


def _cropped(maker: ImageRows, picture: Picture, seed: int) -> tuple[Cell, list[list[str]]]:
    """Return a picture with the crops of its views, and what was drawn for each of them."""
    pixels = maker.decoded(picture, seed)
    assert not isinstance(pixels, Rejected)  # a placeholder has no weight
    height, width, channels = pixels.shape
    views = maker.views(picture, pixels, seed)
    words = []
    for view in views:
        crop = f"crop {view.width * view.height / (width * height):.0%}"
        named = [f"{name} {amount}".strip() for name, amount in changes(view, channels).items()]
        whole = ", ".join(word.replace(" ", NO_BREAK) for word in [crop, *named])
        lines = textwrap.wrap(whole, LINE_CHARACTERS, break_on_hyphens=False)
        words.append([line.replace(NO_BREAK, " ") for line in lines])
    return Cell(pixels, boxes=[(v.left, v.top, v.width, v.height) for v in views]), words


def _pictures(manifest: Manifest, split: Split, count: int) -> Iterator[Picture]:
    """Yield so many pictures of a split, if there are, of blocks spread over the corpus."""
    blocks = manifest.blocks_of(split)
    stride = -(-manifest.records_where(split) // count)
    spread = (block for start in range(stride) for block in blocks[start::stride])
    found = (picture for block in spread for picture in manifest.read(block, split))
    return islice(found, count)  # the bytes of large ones are not held together
