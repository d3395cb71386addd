"""The plan: from (manifest, seed) to an endless sequence of work orders.

A work order is a few blocks of different shards that one task makes into rows: the shuffle
window, and the pool in which NotNext pairs exchange their second segments. Orders are numbered
across epochs without a gap; every epoch visits every block once, in an order of its own, or as
often as the weight of its source says. Nothing here knows of workers, so neither does the
sequence.
"""

from collections import Counter
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

    def first_block(self, step: int) -> int:
        """Return the number of the first travelling block of the superblock of a step."""
        return step // self.steps_per_block * self.slots

    def first_step(self, block: int) -> int:
        """Return the first step of the superblock that starts with a travelling block."""
        return block // self.slots * self.steps_per_block


class Cursor(NamedTuple):
    """Where a run stands in the endless sequence of rows."""

    order: int = 0
    """The order and the row in it at which the current superblock starts."""
    row: int = 0
    steps_done: int = 0
    """Steps already made of that superblock."""


class BlockVisit(NamedTuple):
    """A block, and in which pass over its source it is used: without weights, the epoch."""

    block: int
    visit: int


class WorkOrder(NamedTuple):
    """Blocks to be made into rows by one task."""

    number: int
    blocks: tuple[BlockVisit, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """The endless sequence of work orders over the training blocks of a manifest.

    Each source is an endless sequence of passes over its blocks, each in a keyed order, and
    every epoch takes the next `blocks_per_epoch` of them.
    """

    manifest: Manifest
    seed: int
    blocks_per_order: int
    weights: tuple[float, ...] = ()
    """How many passes over each source an epoch makes; without any, one over all."""

    @cached_property
    def blocks(self) -> NDArray[np.int64]:
        """The blocks that hold training documents."""
        return np.array(self.manifest.blocks_of("training"), dtype=np.int64)

    @cached_property
    def shards(self) -> NDArray[np.int64]:
        """The shard of each of these blocks."""
        return np.array([self.manifest.blocks[block].shard for block in self.blocks], np.int64)

    @cached_property
    def sources(self) -> NDArray[np.int64]:
        """The source of each of these blocks."""
        return np.array([self.manifest.shards[shard].source for shard in self.shards], np.int64)

    @cached_property
    def blocks_per_epoch(self) -> dict[int, int]:
        """How many blocks of each source an epoch takes: the same number in every epoch."""
        counts = Counter(self.sources.tolist())
        weights = self.weights or (1.0,)
        return {source: max(1, round(weights[source] * n)) for source, n in sorted(counts.items())}

    @cached_property
    def orders_per_epoch(self) -> int:
        """How many orders an epoch has."""
        return -(-sum(self.blocks_per_epoch.values()) // self.blocks_per_order)

    def order(self, number: int) -> WorkOrder:
        """Return work order `number` of the endless sequence."""
        epoch, index = divmod(number, self.orders_per_epoch)
        return WorkOrder(number, _epoch_orders(self, epoch)[index])

    def orders(self, start: int) -> Iterator[WorkOrder]:
        """Yield the orders from number `start` on, without end."""
        while True:
            yield self.order(start)
            start += 1

    def row_permutation(self, number: int, num_rows: int) -> NDArray[np.int64]:
        """Return the order in which the rows of a work order are used."""
        return permutation(key(self.seed, number, "rows"), num_rows)


@lru_cache(maxsize=4)
def _epoch_orders(plan: Plan, epoch: int) -> list[tuple[BlockVisit, ...]]:
    """Return the blocks of each order of an epoch.

    The blocks are laid out shard by shard, both in keyed order, and order i takes every n-th
    of them from a keyed place on, n being the number of orders. Two blocks of one shard then
    meet in an order only if the epoch takes more than n blocks of the shard, where they have to.
    """
    parts = [_take(plan, epoch, source) for source in plan.blocks_per_epoch]
    taken, visits = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    shard_rank = permutation(key(plan.seed, epoch, "shards"), len(plan.manifest.shards))
    laid_out = np.argsort(shard_rank[plan.shards[taken]], kind="stable")
    blocks, visits = plan.blocks[taken[laid_out]].tolist(), visits[laid_out].tolist()
    visited = [*map(BlockVisit, blocks, visits)]
    num_orders = plan.orders_per_epoch
    places = permutation(key(plan.seed, epoch, "orders"), num_orders).tolist()
    return [tuple(visited[place::num_orders]) for place in places]


def _take(plan: Plan, epoch: int, source: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return what an epoch takes of a source: indices into `plan.blocks`, and their passes."""
    count = plan.blocks_per_epoch[source]
    size = int((plan.sources == source).sum())
    visits, places = np.divmod(np.arange(epoch * count, (epoch + 1) * count), size)
    taken = []
    for visit in range(int(visits[0]), int(visits[-1]) + 1):
        within = permutation(key(plan.seed, visit, "blocks"), len(plan.blocks))
        within = within[plan.sources[within] == source]
        taken.append(within[places[visits == visit]])
    return np.concatenate(taken), visits
