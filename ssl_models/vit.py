"""ViT: image patches as tokens of a pre-norm transformer encoder.

Shapes: B rows, C channels, H height, W width, P patch size, L patches, D hidden size.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_models.bert import initialize
from ssl_models.pixels import PixelNorm, check_pixels
from ssl_models.transformer import LAYER_NORM_EPSILON, TransformerEncoder

TEMPERATURE = 10_000.0


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, arXiv:2010.11929.

    Positions are fixed sines and cosines and features are the mean over patches, as in Beyer et al.
    2022, Better plain ViT baselines for ImageNet-1k, arXiv:2205.01580: both do at least as well in
    short runs as learned positions and a class token, and an encoder without a table of positions
    takes images of any size that its patches divide.
    """

    kind: Literal["vit"] = "vit"
    patch_size: int = 16
    """Pixels; 16 for images of 224, 4 for 32."""
    hidden_size: int = 192
    num_layers: int = 12
    num_heads: int = 3
    intermediate_size: int = 768
    dropout: float = 0.0
    """Probability of dropping a hidden unit or an attention weight in training."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    channels: int = 3
    """1 (grey) or 3 (RGB)."""
    mean: tuple[float, ...] = (0.5,)
    """Of the pixels on the scale of [0, 1]; one for all channels, or one for each."""
    std: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        for name in ("patch_size", "num_layers", "num_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size < 8 or self.hidden_size % 4 or self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} with num_heads {self.num_heads}: choose a "
                "multiple of both 4 (sine and cosine of row and column) and num_heads, at least 8"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                f"dropout must be at least 0 and below 1, got {self.dropout}: 0 turns it off"
            )
        if not self.initializer_range > 0.0:
            raise ValueError(f"initializer_range must be above 0, got {self.initializer_range}")
        check_pixels(self.channels, self.mean, self.std)

    @property
    def feature_size(self) -> int:
        """Width of the features."""
        return self.hidden_size


VIT_TI = ViTConfig()
"""Touvron et al. 2021, DeiT, arXiv:2012.12877, table 1, as ViT-S."""
VIT_S = ViTConfig(hidden_size=384, num_heads=6, intermediate_size=1536)
VIT_B = ViTConfig(hidden_size=768, num_heads=12, intermediate_size=3072)


class ViTEncoder(nn.Module):
    """Images to the mean of the normed last hidden states of their patches."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.pixel_norm = PixelNorm(config.channels, config.mean, config.std)
        patch_values = config.channels * config.patch_size**2
        self.patch_embedding = nn.Linear(patch_values, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.transformer = TransformerEncoder(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            intermediate_size=config.intermediate_size,
            dropout=config.dropout,
            norm="pre",
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPSILON)
        initialize(self, config.initializer_range)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return features (B, D), float32 even under autocast, of uint8 pixels (B, C, H, W).

        Raises:
            ValueError: If the pixels are not uint8 (B, C, H, W) of this number of channels, or if
                the patches do not divide their height and width.
        """
        normalised_BCHW = self.pixel_norm(pixels_BCHW)
        patches_BLX, rows, columns = self._patches(normalised_BCHW)
        positions_LD = sine_positions(rows, columns, self.config.hidden_size, patches_BLX.device)
        embedded_BLD = self.patch_embedding(patches_BLX) + positions_LD
        hidden_BLD: Tensor = self.norm(self.transformer(self.dropout(embedded_BLD)))
        return hidden_BLD.to(normalised_BCHW.dtype).mean(dim=1)

    def _patches(self, images_BCHW: Tensor) -> tuple[Tensor, int, int]:
        """Return the patches (B, L, C * P * P) row by row, and the rows and columns of the grid."""
        rows_of_batch, channels, height, width = images_BCHW.shape
        size = self.config.patch_size
        if height % size or width % size:
            raise ValueError(
                f"images of {height} x {width} pixels, but patches of {size}: "
                "choose a size that the patches divide"
            )
        rows, columns = height // size, width // size
        grid = images_BCHW.reshape(rows_of_batch, channels, rows, size, columns, size)
        return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), rows, columns


def sine_positions(rows: int, columns: int, size: int, device: torch.device) -> Tensor:
    """Return the positions (rows * columns, size): sine and cosine of the column, then of the row.

    Frequencies fall from 1 to 1 / 10,000 geometrically, as `posemb_sincos_2d` in
    google-research/big_vision.
    """
    quarter = size // 4
    frequencies = TEMPERATURE ** -(torch.arange(quarter, device=device) / (quarter - 1))
    row_angles = torch.arange(rows, device=device)[:, None] * frequencies
    column_angles = torch.arange(columns, device=device)[:, None] * frequencies
    row_angles = row_angles.repeat_interleave(columns, dim=0)
    column_angles = column_angles.repeat(rows, 1)
    parts = (column_angles.sin(), column_angles.cos(), row_angles.sin(), row_angles.cos())
    return torch.cat(parts, dim=1)
