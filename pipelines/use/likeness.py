"""How alike two items are without a model: what embeddings have to beat, told beside them."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.decode import Pixels
from pipelines.data.manifest import content_hash

SHINGLE_WORDS = 5
DHASH_BITS = 64


def dhash(pixels: Pixels) -> int:
    """Return 64 bits of an RGB picture: whether it grows brighter to the right, in 8 x 8 places.

    Krawetz 2013, Kind of Like That, hackerfactor.com; bit for bit the `dhash` of ImageHash.
    """
    grey = Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.LANCZOS)
    small = np.asarray(grey)
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes())


def hash_distance(first: int, second: int) -> int:
    """Return how many of the 64 bits differ."""
    return (first ^ second).bit_count()


def shingles(text: str) -> NDArray[np.uint64]:
    """Return the hashes of the runs of five words of a text, or of all its words if it has fewer.

    Broder 1997, On the Resemblance and Containment of Documents. Case does not count.
    """
    words = text.split()
    starts = range(max(1, len(words) - SHINGLE_WORDS + 1))
    runs = {content_hash(" ".join(words[start : start + SHINGLE_WORDS])) for start in starts}
    return np.array(sorted(runs), np.uint64)


def jaccard(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> float:
    """Return the share of the shingles of either text that both have."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)
