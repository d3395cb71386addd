"""Tests of decoding: every file is canonical pixels or has a reason."""

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.data.decode import MAX_PIXELS, Pixels, decode, leaving
from pipelines.data.shards import Rejected


def scene(height: int = 60, width: int = 80, seed: int = 0) -> Pixels:
    """Return a smooth colourful picture without symmetry, so that JPEG keeps it well."""
    dice = np.random.default_rng(seed)
    small = dice.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def encode(pixels: Pixels | Image.Image, form: str, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def decoded(data: bytes, channels: Any = 3) -> Pixels:
    pixels = decode(data, channels)
    assert not isinstance(pixels, Rejected), pixels
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == channels
    assert pixels.flags.c_contiguous
    return pixels


def reason(data: bytes) -> str:
    found = decode(data, 3)
    assert isinstance(found, Rejected), found
    return found.reason


def distance(first: Pixels, second: Pixels) -> float:
    assert first.shape == second.shape
    return float(np.abs(first.astype(int) - second.astype(int)).max())


@pytest.mark.parametrize("quality", [50, 90, 95])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_three_decoders_agree_on_jpeg(quality: int, subsampling: int, progressive: bool) -> None:
    data = encode(
        scene(), "JPEG", quality=quality, subsampling=subsampling, progressive=progressive
    )
    ours = decoded(data)
    assert distance(ours, np.asarray(Image.open(io.BytesIO(data)))) == 0
    opencv = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert distance(ours, np.asarray(opencv)) == 0


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_forms_give_the_pixels_back(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    assert distance(decoded(encode(scene(), form, **options)), scene()) == 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_upright_whatever_their_form(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(scene(), form, exif=exif.tobytes())
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert distance(decoded(data), np.asarray(upright)) == 0


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_unknown_orientation_turns_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert distance(decoded(encode(scene(), "PNG", exif=exif.tobytes())), scene()) == 0


def test_one_channel_is_the_luma() -> None:
    for form in ("JPEG", "PNG"):
        data = encode(scene(), form)
        luma = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
        off = np.abs(decoded(data, 1)[..., 0].astype(int) - luma)
        # A JPEG holds luma of its own, of colours that RGB has to clip.
        assert off.max() <= 4
        assert off.mean() < 0.5


def test_grey_pictures_have_three_equal_channels() -> None:
    for form in ("JPEG", "PNG"):
        pixels = decoded(encode(Image.fromarray(scene()).convert("L"), form))
        assert (pixels == pixels[..., :1]).all()


def test_sixteen_bits_are_cut_to_the_upper_eight() -> None:
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    upper = (values >> 8).astype(np.uint8)
    for form in ("PNG", "TIFF"):
        assert distance(decoded(encode(Image.fromarray(values), form), 1)[..., 0], upper) == 0


def test_transparency_shows_white() -> None:
    pixels = np.dstack([scene(), np.zeros(scene().shape[:2], np.uint8)])
    pixels[:30, :, 3] = 255
    shown = decoded(encode(pixels, "PNG"))
    assert distance(shown[:30], scene()[:30]) == 0
    assert (shown[30:] == 255).all()


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    dice = np.random.default_rng(0)
    pixels = dice.integers(0, 256, (50, 60, 4), np.uint8)
    colour, alpha = pixels[..., :3].astype(float), pixels[..., 3:] / 255
    mixed = colour * alpha + 255 * (1 - alpha)
    assert np.abs(decoded(encode(pixels, "PNG")) - mixed).max() <= 0.5


def test_a_palette_gives_its_colours_and_its_transparency() -> None:
    image = Image.fromarray(scene()).quantize(16)
    expected = np.asarray(image.convert("RGB"))
    assert distance(decoded(encode(image, "PNG")), expected) == 0
    shown = decoded(encode(image, "PNG", transparency=int(np.asarray(image)[0, 0])))
    assert (shown[0, 0] == 255).all()


def test_cmyk_is_what_pillow_makes_of_it() -> None:
    data = encode(Image.fromarray(scene()).convert("CMYK"), "JPEG", quality=95)
    assert distance(decoded(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))) <= 3


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_counts(form: str) -> None:
    frames = [Image.fromarray(scene(seed=number)) for number in range(3)]
    data = encode(frames[0], form, save_all=True, append_images=frames[1:])
    still = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert distance(decoded(data), still) == 0


@pytest.mark.parametrize("size", [(1, 1), (50_000, 3), (3, 50_000)])
def test_odd_sizes_are_pictures(size: tuple[int, int]) -> None:
    assert decoded(encode(Image.new("RGB", size, "red"), "JPEG")).shape[:2] == size[::-1]


@pytest.mark.parametrize("part", [i / 50 for i in range(50)])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_cut_jpeg_never_passes_as_whole(part: float, progressive: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(scene(300, 400), "JPEG", progressive=progressive, exif=exif.tobytes())
    assert reason(data[: int(part * len(data))]).startswith("quarantined:")


@pytest.mark.parametrize("channels", ["CMYK", "L"])
def test_a_cut_jpeg_of_other_channels_never_passes_either(channels: str) -> None:
    data = encode(Image.fromarray(scene(300, 400)).convert(channels), "JPEG")
    for end in range(len(data) // 2, len(data), 101):
        assert reason(data[:end]).startswith("quarantined:")


def test_a_jpeg_with_more_behind_it_is_read_as_strictly_as_any() -> None:
    """Cameras put a preview or a second view behind a picture; Pillow calls that MPO."""
    alone = encode(scene(300, 400), "JPEG")
    other = Image.fromarray(scene(seed=1))
    data = encode(scene(300, 400), "MPO", save_all=True, append_images=[other])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert distance(decoded(data), decoded(alone)) == 0
    half = decode(data, 3, leaving(150))
    assert not isinstance(half, Rejected)
    assert half.shape == (150, 200, 3)
    scan = data.index(b"\xff\xda")
    for place in range(scan + 20, len(alone) - 200, 500):
        harmed = data[:place] + b"\xff\xfe" + data[place + 2 :]
        assert reason(harmed).startswith("quarantined:")
        assert reason(data[:place]).startswith("quarantined:")


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_jpeg_without_its_last_bytes_is_cut(cut: int) -> None:
    assert reason(encode(scene(), "JPEG")[:-cut]) == "quarantined:cut-image"


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_cut_picture_of_another_form_never_passes(form: str) -> None:
    data = encode(scene(), form)
    for part in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9):
        assert reason(data[: int(part * len(data))]).startswith("quarantined:")


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"<html><body>404</body></html>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"GIF89a"]
)
def test_what_is_no_picture_is_named(data: bytes) -> None:
    assert reason(data) in ("quarantined:not-an-image", "quarantined:cut-image")


def test_a_bomb_is_refused_by_its_header() -> None:
    side = 16_000
    assert side * side > MAX_PIXELS
    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(bytes(side // 8 + 1)) for _ in range(side)) + rows.flush()

    def chunk(name: bytes, content: bytes) -> bytes:
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    assert len(data) < 100_000
    assert reason(data) == "quarantined:too-many-pixels"


def test_a_flipped_byte_of_a_png_is_noticed() -> None:
    data = bytearray(encode(scene(), "PNG"))
    data[len(data) // 2] ^= 1
    assert reason(bytes(data)).startswith("quarantined:")


def test_large_jpegs_are_decoded_at_a_fraction_only_where_enough_is_left() -> None:
    data = encode(scene(600, 800), "JPEG")
    for smallest, shape in (
        (601, (600, 800)),
        (301, (600, 800)),
        (300, (300, 400)),
        (75, (75, 100)),
    ):
        pixels = decode(data, 3, leaving(smallest))
        assert not isinstance(pixels, Rejected)
        assert pixels.shape[:2] == shape


def test_a_fraction_is_chosen_by_the_sides_of_the_upright_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    told: list[tuple[int, int]] = []

    def reduction(height: int, width: int) -> int:
        told.append((height, width))
        return 2

    pixels = decode(encode(scene(60, 80), "JPEG", exif=exif.tobytes()), 3, reduction)
    assert not isinstance(pixels, Rejected)
    assert told == [(80, 60)]
    assert pixels.shape[:2] == (40, 30)
