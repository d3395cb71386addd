"""From the plan to the global batches that workers train on, in one order for any worker count.

    work order -> one Ray task makes its rows -> cut into travelling blocks of equal row counts
    block k    -> slot k % S of superblock k // S -> rank k % W
    step i     -> the i-th part of every block of the superblock: S slots, one forward pass each

The stream of rows is the plan's alone, and so is the cut; W decides only who holds which slot.
Ranks compare the edges of their blocks once a superblock, so a stream that ever lost, doubled
or moved a row stops the run instead of training on.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from pipelines.data.plan import BlockVisit, Cursor, OrderConfig, Plan, WorkOrder
from pipelines.data.records import Form

ArrayBatch = dict[str, NDArray[Any]]

MAX_READ_TASKS = 1000
"""Ray takes a minute to plan tens of thousands of tasks: in longer runs each makes more orders."""
MADE_BYTES = 12 * 1024 * 1024
"""With more than this a task that makes rows hands them over; by default Ray gathers ten times as
much. A part of image rows is a little larger, so that it is not copied into a whole first."""
SPARE_ORDERS = 1.3
"""Orders planned for each order that is expected to be needed."""
SAMPLED_BLOCKS = 8
"""Blocks whose rows are counted to estimate those of all orders, if there are no more kinds."""


class RowMaker(Protocol):
    """What a modality gives: rows from records, and a batch from rows."""

    @property
    def fates(self) -> Sequence[str]:
        """What can become of a row; the column `fate` holds an index into it."""

    @property
    def rows_at_once(self) -> int:
        """How many rows to make at once if each is of one item alone, 0 if an order is one pool."""

    def rows(self, items: Sequence[Any], /, *, seed: int, order: int) -> pa.Table:
        """Return the rows of what the blocks of a work order hold, a function of these alone."""

    def collate(self, table: pa.Table, *, seed: int, step: int, slot: int) -> ArrayBatch:
        """Return the batch that the model is given for the rows of one slot of one step."""


@dataclass(frozen=True, eq=False)
class RowSource:
    """Everything it takes to make any row of a run, anywhere."""

    plan: Plan
    maker: RowMaker

    def table(self, order: WorkOrder) -> pa.Table:
        """Return the rows of a work order as they are used, with their address."""
        return pa.concat_tables(self.tables(order)).combine_chunks()

    def tables(self, order: WorkOrder, first_row: int = 0) -> Iterator[pa.Table]:
        """Yield these rows, from one on, in parts: all of them might not fit into memory.

        Added columns: `order`, `row` in the order, and `order_rows`, how many it has.
        """
        items, size = self._items(order), self.maker.rows_at_once
        if not size:
            made = self._rows(items, order)
            shuffled = made.take(self.plan.row_permutation(order.number, made.num_rows))
            yield _addressed(shuffled, order.number, 0, made.num_rows).slice(first_row)
            return
        places = self.plan.row_permutation(order.number, len(items)).tolist()
        for start in range(first_row, len(items), size):
            made = self._rows([items[i] for i in places[start : start + size]], order)
            yield _addressed(made, order.number, start, len(items))

    def num_rows(self, order: WorkOrder) -> int:
        """Return how many rows a work order has."""
        items = self._items(order)
        return len(items) if self.maker.rows_at_once else self._rows(items, order).num_rows

    def _items(self, order: WorkOrder) -> list[Any]:
        return [
            found._replace(visit=visit)
            for block, visit in order.blocks
            for found in self.plan.manifest.read(block, "training")
        ]

    def _rows(self, items: Sequence[Any], order: WorkOrder) -> pa.Table:
        return self.maker.rows(items, seed=self.plan.seed, order=order.number)

    def rows_per_order(self) -> float:
        """Return an estimate of the mean rows of a work order.

        A byte gives more rows in one source or form than in another, so a few blocks of each
        are made into rows, spread over its shards.
        """
        plan, rows_per_epoch = self.plan, 0.0
        shards, blocks = plan.manifest.shards, plan.manifest.blocks
        kinds: dict[tuple[int, Form], list[int]] = defaultdict(list)
        for block in plan.blocks.tolist():
            shard = shards[blocks[block].shard]
            kinds[shard.source, shard.form].append(block)
        sizes = Counter(plan.sources.tolist())
        for (source, _), members in kinds.items():
            stride = -(-len(members) // max(1, SAMPLED_BLOCKS // len(kinds)))
            sampled = members[stride // 2 :: stride]
            made = self.num_rows(WorkOrder(0, tuple(BlockVisit(block, 0) for block in sampled)))
            sampled_bytes = sum(blocks[block].bytes for block in sampled)
            passes = plan.blocks_per_epoch[source] / sizes[source]
            all_bytes = passes * sum(blocks[block].bytes for block in members)
            rows_per_epoch += made * all_bytes / sampled_bytes
        return rows_per_epoch / plan.orders_per_epoch


class Edge(NamedTuple):
    """Addresses, (order, row), of a block's first row and of the row that has to come next."""

    first: tuple[int, int]
    after: tuple[int, int]


class Step(NamedTuple):
    """One rank's part of one global batch."""

    slots: dict[int, ArrayBatch]
    fates: NDArray[np.int64]
    """How many of these rows met each fate."""
    cursor: Cursor
    """Where a run that has made this step goes on."""


def dataset(
    source_ref: "ray.ObjectRef[RowSource]",
    config: OrderConfig,
    start: Cursor,
    tasks: Sequence[range],
) -> ray.data.Dataset:
    """Return the Ray Dataset of travelling blocks: rows of `rows_per_block`, in stream order."""
    rows = numbered_blocks(tasks).map_batches(
        _make_rows,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"source_ref": source_ref, "start": start},
    )
    # Without strict the short tails of orders would break the round robin of the split.
    blocks: ray.data.Dataset = rows.repartition(
        target_num_rows_per_block=config.rows_per_block, strict=True
    )
    blocks.context.target_max_block_size = MADE_BYTES
    return blocks


def numbered_blocks(tasks: Sequence[Sequence[int]]) -> Any:
    """Return a `ray.data.Dataset` of one block for each number, in the column `number`.

    `tasks` are the numbers of each read task.
    """
    # With fewer blocks than tasks Ray would cut ours.
    return ray.data.read_datasource(_Numbers(tasks), override_num_blocks=len(tasks))


def read_tasks(start: Cursor, num_rows: int, rows_per_order: float) -> list[range]:
    """Return the work orders of each read task: enough for `num_rows` rows, if the estimate holds.

    No more than that, because Ray makes as many rows ahead as its memory holds.
    """
    num_orders = int(SPARE_ORDERS * num_rows / rows_per_order) + 2
    size = -(-num_orders // MAX_READ_TASKS)
    ends = start.order + num_orders
    return [range(number, min(number + size, ends)) for number in range(start.order, ends, size)]


def local_blocks(source: RowSource, config: OrderConfig, start: Cursor) -> Iterator[pa.Table]:
    """Yield the travelling blocks from a cursor on, made in this process, without end."""
    pending: list[pa.Table] = []
    for order in source.plan.orders(start.order):
        for made in source.tables(order, start.row if order.number == start.order else 0):
            pending.append(made)
            while sum(table.num_rows for table in pending) >= config.rows_per_block:
                joined = pa.concat_tables(pending)
                yield joined.slice(0, config.rows_per_block).combine_chunks()
                pending = [joined.slice(config.rows_per_block)]


def ray_blocks(
    source: RowSource, config: OrderConfig, start: Cursor, tasks: Sequence[range]
) -> Iterator[pa.Table]:
    """Yield the travelling blocks of some work orders, made by Ray Data, the last one cut short."""
    blocks = dataset(ray.put(source), config, start, tasks)
    blocks.context.execution_options.preserve_order = True
    whole: Any = None  # a block as it travelled; Ray's annotation forgets the None
    yield from blocks.iter_batches(batch_size=whole, batch_format="pyarrow")


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One worker's place among the others."""

    rank: int = 0
    size: int = 1
    gather: Callable[[dict[int, Edge]], list[dict[int, Edge]]] = lambda edges: [edges]
    """Returns what every rank gave, on every rank."""
    first_block: int = 0
    """Number, in the whole run, of the block that the stream starts with."""


def steps(
    blocks: Iterable[pa.Table], source: RowSource, config: OrderConfig, start: Cursor, rank: Rank
) -> Iterator[Step]:
    """Yield this rank's part of every global batch from a cursor on, to the end of the stream.

    All ranks end at the same superblock: the first that the stream does not fill for all of them.

    Raises:
        RuntimeError: If the blocks of all ranks are not the stream without a gap.
    """
    maker, seed = source.maker, source.plan.seed
    mine = _whole_blocks(blocks, config.rows_per_block)
    position = (start.order, start.row)
    done = start.steps_done
    next_block = rank.first_block
    while True:
        slots = [s for s in range(config.slots) if (next_block + s) % rank.size == rank.rank]
        held = {slot: next(mine, None) for slot in slots}
        tables = {slot: table.combine_chunks() for slot, table in held.items() if table is not None}
        gathered = rank.gather({slot: _edge(table) for slot, table in tables.items()})
        after = _follow(position, gathered, config.slots)
        if after is None:
            return
        for i in range(done, config.steps_per_block):
            parts = {
                slot: table.slice(i * config.rows_per_slot, config.rows_per_slot)
                for slot, table in tables.items()
            }
            last = i + 1 == config.steps_per_block
            step = config.first_step(next_block) + i
            yield Step(
                slots={
                    slot: maker.collate(part, seed=seed, step=step, slot=slot)
                    for slot, part in parts.items()
                },
                fates=_count_fates(parts.values(), len(maker.fates)),
                cursor=Cursor(*after, 0) if last else Cursor(*position, i + 1),
            )
        position, done, next_block = after, 0, next_block + config.slots


def slot_digest(batch: ArrayBatch) -> bytes:
    """Return the SHA-256 of a batch: names, types, shapes and bytes of its arrays."""
    digest = hashlib.sha256()
    for name, array in sorted(batch.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def chain(previous: str, slot_digests: Sequence[bytes]) -> str:
    """Return the digest after a step, from the one before it and its slots' in slot order."""
    return hashlib.sha256(bytes.fromhex(previous) + b"".join(slot_digests)).hexdigest()


def _whole_blocks(blocks: Iterable[pa.Table], num_rows: int) -> Iterator[pa.Table]:
    """Yield the blocks of a stream without its end, which Ray cuts raggedly.

    Raises:
        RuntimeError: If a block is not whole, and more follows than the rest of a stream.
    """
    rest = 0
    for table in blocks:
        if not rest and table.num_rows == num_rows:
            yield table
            continue
        rest += table.num_rows
        if rest >= num_rows:
            raise RuntimeError(
                f"a block came without all of its {num_rows} rows: rows were lost on the way; the "
                "run stops before it trains on what follows"
            )


def _follow(
    position: tuple[int, int], gathered: Sequence[dict[int, Edge]], num_slots: int
) -> tuple[int, int] | None:
    """Return the address after a superblock, having checked that its blocks follow each other.

    None means that the stream has ended for at least one rank before the superblock was full.
    """
    edges = {slot: edge for part in gathered for slot, edge in part.items()}
    for slot in range(num_slots):
        if slot not in edges:
            return None
        if edges[slot].first != position:
            raise RuntimeError(
                f"slot {slot} starts at (order, row) {edges[slot].first} where {position} has to "
                "come: rows were lost, doubled or moved on the way; the run stops before it "
                "trains on them"
            )
        position = edges[slot].after
    return position


def _edge(table: pa.Table) -> Edge:
    order, row, order_rows = (table[name] for name in ("order", "row", "order_rows"))
    first, last = ((order[i].as_py(), row[i].as_py()) for i in (0, -1))
    ends = last[1] + 1 == order_rows[-1].as_py()
    return Edge(first, (last[0] + 1, 0) if ends else (last[0], last[1] + 1))


def _count_fates(parts: Iterable[pa.Table], num_fates: int) -> NDArray[np.int64]:
    fates = np.concatenate([part["fate"].to_numpy() for part in parts])
    return np.bincount(fates, minlength=num_fates)


class _Numbers(Datasource):
    """Read tasks that yield one block for each number."""

    def __init__(self, tasks: Sequence[Sequence[int]]) -> None:
        Datasource.__init__(self)
        self._tasks = tasks

    def estimate_inmemory_data_size(self) -> int:
        return 8 * sum(len(task) for task in self._tasks)

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        return [_read_task(task) for task in self._tasks]


def _read_task(numbers: Sequence[int]) -> ReadTask:
    def read() -> Iterator[pa.Table]:
        for number in numbers:
            yield pa.table({"number": pa.array([number], pa.int64())})

    size = len(numbers)
    metadata = BlockMetadata(num_rows=size, size_bytes=8 * size, input_files=None, exec_stats=None)
    return ReadTask(read, metadata)


def _make_rows(
    numbers: pa.Table, source_ref: "ray.ObjectRef[RowSource]", start: Cursor
) -> Iterator[pa.Table]:
    source = _fetch(source_ref)
    for number in numbers["number"].to_pylist():
        first_row = start.row if number == start.order else 0
        yield from source.tables(source.plan.order(number), first_row)


def _addressed(table: pa.Table, order: int, start: int, order_rows: int) -> pa.Table:
    """Return consecutive rows of an order with their address, the first one being row `start`."""
    num_rows = table.num_rows
    address = {
        "order": np.full(num_rows, order, dtype=np.int64),
        "row": np.arange(start, start + num_rows, dtype=np.int32),
        "order_rows": np.full(num_rows, order_rows, dtype=np.int32),
    }
    for name, column in address.items():
        table = table.append_column(name, pa.array(column))
    return table


@lru_cache(maxsize=1)
def _fetch(source_ref: "ray.ObjectRef[RowSource]") -> RowSource:
    """Return the source; a worker process keeps it for the tasks to come."""
    return ray.get(source_ref)
