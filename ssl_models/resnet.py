"""ResNet-18 and ResNet-50 with GroupNorm, for large images and for small ones.

Shapes: B rows, C channels, H height, W width, D feature size.
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ssl_models.pixels import PixelNorm, check_pixels

CHANNELS_PER_GROUP = 16
BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
"""Depth -> blocks of each of the four stages."""


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """He et al. 2016, Deep Residual Learning for Image Recognition, arXiv:1512.03385, table 1.

    As torchvision has it: ResNet-50 strides in the 3x3 convolution of its bottleneck ("v1.5"), and
    a shortcut that changes shape is a 1x1 convolution (option B).
    """

    kind: Literal["resnet"] = "resnet"
    depth: Literal[18, 50] = 18
    stem: Literal["small", "large"] = "small"
    """`large` is the paper's 7x7 convolution of stride 2 with a max-pool, for 224 pixels; `small` a
    3x3 convolution of stride 1 alone, for 28 to 64 (Chen et al. 2020, SimCLR, arXiv:2002.05709,
    appendix B.9)."""
    width: int = 64
    """Channels of the first stage; 64 is the paper's, less makes a narrow encoder. 4, 8 or a
    multiple of 16, so that the groups of the norms are whole."""
    channels: int = 3
    """1 (grey) or 3 (RGB)."""
    mean: tuple[float, ...] = (0.5,)
    """Of the pixels on the scale of [0, 1]; one for all channels, or one for each."""
    std: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        check_width("width", self.width)
        check_pixels(self.channels, self.mean, self.std)

    @property
    def feature_size(self) -> int:
        """Width of the features."""
        return 8 * self.width * (4 if self.depth == 50 else 1)


class ResidualBlock(nn.Module):
    """ReLU(shortcut(x) + residual(x)): two 3x3 convolutions, or a bottleneck around one."""

    def __init__(self, *, in_channels: int, width: int, stride: int, is_bottleneck: bool) -> None:
        super().__init__()
        out_channels = 4 * width if is_bottleneck else width
        changes_shape = stride != 1 or in_channels != out_channels
        self.shortcut = nn.Sequential()
        if changes_shape:
            self.shortcut.extend(_convolved(in_channels, out_channels, kernel=1, stride=stride))
        if is_bottleneck:
            self.residual = nn.Sequential(
                *_convolved(in_channels, width, kernel=1),
                nn.ReLU(),
                *_convolved(width, width, kernel=3, stride=stride),
                nn.ReLU(),
                *_convolved(width, out_channels, kernel=1),
            )
        else:
            self.residual = nn.Sequential(
                *_convolved(in_channels, width, kernel=3, stride=stride),
                nn.ReLU(),
                *_convolved(width, out_channels, kernel=3),
            )

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Return the maps of this block (B, C, H, W), smaller by its stride."""
        return F.relu(self.shortcut(maps_BCHW) + self.residual(maps_BCHW))


class ResNetEncoder(nn.Module):
    """Images to the global average of the last feature maps."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.pixel_norm = PixelNorm(config.channels, config.mean, config.std)
        if config.stem == "small":
            self.stem = nn.Sequential(
                *_convolved(config.channels, config.width, kernel=3), nn.ReLU()
            )
        else:
            self.stem = nn.Sequential(
                *_convolved(config.channels, config.width, kernel=7, stride=2),
                nn.ReLU(),
                nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            )
        blocks: list[nn.Module] = []
        in_channels = config.width
        is_bottleneck = config.depth == 50
        for stage, count in enumerate(BLOCKS[config.depth]):
            width = config.width * 2**stage
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(
                    ResidualBlock(
                        in_channels=in_channels,
                        width=width,
                        stride=stride,
                        is_bottleneck=is_bottleneck,
                    )
                )
                in_channels = 4 * width if is_bottleneck else width
        self.blocks = nn.Sequential(*blocks)
        _initialize(self)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return features (B, D), float32 even under autocast, of uint8 pixels (B, C, H, W).

        Raises:
            ValueError: If the pixels are not uint8 (B, C, H, W) of this number of channels.
        """
        normalised_BCHW = self.pixel_norm(pixels_BCHW)
        maps_BCHW: Tensor = self.blocks(self.stem(normalised_BCHW))
        return maps_BCHW.to(normalised_BCHW.dtype).mean(dim=(2, 3))


def check_width(name: str, width: int) -> None:
    """Raise ValueError unless `group_norm` can group this width and its doubles."""
    if width not in (4, 8) and (width < CHANNELS_PER_GROUP or width % CHANNELS_PER_GROUP):
        raise ValueError(f"{name} must be 4, 8 or a multiple of 16, got {width}")


def group_norm(channels: int) -> nn.GroupNorm:
    """Return Wu & He 2018, Group Normalization, arXiv:1803.08494, with 16 channels in a group.

    No statistic leaves its image, so slots and workers do not matter. Of the two settings of the
    paper (table 3; the other is 32 groups whatever the width) this one suits narrow encoders and
    last maps of one pixel, where 32 groups would leave a channel or two to be normalised away.
    """
    return nn.GroupNorm(max(1, channels // CHANNELS_PER_GROUP), channels)


def _convolved(in_channels: int, channels: int, *, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Return a convolution that keeps the size but for its stride, and its norm."""
    convolution = nn.Conv2d(
        in_channels, channels, kernel, stride=stride, padding=kernel // 2, bias=False
    )
    return [convolution, group_norm(channels)]


def _initialize(encoder: nn.Module) -> None:
    """He initialisation; the last norm of each block starts at 0, so each block starts as ReLU.

    Goyal et al. 2017, Accurate, Large Minibatch SGD, arXiv:1706.02677, section 5.1.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    for module in encoder.modules():
        if isinstance(module, ResidualBlock):
            last = module.residual[-1]
            assert isinstance(last, nn.GroupNorm)
            nn.init.zeros_(last.weight)
