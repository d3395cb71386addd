"""What an image encoder has learned, on held-out pictures: the loss, and whether it collapsed."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import torch

from pipelines.data.images import ImageRows
from pipelines.data.manifest import Manifest, Picture
from pipelines.run import Run
from pipelines.use.heldout import SEED, Held, NothingHeldOutError, without_copies
from ssl_models.collapse import diagnose, measure
from ssl_models.contrastive import Contrastive
from ssl_models.objective import Objective

MAX_PICTURES = 10_000
"""Of more held-out pictures every n-th block is evaluated."""


@dataclass(frozen=True, kw_only=True)
class ImageEvaluation:
    """Figures on held-out pictures."""

    pictures: int
    losses: dict[str, float]
    """The mean of each term of the loss."""
    collapse: str
    """The name of a collapse of the embeddings that the loss compares; empty if there is none."""
    also_trained: int = 0
    """Pictures left out because they were trained on."""

    def metrics(self) -> dict[str, float]:
        """Return the figures by the names they are logged under."""
        losses = {f"heldout/{name}_loss": loss for name, loss in self.losses.items()}
        counts = {"pictures": self.pictures, "also_trained": self.also_trained}
        return {f"heldout/{name}": float(count) for name, count in counts.items()} | losses

    def lines(self) -> list[str]:
        """Return the figures in words."""
        losses = ", ".join(f"{name} loss {loss:.4f}" for name, loss in self.losses.items())
        lines = [f"on {self.pictures} held-out pictures: {losses}"]
        if self.also_trained:
            num_seen = self.pictures + self.also_trained
            lines.insert(
                0, f"{self.also_trained} of {num_seen} pictures were also trained on: left out"
            )
        if self.collapse:
            lines.append(f"the encoder shows {self.collapse}: its embeddings tell little apart")
        return lines


def evaluate_images(
    objective: Objective, run: Run, data: Manifest | None = None
) -> ImageEvaluation:
    """Return the figures of a run's objective on its held-out pictures, or on other data.

    They are seen in slots as in training. Other data is one manifest with nothing held out, and
    needs Ray; what of it the run was trained on is left out.

    Raises:
        NothingHeldOutError: If no picture is left to evaluate on.
    """
    maker = ImageRows(run.config.images)
    held = Held(run.manifest, "heldout", MAX_PICTURES)
    if data is not None:
        held = without_copies(Held(data, "training", MAX_PICTURES), run.manifest)
    sums: dict[str, Any] = {}
    embedded = []
    num_pictures = 0
    objective.eval()
    for number, rows in enumerate(_slots(held, maker, run.config.order.rows_per_slot)):
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
        raise NothingHeldOutError(
            "every picture was also trained on: name other --data"
            if held.left_out
            else "no picture is held out that can be decoded and told from another: a larger "
            "--source.heldout-ratio holds out more"
        )
    return ImageEvaluation(
        pictures=num_pictures,
        losses={name: float(total / weight) for name, (total, weight) in sums.items()},
        collapse=_collapse(torch.cat(embedded)) if embedded and num_pictures > 1 else "",
        also_trained=held.num_left_out,
    )


def _collapse(embedded_n2D: torch.Tensor) -> str:
    return diagnose(measure(embedded_n2D[:, 0], embedded_n2D[:, 1]))


def _slots(held: Held, maker: ImageRows, size: int) -> Iterator[pa.Table]:
    """Yield the rows of held-out pictures, as many at once as a slot has."""
    pictures: Iterator[Picture] = held.items()
    while some := [*islice(pictures, size)]:
        yield maker.rows(some, seed=SEED, order=0)
