"""The contrastive objective: its contract, its precision, and that it teaches an encoder."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_models import build_objective, contrastive
from ssl_models.collapse import diagnose, measure
from ssl_models.contrastive import Contrastive, ContrastiveConfig
from ssl_models.contrastive_losses import NTXentLossConfig, TripletLossConfig
from ssl_models.objective import WATCHED, Batch, joint_loss
from ssl_models.resnet import ResNetConfig
from ssl_models.vit import ViTConfig

pytestmark = pytest.mark.usefixtures("one_thread")
LOSSES = [
    *(TripletLossConfig(negatives=n, margin=1.0) for n in ("random", "semi-hard", "hard", "all")),
    NTXentLossConfig(),
]
VIT = ViTConfig(
    channels=1,
    patch_size=3,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    intermediate_size=64,
    initializer_range=0.1,
)
CONFIG = ContrastiveConfig(
    encoder=ResNetConfig(width=4), projection_hidden_size=16, projection_size=8
)


def _name(loss: TripletLossConfig | NTXentLossConfig) -> str:
    return loss.negatives if isinstance(loss, TripletLossConfig) else loss.kind


def _objective(**changes: Any) -> Contrastive:
    torch.manual_seed(0)
    return Contrastive(replace(CONFIG, **changes))


def _batch(rows: int = 6) -> Batch:
    dice = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (2, rows, 3, 12, 12), generator=dice, dtype=torch.uint8)
    return {
        "first": pixels[0],
        "second": pixels[1],
        "negative": torch.arange(rows).roll(1),
        "weight": torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0, 1.0])[:rows],
    }


def _loss(objective: Contrastive, batch: Batch) -> Tensor:
    return joint_loss(objective(batch).terms, objective.coefficients, objective.weights(batch))


def _gradient(objective: Contrastive, loss: Tensor) -> Tensor:
    parts = torch.autograd.grad(loss, list(objective.parameters()))
    return torch.cat([part.flatten() for part in parts])


def test_the_triplet_loss_of_a_batch_is_the_weighted_mean_over_its_anchors() -> None:
    objective = _objective(loss=TripletLossConfig(negatives="random", margin=1.0))
    batch = _batch()
    embedded = {
        view: objective.projection(objective.encoder(batch[view])) for view in ("first", "second")
    }
    first, second = ((e / e.norm(dim=1, keepdim=True)).tolist() for e in embedded.values())
    expected, total, active, far = 0.0, 0.0, 0.0, 0.0
    for anchor, weight in enumerate(batch["weight"].tolist()):
        negative = int(batch["negative"][anchor])
        is_there = float(batch["weight"][negative] > 0)
        away = math.dist(first[anchor], first[negative]) ** 2
        loss = math.dist(first[anchor], second[anchor]) ** 2 - away + 1.0
        expected += weight * max(0.0, loss) * is_there
        active += weight * float(loss > 0) * is_there
        far += weight * is_there * away
        total += weight
    output = objective(batch)
    assert total == objective.weights(batch)["triplet"] == 5.5
    assert output.terms["triplet"][0].item() == pytest.approx(expected, rel=1e-4)
    assert _loss(objective, batch).item() == pytest.approx(expected / total, rel=1e-4)
    assert torch.stack(output.metrics["active"]).tolist() == [active, 5.5]
    distance = torch.stack(output.metrics["negative_distance"]).tolist()
    assert distance == pytest.approx([far, 5.0], rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES, ids=_name)
def test_weights_are_known_from_the_batch_and_are_those_of_the_terms(loss: Any) -> None:
    objective, batch = _objective(loss=loss), _batch()
    output = objective(batch)
    for name, weight in objective.weights(batch).items():
        assert weight.dtype == torch.float32
        assert output.terms[name][1] == weight
    assert output.terms.keys() == objective.coefficients.keys()
    assert not any(value.requires_grad for pair in output.metrics.values() for value in pair)


@pytest.mark.parametrize("loss", LOSSES, ids=_name)
def test_a_placeholder_changes_neither_loss_nor_gradient(loss: Any) -> None:
    objective, batch = _objective(loss=loss), _batch()
    other = {name: value.clone() for name, value in batch.items()}
    for view in ("first", "second"):
        other[view][2] = 0
    found, expected = _loss(objective, other), _loss(objective, batch)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        _gradient(objective, found), _gradient(objective, expected), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("loss", LOSSES, ids=_name)
@pytest.mark.parametrize("rows", [1, 6])
def test_a_batch_of_placeholders_or_of_one_row_costs_exactly_0(loss: Any, rows: int) -> None:
    objective, batch = _objective(loss=loss), _batch(rows)
    batch["weight"] = torch.ones(1) if rows == 1 else torch.zeros(rows)
    output = objective(batch)
    found = joint_loss(output.terms, objective.coefficients, objective.weights(batch))
    gradient = _gradient(objective, found)
    assert found == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert all(value.isfinite().all() for pair in output.metrics.values() for value in pair)


@pytest.mark.parametrize("loss", LOSSES, ids=_name)
def test_known_duplicates_are_told_apart_from_negatives(loss: Any) -> None:
    objective, batch = _objective(loss=loss), _batch()
    batch["weight"] = torch.ones(6)
    distinct = _loss(objective, batch | {"group": torch.arange(50, 56)})
    assert torch.equal(distinct, _loss(objective, batch))
    assert _loss(objective, batch | {"group": torch.tensor([1, 1, 1, 2, 2, 2])}) != distinct
    assert _loss(objective, batch | {"group": torch.ones(6, dtype=torch.int64)}) == 0


@pytest.mark.parametrize("loss", LOSSES, ids=_name)
def test_4_the_loss_is_float32_under_autocast(loss: Any) -> None:
    """Embeddings are a little off; what is computed of them is not."""
    objective, batch = _objective(loss=loss), _batch()
    with torch.autocast("cpu", torch.bfloat16):
        embedded = objective.embed(batch)
        output = objective.join([embedded], [batch])
    assert embedded.dtype == torch.float32
    (found, _), *_ = output.terms.values()
    (expected, _), *_ = objective.join([embedded], [batch]).terms.values()
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    whole = objective(batch).terms[objective.term][0]
    torch.testing.assert_close(found, whole, rtol=0.1, atol=0.05)


def test_a_dead_head_has_a_finite_gradient() -> None:
    for loss in LOSSES:
        objective, batch = _objective(loss=loss), _batch()
        for parameter in objective.projection[2].parameters():
            torch.nn.init.zeros_(parameter)
        assert _gradient(objective, _loss(objective, batch)).abs().max() < 100


def test_encode_returns_the_features_below_the_head_which_a_handover_may_leave() -> None:
    objective, pixels = _objective(), _batch()["first"]
    features = objective.encode({"image": pixels})
    assert features.dtype == torch.float32
    assert torch.equal(features, objective.encoder(pixels))
    kept = {
        name: value
        for name, value in objective.state_dict().items()
        if not name.startswith(objective.pretraining_only)
    }
    assert 0 < len(kept) < len(objective.state_dict())
    torch.manual_seed(9)
    other = Contrastive(CONFIG)
    assert not torch.equal(other.encode({"image": pixels}), features)
    other.load_state_dict(kept, strict=False)
    assert torch.equal(other.encode({"image": pixels}), features)


def test_negatives_that_the_batch_names_are_of_its_slot() -> None:
    loss = TripletLossConfig(negatives="random")
    with pytest.raises(ValueError, match="negatives_from 'global' with random negatives"):
        ContrastiveConfig(encoder=ResNetConfig(), loss=loss, negatives_from="global")
    assert build_objective(replace(CONFIG, negatives_from="global")).joins_slots
    assert not build_objective(replace(CONFIG, loss=loss)).joins_slots


@pytest.mark.parametrize("name", ["projection_size", "projection_hidden_size"])
def test_a_head_without_a_size_is_refused(name: str) -> None:
    nothing: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        replace(CONFIG, **nothing)


def _shapes(rows: int, *, seed: int) -> Batch:
    """Squares, crosses and bars, each image in two places and brightnesses; rows are of a kind."""
    dice = torch.Generator().manual_seed(seed)
    stamps = torch.zeros(3, 6, 6)
    stamps[0, 1:5, 1:5] = 1
    stamps[1, 2:4, :] = stamps[1, :, 2:4] = 1
    stamps[2, :, 2:4] = 1
    kinds = torch.arange(rows) % 3
    views = torch.full((2, rows, 1, 12, 12), 20.0)
    for view in range(2):
        for row in range(rows):
            top, left = torch.randint(0, 7, (2,), generator=dice).tolist()
            light = 120 + 110 * torch.rand(1, generator=dice)
            views[view, row, 0, top : top + 6, left : left + 6] += light * stamps[kinds[row]]
    pixels = views.clamp(0, 255).to(torch.uint8)
    return {
        "first": pixels[0],
        "second": pixels[1],
        "weight": torch.ones(rows),
        "negative": torch.arange(rows).roll(1),
        "group": kinds,
    }


def _learn(objective: Contrastive, batches: list[Batch]) -> None:
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    for batch in batches:
        optimizer.zero_grad()
        torch.autograd.backward(_loss(objective, batch))
        optimizer.step()


def _accuracy(objective: Contrastive, batch: Batch) -> float:
    """Return how often the nearest other image, by features, is of the same kind."""
    with torch.no_grad():
        features = objective.encode({"image": batch["first"]})
    distances = torch.cdist(features, features)
    nearest = distances.fill_diagonal_(math.inf).argmin(dim=1)
    return (batch["group"][nearest] == batch["group"]).float().mean().item()


def test_what_is_watched_are_the_figures_of_the_rows_that_have_a_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective, batch = _objective(), _batch()
    with torch.no_grad():
        embedded = objective.embed(batch)
    for share, kept in ((6, [0, 1, 3, 4, 5]), (4, [0, 1, 3]), (2, [0, 1])):
        monkeypatch.setattr(contrastive, "WATCHED_ROWS", 2 * share)
        expected = measure(embedded[kept * 2, 0], embedded[kept * 2, 1])
        found = objective.watch([batch, batch])
        for name, value in found.items():
            told = getattr(expected, name.removeprefix(WATCHED))
            assert value == pytest.approx(told, rel=1e-3, abs=1e-6), name
        means = found | {"active": 1.0, "margin_gap": 0.0}
        assert objective.diagnose(means) == diagnose(replace(expected, active=1.0, margin_gap=0.0))
    assert objective.watch([_batch(1)]) == {}
    assert objective.diagnose({"active": 1.0, "margin_gap": 0.0}) == ""


def test_the_gap_to_the_margin_is_a_mean_over_anchors() -> None:
    objective = _objective(loss=TripletLossConfig(margin=0.5))
    metrics = objective(_batch()).metrics
    loss, gap = (float(metrics[n][0] / metrics[n][1]) for n in ("triplet_loss", "margin_gap"))
    assert gap == pytest.approx(loss / 0.5 - 1)


@pytest.mark.parametrize(
    "loss",
    [TripletLossConfig(negatives="all", margin=1.0), NTXentLossConfig(temperature=0.2)],
    ids=_name,
)
def test_an_encoder_learns_shapes_that_it_meets_elsewhere_in_other_light(loss: Any) -> None:
    objective = _objective(encoder=VIT, loss=loss)
    held_out = _shapes(60, seed=99)
    assert _accuracy(objective, held_out) < 0.9
    _learn(objective, [_shapes(24, seed=step) for step in range(90)])
    assert _accuracy(objective, held_out) > 0.95
    with torch.no_grad():
        embedded = objective.embed(held_out)
    assert diagnose(measure(embedded[:, 0], embedded[:, 1])) == ""


@pytest.mark.parametrize("loss", LOSSES, ids=_name)
def test_an_encoder_learns_to_tell_a_few_noisy_images_apart(loss: Any) -> None:
    dice = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (12, 1, 12, 12), generator=dice)
    noise = torch.randint(-60, 61, image.shape, generator=dice)
    batch = {
        "first": image.to(torch.uint8),
        "second": (image + noise).clamp(0, 255).to(torch.uint8),
        "weight": torch.ones(12),
        "negative": torch.arange(12).roll(1),
    }
    objective = _objective(encoder=ResNetConfig(width=4, channels=1), loss=loss)
    before = _loss(objective, batch).item()
    _learn(objective, [batch] * 70)
    # Cosines are at most 1, so NT-Xent cannot come near to 0 at this temperature.
    assert _loss(objective, batch).item() < before / (10 if loss.kind == "triplet" else 2)
    with torch.no_grad():
        first, second = objective.embed(batch).unbind(dim=1)
    nearest = torch.cdist(first, second).argmin(dim=1)
    is_right = (nearest == torch.arange(12)).float().mean()
    # One named negative each does not keep all twelve apart.
    assert is_right == 1 or (loss.kind == "triplet" and loss.negatives == "random")
