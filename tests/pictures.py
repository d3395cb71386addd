"""Made-up pictures: coloured shapes on a gradient, JPEG and PNG, in tar shards."""

import io
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("ellipse", "rectangle", "line")


def make_picture(number: int, size: int = 24) -> bytes:
    """Return picture `number`: every other one is a JPEG, the rest are PNG."""
    dice = random.Random(number)

    def colour() -> tuple[int, int, int]:
        return dice.randrange(256), dice.randrange(256), dice.randrange(256)

    image = Image.new("RGB", (size + number % 3, size), colour())
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        left, top = dice.randrange(size - 8), dice.randrange(size - 8)
        box = (left, top, left + dice.randint(4, 8), top + dice.randint(4, 8))
        getattr(draw, SHAPES[number % len(SHAPES)])(box, fill=colour())
    out = io.BytesIO()
    image.save(out, "PNG" if number % 2 else "JPEG", quality=90)
    return out.getvalue()


def make_blotches(number: int) -> bytes:
    """Return a PNG of soft blotches of colour, of which no two are alike."""
    colours = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(colours).resize((120, 96), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def extension(number: int) -> str:
    """Return the extension of picture `number`."""
    return "png" if number % 2 else "jpeg"


def make_tar(members: Sequence[tuple[str, bytes]]) -> bytes:
    """Return a tar of files, in their order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def write_pictures(folder: Path, num_pictures: int = 200, num_shards: int = 2) -> list[Path]:
    """Write pictures with a label beside each as tar shards, dealt out in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"part-{shard}.tar" for shard in range(num_shards)]
    for shard, path in enumerate(paths):
        members: list[tuple[str, bytes]] = []
        for i in range(shard, num_pictures, num_shards):
            members.append((f"{i:06}.{extension(i)}", make_picture(i)))
            members.append((f"{i:06}.cls", b"%d" % (i % len(SHAPES))))
        path.write_bytes(make_tar(members))
    return paths
