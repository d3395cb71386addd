"""The figures of embeddings on synthetic data with known answers, and the names of collapses.

The reference values are those of 2048 embeddings of 128 dimensions.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ssl_models.collapse import (
    alignment,
    diagnose,
    feature_std,
    measure,
    rank_me,
    uniformity,
)

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES, SIZE = 2048, 128


def _embeddings(kind: str) -> Tensor:
    dice = torch.Generator().manual_seed(0)
    noise = torch.randn(IMAGES, SIZE, generator=dice)
    match kind:
        case "gaussian":
            return noise
        case "rank-8":
            return noise[:, :8] @ torch.randn(8, SIZE, generator=dice)
        case "cone":
            return 1 + 0.05 * noise
        case _:
            return torch.ones(IMAGES, SIZE)


@pytest.mark.parametrize(
    ("kind", "rank", "centred_rank", "uniform", "deviation", "name"),
    [
        ("gaussian", 127.0, 127.0, -3.94, 0.0884, ""),
        ("rank-8", 7.93, 7.93, -3.04, 0.0855, "dimensional collapse"),
        ("cone", 10.8, 127.0, -0.010, 0.0044, "cone collapse"),
        ("constant", 1.0, 1.0, 0.0, 0.0, "total collapse"),
    ],
)
def test_8_synthetic_embeddings_have_the_reference_figures_and_names(
    kind: str, rank: float, centred_rank: float, uniform: float, deviation: float, name: str
) -> None:
    embeddings = _embeddings(kind)
    assert rank_me(embeddings) == pytest.approx(rank, rel=0.01)
    assert rank_me(embeddings, is_centred=True) == pytest.approx(centred_rank, rel=0.01)
    assert uniformity(embeddings) == pytest.approx(uniform, abs=0.015 if uniform < -1 else 5e-4)
    assert feature_std(embeddings) == pytest.approx(deviation, abs=5e-4)
    assert diagnose(measure(embeddings, embeddings)) == name


def test_rank_me_is_the_exponential_of_the_entropy_of_known_singular_values() -> None:
    left, _ = torch.linalg.qr(torch.randn(20, 4, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    embeddings = left @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0]).double()) @ right
    shares = [0.5, 0.25, 0.125, 0.125]
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert rank_me(embeddings) == pytest.approx(expected, rel=1e-9)


def test_alignment_is_the_mean_squared_distance_on_the_sphere() -> None:
    first = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    second = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    assert alignment(first, second) == pytest.approx((0.8 + 0.0) / 2)


def test_uniformity_is_the_log_of_the_mean_potential_of_all_pairs() -> None:
    embeddings = torch.randn(9, 3)
    unit = (embeddings / embeddings.norm(dim=1, keepdim=True)).tolist()
    potentials = [
        math.exp(-2 * math.dist(unit[i], unit[j]) ** 2) for i in range(9) for j in range(i)
    ]
    expected = math.log(sum(potentials) / len(potentials))
    assert uniformity(embeddings) == pytest.approx(expected, rel=1e-5)


def test_a_cone_whose_triplets_all_cost_the_margin_is_a_total_collapse() -> None:
    cone = measure(_embeddings("cone")[:200], _embeddings("cone")[:200])
    for gap in (0.001, -0.001):
        assert diagnose(replace(cone, active=1.0, margin_gap=gap)) == "total collapse"
    assert diagnose(replace(cone, active=0.9, margin_gap=0.001)) == "cone collapse"
    assert diagnose(replace(cone, active=1.0, margin_gap=-0.1)) == "cone collapse"


def test_triplets_at_the_margin_are_no_collapse_of_embeddings_that_are_spread() -> None:
    """An encoder that has learned nothing yet costs the margin too, on average."""
    healthy = measure(_embeddings("gaussian")[:200], _embeddings("gaussian")[:200])
    assert diagnose(replace(healthy, active=1.0, margin_gap=0.0)) == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("view", [0, 1])
def test_embeddings_that_are_not_finite_are_named(value: float, view: int) -> None:
    views = [_embeddings("gaussian")[:50].clone() for _ in range(2)]
    views[view][7, 3] = value
    assert diagnose(measure(views[0], views[1])) == "not finite"


def test_zero_embeddings_are_a_total_collapse() -> None:
    zeros = torch.zeros(5, 8)
    figures = measure(zeros, zeros)
    assert (figures.rank, figures.centred_rank, figures.spread) == (1.0, 1.0, 0.0)
    assert (figures.alignment, figures.uniformity) == (0.0, 0.0)
    assert diagnose(figures) == "total collapse"


def test_one_image_has_no_spread() -> None:
    with pytest.raises(ValueError, match="1 images: a spread needs two or more"):
        measure(torch.ones(1, 4), torch.ones(1, 4))
