"""Contrastive learning: an image encoder whose two views of an image lie closer than other images.

Shapes: B rows of a slot, N rows that are compared, P embedding size. A batch holds `first` and
`second` uint8 (B, C, H, W), two augmented views of an image; `weight` float32 (B,), 0 for a
placeholder; for random negatives `negative` int64 (B,), the row of the slot that each is told from;
and, if known, `group` int64 (B,), an id that duplicates share and nothing else does, in all of the
data. For `encode` it holds `image` uint8 (B, C, H, W).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, assert_never

import torch
from torch import Tensor, nn

from ssl_models.collapse import Figures, diagnose, measure
from ssl_models.contrastive_losses import (
    NTXentLossConfig,
    Rows,
    TripletLossConfig,
    nt_xent_logits,
    nt_xent_losses,
    triplet_losses,
    unit_rows,
)
from ssl_models.gather import gather_rows, own_rows, row_counts
from ssl_models.image_encoder import ImageEncoderConfig, build_image_encoder
from ssl_models.objective import WATCHED, Batch, Objective, StepOutput, Terms

TOLD_BY_LOSS = ("active", "margin_gap")
"""Figures that metrics of the triplet loss have, of all rows."""
WATCHED_ROWS = 256
"""Of a step, about so many rows are watched, as many of each slot: enough for a rank of 128."""


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """An encoder, a projection head that is dropped afterwards, and a loss on its embeddings.

    The head is that of Chen et al. 2020, SimCLR, arXiv:2002.05709, section 4.2: what it takes in
    serves other tasks better than what it gives out.
    """

    encoder: ImageEncoderConfig
    kind: Literal["contrastive"] = "contrastive"
    loss: TripletLossConfig | NTXentLossConfig = field(default_factory=TripletLossConfig)
    negatives_from: Literal["slot", "global"] = "slot"
    """Which rows are compared: those of a slot, or those of all slots of all ranks: more negatives,
    for the memory of the graphs of all slots of a rank."""
    projection_hidden_size: int = 512
    projection_size: int = 128
    """Size of the embeddings that the loss compares."""

    def __post_init__(self) -> None:
        for name in ("projection_hidden_size", "projection_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.is_random and self.negatives_from == "global":
            raise ValueError(
                "negatives_from 'global' with random negatives: those are rows of the slot; "
                "choose 'slot', or mined negatives"
            )

    @property
    def is_random(self) -> bool:
        """Whether the batch names the negatives."""
        return isinstance(self.loss, TripletLossConfig) and self.loss.negatives == "random"


class Contrastive(Objective):
    """An image encoder with a projection head, trained on one term, `triplet` or `nt_xent`."""

    pretraining_only = ("projection.",)
    remedy = (
        "a lower learning rate or a longer warm-up, semi-hard or random negatives in place of hard "
        "ones, or the loss nt-xent"
    )

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()
        self.config = config
        self.term = config.loss.kind.replace("-", "_")  # as its metrics are called
        self.coefficients = {self.term: 1.0}
        self.joins_slots = config.negatives_from == "global"
        self.encoder = build_image_encoder(config.encoder)
        self.projection = nn.Sequential(
            nn.Linear(config.encoder.feature_size, config.projection_hidden_size),
            nn.ReLU(),
            nn.Linear(config.projection_hidden_size, config.projection_size),
        )

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Return the weight of the anchors, those without a negative in reach included."""
        return {self.term: batch["weight"].sum(dtype=torch.float32)}

    def forward(self, batch: Batch) -> StepOutput:
        """Return the summed losses of one slot, computed in float32 even under autocast.

        With global negatives this is the step of ranks that have one slot each. Metrics are sums
        over anchors: of `triplet_loss`, `active`, which is 1 where it is above 0, `margin_gap`, the
        loss / margin - 1, and `positive_distance`, and over anchors with a negative of
        `negative_distance`; or of `nt_xent_loss` and `nt_xent_accuracy`, 1 where the other view is
        the nearest.
        """
        return self.join([self.embed(batch)], [batch])

    def embed(self, batch: Batch) -> Tensor:
        """Return the embeddings of both views, float32 (B, 2, P), in one pass of the encoder."""
        features = self.encoder(torch.cat([batch["first"], batch["second"]]))
        embedded: Tensor = self.projection(features).to(features.dtype)
        loss = self.config.loss
        if isinstance(loss, NTXentLossConfig) or loss.normalize:
            embedded = unit_rows(embedded)
        return torch.stack(embedded.chunk(2), dim=1)

    def join(self, embedded: Sequence[Tensor], batches: Sequence[Batch]) -> StepOutput:
        """Return the summed losses of all rows of these slots; a collective if global."""
        with torch.autocast(embedded[0].device.type, enabled=False):
            rows, own = self._compared(torch.cat(list(embedded)), batches)
            terms, metrics = self._losses(rows, own, batches)
        detached = {name: (total.detach(), weight) for name, (total, weight) in metrics.items()}
        return StepOutput(terms=terms, metrics=detached)

    def encode(self, batch: Batch) -> Tensor:
        """Return the encoder's features of `image`, float32 (B, width)."""
        features: Tensor = self.encoder(batch["image"])
        return features

    @torch.no_grad()
    def watch(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Return the figures of `collapse.py` of some rows of every slot; none of fewer than two.

        It costs a forward pass of these rows.
        """
        device = batches[0]["weight"].device
        share = -(-WATCHED_ROWS // sum(row_counts(len(batches), device)))
        heads = [{name: tensor[:share] for name, tensor in batch.items()} for batch in batches]
        weight = torch.cat([head["weight"] for head in heads])
        counts = row_counts(len(weight), device)
        everyone_N2P = gather_rows(torch.cat([self.embed(head) for head in heads]), counts)
        used_n2P = everyone_N2P[gather_rows(weight, counts) > 0].float().cpu()
        if len(used_n2P) < 2:
            return {}
        figures = vars(measure(used_n2P[:, 0], used_n2P[:, 1]))
        return {f"{WATCHED}{name}": figures[name] for name in figures if name not in TOLD_BY_LOSS}

    def diagnose(self, means: Mapping[str, float]) -> str:
        """Return the name of a collapse, as `collapse.py` gives it, or ""."""
        watched = {
            name.removeprefix(WATCHED): mean
            for name, mean in means.items()
            if name.startswith(WATCHED)
        }
        told = {name: means.get(name, math.nan) for name in TOLD_BY_LOSS}
        return diagnose(Figures(**watched, **told)) if watched else ""

    def _compared(self, embedded_B2P: Tensor, batches: Sequence[Batch]) -> tuple[Rows, slice]:
        """Return the rows that are compared, and which of them are this rank's."""
        weight = torch.cat([batch["weight"] for batch in batches])
        groups = [batch["group"] for batch in batches if "group" in batch]
        group = torch.cat(groups) if groups else None
        if not self.joins_slots:
            return Rows(embedded_B2P[:, 0], embedded_B2P[:, 1], weight, group), slice(None)
        counts = row_counts(len(weight), weight.device)
        everyone_N2P = gather_rows(embedded_B2P, counts)
        rows = Rows(
            everyone_N2P[:, 0],
            everyone_N2P[:, 1],
            gather_rows(weight, counts),
            None if group is None else gather_rows(group, counts),
        )
        return rows, own_rows(counts)

    def _losses(self, rows: Rows, own: slice, batches: Sequence[Batch]) -> tuple[Terms, Terms]:
        """Return the term and the metrics of the anchors `own`."""
        weight_B = rows.weight[own]
        total = weight_B.sum(dtype=torch.float32)
        match self.config.loss:
            case TripletLossConfig() as loss:
                named = None
                if self.config.is_random:
                    named = torch.cat([batch["negative"] for batch in batches])
                found = triplet_losses(rows, own, loss, named)
                term = ((found.loss * weight_B).sum(), total)
                told_B = weight_B * found.negative.isfinite()
                far = (found.negative.nan_to_num(posinf=0.0) * told_B).sum()
                metrics = {
                    "triplet_loss": term,
                    "active": (((found.loss > 0) * weight_B).sum(), total),
                    "margin_gap": (term[0] / loss.margin - total, total),
                    "positive_distance": ((found.positive * weight_B).sum(), total),
                    "negative_distance": (far, told_B.sum(dtype=torch.float32)),
                }
            case NTXentLossConfig() as loss:
                logits, positive_2B = nt_xent_logits(rows, own, loss)
                term = ((nt_xent_losses(logits, positive_2B) * weight_B).sum(), total)
                is_nearest_2B = logits.argmax(dim=1) == positive_2B
                right = (is_nearest_2B.reshape(2, -1).float().mean(dim=0) * weight_B).sum()
                metrics = {"nt_xent_loss": term, "nt_xent_accuracy": (right, total)}
            case _:
                assert_never(self.config.loss)
        return {self.term: term}, metrics
