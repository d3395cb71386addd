"""The classification objective: its loss is the weighted cross entropy of its logits."""

import pytest
import torch
import torch.nn.functional as F

from ssl_models.bert import BertConfig
from ssl_models.classification import Classification, ClassificationConfig
from ssl_models.objective import Batch, joint_loss
from ssl_models.resnet import ResNetConfig

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = BertConfig(vocab_size=20, max_length=8, hidden_size=8, num_layers=1, intermediate_size=16)


def build(dropout: float = 0.0) -> Classification:
    torch.manual_seed(0)
    return Classification(ClassificationConfig(encoder=TINY, num_classes=3, dropout=dropout))


def batch(num_rows: int = 4) -> Batch:
    torch.manual_seed(1)
    return {
        "input_ids": torch.randint(20, (num_rows, 6)),
        "token_type_ids": torch.zeros(num_rows, 6, dtype=torch.int64),
        "attention_mask": torch.arange(6) < torch.tensor([6, 3, 2, 5])[:num_rows, None],
        "labels": torch.arange(num_rows) % 3,
        "weight": torch.tensor([1.0, 0.0, 2.0, 1.0])[:num_rows],
    }


def test_the_loss_is_the_weighted_mean_cross_entropy() -> None:
    objective, given = build(), batch()
    output = objective(given)
    total, weight = output.terms["cross_entropy"]
    losses = F.cross_entropy(objective.logits(given), given["labels"], reduction="none")
    assert weight == objective.weights(given)["cross_entropy"] == 4
    assert torch.allclose(total / weight, (losses[0] + 2 * losses[2] + losses[3]) / 4)
    right = objective.logits(given).argmax(dim=1) == given["labels"]
    expected = (right[0] + 2 * right[2] + right[3]).float()
    assert output.metrics["accuracy"][0] == expected


def test_slots_share_the_gradient_of_the_batch() -> None:
    whole, given = build(), batch()
    halves = [{name: value[i : i + 2] for name, value in given.items()} for i in (0, 2)]
    totals = whole.weights(given)
    torch.autograd.backward(joint_loss(whole(given).terms, whole.coefficients, totals))
    parted = build()
    for half in halves:
        torch.autograd.backward(joint_loss(parted(half).terms, parted.coefficients, totals))
    for (name, one), (_, two) in zip(
        whole.named_parameters(), parted.named_parameters(), strict=True
    ):
        if one.grad is None:  # the pooler is not asked
            assert name.startswith("encoder.pooler.")
            continue
        assert two.grad is not None
        assert torch.allclose(one.grad, two.grad, atol=1e-6), name


def test_padding_changes_no_logits() -> None:
    objective, given = build(), batch(2)
    short = {name: given[name][1:, :3] for name in ("input_ids", "token_type_ids")}
    alone = objective.logits(short | {"attention_mask": torch.ones(1, 3, dtype=torch.bool)})
    assert torch.allclose(objective.logits(given)[1:], alone, atol=1e-6)


def test_dropout_is_for_training_alone() -> None:
    objective, given = build(dropout=0.5), batch()
    assert not torch.equal(objective.logits(given), objective.logits(given))
    objective.eval()
    assert torch.equal(objective.logits(given), objective.logits(given))


def test_pictures_are_classified_by_their_features() -> None:
    config = ClassificationConfig(encoder=ResNetConfig(width=4), num_classes=2)
    objective = Classification(config)
    image = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    assert objective.encode({"image": image}).shape == (2, config.feature_size) == (2, 32)
    assert objective.logits({"image": image}).shape == (2, 2)


def test_a_config_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        ClassificationConfig(encoder=TINY, num_classes=1)
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1"):
        ClassificationConfig(encoder=TINY, num_classes=2, dropout=1.0)
