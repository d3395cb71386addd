"""Where Ray Train meets the plan: each start of the worker group begins at the newest commit."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataIterator, ExecutionOptions
from ray.train import DataConfig

from pipelines.data.batches import RowSource, dataset, read_tasks
from pipelines.data.plan import Cursor, OrderConfig
from pipelines.training.checkpoint import Attempt, CommitLog


@dataclass(frozen=True, eq=False)
class Feed:
    """What one worker of an attempt is handed."""

    iterator: DataIterator
    attempt: Attempt

    def blocks(self) -> Iterator[pa.Table]:
        """Yield this rank's travelling blocks, fetched ahead while it trains."""
        whole: Any = None  # a block as it travelled; Ray's annotation forgets the None
        yield from self.iterator.iter_batches(
            batch_size=whole, batch_format="pyarrow", prefetch_batches=2
        )


class PlannedDataConfig(DataConfig):
    """Starts the plan where the newest good commit stands, and tells the ranks which one it is.

    Ray calls `configure` at every start of a worker group and nowhere else tells the data how
    many workers there are, so the commit is chosen here, once, for all of them.
    """

    def __init__(
        self, log: CommitLog, source_ref: "ray.ObjectRef[RowSource]", order: OrderConfig, steps: int
    ) -> None:
        # Train replaces the dataset's own options by these: order is kept only if asked for here.
        super().__init__(execution_options=ExecutionOptions(preserve_order=True))
        self._log = log
        self._source_ref = source_ref
        self._order = order
        self._steps = steps

    def configure(
        self,
        datasets: Any,
        world_size: int,
        *_: Any,
        **__: Any,
    ) -> list[dict[str, Any]]:
        """Return a Feed for each rank, under the name of the only dataset."""
        attempt = self._log.begin_attempt(world_size)
        commit = self._log.commit(attempt.commit) if attempt.commit else None
        step, start = (commit.step, commit.cursor) if commit else (0, Cursor())
        tasks = self._tasks(start, step)
        blocks = dataset(self._source_ref, self._order, start, tasks)
        blocks.context.execution_options = self._resolve_execution_options("train")
        blocks.context.raise_original_map_exception = True  # a DataError stays one
        blocks.set_name("train")
        # Ray deals to its first split first. The run goes on dealing where it stood, so that a
        # slot has the same rank, and a sum over ranks the same bits, as if it had never stopped.
        turn = self._order.first_block(step) % world_size
        splits = blocks.streaming_split(world_size, equal=True)
        feeds = [Feed(splits[rank - turn], attempt) for rank in range(world_size)]
        return [dict.fromkeys(datasets, feed) for feed in feeds]

    def _tasks(self, start: Cursor, step: int) -> list[range]:
        """Return read tasks for the steps from `step` on, by the rows of the orders so far."""
        made = step - start.steps_done  # in whole superblocks
        # A superblock more: the end of a stream is cut raggedly.
        num_steps = self._steps - made + 2 * self._order.steps_per_block
        if start.order:
            rows_per_order = (made * self._order.rows_per_step - start.row) / start.order
        else:
            source: RowSource = ray.get(self._source_ref)
            rows_per_order = source.rows_per_order()
        return read_tasks(start, start.row + num_steps * self._order.rows_per_step, rows_per_order)
