"""The plan: from (manifest, seed) to an endless sequence of work orders.

A work order is a few blocks of different shards that one task makes into rows: the shuffle
window, and the pool in which NotNext pairs exchange their second segments. Orders are numbered
across epochs without a gap; every epoch visits every block once, in an order of its own.
Nothing here knows of workers, so neither does the sequence.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.data.manifest import Manifest
from pipelines.data.randomness import key, permutation


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """How rows become global batches; fixed for a run, so that its batches are."""

    rows_per_step: int = 64
    """Rows of one global batch."""
    slots: int = 4
    """Equal parts of a global batch; the largest number of workers."""
    steps_per_block: int = 4
    """A travelling block holds the rows of one slot for so many consecutive steps."""
    blocks_per_order: int = 8
    """Manifest blocks in one work order."""

    def __post_init__(self) -> None:
        for name in ("rows_per_step", "slots", "steps_per_block", "blocks_per_order"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rows_per_step % self.slots:
            raise ValueError(
                f"rows_per_step {self.rows_per_step} is not a multiple of slots {self.slots}"
            )

    @property
    def rows_per_slot(self) -> int:
        """Rows of one slot in one step: one forward pass."""
        return self.rows_per_step // self.slots

    @property
    def rows_per_block(self) -> int:
        """Rows of one travelling block."""
        return self.rows_per_slot * self.steps_per_block

    @property
    def rows_per_superblock(self) -> int:
        """Rows of `slots` travelling blocks, which are `steps_per_block` steps."""
        return self.rows_per_step * self.steps_per_block

    def first_block(self, step: int) -> int:
        """Return the number of the first travelling block of the superblock of a step."""
        return step // self.steps_per_block * self.slots


class Cursor(NamedTuple):
    """Where a run stands in the endless sequence of rows."""

    order: int = 0
    """The order and the row in it at which the current superblock starts."""
    row: int = 0
    steps_done: int = 0
    """Steps already made of that superblock."""


class WorkOrder(NamedTuple):
    """Blocks to be made into rows by one task."""

    number: int
    epoch: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """The endless sequence of work orders over the training blocks of a manifest."""

    manifest: Manifest
    seed: int
    blocks_per_order: int

    @cached_property
    def blocks(self) -> NDArray[np.int64]:
        """The blocks that hold training documents."""
        return np.array(self.manifest.blocks_of("training"), dtype=np.int64)

    @property
    def orders_per_epoch(self) -> int:
        """How many orders visit every block once."""
        return -(-len(self.blocks) // self.blocks_per_order)

    def order(self, number: int) -> WorkOrder:
        """Return work order `number` of the endless sequence."""
        epoch, index = divmod(number, self.orders_per_epoch)
        return WorkOrder(number, epoch, tuple(_epoch_orders(self, epoch)[index].tolist()))

    def orders(self, start: int) -> Iterator[WorkOrder]:
        """Yield the orders from number `start` on, without end."""
        while True:
            yield self.order(start)
            start += 1

    def row_permutation(self, number: int, num_rows: int) -> NDArray[np.int64]:
        """Return the order in which the rows of a work order are used."""
        return permutation(key(self.seed, number, "rows"), num_rows)


@lru_cache(maxsize=4)
def _epoch_orders(plan: Plan, epoch: int) -> list[NDArray[np.int64]]:
    """Return the blocks of each order of an epoch.

    The blocks are laid out shard by shard, both in keyed order, and order i takes every n-th
    of them from a keyed place on, n being the number of orders. Two blocks of one shard then
    meet in an order only if the shard has more than n blocks, where they have to.
    """
    shards = np.array([plan.manifest.blocks[block].shard for block in plan.blocks])
    within = permutation(key(plan.seed, epoch, "blocks"), len(plan.blocks))
    shard_rank = permutation(key(plan.seed, epoch, "shards"), len(plan.manifest.shards))
    laid_out = plan.blocks[within][np.argsort(shard_rank[shards[within]], kind="stable")]
    num_orders = plan.orders_per_epoch
    places = permutation(key(plan.seed, epoch, "orders"), num_orders)
    return [laid_out[place::num_orders] for place in places]
