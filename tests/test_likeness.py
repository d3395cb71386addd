"""What is told beside the cosine: dHash is that of ImageHash, and shingles are runs of words."""

import io

import imagehash
import numpy as np
import pytest
from PIL import Image

from pipelines.data.decode import decode
from pipelines.use.likeness import dhash, hash_distance, jaccard, shingles
from tests.pictures import make_picture


@pytest.mark.parametrize("size", [24, 200])
def test_dhash_is_bit_for_bit_that_of_imagehash(size: int) -> None:
    for number in range(40):
        data = make_picture(number, size)
        found = dhash(np.asarray(decode(data, 3)))
        assert f"{found:016x}" == str(imagehash.dhash(Image.open(io.BytesIO(data))))


def test_dhash_of_a_picture_that_grows_brighter_has_every_bit() -> None:
    ramp = np.broadcast_to(np.arange(0, 180, 5, dtype=np.uint8)[None, :, None], (32, 36, 3))
    assert dhash(ramp) == 2**64 - 1
    assert dhash(ramp[:, ::-1]) == 0
    assert hash_distance(dhash(ramp), dhash(ramp[:, ::-1])) == 64
    assert hash_distance(0b1011, 0b0001) == 2


def test_shingles_are_runs_of_five_words() -> None:
    words = ["the", "captain", "sails", "home", "before", "the", "tide", "turns"]
    assert len(shingles(" ".join(words))) == len(words) - 4
    assert len(shingles("the captain")) == 1
    assert len(shingles("a " * 50)) == 1
    first, second = shingles(" ".join(words)), shingles(" ".join([*words[1:], "again"]))
    assert jaccard(first, first) == 1
    assert jaccard(first, second) == 3 / 5
    assert jaccard(first, shingles("THE captain  sails\nhome before the tide turns")) == 1
    assert jaccard(first, shingles("nothing of all this is in the other text")) == 0
