"""What a run or a model is measured on: held-out records, without what was also trained on."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import ray

from pipelines.cluster import parallel_map
from pipelines.data.manifest import Manifest, Split
from pipelines.errors import DataError

TASKS = 64
SEED = -1
"""Of held-out rows; no run can have it, so training rows never share a draw with these."""


class NothingHeldOutError(DataError):
    """No record is left to evaluate on."""


class Held(NamedTuple):
    """The documents or pictures to evaluate on."""

    manifest: Manifest
    split: Split
    most: int
    """Of more records every n-th block is evaluated."""
    left_out: frozenset[int] = frozenset()
    """Content of records that are not evaluated on."""
    num_left_out: int = 0

    @property
    def num_records(self) -> int:
        """How many there are, those that are not evaluated on included."""
        return self.manifest.records_where(self.split)

    def items(self) -> Iterator[Any]:
        """Yield every `Document` or `Picture` that is evaluated on."""
        stride = -(-self.num_records // self.most) or 1
        for number in self.manifest.blocks_of(self.split)[::stride]:
            for item in self.manifest.read(number, self.split):
                if item.content not in self.left_out:
                    yield item


def without_copies(held: Held, manifest: Manifest) -> Held:
    """Leave out what is also a training record of a manifest, which is read in parallel."""
    contents = [item.content for item in held.items()]
    told = ray.put((manifest, frozenset(contents)))
    blocks = np.array(manifest.blocks_of("training"))
    parts = [part.tolist() for part in np.array_split(blocks, min(len(blocks), TASKS))]
    copies = frozenset[int]().union(*parallel_map(partial(_found, told), parts))
    return held._replace(
        left_out=copies, num_left_out=sum(content in copies for content in contents)
    )


def _found(
    told: "ray.ObjectRef[tuple[Manifest, frozenset[int]]]", blocks: Sequence[int]
) -> set[int]:
    manifest, wanted = ray.get(told)
    read = (item for number in blocks for item in manifest.read(number, "training"))
    return {item.content for item in read} & wanted
