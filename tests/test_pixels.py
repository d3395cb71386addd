"""Pixels are scaled and normalised as the config says, and nothing but uint8 gets in."""

import pytest
import torch

from ssl_models.pixels import PixelNorm, check_pixels


def test_pixels_are_scaled_then_normalised_by_channel() -> None:
    norm = PixelNorm(3, (0.5, 0.25, 0.0), (0.5, 0.25, 2.0))
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(2, 3, 4, 5)
    normalised = norm(pixels)
    assert normalised.shape == (2, 3, 4, 5)
    assert normalised.dtype == torch.float32
    torch.testing.assert_close(normalised[1, :, 2, 3], torch.tensor([-1.0, -0.2, 0.5]))
    torch.testing.assert_close(norm.inverse(normalised) * 255, pixels.float())


def test_one_number_serves_all_channels_and_none_is_in_the_state_dict() -> None:
    norm = PixelNorm(3, (0.5,), (0.5,))
    pixels = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert torch.equal(norm(pixels), torch.ones(1, 3, 2, 2))
    assert norm.state_dict() == {}


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(2, 3, 4, 4),
        torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
        torch.zeros(2, 4, 4, 3, dtype=torch.uint8),
        torch.zeros(3, 4, 4, dtype=torch.uint8),
    ],
    ids=["floats", "grey", "channels last", "no rows"],
)
def test_other_pixels_are_refused(pixels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"the encoder takes torch.uint8 \(rows, 3, height, width"):
        PixelNorm(3, (0.5,), (0.5,))(pixels)


@pytest.mark.parametrize(
    ("channels", "mean", "std", "message"),
    [
        (2, (0.5,), (0.5,), r"channels must be 1 \(grey\) or 3 \(RGB\), got 2"),
        (3, (0.5, 0.5), (0.5,), "mean has 2 numbers for 3 channels"),
        (1, (0.5,), (0.5, 0.5, 0.5), "std has 3 numbers for 1 channels"),
        (3, (), (0.5,), "mean has 0 numbers"),
        (3, (float("nan"),), (0.5,), "mean must be finite"),
        (3, (0.5,), (0.5, 0.0, 0.5), "std must be above 0"),
    ],
)
def test_a_norm_that_cannot_be_is_refused(
    channels: int, mean: tuple[float, ...], std: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_pixels(channels, mean, std)
