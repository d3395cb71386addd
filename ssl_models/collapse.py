"""Has the encoder collapsed? Figures of embeddings, and a name for what they show.

Shapes: n images, D embedding size. Leave placeholders out, and measure the embeddings that the loss
compares: the encoder's features come out of a ReLU and always point one way. A collapsed encoder
gives every image much the same embedding; a loss alone may not tell, and one figure alone does not
either: centring hides a narrow cone from the rank, and the spread hides a low rank.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_models.contrastive_losses import unit_rows

AT_MARGIN = 0.01
"""How near to the margin the mean triplet loss of a collapsed encoder is, relatively."""
TOTAL_SPREAD = 0.01
"""Below this spread all embeddings are one; of random directions it is 1."""
CONE_SPREAD = 0.3
"""Below this spread the embeddings point one way; it stands for a mean cosine above 0.91."""
LOW_RANK = 0.1
"""Below this share of the dimensions the embeddings fill a few of them."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is watched; nan where a figure does not apply."""

    rank: float
    """`rank_me` of the embeddings as they are."""
    centred_rank: float
    """`rank_me` of the embeddings less their mean."""
    full_rank: float
    """The most that a rank can be, min(n - 1, D)."""
    alignment: float
    """0 where both views of an image are one; 2 for random directions."""
    uniformity: float
    """0 where all images are one; near -4 for random directions."""
    spread: float
    """`feature_std` times the square root of D: 0 where all images are one, 1 for random ones."""
    active: float = math.nan
    """Share of triplets with a loss above 0, which the loss tells, not the embeddings."""
    margin_gap: float = math.nan
    """Mean triplet loss / margin - 1: 0 where all images are one."""


def measure(first_nD: Tensor, second_nD: Tensor) -> Figures:
    """Return the figures of both views of n images.

    Raises:
        ValueError: If there are fewer than two images.
    """
    if len(first_nD) < 2:
        raise ValueError(f"{len(first_nD)} images: a spread needs two or more")
    num_images, size = first_nD.shape
    return Figures(
        rank=rank_me(first_nD),
        centred_rank=rank_me(first_nD, is_centred=True),
        full_rank=min(num_images - 1, size),
        alignment=alignment(first_nD, second_nD),
        uniformity=uniformity(first_nD),
        spread=feature_std(first_nD) * math.sqrt(size),
    )


def diagnose(figures: Figures) -> str:
    """Return the name of a collapse, or "" where there is none.

    The first that holds:

    `not finite`: an embedding of a view is NaN or infinite.
    `total collapse`: all embeddings are one (spread below 0.01), or every triplet is active and
    their mean loss is within 1 % of the margin while the embeddings point one way.
    `cone collapse`: they point one way (spread below 0.3) and vary around it.
    `dimensional collapse`: centred, they fill less than a tenth of their dimensions.

    An encoder fresh from its initial weights often is a cone, so let it warm up first.
    """
    if not math.isfinite(figures.uniformity + figures.alignment):
        return "not finite"
    is_cone = figures.spread < CONE_SPREAD
    is_at_margin = figures.active == 1.0 and abs(figures.margin_gap) < AT_MARGIN
    if figures.spread < TOTAL_SPREAD or (is_cone and is_at_margin):
        return "total collapse"
    if is_cone:
        return "cone collapse"
    if figures.centred_rank < LOW_RANK * figures.full_rank:
        return "dimensional collapse"
    return ""


def rank_me(embeddings_nD: Tensor, *, is_centred: bool = False) -> float:
    """Return the effective number of dimensions, from 1 to min(n, D); nan if not finite.

    Garrido et al. 2023, RankMe, arXiv:2210.02885: the exponential of the entropy of the singular
    values, each as a share of their sum. The paper does not centre.
    """
    exact_nD = embeddings_nD.double()
    if not exact_nD.isfinite().all():
        return math.nan
    if is_centred:
        exact_nD = exact_nD - exact_nD.mean(dim=0)
    values = torch.linalg.svdvals(exact_nD)
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return math.exp(torch.special.entr(shares).sum().item())


def alignment(first_nD: Tensor, second_nD: Tensor) -> float:
    """Return the mean squared distance of both views on the unit sphere.

    Wang & Isola 2020, Understanding Contrastive Representation Learning through Alignment and
    Uniformity on the Hypersphere, arXiv:2005.10242, with alpha = 2.
    """
    difference_nD = unit_rows(first_nD.float()) - unit_rows(second_nD.float())
    return difference_nD.square().sum(dim=1).mean().item()


def uniformity(embeddings_nD: Tensor) -> float:
    """Return log mean exp(-2 squared distance) over all pairs of images on the unit sphere.

    Wang & Isola 2020, arXiv:2005.10242, with t = 2.
    """
    distances = torch.pdist(unit_rows(embeddings_nD.float()))
    mean = distances.square().mul(-2.0).logsumexp(dim=0) - math.log(len(distances))
    return mean.item()


def feature_std(embeddings_nD: Tensor) -> float:
    """Return the mean over dimensions of the standard deviation on the unit sphere.

    Chen & He 2021, Exploring Simple Siamese Representation Learning, arXiv:2011.10566, section 4.1:
    1 / sqrt(D) for random directions.
    """
    return unit_rows(embeddings_nD.float()).std(dim=0).mean().item()
