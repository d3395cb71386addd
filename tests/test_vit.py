"""The ViT against the layers of transformers, its positions, and the parameters of the papers."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig as PeerConfig
from transformers import ViTModel

from ssl_models.vit import VIT_B, VIT_S, VIT_TI, ViTConfig, ViTEncoder, sine_positions

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = ViTConfig(patch_size=4, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24)


def _pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _encoder(config: ViTConfig = CONFIG) -> ViTEncoder:
    torch.manual_seed(0)
    encoder = ViTEncoder(config)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder


def _peer(encoder: ViTEncoder) -> ViTModel:
    """The model of transformers with our weights; its class token and positions go unused."""
    peer = ViTModel(
        PeerConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            layer_norm_eps=1e-12,
            image_size=(8, 12),
            patch_size=4,
        ),
        add_pooling_layer=False,
    )
    names = {
        "patch_embedding": "embeddings.patch_embeddings.projection",
        "transformer.layers": "layers",
        "attention.query": "attention.q_proj",
        "attention.key": "attention.k_proj",
        "attention.value": "attention.v_proj",
        "attention.output": "attention.o_proj",
        "attention_norm": "layernorm_before",
        "output_norm": "layernorm_after",
        "intermediate": "mlp.fc1",
    }
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            parts = name.split(".")
            if parts[0] == "norm":
                parts[0] = "layernorm"
            if parts[0] == "layers" and parts[2] == "output":
                parts[2] = "mlp.fc2"
            their = peer.get_parameter(".".join(parts))
            their.copy_(parameter.view_as(their))
    peer.train(False)
    return peer


def _position(row: int, column: int, size: int) -> list[float]:
    quarter = size // 4
    rates = [10_000 ** (-k / (quarter - 1)) for k in range(quarter)]
    return [
        function(place * rate)
        for place in (column, row)
        for function in (math.sin, math.cos)
        for rate in rates
    ]


def test_positions_are_sines_and_cosines_of_column_and_row() -> None:
    expected = [_position(row, column, 16) for row in range(2) for column in range(3)]
    positions = sine_positions(2, 3, 16, torch.device("cpu"))
    torch.testing.assert_close(positions, torch.tensor(expected))


def test_the_encoder_equals_the_layers_of_transformers() -> None:
    encoder, pixels = _encoder(), _pixels(3, 3, 8, 12)
    peer = _peer(encoder)
    hidden = peer.embeddings.patch_embeddings((pixels.float() / 255 - 0.5) / 0.5)
    places = [_position(row, column, 16) for row in range(2) for column in range(3)]
    hidden = hidden + torch.tensor(places)
    for layer in peer.layers:
        hidden = layer(hidden)
    expected = peer.layernorm(hidden).mean(dim=1)
    features = encoder(pixels)
    assert features.shape == (3, encoder.config.feature_size)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "count"), [(VIT_TI, 5_717_416), (VIT_S, 22_050_664), (VIT_B, 86_567_656)]
)
def test_the_encoder_has_the_parameters_of_the_paper_less_what_it_leaves_out(
    config: ViTConfig, count: int
) -> None:
    """Less a classifier of 1000 classes, a class token and 197 positions."""
    with torch.device("meta"):
        encoder = ViTEncoder(config)
    size = config.hidden_size
    left_out = (1000 * size + 1000) + size + 197 * size
    assert sum(p.numel() for p in encoder.parameters()) == count - left_out


def test_where_a_patch_stands_matters() -> None:
    encoder, pixels = _encoder(), _pixels(1, 3, 8, 8)
    swapped = torch.cat([pixels[..., 4:], pixels[..., :4]], dim=3)
    assert not torch.allclose(encoder(pixels), encoder(swapped), atol=1e-3)


def test_images_of_another_size_are_taken_if_the_patches_divide_them() -> None:
    encoder = _encoder()
    assert encoder(_pixels(2, 3, 20, 4)).isfinite().all()
    with pytest.raises(ValueError, match="images of 8 x 10 pixels, but patches of 4"):
        encoder(_pixels(2, 3, 8, 10))


def test_features_are_float32_under_autocast_and_near_those_without() -> None:
    encoder, pixels = _encoder(), _pixels(2, 3, 8, 8)
    expected = encoder(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder(pixels)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=0.1, atol=0.1)
    assert not torch.equal(features, expected)


def test_dropout_stops_in_evaluation() -> None:
    encoder, pixels = _encoder(replace(CONFIG, dropout=0.5)), _pixels(2, 3, 8, 8)
    assert not torch.equal(encoder(pixels), encoder(pixels))
    assert torch.equal(encoder.eval()(pixels), _encoder()(pixels))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("patch_size", 0, "patch_size must be at least 1, got 0"),
        ("num_layers", 0, "num_layers must be at least 1, got 0"),
        ("hidden_size", 4, "hidden_size 4 with num_heads 2"),
        ("hidden_size", 18, "hidden_size 18 with num_heads 2"),
        ("num_heads", 3, "hidden_size 16 with num_heads 3"),
        ("dropout", 1.0, "dropout must be at least 0 and below 1, got 1.0"),
        ("initializer_range", 0.0, "initializer_range must be above 0, got 0.0"),
        ("channels", 2, "channels must be 1"),
    ],
)
def test_a_bad_config_is_refused_with_its_value(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **{field: value})
