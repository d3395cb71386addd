"""Randomness that is addressed, never consumed.

Every draw of the data path is a pure function of a key and a counter, so a task that is run
again gives the same bytes, whatever ran before it. All of it is fixed-width integer code of
our own, because numpy promises no stream across its versions; golden vectors hold it in place.

    >>> draws(key(0, "mask"), np.arange(2, dtype=np.uint64))
    array([ 2467486297093485543, 15495719122655060014], dtype=uint64)
"""

import hashlib
import json

import numpy as np
from numpy.typing import NDArray

Words64 = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def key(*address: int | str) -> int:
    """Return the 64-bit key of an address such as `(seed, epoch, "mask")`.

    Hashed with SHA-256, so that neighbouring seeds or epochs have unrelated streams.
    """
    digest = hashlib.sha256(json.dumps(address).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def draws(keys: int | Words64, counters: Words64) -> Words64:
    """Return one 64-bit draw for each counter, under one key or under a key each.

    The output function of Steele, Lea and Flood 2014, Fast Splittable Pseudorandom Number
    Generators (SplitMix64).
    """
    return _mixed(np.asarray(keys, dtype=np.uint64) + (counters + np.uint64(1)) * _GOLDEN)


def streams(keys: Words64, lengths: NDArray[np.int64]) -> Words64:
    """Return the first draws under each key, joined: `draws(keys[i], range(lengths[i]))`."""
    start = (np.cumsum(lengths) - lengths).astype(np.uint64)
    state = np.arange(1, int(lengths.sum()) + 1, dtype=np.uint64)
    state *= _GOLDEN
    state += np.repeat(keys - start * _GOLDEN, lengths)
    return _mixed(state)


def _mixed(state: Words64) -> Words64:
    """Return the output of SplitMix64 for each state, in its place."""
    shifted = state >> np.uint64(30)
    state ^= shifted
    state *= _FIRST
    np.right_shift(state, np.uint64(27), out=shifted)
    state ^= shifted
    state *= _SECOND
    np.right_shift(state, np.uint64(31), out=shifted)
    state ^= shifted
    return state


def uniform(words: Words64) -> NDArray[np.float64]:
    """Return the draws as floats in [0, 1), from their upper 53 bits."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(permutation_key: int, length: int) -> NDArray[np.int64]:
    """Return a permutation of `range(length)`.

    The order of keyed draws: unlike a cipher it needs memory for the whole range, which the
    manifest takes anyway, and in return it is one line that numpy sorts at full speed.
    """
    words = draws(permutation_key, np.arange(length, dtype=np.uint64))
    return np.argsort(words, kind="stable").astype(np.int64)
