"""What an image encoder has learned, on held-out pictures: the loss, and whether it collapsed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from pipelines.data.images import ImageRows
from pipelines.data.manifest import Picture
from pipelines.errors import DataError
from pipelines.run import Run
from ssl_models.collapse import diagnose, measure
from ssl_models.contrastive import Contrastive
from ssl_models.objective import Objective

MAX_PICTURES = 10_000
"""Of more held-out pictures every n-th block is evaluated."""
SEED = -1
"""One that no run can have: training rows never share a draw with these."""


@dataclass(frozen=True, kw_only=True)
class ImageEvaluation:
    """Figures on held-out pictures."""

    pictures: int
    losses: dict[str, float]
    """The mean of each term of the loss."""
    collapse: str
    """The name of a collapse of the embeddings that the loss compares; empty if there is none."""

    def metrics(self) -> dict[str, float]:
        """Return the figures by the names they are logged under."""
        losses = {f"heldout/{name}_loss": loss for name, loss in self.losses.items()}
        return {"heldout/pictures": float(self.pictures)} | losses

    def lines(self) -> list[str]:
        """Return the figures in words."""
        losses = ", ".join(f"{name} loss {loss:.4f}" for name, loss in self.losses.items())
        lines = [f"on {self.pictures} held-out pictures: {losses}"]
        if self.collapse:
            lines.append(f"the encoder shows {self.collapse}: its embeddings tell little apart")
        return lines


def evaluate_images(objective: Objective, run: Run) -> ImageEvaluation:
    """Return the figures of a run's objective on its held-out pictures, in slots as in training.

    Raises:
        DataError: If no picture is held out.
    """
    maker = ImageRows(run.config.images)
    sums: dict[str, Any] = {}
    embedded = []
    num_pictures = 0
    objective.eval()
    for number, rows in enumerate(_slots(run, maker)):
        arrays = maker.collate(rows, seed=SEED, step=number, slot=0)
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        used = batch["weight"] > 0
        num_pictures += int(used.sum())
        with torch.no_grad():
            for name, pair in objective(batch).terms.items():
                sums[name] = sums.get(name, 0) + torch.stack(pair).double()
            if isinstance(objective, Contrastive):
                embedded.append(objective.embed(batch)[used])
    if not num_pictures:
        raise DataError("no picture is held out; set --source.heldout-ratio above 0")
    return ImageEvaluation(
        pictures=num_pictures,
        losses={name: float(total / weight) for name, (total, weight) in sums.items()},
        collapse=_collapse(torch.cat(embedded)) if embedded and num_pictures > 1 else "",
    )


def _collapse(embedded_n2D: torch.Tensor) -> str:
    return diagnose(measure(embedded_n2D[:, 0], embedded_n2D[:, 1]))


def _slots(run: Run, maker: ImageRows) -> Iterator[pa.Table]:
    """Yield the rows of held-out pictures, as many at once as a slot has."""
    size, manifest = run.config.order.rows_per_slot, run.manifest
    waiting: list[Picture] = []
    stride = -(-manifest.records_where("heldout") // MAX_PICTURES) or 1
    for block in manifest.blocks_of("heldout")[::stride]:
        waiting += manifest.read(block, "heldout")
        while len(waiting) >= size:
            yield maker.rows(waiting[:size], seed=SEED, order=0)
            waiting = waiting[size:]
    if waiting:
        yield maker.rows(waiting, seed=SEED, order=0)
