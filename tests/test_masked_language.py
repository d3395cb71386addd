"""The joint objective against loops, against the full head and against transformers (T8)."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig as PeerConfig
from transformers import BertForPreTraining

from ssl_models.bert import BertConfig
from ssl_models.masked_language import MaskedLanguage, MaskedLanguageConfig
from ssl_models.objective import Batch, Objective, joint_loss
from ssl_models.optim import FlatGradients, OptimizerConfig, build_optimizer

VOCAB_SIZE, LENGTH, NUM_PREDICTIONS = 40, 12, 4
CONFIG = MaskedLanguageConfig(
    encoder=BertConfig(
        vocab_size=VOCAB_SIZE,
        max_length=16,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=24,
    )
)


def _objective(config: MaskedLanguageConfig = CONFIG) -> MaskedLanguage:
    """An objective whose parameters are all far from 0, so that every one of them matters."""
    torch.manual_seed(0)
    objective = MaskedLanguage(config)
    for parameter in objective.parameters():
        nn.init.normal_(parameter, std=0.3)
    return objective


def _batch() -> Batch:
    """Six rows of unequal lengths with 4, 1, 3, 0, 2 and 4 predictions; one pair has no label."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([12, 7, 9, 6, 8, 11])
    mask = torch.arange(LENGTH) < lengths[:, None]
    is_used = torch.arange(NUM_PREDICTIONS) < torch.tensor([4, 1, 3, 0, 2, 4])[:, None]
    columns = torch.stack(
        [1 + torch.randperm(int(n) - 1, generator=generator)[:NUM_PREDICTIONS] for n in lengths]
    )
    shape = (6, NUM_PREDICTIONS)
    masked_ids = torch.randint(5, VOCAB_SIZE, shape, generator=generator)
    return {
        "input_ids": torch.randint(5, VOCAB_SIZE, (6, LENGTH), generator=generator) * mask,
        "token_type_ids": (torch.arange(LENGTH) >= 4).long() * mask,
        "attention_mask": mask,
        "masked_positions": columns * is_used,
        "masked_ids": masked_ids.masked_fill(~is_used, -100),
        "nsp_labels": torch.tensor([0, 1, 1, -100, 0, 1]),
    }


def _without_predictions(batch: Batch) -> Batch:
    return batch | {
        "masked_positions": torch.zeros_like(batch["masked_positions"]),
        "masked_ids": torch.full_like(batch["masked_ids"], -100),
    }


def _all_padding(batch: Batch) -> Batch:
    empty = {name: torch.zeros_like(batch[name]) for name in ("input_ids", "token_type_ids")}
    unlabelled = {"nsp_labels": torch.full_like(batch["nsp_labels"], -100)}
    mask = {"attention_mask": torch.zeros_like(batch["attention_mask"])}
    return _without_predictions(batch) | empty | unlabelled | mask


def _loss(objective: Objective, batch: Batch) -> Tensor:
    return joint_loss(objective(batch).terms, objective.coefficients, objective.weights(batch))


def _gradient(objective: nn.Module, loss: Tensor) -> Tensor:
    gradients = torch.autograd.grad(
        loss, list(objective.parameters()), allow_unused=True, materialize_grads=True
    )
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_t8_the_masked_only_head_equals_the_full_head_in_loss_and_gradient() -> None:
    objective, batch = _objective(), _batch()
    hidden, _ = objective.encoder(batch)
    head = objective.mlm_head
    transformed = head.norm(F.gelu(head.dense(hidden)))
    full_logits = transformed @ objective.encoder.token_embeddings.weight.T + head.bias
    labels = torch.full((6, LENGTH), -100)
    for row in range(6):
        for column, true_id in zip(
            batch["masked_positions"][row], batch["masked_ids"][row], strict=True
        ):
            if true_id != -100:
                labels[row, column] = true_id
    full_loss = F.cross_entropy(full_logits.flatten(0, 1), labels.flatten(), reduction="sum")

    masked_loss, weight = objective(batch).terms["mlm"]
    assert weight == 14
    torch.testing.assert_close(masked_loss, full_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        _gradient(objective, masked_loss),
        _gradient(objective, full_loss),
        rtol=1e-4,
        atol=1e-5,
    )


def test_t8_the_joint_loss_is_the_coefficient_sum_of_mlm_and_nsp() -> None:
    objective = _objective(replace(CONFIG, mlm_coefficient=0.7, nsp_coefficient=1.9))
    batch = _batch()
    mask_logits, nsp_logits = objective.mask_logits(batch), objective.nsp_logits(batch)
    mlm, nsp = [], []
    for row in range(6):
        for index, true_id in enumerate(batch["masked_ids"][row].tolist()):
            if true_id != -100:
                logits = mask_logits[row, index]
                mlm.append(torch.log(torch.exp(logits).sum()) - logits[true_id])
        label = int(batch["nsp_labels"][row])
        if label != -100:
            logits = nsp_logits[row]
            nsp.append(torch.log(torch.exp(logits).sum()) - logits[label])
    assert (len(mlm), len(nsp)) == (14, 5)
    expected = 0.7 * sum(mlm, torch.zeros(())) / 14 + 1.9 * sum(nsp, torch.zeros(())) / 5

    loss = _loss(objective, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        _gradient(objective, loss), _gradient(objective, expected), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("empty", [_without_predictions, _all_padding])
def test_t8_batches_without_masks_or_tokens_are_finite_in_loss_and_gradient(
    empty: Callable[[Batch], Batch], is_autocast: bool
) -> None:
    objective, batch = _objective(), empty(_batch())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        output = objective(batch)
        features = objective.encode(batch)
    loss = joint_loss(output.terms, objective.coefficients, objective.weights(batch))
    assert output.terms["mlm"][0].item() == 0.0
    assert loss.isfinite()
    assert _gradient(objective, loss).isfinite().all()
    assert features.isfinite().all()
    assert all(value.isfinite() for value, _ in output.metrics.values())
    if empty is _all_padding:
        assert loss.item() == 0.0
        assert not features.any()


def test_t8_an_all_padding_row_beside_real_ones_is_finite_and_changes_nothing() -> None:
    objective, batch = _objective(), _batch()
    padding = {name: value[:1] for name, value in _all_padding(batch).items()}
    joined = {name: torch.cat([batch[name], padding[name]]) for name in batch}
    torch.testing.assert_close(
        _gradient(objective, _loss(objective, joined)),
        _gradient(objective, _loss(objective, batch)),
        rtol=1e-4,
        atol=1e-6,
    )


def test_t8_unequal_halves_accumulated_with_global_weights_equal_one_batch() -> None:
    objective, batch = _objective(), _batch()
    rows_of_halves = (slice(0, 2), slice(2, 6))
    halves = [{name: value[rows] for name, value in batch.items()} for rows in rows_of_halves]
    weights = [objective.weights(half) for half in halves]
    assert [int(weight["mlm"]) for weight in weights] == [5, 9]
    totals = {name: weights[0][name] + weights[1][name] for name in weights[0]}
    shares = [joint_loss(objective(half).terms, objective.coefficients, totals) for half in halves]
    whole = _loss(objective, batch)
    torch.testing.assert_close(torch.stack(shares).sum(), whole, rtol=1e-5, atol=0)
    accumulated = _gradient(objective, shares[0]) + _gradient(objective, shares[1])
    torch.testing.assert_close(accumulated, _gradient(objective, whole), rtol=1e-5, atol=1e-6)


def test_weights_are_those_of_the_terms() -> None:
    objective, batch = _objective(), _batch()
    for name, weight in objective.weights(batch).items():
        assert weight.dtype == torch.float32
        assert weight.shape == ()
        assert objective(batch).terms[name][1] == weight


def test_uniform_logits_cost_ln_of_the_number_of_choices() -> None:
    objective, batch = _objective(), _batch()
    for parameter in objective.parameters():
        nn.init.zeros_(parameter)
    output = objective(batch)
    means = {name: (total / weight).item() for name, (total, weight) in output.metrics.items()}
    assert means["mlm_loss"] == pytest.approx(math.log(VOCAB_SIZE), rel=1e-6)
    assert means["entropy"] == pytest.approx(math.log(VOCAB_SIZE), rel=1e-6)
    assert means["p_true"] == pytest.approx(1 / VOCAB_SIZE, rel=1e-6)
    assert means["nsp_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert means["mlm_accuracy"] == 0.0  # the first of equals is [PAD], never a true id


def test_metrics_equal_a_loop() -> None:
    objective, batch = _objective(), _batch()
    # Two true ids become the likeliest ones, so that the accuracies are neither 0 nor 1.
    batch["masked_ids"][0, :2] = objective.mask_logits(batch)[0, :2].argmax(dim=-1)
    expected = dict.fromkeys(("mlm_accuracy", "entropy", "p_true", "nsp_accuracy"), 0.0)
    probabilities = objective.mask_logits(batch).softmax(dim=-1)
    for row in range(6):
        for index, true_id in enumerate(batch["masked_ids"][row].tolist()):
            if true_id == -100:
                continue
            scores = probabilities[row, index].tolist()
            expected["mlm_accuracy"] += scores.index(max(scores)) == true_id
            expected["p_true"] += scores[true_id]
            expected["entropy"] -= sum(p * math.log(p) for p in scores)
        first, second = objective.nsp_logits(batch)[row].tolist()
        expected["nsp_accuracy"] += int(second > first) == int(batch["nsp_labels"][row])
    assert 2 <= expected["mlm_accuracy"] < 14

    output = objective(batch)
    for name, value in expected.items():
        total, weight = output.metrics[name]
        assert total.item() == pytest.approx(value, rel=1e-5), name
        assert weight.item() == (5 if name == "nsp_accuracy" else 14), name
    for name in ("mlm", "nsp"):
        assert torch.equal(output.metrics[f"{name}_loss"][0], output.terms[name][0])
    assert not any(total.requires_grad for total, _ in output.metrics.values())


def test_losses_and_metrics_are_float32_under_autocast() -> None:
    objective, batch = _objective(), _batch()
    expected = objective(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert objective.mask_logits(batch).dtype == torch.bfloat16
        assert objective.encode(batch).dtype == torch.float32
        output = objective(batch)
    for (total, weight), (expected_total, expected_weight) in zip(
        [*output.terms.values(), *output.metrics.values()],
        [*expected.terms.values(), *expected.metrics.values()],
        strict=True,
    ):
        assert total.dtype == weight.dtype == torch.float32
        assert weight == expected_weight
        # atol: one prediction more or less may be correct.
        torch.testing.assert_close(total, expected_total, rtol=0.1, atol=1.01)


def test_encode_is_the_mean_over_real_tokens_only() -> None:
    objective, batch = _objective(), _batch()
    hidden, _ = objective.encoder(batch)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    expected = torch.stack([hidden[row, :n].mean(dim=0) for row, n in enumerate(lengths)])
    torch.testing.assert_close(objective.encode(batch), expected, rtol=1e-5, atol=1e-6)


def test_features_of_a_bfloat16_model_are_float32() -> None:
    assert _objective().bfloat16().encode(_batch()).dtype == torch.float32


def test_heads_start_as_the_encoder_does() -> None:
    torch.manual_seed(0)
    for name, parameter in MaskedLanguage(CONFIG).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" not in name:
            assert 0 < parameter.abs().max() <= 0.04, name


_PEER_MODULES = {
    "encoder.token_embeddings": "bert.embeddings.word_embeddings",
    "encoder.position_embeddings": "bert.embeddings.position_embeddings",
    "encoder.segment_embeddings": "bert.embeddings.token_type_embeddings",
    "encoder.embedding_norm": "bert.embeddings.LayerNorm",
    "encoder.pooler": "bert.pooler.dense",
    "mlm_head.dense": "cls.predictions.transform.dense",
    "mlm_head.norm": "cls.predictions.transform.LayerNorm",
    "mlm_head": "cls.predictions",
    "nsp_head": "cls.seq_relationship",
}
_PEER_LAYER_MODULES = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}


def _peer_of(objective: MaskedLanguage) -> BertForPreTraining:
    """The model of transformers with the same weights, copied one by one."""
    encoder = objective.encoder.config
    peer = BertForPreTraining(
        PeerConfig(
            vocab_size=encoder.vocab_size,
            max_position_embeddings=encoder.max_length,
            hidden_size=encoder.hidden_size,
            num_hidden_layers=encoder.num_layers,
            num_attention_heads=encoder.num_heads,
            intermediate_size=encoder.intermediate_size,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    peer.set_attn_implementation("eager")
    modules = _PEER_MODULES | {
        f"encoder.transformer.layers.{index}.{name}": f"bert.encoder.layer.{index}.{peer_name}"
        for index in range(encoder.num_layers)
        for name, peer_name in _PEER_LAYER_MODULES.items()
    }
    weights = {}
    for name, value in objective.state_dict().items():
        module, _, kind = name.rpartition(".")
        weights[f"{modules[module]}.{kind}"] = value
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"]
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    peer.load_state_dict(weights)
    return peer


@torch.no_grad()
def test_hidden_states_pooled_output_and_logits_equal_transformers() -> None:
    objective, batch = _objective(), _batch()
    peer = _peer_of(objective)
    inputs = {name: batch[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    states = peer.bert(**inputs)
    outputs = peer(**inputs)

    is_real = batch["attention_mask"]
    hidden, pooled = objective.encoder(batch)
    torch.testing.assert_close(
        hidden[is_real], states.last_hidden_state[is_real], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(pooled, states.pooler_output, rtol=1e-4, atol=1e-5)
    rows = torch.arange(6)[:, None]
    peer_mask_logits = outputs.prediction_logits[rows, batch["masked_positions"]]
    torch.testing.assert_close(objective.mask_logits(batch), peer_mask_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        objective.nsp_logits(batch), outputs.seq_relationship_logits, rtol=1e-4, atol=1e-5
    )


def test_the_objective_overfits_one_batch() -> None:
    torch.manual_seed(0)
    encoder = replace(CONFIG.encoder, hidden_size=32, intermediate_size=64)
    objective, batch = MaskedLanguage(replace(CONFIG, encoder=encoder)), _batch()
    optimizer = build_optimizer(objective, OptimizerConfig(learning_rate=5e-3))
    gradients = FlatGradients(objective)
    losses = []
    for _ in range(60):
        gradients.zero()
        loss = _loss(objective, batch)
        torch.autograd.backward(loss)
        gradients.clip(1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(VOCAB_SIZE) + math.log(2), rel=0.1)
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ({"mlm_coefficient": -1.0}, "mlm_coefficient must be finite and at least 0, got -1.0"),
        ({"nsp_coefficient": math.inf}, "nsp_coefficient must be finite and at least 0, got inf"),
        ({"mlm_coefficient": 0.0, "nsp_coefficient": 0.0}, "are both 0.0"),
    ],
)
def test_a_bad_config_is_refused_with_its_value(coefficients: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **coefficients)
