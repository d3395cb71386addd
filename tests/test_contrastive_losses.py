"""Triplet loss and NT-Xent against hand values, brute force, finite differences and symmetries."""

import math
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_models.contrastive_losses import (
    NTXentLossConfig,
    Rows,
    TripletLossConfig,
    TripletLosses,
    nt_xent_logits,
    nt_xent_losses,
    triplet_losses,
    unit_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")
Negatives = Literal["random", "semi-hard", "hard", "all"]
DISTANCES: tuple[Literal["squared-l2", "l2"], ...] = ("squared-l2", "l2")
NEGATIVES: tuple[Negatives, ...] = ("random", "semi-hard", "hard", "all")
EVERYONE = slice(None)


def _rows(
    num_rows: int, *, seed: int = 0, size: int = 5, dtype: torch.dtype = torch.float64
) -> Rows:
    """Unit embeddings with a placeholder, unequal weights and two pairs of duplicates."""
    dice = torch.Generator().manual_seed(seed)
    first = unit_rows(torch.randn(num_rows, size, generator=dice, dtype=dtype))
    noise = torch.randn(num_rows, size, generator=dice, dtype=dtype)
    weight = 0.5 + torch.rand(num_rows, generator=dice, dtype=dtype)
    weight[2::5] = 0
    group = torch.arange(100, 100 + num_rows)
    group[4:6], group[7:9] = 7, 3
    return Rows(first, unit_rows(first + 0.8 * noise), weight, group)


def _named(num_rows: int) -> Tensor:
    return (torch.arange(num_rows) * 3 + 1) % num_rows


def _triplet(rows: Rows, config: TripletLossConfig, anchors: slice = EVERYONE) -> TripletLosses:
    named = _named(len(rows.weight))[anchors]
    return triplet_losses(rows, anchors, config, named)


def _nt_xent(rows: Rows, config: NTXentLossConfig, anchors: slice = EVERYONE) -> Tensor:
    return nt_xent_losses(*nt_xent_logits(rows, anchors, config))


def _mean_loss(rows: Rows, config: TripletLossConfig | NTXentLossConfig) -> Tensor:
    if isinstance(config, TripletLossConfig):
        return (_triplet(rows, config).loss * rows.weight).sum()
    return (_nt_xent(rows, config) * rows.weight).sum()


def _brute_force(rows: Rows, anchor: int, config: TripletLossConfig) -> float:
    """The loss of one anchor, by enumeration of its triplets."""
    power = 2 if config.distance == "squared-l2" else 1
    first, second = rows.first.tolist(), rows.second.tolist()
    group = list(range(len(first))) if rows.group is None else rows.group.tolist()
    positive = math.dist(first[anchor], second[anchor]) ** power
    allowed = [
        row
        for row in range(len(first))
        if row != anchor and group[row] != group[anchor] and rows.weight[row] > 0
    ]
    if config.negatives == "random":
        allowed = [row for row in allowed if row == int(_named(len(first))[anchor])]
    far = sorted(math.dist(first[anchor], first[row]) ** power for row in allowed)
    if not far:
        return 0.0
    if config.negatives == "hard":
        far = far[:1]
    if config.negatives == "semi-hard":
        far = [min((d for d in far if d > positive), default=far[-1])]
    return sum(max(0.0, positive - d + config.margin) for d in far) / len(far)


@pytest.mark.parametrize(
    ("distance", "margin", "loss"),
    [
        ("squared-l2", 0.2, 0.0),
        ("squared-l2", 1.5, 0.3),
        ("l2", 0.2, 0.0),
        ("l2", 1.5, 1.5 + 0.8**0.5 - 2**0.5),
    ],
)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_1_the_loss_of_a_triplet_has_its_hand_value(
    distance: Any, margin: float, loss: float, negatives: Negatives
) -> None:
    rows = Rows(
        torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        torch.tensor([[0.6, 0.8], [0.0, 1.0]]),
        torch.ones(2),
    )
    config = TripletLossConfig(distance=distance, margin=margin, negatives=negatives)
    found = triplet_losses(rows, slice(0, 1), config, torch.tensor([1]))
    expected = (0.8, 2.0) if distance == "squared-l2" else (0.8944, 1.4142)
    assert found.positive.item() == pytest.approx(expected[0], abs=1e-4)
    assert found.negative.item() == pytest.approx(expected[1], abs=1e-4)
    assert found.loss.item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("size", [1, 32], ids=["all on one point", "spread"])
def test_2_when_all_embeddings_are_one_the_loss_is_the_margin_with_gradient_0(
    distance: Any, negatives: Negatives, size: int
) -> None:
    point = unit_rows(torch.ones(6, size)).requires_grad_()
    rows = Rows(point, point, torch.ones(6))
    found = _triplet(rows, TripletLossConfig(distance=distance, negatives=negatives))
    assert torch.equal(found.loss, torch.full((6,), 0.2))
    (gradient,) = torch.autograd.grad(found.loss.sum(), point)
    assert torch.equal(gradient, torch.zeros(6, size))


@pytest.mark.parametrize("num_rows", [2, 3, 6])
def test_2_when_all_embeddings_are_one_nt_xent_is_at_chance(num_rows: int) -> None:
    point = unit_rows(torch.ones(num_rows, 4))
    losses = _nt_xent(Rows(point, point, torch.ones(num_rows)), NTXentLossConfig())
    expected = torch.full((num_rows,), math.log(2 * num_rows - 1))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


CONFIGS = [
    *(TripletLossConfig(distance=d, negatives=n, margin=0.7) for d in DISTANCES for n in NEGATIVES),
    NTXentLossConfig(temperature=0.3),
]


def _name(config: TripletLossConfig | NTXentLossConfig) -> str:
    if isinstance(config, TripletLossConfig):
        return f"{config.negatives}-{config.distance}"
    return config.kind


MINED = [c for c in CONFIGS if not (isinstance(c, TripletLossConfig) and c.negatives == "random")]


@pytest.mark.parametrize("config", CONFIGS, ids=_name)
def test_2_a_rotation_changes_nothing(config: TripletLossConfig | NTXentLossConfig) -> None:
    rows = _rows(12)
    turn, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    turned = rows._replace(first=rows.first @ turn, second=rows.second @ turn)
    torch.testing.assert_close(_mean_loss(turned, config), _mean_loss(rows, config))


@pytest.mark.parametrize("config", MINED, ids=_name)
def test_2_the_order_of_the_rows_changes_nothing_even_among_ties(
    config: TripletLossConfig | NTXentLossConfig,
) -> None:
    rows = _rows(12)
    rows.first[[1, 3, 6]] = rows.first[0].clone()
    order = torch.randperm(12)
    assert rows.group is not None
    first = rows.first.clone().requires_grad_()
    shuffled = Rows(first[order], rows.second[order], rows.weight[order], rows.group[order])
    expected = _mean_loss(rows._replace(first=first), config)
    loss = _mean_loss(shuffled, config)
    torch.testing.assert_close(loss, expected)
    (found,), (wanted,) = torch.autograd.grad(loss, first), torch.autograd.grad(expected, first)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_2_the_loss_is_never_negative_and_grows_with_the_margin(negatives: Negatives) -> None:
    rows = _rows(20)
    losses = [
        _triplet(rows, TripletLossConfig(margin=margin, negatives=negatives)).loss
        for margin in (0.01, 0.2, 0.8, 3.0)
    ]
    assert (losses[0] >= 0).all()
    for smaller, larger in pairwise(losses):
        assert (larger >= smaller).all()
    assert (losses[0] == 0).any()


def test_2_a_row_is_not_its_own_negative_nor_that_of_its_duplicates_nor_is_a_placeholder() -> None:
    rows = Rows(
        torch.zeros(5, 2),
        torch.zeros(5, 2),
        torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0]),
        torch.tensor([8, 4, 5, 8, 6]),
    )
    expected = torch.tensor(
        [
            [False, True, False, False, True],
            [True, False, False, True, True],
            [True, True, False, True, True],
            [False, True, False, False, True],
            [True, True, False, True, False],
        ]
    )
    assert torch.equal(rows.negatives(EVERYONE), expected)
    assert torch.equal(rows.negatives(slice(1, 3)), expected[1:3])
    without = rows._replace(group=None).negatives(EVERYONE)
    assert torch.equal(without, (rows.weight > 0) & ~torch.eye(5, dtype=torch.bool))


@pytest.mark.parametrize("config", CONFIGS, ids=_name)
def test_3_the_gradient_is_that_of_finite_differences(
    config: TripletLossConfig | NTXentLossConfig,
) -> None:
    rows = _rows(9, size=3)

    def loss(first: Tensor, second: Tensor) -> Tensor:
        views = {"first": unit_rows(first), "second": unit_rows(second)}
        return _mean_loss(rows._replace(**views), config)

    first = (2 * rows.first).requires_grad_()
    second = (0.5 * rows.second).requires_grad_()
    assert torch.autograd.gradcheck(loss, (first, second), eps=1e-7, atol=1e-5)
    assert torch.autograd.grad(loss(first, second), first)[0].abs().max() > 0.01


@pytest.mark.parametrize("config", CONFIGS, ids=_name)
def test_3_views_that_coincide_have_a_finite_gradient(
    config: TripletLossConfig | NTXentLossConfig,
) -> None:
    first = _rows(10, dtype=torch.float32).first
    first[3] = first[4]
    first[5] = 0
    leaf = first.clone().requires_grad_()
    views = unit_rows(leaf)
    loss = _mean_loss(Rows(views, views, torch.ones(10)), config)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 100
    assert torch.equal(gradient[5], torch.zeros(5))


def test_3_unit_rows_have_length_1_and_0_stays_0_without_a_gradient() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0], [1e-3, 0.0]], requires_grad=True)
    unit = unit_rows(rows)
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(unit, expected)
    (gradient,) = torch.autograd.grad((unit * torch.tensor([1.0, 2.0])).sum(), rows)
    assert torch.equal(gradient[1:3], torch.zeros(2, 2))
    torch.testing.assert_close(gradient[0], torch.tensor([-0.8 * 0.4, 0.6 * 0.4]) / 5)
    naive = torch.zeros(1, 2, requires_grad=True)
    assert torch.autograd.grad(F.normalize(naive).sum(), naive)[0].abs().max() > 1e8


def test_4_distances_of_close_pairs_are_precise() -> None:
    """2 - 2 cos is off by its rounding error, which a distance of 1e-6 drowns in."""
    dice = torch.Generator().manual_seed(0)
    point = unit_rows(torch.randn(64, 128, dtype=torch.float64, generator=dice))
    near = unit_rows(point + 1e-4 * torch.randn(64, 128, dtype=torch.float64, generator=dice))
    first, second = point.float(), near.float()
    exact = (first.double() - second.double()).square().sum(dim=1)
    rows = Rows(torch.cat([first, second]), torch.cat([second, first]), torch.ones(128))
    found = triplet_losses(rows, slice(0, 64), TripletLossConfig(negatives="hard"))
    torch.testing.assert_close(found.positive.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.negative.double(), exact, rtol=1e-5, atol=0)
    by_cosine = 2 - 2 * (first * second).sum(dim=1)
    assert ((by_cosine - exact).abs() / exact).max() > 0.01


def test_5_a_point_is_at_distance_0_of_itself_where_torch_adds_1e_6_to_each_difference() -> None:
    point = unit_rows(torch.ones(2, 128))
    found = triplet_losses(
        Rows(point, point, torch.ones(2)),
        EVERYONE,
        TripletLossConfig(distance="l2", negatives="hard"),
    )
    assert torch.equal(found.positive, torch.zeros(2))
    assert torch.equal(found.negative, torch.zeros(2))
    assert F.pairwise_distance(point, point)[0].item() == pytest.approx(1.13e-5, rel=0.01)


@pytest.mark.parametrize("margin", [0.2, 1.0])
def test_5_unsquared_distances_give_the_loss_of_torch_but_for_that(margin: float) -> None:
    rows = _rows(20, size=128)._replace(weight=torch.ones(20), group=None)
    config = TripletLossConfig(distance="l2", negatives="random", margin=margin)
    expected = F.triplet_margin_loss(
        rows.first, rows.second, rows.first[_named(20)], margin=margin, reduction="none"
    )
    assert expected.max() > 0
    torch.testing.assert_close(_triplet(rows, config).loss, expected, rtol=0, atol=2.3e-5)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 9, 32])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("margin", [0.2, 1.3])
def test_7_mining_finds_what_enumeration_finds(
    num_rows: int, distance: Any, negatives: Negatives, margin: float
) -> None:
    config = TripletLossConfig(distance=distance, margin=margin, negatives=negatives)
    for seed in range(3):
        rows = _rows(num_rows, seed=seed)
        if seed == 2:  # ties, at distance 0 and elsewhere
            rows = rows._replace(first=rows.first.round(), second=rows.second.round())
        expected = [_brute_force(rows, anchor, config) for anchor in range(num_rows)]
        found = _triplet(rows, config).loss
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
        part = slice(num_rows // 3, num_rows)
        torch.testing.assert_close(_triplet(rows, config, part).loss, found[part])


def test_7_without_a_semi_hard_negative_the_farthest_is_taken() -> None:
    first = torch.tensor([[0.0], [1.0], [2.0], [0.5]])
    rows = Rows(first, first + torch.tensor([[3.0], [0.1], [0.1], [0.1]]), torch.ones(4))
    found = triplet_losses(rows, EVERYONE, TripletLossConfig(distance="l2", margin=0.6))
    torch.testing.assert_close(found.negative, torch.tensor([2.0, 0.5, 1.0, 0.5]))
    torch.testing.assert_close(found.loss, torch.tensor([1.6, 0.2, 0.0, 0.2]))


@pytest.mark.parametrize("config", CONFIGS, ids=_name)
@pytest.mark.parametrize("case", ["one row", "all duplicates", "all placeholders"])
def test_7_anchors_without_a_negative_cost_nothing(
    config: TripletLossConfig | NTXentLossConfig, case: str
) -> None:
    rows = _rows(1 if case == "one row" else 6)
    first = rows.first.clone().requires_grad_()
    rows = rows._replace(first=first, weight=torch.ones(len(first)), group=None)
    if case == "all duplicates":
        rows = rows._replace(group=torch.full((6,), 5))
    if case == "all placeholders":
        rows = rows._replace(weight=torch.zeros(6))
    loss = _mean_loss(rows, config)
    (gradient,) = torch.autograd.grad(loss, first)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(first))
    if isinstance(config, TripletLossConfig):
        assert (_triplet(rows, config).negative == math.inf).all()


def test_nt_xent_is_the_cross_entropy_of_the_other_view_among_all_that_are_compared() -> None:
    rows, temperature = _rows(11), 0.3
    assert rows.group is not None
    views = [*rows.first.tolist(), *rows.second.tolist()]
    expected = []
    for anchor in range(11):
        losses = []
        for view, other in ((anchor, anchor + 11), (anchor + 11, anchor)):
            scores = {}
            for column in range(22):
                row = column % 11
                is_negative = rows.group[row] != rows.group[anchor] and rows.weight[row] > 0
                if column == other or is_negative:
                    dot = sum(x * y for x, y in zip(views[view], views[column], strict=True))
                    scores[column] = math.exp(dot / temperature)
            losses.append(-math.log(scores[other] / sum(scores.values())))
        expected.append(sum(losses) / 2)
    config = NTXentLossConfig(temperature=temperature)
    found = _nt_xent(rows, config)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(_nt_xent(rows, config, slice(3, 8)), found[3:8])


def test_nt_xent_without_placeholders_is_that_of_simclr() -> None:
    """Cross entropy over the matrix of all views, with its diagonal struck out."""
    rows = _rows(8)._replace(weight=torch.ones(8), group=None)
    views = torch.cat([rows.first, rows.second])
    logits = (views @ views.T / 0.5).fill_diagonal_(-math.inf)
    labels = torch.arange(16).roll(8)
    expected = F.cross_entropy(logits, labels)
    torch.testing.assert_close(_nt_xent(rows, NTXentLossConfig()).mean(), expected)


@pytest.mark.parametrize("value", [0.0, -0.2, float("nan"), float("inf")])
def test_a_margin_or_temperature_that_is_not_a_positive_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"margin must be finite and above 0, got {value}"):
        TripletLossConfig(margin=value)
    with pytest.raises(ValueError, match=f"temperature must be finite and above 0, got {value}"):
        NTXentLossConfig(temperature=value)
