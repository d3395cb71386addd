"""From stored pixels to what an encoder computes with: uint8 until the device.

Shapes: B rows, C channels, H height, W width.
"""

import math

import torch
from torch import Tensor, nn

MAX_PIXEL = 255


def check_pixels(channels: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Raise ValueError unless images of these channels can be normalised by this mean and std."""
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise ValueError(
                f"{name} has {len(values)} numbers for {channels} channels: "
                "give one for all channels, or one for each"
            )
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"{name} must be finite, got {values}")
    if not min(std) > 0.0:
        raise ValueError(f"std must be above 0, got {std}")


class PixelNorm(nn.Module):
    """Scales pixels to [0, 1], then takes off the mean and divides by the standard deviation.

    Mean and std are part of the config, and so not of the state dict.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return normalised pixels (B, C, H, W), float32.

        Raises:
            ValueError: If the pixels are not uint8 (B, C, H, W) of this number of channels.
        """
        normalised_BCHW: Tensor = (self.unit(pixels_BCHW) - self.mean) / self.std
        return normalised_BCHW

    def unit(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the pixels scaled to [0, 1], float32.

        Raises:
            ValueError: If the pixels are not uint8 (B, C, H, W) of this number of channels.
        """
        shape = tuple(pixels_BCHW.shape)
        if pixels_BCHW.dtype != torch.uint8 or len(shape) != 4 or shape[1] != self.channels:
            raise ValueError(
                f"got pixels {pixels_BCHW.dtype} {shape}: "
                f"the encoder takes torch.uint8 (rows, {self.channels}, height, width)"
            )
        return pixels_BCHW.to(self.mean.dtype) / MAX_PIXEL

    def inverse(self, normalised_BCHW: Tensor) -> Tensor:
        """Return pixels on the scale of [0, 1] from normalised ones."""
        unit_BCHW: Tensor = normalised_BCHW * self.std + self.mean
        return unit_BCHW
