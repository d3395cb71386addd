"""Which image encoder a config describes: uint8 pixels (B, C, H, W) to float32 features (B, D)."""

from typing import assert_never

from ssl_models.resnet import ResNetConfig, ResNetEncoder
from ssl_models.vit import ViTConfig, ViTEncoder

ImageEncoderConfig = ResNetConfig | ViTConfig
ImageEncoder = ResNetEncoder | ViTEncoder


def build_image_encoder(config: ImageEncoderConfig) -> ImageEncoder:
    """Return the encoder that a config describes, with freshly drawn weights."""
    match config:
        case ResNetConfig():
            return ResNetEncoder(config)
        case ViTConfig():
            return ViTEncoder(config)
        case _:
            assert_never(config)
