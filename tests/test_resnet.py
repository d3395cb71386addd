"""The ResNets against those of transformers with GroupNorm, their parameters and their start."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetConfig as PeerConfig
from transformers import ResNetModel

from ssl_models.resnet import ResidualBlock, ResNetConfig, ResNetEncoder, group_norm

pytestmark = pytest.mark.usefixtures("one_thread")
PEERS: dict[int, tuple[str, list[int], int]] = {
    18: ("basic", [2, 2, 2, 2], 1),
    50: ("bottleneck", [3, 4, 6, 3], 4),
}


def _pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _encoder(**changes: Any) -> ResNetEncoder:
    """An encoder whose every parameter matters: no norm of a block is 0."""
    torch.manual_seed(0)
    encoder = ResNetEncoder(ResNetConfig(**{"width": 16, **changes}))
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.2)
    return encoder


def _peer(encoder: ResNetEncoder) -> ResNetModel:
    """The model of transformers with our weights and stem, and GroupNorm for BatchNorm."""
    layer_type, depths, expansion = PEERS[encoder.config.depth]
    width = encoder.config.width
    peer = ResNetModel(
        PeerConfig(
            embedding_size=width,
            hidden_sizes=[expansion * width * 2**stage for stage in range(4)],
            depths=depths,
            layer_type=layer_type,
        )
    )
    if encoder.config.stem == "small":
        peer.embedder.embedder.convolution = nn.Conv2d(3, width, 3, padding=1, bias=False)
        peer.embedder.pooler = nn.MaxPool2d(1)
    for name, module in list(peer.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, child = name.rpartition(".")
            setattr(peer.get_submodule(parent), child, group_norm(module.num_features))
    with torch.no_grad():
        for theirs, ours in zip(peer.parameters(), encoder.parameters(), strict=True):
            assert theirs.shape == ours.shape
            theirs.copy_(ours)
    return peer


@pytest.mark.parametrize(("depth", "stem"), [(18, "small"), (18, "large"), (50, "large")])
def test_the_encoder_equals_that_of_transformers_in_features_and_gradient(
    depth: int, stem: str
) -> None:
    encoder = _encoder(depth=depth, stem=stem, width=4, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    peer = _peer(encoder)
    pixels = _pixels(2, 3, 40, 48) if stem == "large" else _pixels(2, 3, 12, 20)
    scaled = pixels.float() / 255
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    normalised = (scaled - mean[:, None, None]) / std[:, None, None]

    features, expected = encoder(pixels), peer(normalised).pooler_output.flatten(1)

    assert features.shape == (2, encoder.config.feature_size)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(features)
    found = torch.autograd.grad((features * direction).sum(), list(encoder.parameters()))
    wanted = torch.autograd.grad((expected * direction).sum(), list(peer.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize(("depth", "count"), [(18, 11_689_512), (50, 25_557_032)])
def test_the_encoder_has_the_parameters_of_the_paper_less_its_classifier(
    depth: Any, count: int
) -> None:
    """As many as torchvision counts: a GroupNorm has as many parameters as a BatchNorm."""
    config = ResNetConfig(depth=depth, stem="large")
    with torch.device("meta"):
        encoder = ResNetEncoder(config)
    classifier = 1000 * config.feature_size + 1000
    assert sum(p.numel() for p in encoder.parameters()) == count - classifier


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (8, 1), (16, 1), (64, 4), (2048, 128)])
def test_a_norm_has_sixteen_channels_in_a_group(channels: int, groups: int) -> None:
    norm = group_norm(channels)
    assert (norm.num_groups, norm.num_channels) == (groups, channels)
    maps = torch.randn(2, channels, 3, 3) * 3 + 1
    expected = torch.stack(
        [
            (part - part.mean()) / torch.sqrt(part.var(correction=0) + 1e-5)
            for row in maps
            for part in row.chunk(groups)
        ]
    ).reshape(maps.shape)
    torch.testing.assert_close(norm(maps), expected, rtol=1e-4, atol=1e-5)


def test_every_block_starts_as_its_shortcut() -> None:
    torch.manual_seed(0)
    encoder = ResNetEncoder(ResNetConfig(width=16))
    for block in encoder.blocks:
        assert isinstance(block, ResidualBlock)
        first = block.residual[0]
        assert isinstance(first, nn.Conv2d)
        maps = torch.randn(2, first.in_channels, 8, 8)
        assert torch.equal(block(maps), F.relu(block.shortcut(maps)))


def test_initial_convolutions_are_he_normal() -> None:
    torch.manual_seed(0)
    convolution = ResNetEncoder(ResNetConfig(width=64)).stem[0]
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("size", [28, 64])
def test_a_small_image_keeps_its_size_in_the_stem_and_a_large_one_is_quartered(size: int) -> None:
    encoder = _encoder(channels=1)
    normalised = encoder.pixel_norm(_pixels(1, 1, size, size))
    assert encoder.stem(normalised).shape == (1, 16, size, size)
    large = _encoder(channels=1, stem="large")
    assert large.stem(normalised).shape == (1, 16, size // 4, size // 4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 28), (3, 28, 28)])
def test_features_of_a_row_do_not_depend_on_the_others(shape: tuple[int, int, int]) -> None:
    encoder = _encoder(channels=shape[0], width=4)
    pixels = _pixels(5, *shape)
    together = encoder(pixels)
    assert together.isfinite().all()
    torch.testing.assert_close(encoder(pixels[3:4]), together[3:4], rtol=1e-4, atol=1e-5)


def test_features_are_float32_under_autocast_and_near_those_without() -> None:
    encoder, pixels = _encoder(), _pixels(2, 3, 28, 28)
    expected = encoder(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder(pixels)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=0.1, atol=0.05)
    assert not torch.equal(features, expected)


@pytest.mark.parametrize("width", [0, 2, 12, 24, 100])
def test_a_width_without_whole_groups_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"width must be 4, 8 or a multiple of 16, got {width}"):
        ResNetConfig(width=width)


def test_a_config_with_bad_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="channels must be 1"):
        ResNetConfig(channels=4)
