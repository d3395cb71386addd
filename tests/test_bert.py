"""The encoder's embeddings, its padding, its initial weights and its config."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from ssl_models.bert import BertConfig, BertEncoder
from ssl_models.objective import Batch

CONFIG = BertConfig(
    vocab_size=50, max_length=12, hidden_size=16, num_layers=2, num_heads=4, intermediate_size=24
)


@pytest.fixture
def encoder() -> BertEncoder:
    torch.manual_seed(0)
    encoder = BertEncoder(CONFIG)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return encoder


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(8) < torch.tensor([[8], [5], [6]])
    return {
        "input_ids": torch.randint(5, 50, (3, 8), generator=generator) * mask,
        "token_type_ids": (torch.arange(8) >= 3).long() * mask,
        "attention_mask": mask,
    }


def test_the_encoder_returns_hidden_states_and_the_pooled_first_token(
    encoder: BertEncoder, batch: Batch
) -> None:
    hidden, pooled = encoder(batch)
    assert hidden.shape == (3, 8, 16)
    expected = torch.tanh(hidden[:, 0] @ encoder.pooler.weight.T + encoder.pooler.bias)
    torch.testing.assert_close(pooled, expected)


def test_padding_content_does_not_change_real_tokens(encoder: BertEncoder, batch: Batch) -> None:
    padding = ~batch["attention_mask"]
    other = batch | {
        "input_ids": batch["input_ids"].masked_fill(padding, 7),
        "token_type_ids": batch["token_type_ids"].masked_fill(padding, 1),
    }
    hidden, pooled = encoder(batch)
    other_hidden, other_pooled = encoder(other)
    assert torch.equal(hidden[~padding], other_hidden[~padding])
    assert torch.equal(pooled, other_pooled)
    assert not torch.equal(hidden[padding], other_hidden[padding])


def test_more_padding_does_not_change_real_tokens(encoder: BertEncoder, batch: Batch) -> None:
    longer = {name: torch.nn.functional.pad(value, (0, 4)) for name, value in batch.items()}
    hidden, _ = encoder(batch)
    longer_hidden, _ = encoder(longer)
    torch.testing.assert_close(
        longer_hidden[:, :8][batch["attention_mask"]],
        hidden[batch["attention_mask"]],
        rtol=1e-5,
        atol=1e-5,
    )


def test_the_position_of_a_token_matters(encoder: BertEncoder, batch: Batch) -> None:
    swapped = batch["input_ids"].clone()
    swapped[:, [1, 2]] = swapped[:, [2, 1]]
    _, pooled = encoder(batch)
    _, swapped_pooled = encoder(batch | {"input_ids": swapped})
    assert not torch.allclose(pooled, swapped_pooled, atol=1e-3)

    torch.nn.init.zeros_(encoder.position_embeddings.weight)
    _, pooled = encoder(batch)
    _, swapped_pooled = encoder(batch | {"input_ids": swapped})
    torch.testing.assert_close(pooled, swapped_pooled, rtol=1e-4, atol=1e-5)


def test_the_segment_of_a_token_matters(encoder: BertEncoder, batch: Batch) -> None:
    _, pooled = encoder(batch)
    one_segment = torch.zeros_like(batch["token_type_ids"])
    _, other_pooled = encoder(batch | {"token_type_ids": one_segment})
    assert not torch.allclose(pooled, other_pooled, atol=1e-3)


def test_initial_weights_are_truncated_normal_with_biases_0_and_norms_1() -> None:
    torch.manual_seed(0)
    for name, parameter in BertEncoder(CONFIG).named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.abs().max() <= 0.04, name
    deviation = BertEncoder(BertConfig(vocab_size=2000)).token_embeddings.weight.std().item()
    assert deviation == pytest.approx(0.02 * 0.8796, rel=0.02)  # of a normal cut at two deviations


def test_rows_longer_than_max_length_are_refused(encoder: BertEncoder) -> None:
    ids = torch.ones(1, 13, dtype=torch.long)
    batch = {"input_ids": ids, "token_type_ids": ids, "attention_mask": ids.bool()}
    with pytest.raises(ValueError, match="rows of 13 tokens, but max_length is 12"):
        encoder(batch)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 0, "vocab_size must be at least 1, got 0"),
        ("num_layers", -2, "num_layers must be at least 1, got -2"),
        ("num_heads", 3, "hidden_size 128 is not divisible by num_heads 3"),
        ("dropout", 1.0, "dropout must be at least 0 and below 1, got 1.0"),
        ("dropout", float("nan"), "got nan"),
    ],
)
def test_a_bad_config_is_refused_with_its_value(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(BertConfig(vocab_size=50), **{field: value})
