r"""Whether embeddings find near-duplicate photos: precision and recall, beside dHash.

    rayssl samples photos
    python -m infra.bench.duplicates samples/photos --small small.tar
    rayssl pretrain image-tiny --data small.tar --register photos-triplet FLAGS
    rayssl pretrain image-tiny-autoencoder --data small.tar --register photos-autoencoder FLAGS
    python -m infra.bench.duplicates samples/photos --model models:/photos-triplet@candidate \
        --model models:/photos-autoencoder@candidate

The encoders are trained without labels on small copies of the photos, as by who cleans a corpus of
their own, with these FLAGS in the results that are kept:

    --steps 800 --source.heldout-ratio 0 --order.rows-per-step 64 --order.slots 2
    --optimizer.learning-rate 3e-3 --objective.encoder.stem large --objective.encoder.width 16
    --images.views.size 64 --images.views.crop-scale 0.35 1 --images.views.greyscale 0
    triplet:      --objective.loss.margin 0.5 --images.views.jitter 0.3 --images.views.rotation 0.7
                  --images.views.degrees 90
    autoencoder:  --objective.image-size 64 --objective.decoder-width 16 --images.views.jitter 0

Every photo is changed in each way of `CHANGES`. A pair is a photo and a changed copy of any photo,
and is right if the copy is its own. Photos of one series, by their keys such as walls-l, walls-r,
show the same things and are no wrong pair.

The threshold of each method is the lowest that reaches a precision of 0.99 over all changes on one
half of the scenes, and is measured on the other half; both halves in turn. A precision depends on
how many wrong pairs there are: their number stands in the result.
"""

import argparse
import io
import math
import random
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve

from infra.bench.measure import keep
from pipelines.data.decode import decode
from pipelines.data.fields import KEY, field_values
from pipelines.data.indexing import build
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.use import neighbours
from pipelines.use.encoder import Encoder
from pipelines.use.likeness import dhash, hash_distance
from pipelines.use.registry import load_encoder
from pipelines.verbs_search import Duplicates
from ssl_models import build_objective
from ssl_models.autoencoder import Autoencoder
from ssl_models.contrastive import Contrastive

PRECISION = 0.99
SMALL = 800
SERIES = re.compile(r"[-_]?\d*([-_](\d+|[lr]))?$")
Embedded = dict[str, NDArray[np.float32]]
"""Of each change, the embeddings of the copies; of "", those of the photos."""
Scores = dict[str, NDArray[np.float64]]
"""Of each change: how alike photo i and the changed copy of photo j are, (photos, photos)."""


class Photo(NamedTuple):
    """A photo as it is in its shard."""

    scene: str
    data: bytes


def _crop(share: float) -> Callable[[Image.Image, random.Random], Image.Image]:
    def crop(image: Image.Image, dice: random.Random) -> Image.Image:
        width, height = round(image.width * share), round(image.height * share)
        left, top = dice.randint(0, image.width - width), dice.randint(0, image.height - height)
        return image.crop((left, top, left + width, top + height))

    return crop


def _rotation(degrees: float) -> Callable[[Image.Image, random.Random], Image.Image]:
    """Return a change that turns a photo and cuts off the bare corners, in its proportions."""
    turn = math.radians(degrees)

    def rotate(image: Image.Image, dice: random.Random) -> Image.Image:
        turned = image.rotate(degrees * dice.choice((-1, 1)), Image.Resampling.BICUBIC)
        longer = max(image.size) / min(image.size)
        share = 1 / (math.cos(turn) + longer * math.sin(turn))
        left, top = (side * (1 - share) / 2 for side in image.size)
        return turned.crop(
            (round(left), round(top), image.width - round(left), image.height - round(top))
        )

    return rotate


CHANGES: dict[str, tuple[Callable[[Image.Image, random.Random], Image.Image], int]] = {
    "jpeg of quality 30": (lambda image, _: image, 30),
    "half the size": (lambda image, _: image.resize((image.width // 2, image.height // 2)), 90),
    "crop of 90 % of each side": (_crop(0.9), 90),
    "crop of 70 % of each side": (_crop(0.7), 90),
    "rotated by 5 degrees": (_rotation(5), 90),
    "rotated by 15 degrees": (_rotation(15), 90),
    "rotated by 90 degrees": (lambda image, _: image.transpose(Image.Transpose.ROTATE_90), 90),
    "mirrored": (lambda image, _: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 90),
}
"""How a copy is made, and the JPEG quality that it is kept in."""


def main() -> None:
    """Measure, print the result and keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+")
    parser.add_argument("--model", action="append", default=[], help="may be given again")
    parser.add_argument("--small", type=Path, help="write small copies here and measure nothing")
    parser.add_argument("--tracking-uri", default="sqlite:///mlflow.db")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.small:
        write_small(read_photos(given.data), given.small)
        return
    encoders = {uri: load_encoder(uri, given.tracking_uri) for uri in given.model}
    keep("duplicates", measure(encoders, read_photos(given.data)))


def read_photos(data: Sequence[str]) -> list[Photo]:
    """Return every photo of some shards."""
    source = SourceConfig(heldout_ratio=0.0)
    manifest = build(find_shards(data), source, lambda function, items: [*map(function, items)])
    photos = []
    for number, block in enumerate(manifest.blocks):
        keys = list(field_values(manifest, number, KEY))
        for picture in manifest.read(number, "training"):
            key = keys[picture.record - block.first_record] or ""
            photos.append(Photo(scene_of(key), picture.data))
    return photos


def write_small(photos: Sequence[Photo], path: Path) -> None:
    """Write copies of at most `SMALL` pixels a side as a tar shard, which are soon decoded."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for number, photo in enumerate(photos):
            image = Image.fromarray(np.asarray(decode(photo.data, 3)))
            image.thumbnail((SMALL, SMALL))
            out = io.BytesIO()
            image.save(out, "JPEG", quality=92)
            member = tarfile.TarInfo(f"{number:04}.jpg")
            member.size = out.tell()
            out.seek(0)
            shard.addfile(member, out)


def scene_of(key: str) -> str:
    """Return what the keys of a series share: of campus-P1070491 it is P, of images-walls-l walls.

    A key that is a number alone is a scene of its own.
    """
    return SERIES.sub("", key.partition("-")[2] or key) or key


def measure(encoders: Mapping[str, Encoder], photos: Sequence[Photo]) -> dict[str, Any]:
    """Return what dHash finds, and the embeddings of each encoder."""
    copies = {change: [_changed(photo, change) for photo in photos] for change in CHANGES}
    originals = [photo.data for photo in photos]
    methods = {"dhash": _hash_scores(originals, copies)}
    for name, encoder in encoders.items():
        trained = _embed(encoder, originals, copies)
        untrained = _embed(_untrained(encoder), originals, copies)
        methods |= {
            name: _cosines(trained),
            f"{name} without the mean": _cosines(_centred(trained)),
            f"{name} before training": _cosines(untrained),
        }
    scenes = np.unique([photo.scene for photo in photos], return_inverse=True)[1]
    is_own = np.eye(len(photos), dtype=bool)
    counts = is_own | (scenes[:, None] != scenes[None, :])
    default = Duplicates.threshold
    return {
        "what": "pairs of a photo and a changed copy of any photo; right is the copy of its own",
        "photos": len(photos),
        "scenes": int(scenes.max()) + 1,
        "pairs_of_each_change": {"right": len(photos), "wrong": int((counts & ~is_own).sum())},
        "precision_asked_for": PRECISION,
        "methods": {name: _report(scores, scenes, counts) for name, scores in methods.items()},
        f"at the default threshold of {default}": {
            name: {
                change: _at(values[counts], is_own[counts], default)
                for change, values in methods[name].items()
            }
            for name in encoders
        },
    }


def _changed(photo: Photo, change: str) -> bytes:
    make, quality = CHANGES[change]
    image = Image.fromarray(np.asarray(decode(photo.data, 3)))
    out = io.BytesIO()
    dice = random.Random(f"{len(photo.data)} {change}")
    make(image, dice).save(out, "JPEG", quality=quality)
    return out.getvalue()


def _untrained(encoder: Encoder) -> Encoder:
    assert isinstance(encoder.objective, Contrastive | Autoencoder), "the model is not of images"
    torch.manual_seed(0)
    return Encoder(encoder.config, None, build_objective(encoder.objective.config))


def _embed(
    encoder: Encoder, originals: Sequence[bytes], copies: Mapping[str, Sequence[bytes]]
) -> Embedded:
    embedded = {change: encoder.encode(made) for change, made in copies.items()}
    return {"": encoder.encode(originals), **embedded}


def _centred(embedded: Embedded) -> Embedded:
    mean = np.concatenate(list(embedded.values())).mean(axis=0)
    return {change: vectors - mean for change, vectors in embedded.items()}


def _cosines(embedded: Embedded) -> Scores:
    unit = {change: neighbours.on_sphere(vectors) for change, vectors in embedded.items()}
    return {change: (unit[""] @ unit[change].T).astype(np.float64) for change in CHANGES}


def _hash_scores(originals: Sequence[bytes], copies: Mapping[str, Sequence[bytes]]) -> Scores:
    def hashes(pictures: Sequence[bytes]) -> list[int]:
        return [dhash(np.asarray(decode(data, 3))) for data in pictures]

    firsts = hashes(originals)
    return {
        change: np.array(
            [[-hash_distance(a, b) for b in seconds] for a in firsts], dtype=np.float64
        )
        for change, seconds in ((change, hashes(made)) for change, made in copies.items())
    }


def _report(scores: Scores, scenes: NDArray[np.int64], counts: NDArray[np.bool_]) -> dict[str, Any]:
    """Return average precision, and what the threshold of one half finds in the other."""
    is_own = np.eye(len(scenes), dtype=bool)
    halves = [(scenes[:, None] % 2 == half) & (scenes[None, :] % 2 == half) for half in (0, 1)]
    thresholds = []
    for half in halves:
        used = half & counts
        values = np.concatenate([values[used] for values in scores.values()])
        thresholds.append(_threshold(values, np.tile(is_own[used], len(scores))))
    found = {}
    for change, values in scores.items():
        given = np.where(halves[0], thresholds[1], thresholds[0])
        measured = counts & (halves[0] | halves[1])
        precision = float(average_precision_score(is_own[counts], values[counts]))
        found[change] = {"average_precision": round(precision, 3)} | _at(
            (values - given)[measured], is_own[measured], 0.0
        )
    return {"thresholds": [round(value, 4) for value in thresholds], "changes": found}


def _threshold(values: NDArray[np.float64], is_own: NDArray[np.bool_]) -> float:
    precision, _, thresholds = precision_recall_curve(is_own, values)
    reached = thresholds[precision[:-1] >= PRECISION]
    return float(reached.min()) if len(reached) else float("inf")


def _at(values: NDArray[np.float64], is_own: NDArray[np.bool_], threshold: float) -> dict[str, Any]:
    is_found = values >= threshold
    right, wrong = int((is_found & is_own).sum()), int((is_found & ~is_own).sum())
    return {
        "recall": round(right / int(is_own.sum()), 3),
        "precision": round(right / (right + wrong), 3) if right + wrong else None,
        "wrong_pairs": wrong,
    }


if __name__ == "__main__":
    main()
