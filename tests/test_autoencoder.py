"""The autoencoder: its loss by hand, its decoder's sizes, what it keeps, and that it learns."""

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from ssl_models.autoencoder import Autoencoder, AutoencoderConfig
from ssl_models.objective import Batch, joint_loss
from ssl_models.resnet import ResNetConfig
from ssl_models.vit import ViTConfig

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = AutoencoderConfig(
    encoder=ResNetConfig(width=4, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.5)),
    image_size=12,
    decoder_width=4,
)
VIT = ViTConfig(patch_size=4, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24)


def _objective(config: AutoencoderConfig = CONFIG, **changes: Any) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(replace(config, **changes))


def _batch(rows: int = 4, size: int = 12, channels: int = 3) -> Batch:
    dice = torch.Generator().manual_seed(1)
    pixels = torch.randint(
        0, 256, (2, rows, channels, size, size), generator=dice, dtype=torch.uint8
    )
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0] + [1.0] * rows)[:rows]
    return {"image": pixels[0], "corrupted": pixels[1], "weight": weight}


def _loss(objective: Autoencoder, batch: Batch) -> Tensor:
    return joint_loss(objective(batch).terms, objective.coefficients, objective.weights(batch))


@pytest.mark.parametrize("distance", ["mse", "l1"])
@pytest.mark.parametrize("pixels", ["unit", "normalized"])
@pytest.mark.parametrize("is_denoising", [False, True])
def test_the_loss_is_the_weighted_mean_of_the_distances_of_the_rows(
    distance: Literal["mse", "l1"], pixels: Literal["unit", "normalized"], is_denoising: bool
) -> None:
    objective, batch = _objective(distance=distance, pixels=pixels), _batch()
    if not is_denoising:
        del batch["corrupted"]
    seen = batch["corrupted" if is_denoising else "image"]
    drawn = objective.decoder(objective.encoder(seen))
    expected = 0.0
    for row, weight in enumerate(batch["weight"].tolist()):
        target = batch["image"][row].float() / 255
        if pixels == "normalized":
            mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.5])
            target = (target - mean[:, None, None]) / std[:, None, None]
        apart = drawn[row] - target
        expected += weight * (apart**2 if distance == "mse" else apart.abs()).mean().item()
    found, weight = objective(batch).terms["reconstruction"]
    assert weight == objective.weights(batch)["reconstruction"] == 3.5
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert _loss(objective, batch).item() == pytest.approx(expected / 3.5, rel=1e-5)


def test_the_decoder_equals_its_transcription() -> None:
    objective = _objective(decoder_width=16)
    features = torch.randn(2, 32)
    layers = dict(objective.decoder.named_parameters())

    def normed(maps: Tensor, name: str) -> Tensor:
        groups = maps.shape[1] // 16
        parts = maps.reshape(2, groups, -1)
        centred = parts - parts.mean(dim=2, keepdim=True)
        scaled = centred / torch.sqrt(centred.square().mean(dim=2, keepdim=True) + 1e-5)
        weight, bias = (layers[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return (scaled.reshape(maps.shape) * weight + bias).clamp(min=0)

    for name, parameter in layers.items():
        nn.init.normal_(parameter, std=0.5 if "weight" in name else 0.1)
    maps = (features @ layers["start.0.weight"].T + layers["start.0.bias"]).reshape(2, 32, 6, 6)
    maps = normed(maps, "start.2")
    maps = maps.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    maps = nn.functional.conv2d(maps, layers["doublings.1.weight"], padding=1)
    maps = normed(maps, "doublings.2")
    expected = nn.functional.conv2d(maps, layers["output.weight"], layers["output.bias"], padding=1)
    torch.testing.assert_close(objective.decoder(features), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("image_size", "start"),
    [(4, 4), (7, 7), (8, 4), (12, 6), (28, 7), (32, 4), (40, 5), (64, 4), (96, 6), (224, 7)],
)
def test_the_decoder_draws_images_of_the_size_of_the_input(image_size: int, start: int) -> None:
    config = replace(CONFIG, image_size=image_size, encoder=ResNetConfig(width=4, channels=1))
    assert config.start_size == start
    objective = _objective(config)
    assert objective.decoder(torch.zeros(1, 32)).shape == (1, 1, image_size, image_size)


@pytest.mark.parametrize("image_size", [0, 3, 9, 18, 30, 100])
def test_a_size_that_cannot_be_doubled_to_is_refused(image_size: int) -> None:
    with pytest.raises(ValueError, match=f"image_size must be .* got {image_size}"):
        replace(CONFIG, image_size=image_size)


def test_other_images_and_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images of \(16, 16\) pixels, but image_size is 12"):
        _objective()(_batch(size=16))
    with pytest.raises(ValueError, match="decoder_width must be 4, 8 or a multiple of 16, got 20"):
        replace(CONFIG, decoder_width=20)


@pytest.mark.parametrize("pixels", ["unit", "normalized"])
def test_a_reconstruction_is_what_is_drawn_as_pixels(pixels: Literal["unit", "normalized"]) -> None:
    objective, batch = _objective(pixels=pixels), _batch()
    objective.decoder.output.bias = nn.Parameter(torch.tensor([-9.0, 0.0, 9.0]))
    drawn = objective.decoder(objective.encoder(batch["corrupted"]))
    if pixels == "normalized":
        mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.5])
        drawn = drawn * std[:, None, None] + mean[:, None, None]
    expected = (255 * drawn).round().clamp(0, 255)
    reconstruction = objective.reconstruct(batch)
    assert reconstruction.dtype == torch.uint8
    assert ((reconstruction.float() - expected).abs() <= 1).all()
    assert (reconstruction[:, 0] == 0).all()
    assert (reconstruction[:, 2] == 255).all()


@pytest.mark.parametrize("encoder", [CONFIG.encoder, VIT], ids=["resnet", "vit"])
def test_encode_returns_the_features_which_need_no_decoder(encoder: Any) -> None:
    objective, batch = _objective(encoder=encoder), _batch()
    features = objective.encode({"image": batch["image"]})
    assert features.dtype == torch.float32
    assert torch.equal(features, objective.encoder(batch["image"]))
    state = objective.state_dict()
    kept = {k: v for k, v in state.items() if not k.startswith(objective.pretraining_only)}
    assert {name.split(".")[0] for name in kept} == {"encoder"}
    assert {name.split(".")[0] for name in state} == {"encoder", "decoder"}


def test_a_placeholder_changes_neither_loss_nor_gradient() -> None:
    objective, batch = _objective(), _batch()
    del batch["corrupted"]
    image = batch["image"].clone()
    image[2] = 0
    losses = [_loss(objective, batch), _loss(objective, batch | {"image": image})]
    assert torch.equal(losses[0], losses[1])
    found, expected = (torch.autograd.grad(loss, list(objective.parameters())) for loss in losses)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    nothing = _loss(objective, batch | {"weight": torch.zeros(4)})
    assert nothing == 0
    assert not any(g.any() for g in torch.autograd.grad(nothing, list(objective.parameters())))


def test_the_loss_is_float32_under_autocast_and_near_that_without() -> None:
    objective, batch = _objective(), _batch()
    expected = objective(batch).terms["reconstruction"][0]
    with torch.autocast("cpu", torch.bfloat16):
        found = objective(batch).terms["reconstruction"][0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("encoder", "decoder_width", "rate", "is_denoising"),
    [
        (ResNetConfig(width=4), 16, 3e-3, False),
        (replace(VIT, initializer_range=0.2), 8, 1e-2, True),
    ],
    ids=["plain resnet", "denoising vit"],
)
def test_a_few_images_are_learned_by_heart(
    encoder: Any, decoder_width: int, rate: float, is_denoising: bool
) -> None:
    dice = torch.Generator().manual_seed(2)
    coarse = torch.randint(0, 256, (6, 3, 3, 3), generator=dice)
    image = coarse.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    noise = torch.randint(-40, 41, image.shape, generator=dice)
    batch = {"image": image.to(torch.uint8), "weight": torch.ones(6)}
    if is_denoising:
        batch["corrupted"] = (image + noise).clamp(0, 255).to(torch.uint8)
    objective = _objective(encoder=encoder, decoder_width=decoder_width)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(120):
        optimizer.zero_grad()
        torch.autograd.backward(_loss(objective, batch))
        optimizer.step()
    scaled = batch["image"].float() / 255
    loss_of_the_mean_image = (scaled - scaled.mean(dim=0)).square().mean().item()
    assert _loss(objective, batch).item() < loss_of_the_mean_image / 10
