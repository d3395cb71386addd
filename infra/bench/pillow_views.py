"""The peer of the image benchmark: two SimCLR views with Pillow, in workers of a torch DataLoader.

What most self-supervised code does, torchvision.transforms.v1 on Pillow pictures, operation by
operation: torchvision itself cannot be imported with a CPU build of torch.
"""

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch.utils.data import DataLoader, Dataset

from pipelines.data.views import ViewConfig

CROP_TRIES = 10


class TwoViews(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Pictures in files, as two views each, uint8 (3, size, size)."""

    def __init__(self, files: Sequence[Path], config: ViewConfig) -> None:
        self.files = files
        self.config = config

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = Image.open(self.files[number]).convert("RGB")
        return _tensor(make_view(image, self.config)), _tensor(make_view(image, self.config))


def loader(
    files: Sequence[Path], config: ViewConfig, *, batch_size: int, workers: int
) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
    """Return a loader that shuffles, with workers that stay between its passes."""
    return DataLoader(
        TwoViews(files, config),
        batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="forkserver",  # Ray's threads do not survive a fork
    )


def make_view(image: Image.Image, config: ViewConfig) -> Image.Image:
    """Return a view: RandomResizedCrop, flip, ColorJitter, RandomGrayscale and GaussianBlur."""
    made = image.resize(
        (config.size, config.size), Image.Resampling.BILINEAR, box=_draw_crop(image.size, config)
    )
    if random.random() < config.flip:
        made = made.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if random.random() < config.jitter:
        made = _jitter(made, config)
    if random.random() < config.greyscale:
        made = made.convert("L").convert("RGB")
    if random.random() < config.blur:
        made = made.filter(ImageFilter.GaussianBlur(random.uniform(*config.blur_sigma)))
    return made


def _draw_crop(size: tuple[int, int], config: ViewConfig) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a crop; of a picture too narrow, the whole."""
    width, height = size
    low, high = (math.log(ratio) for ratio in config.crop_ratio)
    for _ in range(CROP_TRIES):
        pixels = width * height * random.uniform(*config.crop_scale)
        shape = math.exp(random.uniform(low, high))
        wide, high_ = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
        if 0 < wide <= width and 0 < high_ <= height:
            left, top = random.randint(0, width - wide), random.randint(0, height - high_)
            return left, top, left + wide, top + high_
    return 0, 0, width, height


def _jitter(image: Image.Image, config: ViewConfig) -> Image.Image:
    """Change brightness, contrast, saturation and hue, in an order drawn anew, as torchvision."""

    def enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance], strength: float) -> None:
        nonlocal image
        image = kind(image).enhance(1 + random.uniform(-strength, strength))

    for change in random.sample(range(4), 4):
        match change:
            case 0:
                enhanced(ImageEnhance.Brightness, config.brightness)
            case 1:
                enhanced(ImageEnhance.Contrast, config.contrast)
            case 2:
                enhanced(ImageEnhance.Color, config.saturation)
            case _:
                image = _turn_hue(image, random.uniform(-config.hue, config.hue))
    return image


def _turn_hue(image: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(int(turn * 255) % 256)
    merged = Image.merge("HSV", (Image.fromarray(turned), saturation, value))
    return merged.convert("RGB")


def _tensor(image: Image.Image) -> torch.Tensor:
    """Return the pixels as PILToTensor does, uint8 (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
