"""Autoencoder: an image encoder whose features are enough to draw the image again.

Shapes: B rows, C channels, H height, W width, D feature size. A batch holds `image` uint8
(B, C, H, W), square; `weight` float32 (B,), 0 for a placeholder; and for the denoising form
`corrupted` uint8 (B, C, H, W), which the encoder then sees in place of the image. `encode` needs
`image` alone.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_models.image_encoder import ImageEncoderConfig, build_image_encoder
from ssl_models.objective import Batch, Objective, StepOutput
from ssl_models.pixels import MAX_PIXEL
from ssl_models.resnet import check_width, group_norm

MIN_START, MAX_START = 4, 8
"""Sizes of the map that a decoder starts from: the image size, halved until below 8."""
MAX_WIDENING = 8


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Hinton & Salakhutdinov 2006, Reducing the Dimensionality of Data with Neural Networks.

    The denoising form is Vincent et al. 2008, Extracting and Composing Robust Features with
    Denoising Autoencoders. The loss is distance(x, D(E(x))), a mean over the pixels of a row.
    """

    encoder: ImageEncoderConfig
    image_size: int
    """Height and width in pixels: 4, 5, 6 or 7 times a power of two."""
    kind: Literal["autoencoder"] = "autoencoder"
    distance: Literal["mse", "l1"] = "mse"
    """Mean of squared or of absolute differences."""
    pixels: Literal["unit", "normalized"] = "unit"
    """What is compared: pixels on the scale of [0, 1], or after the encoder's mean and std."""
    decoder_width: int = 32
    """Channels of the decoder's last map; they double towards the first, eightfold at most. 4, 8 or
    a multiple of 16."""

    def __post_init__(self) -> None:
        start = self.start_size
        if self.image_size < MIN_START or start >= MAX_START:
            raise ValueError(
                f"image_size must be 4, 5, 6 or 7 times a power of two, got {self.image_size}: "
                "28, 32, 64, 96 and 224 are"
            )
        check_width("decoder_width", self.decoder_width)

    @property
    def start_size(self) -> int:
        """Height and width of the decoder's first map."""
        size = self.image_size
        while size >= MAX_START and size % 2 == 0:
            size //= 2
        return size


class Decoder(nn.Module):
    """Features to pixels: a linear map to a small image, doubled until it has its size.

    Nearest neighbours and then a 3x3 convolution, since transposed convolutions draw checkerboards:
    Odena et al. 2016, Deconvolution and Checkerboard Artifacts.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        doublings = (config.image_size // config.start_size).bit_length() - 1
        widths = [
            config.decoder_width * min(2**left, MAX_WIDENING) for left in range(doublings, -1, -1)
        ]
        shape = (widths[0], config.start_size, config.start_size)
        self.start = nn.Sequential(
            nn.Linear(config.encoder.feature_size, shape[0] * shape[1] * shape[2]),
            nn.Unflatten(1, shape),
            group_norm(widths[0]),
            nn.ReLU(),
        )
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            convolution = nn.Conv2d(wide, narrow, 3, padding=1, bias=False)
            layers += [nn.Upsample(scale_factor=2), convolution, group_norm(narrow), nn.ReLU()]
        self.doublings = nn.Sequential(*layers)
        self.output = nn.Conv2d(widths[-1], config.encoder.channels, 3, padding=1)

    def forward(self, features_BD: Tensor) -> Tensor:
        """Return the drawn pixels (B, C, H, W), on the scale that the config compares."""
        # The large maps have few channels: with them last, a step takes a sixth less of a CPU.
        start_BCHW = self.start(features_BD).contiguous(memory_format=torch.channels_last)
        drawn_BCHW: Tensor = self.output(self.doublings(start_BCHW))
        return drawn_BCHW


class Autoencoder(Objective):
    """An image encoder E and a decoder D, trained on one term, `reconstruction`."""

    pretraining_only = ("decoder.",)

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.coefficients = {"reconstruction": 1.0}
        self.encoder = build_image_encoder(config.encoder)
        self.decoder = Decoder(config)

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Return the weight of the rows."""
        return {"reconstruction": batch["weight"].sum(dtype=torch.float32)}

    def forward(self, batch: Batch) -> StepOutput:
        """Return the summed distances of the rows, computed in float32 even under autocast.

        The metric `reconstruction_loss` is the same sum.

        Raises:
            ValueError: If the images have another size than the decoder draws.
        """
        norm, image_BCHW = self.encoder.pixel_norm, batch["image"]
        target_BCHW = norm.unit(image_BCHW) if self.config.pixels == "unit" else norm(image_BCHW)
        drawn_BCHW = self._drawn(batch)
        if drawn_BCHW.shape != target_BCHW.shape:
            raise ValueError(
                f"images of {tuple(image_BCHW.shape[2:])} pixels, but image_size is "
                f"{self.config.image_size}"
            )
        distance = F.mse_loss if self.config.distance == "mse" else F.l1_loss
        losses_B = distance(drawn_BCHW, target_BCHW, reduction="none").mean(dim=(1, 2, 3))
        total = (losses_B * batch["weight"]).sum()
        weight = self.weights(batch)["reconstruction"]
        return StepOutput(
            terms={"reconstruction": (total, weight)},
            metrics={"reconstruction_loss": (total.detach(), weight)},
        )

    def encode(self, batch: Batch) -> Tensor:
        """Return the encoder's features of `image`, float32 (B, width)."""
        features: Tensor = self.encoder(batch["image"])
        return features

    def reconstruct(self, batch: Batch) -> Tensor:
        """Return what the decoder draws of the batch, uint8 (B, C, H, W), to be looked at."""
        drawn_BCHW = self._drawn(batch)
        if self.config.pixels == "normalized":
            drawn_BCHW = self.encoder.pixel_norm.inverse(drawn_BCHW)
        return (drawn_BCHW.clamp(0, 1) * MAX_PIXEL).round().to(torch.uint8)

    def _drawn(self, batch: Batch) -> Tensor:
        features_BD = self.encoder(batch.get("corrupted", batch["image"]))
        drawn_BCHW: Tensor = self.decoder(features_BD).to(features_BD.dtype)
        return drawn_BCHW
