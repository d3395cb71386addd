"""The encoder against a transcription, its mask, its dropout and its edge cases."""

import math

import pytest
import torch
from torch import Tensor

from ssl_models.transformer import EncoderLayer, NormPlace, TransformerEncoder

HIDDEN_SIZE, NUM_HEADS = 12, 3


def _encoder(*, dropout: float = 0.0, norm: NormPlace = "post") -> TransformerEncoder:
    torch.manual_seed(0)
    encoder = TransformerEncoder(
        num_layers=2,
        hidden_size=HIDDEN_SIZE,
        num_heads=NUM_HEADS,
        intermediate_size=20,
        dropout=dropout,
        norm=norm,
    )
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return encoder


def _normed(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + 1e-12) * norm.weight + norm.bias


def _attended(layer: EncoderLayer, row: Tensor, is_real: Tensor) -> Tensor:
    """One row (length, width) through self-attention, token by token and head by head."""
    attention, outputs = layer.attention, []
    queries, keys, values = attention.query(row), attention.key(row), attention.value(row)
    width = HIDDEN_SIZE // NUM_HEADS
    for i in range(len(row)):
        heads = []
        for head in range(NUM_HEADS):
            part = slice(head * width, (head + 1) * width)
            scores = torch.stack(
                [queries[i, part] @ keys[j, part] / math.sqrt(width) for j in range(len(row))]
            )
            odds = torch.exp(scores) * is_real
            heads.append((odds / odds.sum()) @ values[:, part])
        outputs.append(attention.output(torch.cat(heads)))
    return torch.stack(outputs)


def _expanded(layer: EncoderLayer, token: Tensor) -> Tensor:
    inner = layer.intermediate(token)
    output: Tensor = layer.output(inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))))
    return output


def _transcribed_layer(layer: EncoderLayer, row: Tensor, is_real: Tensor) -> Tensor:
    """One row through a layer with its norms after the sums, or with `pre` before the sublayers."""
    tokens = []
    if layer.norm == "pre":
        normed = torch.stack([_normed(token, layer.attention_norm) for token in row])
        for token in row + _attended(layer, normed, is_real):
            tokens.append(token + _expanded(layer, _normed(token, layer.output_norm)))
    else:
        for token in row + _attended(layer, row, is_real):
            middle = _normed(token, layer.attention_norm)
            tokens.append(_normed(middle + _expanded(layer, middle), layer.output_norm))
    return torch.stack(tokens)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_the_encoder_equals_its_transcription_with_padding(norm: NormPlace) -> None:
    encoder = _encoder(norm=norm)
    hidden = torch.randn(2, 5, HIDDEN_SIZE)
    mask = torch.tensor([[True, True, True, True, True], [True, True, True, False, False]])
    expected = []
    for row, is_real in zip(hidden, mask, strict=True):
        for layer in encoder.layers:
            assert isinstance(layer, EncoderLayer)
            row = _transcribed_layer(layer, row, is_real)
        expected.append(row)
    torch.testing.assert_close(encoder(hidden, mask), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_both_places_of_the_norm_have_the_same_parameters_in_the_same_order() -> None:
    post, pre = _encoder().state_dict(), _encoder(norm="pre").state_dict()
    assert list(post) == list(pre)
    assert all(torch.equal(post[name], pre[name]) for name in post)


def test_no_mask_is_a_mask_of_real_tokens() -> None:
    encoder, hidden = _encoder(), torch.randn(2, 5, HIDDEN_SIZE)
    everything = torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(encoder(hidden), encoder(hidden, everything))


def test_real_tokens_do_not_see_padding() -> None:
    encoder, hidden = _encoder(), torch.randn(2, 5, HIDDEN_SIZE)
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    other = hidden.clone()
    other[:, 3:] = 100.0
    assert torch.equal(encoder(hidden, mask)[:, :3], encoder(other, mask)[:, :3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_a_real_token_are_finite_and_leave_the_others_alone(
    dtype: torch.dtype,
) -> None:
    encoder = _encoder().to(dtype)
    hidden = torch.randn(2, 5, HIDDEN_SIZE, dtype=dtype, requires_grad=True)
    mask = torch.tensor([[True, True, True, True, False], [False] * 5])
    output = encoder(hidden, mask)
    output.square().sum().backward()
    assert output.isfinite().all()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    alone = encoder(hidden[:1], mask[:1])
    torch.testing.assert_close(output[:1], alone, rtol=tolerance, atol=tolerance)


def test_a_row_without_a_real_token_sees_its_padding_in_every_kernel() -> None:
    encoder, hidden = _encoder(), torch.randn(2, 5, HIDDEN_SIZE)
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    torch.testing.assert_close(encoder(hidden, nothing), encoder(hidden))


def test_dropout_follows_the_global_generator_and_stops_in_evaluation() -> None:
    encoder, hidden = _encoder(dropout=0.5), torch.randn(2, 5, HIDDEN_SIZE)
    torch.manual_seed(1)
    first = encoder(hidden)
    second = encoder(hidden)
    torch.manual_seed(1)
    assert torch.equal(encoder(hidden), first)
    assert not torch.equal(second, first)
    encoder.eval()
    assert torch.equal(encoder(hidden), encoder(hidden))
    assert torch.equal(encoder(hidden), _encoder()(hidden))


def test_dropout_acts_on_attention_weights_too() -> None:
    layer = _encoder(dropout=0.5).layers[0]
    assert isinstance(layer, EncoderLayer)
    hidden = torch.randn(2, 5, HIDDEN_SIZE)
    assert not torch.equal(layer.attention(hidden, None), layer.attention(hidden, None))
