"""The pictures of Pillow's own tests, many of them broken on purpose, and the largest allowed.

Each is canonical pixels, the same as Pillow's, or has a reason; nothing needs much memory.
"""

import io
import json
import subprocess
import sys
import tarfile
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.data.decode import FORMATS, MAX_PIXELS, decode
from pipelines.data.images import FATES
from pipelines.data.shards import Rejected

pytestmark = pytest.mark.slow
MAX_GROWTH_BYTES = 512 * 10**6
PLAIN_MODES = ("1", "L", "P", "RGB", "CMYK")
DECODE_ALL = """
import json, pathlib, sys
from pipelines.data.decode import decode
from pipelines.data.shards import Rejected

def most_used():
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

def tell(path):
    found = decode(pathlib.Path(path).read_bytes(), 3)
    return found.reason if isinstance(found, Rejected) else [*found.shape, str(found.dtype)]

decode(b"", 3)
before = most_used()
told = {path: tell(path) for path in sys.stdin.read().splitlines()}
print(json.dumps({"told": told, "growth": most_used() - before}))
"""


def decode_all(paths: list[Path]) -> dict[str, Any]:
    """Decode files in one process; return what each gave, and how much memory was needed."""
    done = subprocess.run(
        [sys.executable, "-c", DECODE_ALL],
        input="\n".join(map(str, paths)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@dataclass(frozen=True)
class Suite:
    """The pictures of the source archive of the Pillow that is installed."""

    paths: list[Path]
    told: dict[str, Any]
    growth: int


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    folder = tmp_path_factory.mktemp("pillow")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary=pillow", "--disable-pip-version-check", f"--dest={folder}"]
    done = subprocess.run(
        [*command, f"pillow=={version('pillow')}"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.fail(f"cannot download the source of Pillow: {done.stderr.strip()[-500:]}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        images = [member for member in source if "/Tests/images/" in member.name]
        source.extractall(folder, images, filter="data")
    paths = sorted(path for path in folder.glob("*/Tests/images/**/*") if path.is_file())
    found = decode_all(paths)
    return Suite(paths, found["told"], found["growth"])


def test_each_is_canonical_or_has_a_reason_in_little_memory(suite: Suite) -> None:
    assert len(suite.told) == len(suite.paths) > 900
    used = [told for told in suite.told.values() if isinstance(told, list)]
    assert len(used) > 600
    for height, width, channels, dtype in used:
        assert (channels, dtype) == (3, "uint8")
        assert 0 < height * width <= MAX_PIXELS
    reasons = {told for told in suite.told.values() if not isinstance(told, list)}
    assert reasons == set(FATES[1:])
    assert suite.growth < MAX_GROWTH_BYTES


def test_what_pillow_refuses_is_refused_and_the_rest_has_its_pixels(suite: Suite) -> None:
    compared = 0
    for path in suite.paths:
        found = decode(path.read_bytes(), 3)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = Image.open(path, formats=FORMATS)
                image.load()
        except Exception:
            assert isinstance(found, Rejected), path.name
            continue
        if isinstance(found, Rejected):
            continue
        upright = ImageOps.exif_transpose(image)
        assert found.shape[:2] == upright.size[::-1], path.name
        if image.mode in PLAIN_MODES and not image.has_transparency_data:
            off = np.abs(np.asarray(upright.convert("RGB")).astype(int) - found)
            assert off.max() == 0, path.name
            compared += 1
    assert compared > 400


def test_every_jpeg_of_the_suite_that_is_cut_anywhere_is_refused(suite: Suite) -> None:
    whole = [path for path in suite.paths if path.suffix == ".jpg" and path.stat().st_size < 40_000]
    whole = [path for path in whole if isinstance(suite.told[str(path)], list)]
    assert len(whole) > 20
    for path in whole:
        data = path.read_bytes()
        end = data.rindex(b"\xff\xd9")  # some have other bytes behind the picture
        for part in np.linspace(0, end, 20, dtype=int):
            assert isinstance(decode(data[:part], 3), Rejected), (path.name, part)


def save(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def test_the_largest_pictures_fit_into_memory(tmp_path: Path) -> None:
    """All forms but WebP with transparency, of which Pillow keeps five copies of its own."""
    size = (6400, MAX_PIXELS // 6400)
    exif = Image.Exif()
    exif[0x0112] = 6
    largest = {
        "rgba": save(Image.new("RGBA", size, (9, 9, 9, 7)), "PNG", compress_level=1),
        "grey-alpha": save(Image.new("LA", size, (9, 7)), "PNG", compress_level=1),
        "palette": save(Image.new("P", size, 3), "GIF", transparency=3),
        "16-bit": save(Image.new("I;16", size, 3000), "PNG", compress_level=1),
        "float": save(Image.new("F", size, 0.5), "TIFF"),
        "turned": save(Image.new("RGB", size), "PNG", compress_level=1, exif=exif.tobytes()),
        "cmyk": save(Image.new("CMYK", size), "JPEG"),
        "progressive": save(Image.new("RGB", size), "JPEG", progressive=True, subsampling=0),
    }
    paths = [tmp_path / name for name in largest]
    for path in paths:
        path.write_bytes(largest[path.name])
    found = decode_all(paths)
    for name, told in zip(largest, found["told"].values(), strict=True):
        expected = size if name == "turned" else size[::-1]
        assert told == ("quarantined:bad-image" if name == "float" else [*expected, 3, "uint8"])
    assert MAX_GROWTH_BYTES / 2 < found["growth"] < MAX_GROWTH_BYTES  # or nothing was measured
