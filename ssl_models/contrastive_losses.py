"""Triplet loss and NT-Xent as pure functions of the embeddings of a batch, in float32.

Shapes: N rows that are compared, B of them anchors, D embedding size. Both losses take all N rows
and the slice of the anchors: the anchors of a slot are all of its rows, those of a rank its own
among the rows of all ranks. A row of weight 0 is a placeholder: no positive of it counts, and it is
nobody's negative. Rows of one group are duplicates: never negatives of each other.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

ZERO_NORM = 1e-6


@dataclass(frozen=True, kw_only=True)
class TripletLossConfig:
    """Schroff et al. 2015, FaceNet, arXiv:1503.03832: max(0, d(e1, e1') - d(e1, e2) + margin).

    e1 is the anchor, e1' the other view of its image, e2 a view `first` of another image. The loss
    is the mean over the anchors: the loop divides by weights that it knows from the batch, before
    any forward pass, so the mean over the triplets that still hurt (the default of
    pytorch-metric-learning) has no place here, and FaceNet's sum is this mean on another scale. An
    anchor without a negative in reach adds 0.
    """

    kind: Literal["triplet"] = "triplet"
    distance: Literal["squared-l2", "l2"] = "squared-l2"
    normalize: bool = True
    """Put embeddings on the unit sphere, where squared distances reach from 0 to 4. Without it a
    net may escape the margin by growing."""
    margin: float = 0.2
    """FaceNet's, for squared distances on the sphere."""
    negatives: Literal["random", "semi-hard", "hard", "all"] = "semi-hard"
    """`random`: the row that the batch names, `negative`. `semi-hard`: the nearest that is farther
    than the positive, and where there is none the farthest. `hard`: the nearest. `all`: the mean
    over the losses with each. Random ones soon teach nothing: on a sphere of 128 dimensions they
    are 2 +/- 0.18 away."""

    def __post_init__(self) -> None:
        if not (self.margin > 0.0 and math.isfinite(self.margin)):
            raise ValueError(f"margin must be finite and above 0, got {self.margin}")


@dataclass(frozen=True, kw_only=True)
class NTXentLossConfig:
    """Chen et al. 2020, SimCLR, arXiv:2002.05709, equation 1: tell the other view from all others.

    Cross entropy over cosines / temperature, of both views of an anchor; the negatives are both
    views of every other row. At chance it is ln(2 N - 1).
    """

    kind: Literal["nt-xent"] = "nt-xent"
    temperature: float = 0.5

    def __post_init__(self) -> None:
        if not (self.temperature > 0.0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be finite and above 0, got {self.temperature}")


class Rows(NamedTuple):
    """The rows that are compared."""

    first: Tensor
    """Embeddings (N, D) of the first views."""
    second: Tensor
    """Embeddings (N, D) of the second views."""
    weight: Tensor
    """(N,), 0 for placeholders."""
    group: Tensor | None = None
    """Ids (N,) of known duplicates; without, no two rows are."""

    def negatives(self, anchors: slice) -> Tensor:
        """Return which rows may be negatives of which anchors, bool (B, N)."""
        groups_N = self.group
        if groups_N is None:
            groups_N = torch.arange(len(self.weight), device=self.weight.device)
        return (groups_N[anchors, None] != groups_N) & (self.weight > 0)


class TripletLosses(NamedTuple):
    """What became of each anchor; both distances (B,) are those that its loss compares."""

    loss: Tensor
    positive: Tensor
    negative: Tensor
    """Infinite where there is no negative; with `all`, the mean."""


def unit_rows(rows_ND: Tensor) -> Tensor:
    """Return rows of length 1; a row that is as good as 0 becomes 0, with gradient 0.

    `F.normalize` would give it a gradient of 1e12 times what comes in.
    """
    norm_N1 = torch.linalg.vector_norm(rows_ND, dim=-1, keepdim=True)
    unit_ND: Tensor = rows_ND / norm_N1.masked_fill(norm_N1 < ZERO_NORM, math.inf)
    return unit_ND


def triplet_losses(
    rows: Rows, anchors: slice, config: TripletLossConfig, negative_B: Tensor | None = None
) -> TripletLosses:
    """Return the loss of each anchor. `negative_B` names the negatives among the rows for `random`.

    Memory is O(B N). Distances are taken of differences: 2 - 2 cos loses those of close pairs.
    Equally far negatives share the gradient, so the order of the rows does not matter.
    """
    first_BD, is_negative_BN = rows.first[anchors], rows.negatives(anchors)
    if config.negatives == "random":
        assert negative_B is not None, "random negatives are named by the batch"
        columns_N = torch.arange(len(rows.weight), device=negative_B.device)
        is_negative_BN = is_negative_BN & (negative_B[:, None] == columns_N)
    positive_B = torch.linalg.vector_norm(first_BD - rows.second[anchors], dim=-1)
    # Not by a matrix product; and unlike a square root it has gradient 0 at distance 0.
    distance_BN = torch.cdist(first_BD, rows.first, compute_mode="donot_use_mm_for_euclid_dist")
    if config.distance == "squared-l2":
        positive_B, distance_BN = positive_B.square(), distance_BN.square()

    if config.negatives in ("semi-hard", "hard"):
        mine = _nearest if config.negatives == "hard" else _semi_hard
        mined_B = mine(positive_B, distance_BN, is_negative_BN)
        loss_B = torch.relu(positive_B - mined_B + config.margin)
        return TripletLosses(loss_B, positive_B, mined_B)
    hinge_BN = torch.relu(positive_B[:, None] - distance_BN + config.margin)
    count_B = is_negative_BN.sum(dim=1)
    loss_B = (hinge_BN * is_negative_BN).sum(dim=1) / count_B.clamp(min=1)
    mean_B = (distance_BN * is_negative_BN).sum(dim=1) / count_B.clamp(min=1)
    return TripletLosses(loss_B, positive_B, mean_B.masked_fill(count_B == 0, math.inf))


def nt_xent_logits(rows: Rows, anchors: slice, config: NTXentLossConfig) -> tuple[Tensor, Tensor]:
    """Return logits (2 B, 2 N) of unit rows, first views before second ones, and the positives.

    What an anchor is not compared with has logit minus infinity. The positives (2 B,) are columns.
    """
    views_2N = torch.cat([rows.first, rows.second])
    anchors_2B = torch.cat([rows.first[anchors], rows.second[anchors]])
    num_rows = len(rows.weight)
    own_B = torch.arange(num_rows, device=views_2N.device)[anchors]
    positive_2B = torch.cat([own_B + num_rows, own_B])
    is_compared = rows.negatives(anchors).repeat(2, 2).scatter(1, positive_2B[:, None], True)
    logits = anchors_2B @ views_2N.T / config.temperature
    return logits.masked_fill(~is_compared, -math.inf), positive_2B


def nt_xent_losses(logits: Tensor, positive_2B: Tensor) -> Tensor:
    """Return the loss (B,) of each anchor, the mean of its two views."""
    own_2B = logits.gather(1, positive_2B[:, None])[:, 0]
    return (logits.logsumexp(dim=1) - own_2B).reshape(2, -1).mean(dim=0)


def _nearest(positive_B: Tensor, distance_BN: Tensor, is_negative_BN: Tensor) -> Tensor:
    """Return the distance of the nearest negative, infinite where there is none."""
    del positive_B
    return distance_BN.masked_fill(~is_negative_BN, math.inf).amin(dim=1)


def _semi_hard(positive_B: Tensor, distance_BN: Tensor, is_negative_BN: Tensor) -> Tensor:
    """Return the distance of the nearest negative beyond the positive, or else of the farthest.

    Infinite where there is no negative at all. FaceNet also wants it inside the margin; beyond the
    margin it adds 0 anyway.
    """
    is_farther_BN = is_negative_BN & (distance_BN > positive_B[:, None])
    farther_B = _nearest(positive_B, distance_BN, is_farther_BN)
    farthest_B = distance_BN.masked_fill(~is_negative_BN, -math.inf).amax(dim=1)
    falls_back_B = is_negative_BN.any(dim=1) & ~is_farther_BN.any(dim=1)
    return torch.where(falls_back_B, farthest_B, farther_B)
