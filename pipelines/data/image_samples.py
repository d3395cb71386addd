"""Pictures of public packages as webdataset shards.

Two forms are read: pixels as numbers, which become PNG files with a label beside each, and
photographs, which keep their own bytes.

    mnist_train.csv   label,1x1,...,28x28   ->  train-00042.cls   train-00042.png
                      7,0,0,...                 7                 28 x 28, grey
    picture i of a split                    ->  mnist-train-0{i % 8}.tar
"""

import gzip
import io
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from pyarrow import csv

NUM_SHARDS = 8
"""Of each split."""

Numbers = NDArray[np.uint8]


class Split(NamedTuple):
    """Pictures to train on, or to test with."""

    name: str
    pixels: Numbers
    """Grey, (pictures, height, width)."""
    labels: Numbers
    """(pictures,)."""


def write_pixels(
    read: Callable[[list[bytes]], list[Split]],
    name: str,
    members: Mapping[str, bytes],
    folder: Path,
) -> tuple[int, int]:
    """Write labelled pixels as PNG files in tar shards.

    Returns:
        How many were written, and how many were left out: none.
    """
    splits = read(list(members.values()))
    for split in splits:
        pictures = (
            {"__key__": f"{split.name}-{i:05}", "png": _png(pixels), "cls": b"%d" % label}
            for i, (pixels, label) in enumerate(zip(split.pixels, split.labels, strict=True))
        )
        _write_tars(f"{name}-{split.name}", pictures, folder)
    return sum(len(split.labels) for split in splits), 0


def write_photos(name: str, members: Mapping[str, bytes], folder: Path) -> tuple[int, int]:
    """Write photographs as they are in tar shards, keyed by the end of their path in the package.

    Returns:
        How many were written, and how many were left out: none.
    """
    paths = map(PurePosixPath, members)
    pictures = (
        {"__key__": f"{path.parent.name}-{path.stem}", path.suffix[1:]: members[str(path)]}
        for path in paths
    )
    _write_tars(name, pictures, folder)
    return len(members), 0


def read_csv_splits(members: list[bytes]) -> list[Split]:
    """Return the splits of two tables of a test and a train set: a label and 28 x 28 numbers."""
    return [_csv_split(name, data) for name, data in zip(("test", "train"), members, strict=True)]


def read_idx_splits(members: list[bytes]) -> list[Split]:
    """Return the splits of four idx.gz files: test pictures and labels, then those to train on.

    LeCun et al. 1998, The MNIST Database, "File Formats".
    """
    test_pixels, test_labels, pixels, labels = map(_idx, members)
    return [Split("test", test_pixels, test_labels), Split("train", pixels, labels)]


def _csv_split(name: str, data: bytes) -> Split:
    columns = data[: data.index(b"\n")].decode().strip().split(",")
    as_bytes = csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.uint8()))
    table = csv.read_csv(pa.BufferReader(data), convert_options=as_bytes)
    labels, *pixels = (column.to_numpy() for column in table.columns)
    return Split(name, np.stack(pixels, axis=1).reshape(-1, 28, 28), labels)


def _idx(packed: bytes) -> Numbers:
    """Return the array of a file: two zeros, 8 for uint8, the rank, the shape, the numbers."""
    data = gzip.decompress(packed)
    rank = data[3]
    shape = np.frombuffer(data, ">u4", count=rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _png(pixels: Numbers) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _write_tars(stem: str, pictures: Iterable[dict[str, Any]], folder: Path) -> None:
    """Deal samples out over shards; the same samples give the same bytes."""
    os.environ["WDS_SECURE"] = "1"  # read when webdataset is imported: it unpickles otherwise
    import webdataset

    with ExitStack() as stack:
        files = [
            stack.enter_context((folder / f"{stem}-{shard:02}.tar").open("wb"))
            for shard in range(NUM_SHARDS)
        ]
        shards = [
            stack.enter_context(webdataset.TarWriter(file, encoder=False, mtime=0))
            for file in files
        ]
        for i, picture in enumerate(pictures):
            shards[i % NUM_SHARDS].write(picture)
