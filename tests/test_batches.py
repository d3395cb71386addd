"""The stream of global batches: one for any number of workers, from any step on, without a gap."""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.batches import (
    ArrayBatch,
    Edge,
    Rank,
    RowSource,
    Step,
    chain,
    local_blocks,
    read_tasks,
    slot_digest,
    steps,
)
from pipelines.data.indexing import build
from pipelines.data.manifest import Document
from pipelines.data.plan import Cursor, OrderConfig, Plan
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.data.text import TextRows
from pipelines.data.text_config import TextConfig
from pipelines.data.vocabulary import Vocabulary
from pipelines.training.checkpoint import START_DIGEST, Commit, CommitLog
from pipelines.training.feed import Feed, PlannedDataConfig
from tests.corpus import build_manifest, make_text, serial_map, write_corpus

NUM_STEPS = 12
START = Cursor()
CONFIG = OrderConfig(rows_per_step=16, slots=4, steps_per_block=2, blocks_per_order=3)


class Told(NamedTuple):
    """What a rank tells of a step it has made."""

    digests: dict[int, bytes]
    fates: list[int]
    cursor: Cursor


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary) -> RowSource:
    """Return a source of some 30 rows an order and 5 orders an epoch."""
    folder = tmp_path_factory.mktemp("batches")
    paths = write_corpus(folder, num_documents=30, num_shards=3, num_sentences=10)
    manifest = build_manifest(paths, block_bytes=1500, heldout_ratio=0.1)
    maker = TextRows(TextConfig(max_length=32), vocabulary)
    return RowSource(Plan(manifest, 0, CONFIG.blocks_per_order), maker)


def told(step: Step) -> Told:
    digests = {slot: slot_digest(batch) for slot, batch in step.slots.items()}
    return Told(digests, step.fates.tolist(), step.cursor)


def local(
    source: RowSource, config: OrderConfig, start: Cursor = START, count: int = NUM_STEPS
) -> list[Told]:
    """Return the first steps from a cursor on, made here by one rank that holds every slot."""
    blocks = local_blocks(source, config, start)
    return [told(s) for s in islice(steps(blocks, source, config, start, Rank()), count)]


def by_ranks(
    streams: Sequence[Iterable[pa.Table]],
    source: RowSource,
    config: OrderConfig,
    *,
    start: Cursor = START,
    first_block: int = 0,
    count: int = NUM_STEPS,
) -> list[list[Told]]:
    """Return the steps of each rank, one for each stream; they gather as workers do."""
    size = len(streams)
    given: list[dict[int, Edge]] = [{}] * size
    barrier = threading.Barrier(size, timeout=60)

    def work(number: int) -> list[Told]:
        def gather(edges: dict[int, Edge]) -> list[dict[int, Edge]]:
            given[number] = edges
            barrier.wait()
            found = list(given)
            barrier.wait()
            return found

        rank = Rank(rank=number, size=size, gather=gather, first_block=first_block)
        made = steps(streams[number], source, config, start, rank)
        try:
            return [told(step) for step in islice(made, count)]
        except RuntimeError:
            barrier.abort()  # the others must not wait for a rank that stopped
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(work, number) for number in range(size)]
    for future in futures:
        if (error := future.exception()) and not isinstance(error, threading.BrokenBarrierError):
            raise error
    ranks = [future.result() for future in futures]
    assert len({len(made) for made in ranks}) == 1
    return ranks


def join(ranks: Sequence[Sequence[Told]]) -> list[Told]:
    """Return whole steps from each rank's part of them."""
    joined = []
    for parts in zip(*ranks, strict=True):
        digests = {slot: digest for part in parts for slot, digest in part.digests.items()}
        assert len(digests) == sum(len(part.digests) for part in parts)
        assert len({part.cursor for part in parts}) == 1
        fates = np.sum([part.fates for part in parts], axis=0).tolist()
        joined.append(Told(dict(sorted(digests.items())), fates, parts[0].cursor))
    return joined


def through_ray(
    source: RowSource, config: OrderConfig, log: CommitLog, workers: int, num_steps: int
) -> list[list[Told]]:
    """Return the steps that each worker of a run still has to make, streamed by Ray Data."""

    def take(feed: Feed, count: int) -> list[pa.Table]:
        return list(islice(feed.blocks(), count))

    configure = PlannedDataConfig(log, ray.put(source), config, num_steps).configure
    feeds = configure({"train": None}, workers, None, None)
    newest = log.newest()
    start, done = (newest.cursor, newest.step) if newest else (Cursor(), 0)
    first = config.first_block(done)
    last = first - (-(start.steps_done + num_steps - done) // config.steps_per_block) * config.slots
    of_rank = [[k for k in range(first, last) if k % workers == rank] for rank in range(workers)]
    taken = ray.remote(num_cpus=0)(take)
    streams = ray.get(
        [
            taken.remote(feed["train"], len(blocks))
            for feed, blocks in zip(feeds, of_rank, strict=True)
        ]
    )
    return by_ranks(streams, source, config, start=start, first_block=first, count=num_steps - done)


def uneven(source: RowSource) -> RowSource:
    """Return a source that is late with every third work order; later ones are ready before."""

    class Uneven(TextRows):
        def rows(self, documents: Sequence[Document], *, seed: int, order: int) -> pa.Table:
            time.sleep(0.4 if order % 3 == 0 else 0)
            return super().rows(documents, seed=seed, order=order)

    assert isinstance(source.maker, TextRows)
    return replace(source, maker=Uneven(source.maker.config, source.maker.vocabulary))


# Through Ray Data

ALWAYS = [(1, 5), (2, 1), (3, 5), (4, 2)]
"""Every number of workers and every number of steps in a block; the other couples are slow."""
ALSO = [(1, 1), (1, 2), (2, 2), (2, 5), (3, 1), (3, 2), (4, 1), (4, 5)]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("workers", "steps_per_block"),
    [*ALWAYS, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALSO)],
)
def test_t5_t12_every_number_of_workers_gets_the_same_steps(
    source: RowSource, tmp_path: Path, workers: int, steps_per_block: int
) -> None:
    config = replace(CONFIG, steps_per_block=steps_per_block)
    made = through_ray(source, config, CommitLog(tmp_path), workers, NUM_STEPS)
    assert join(made) == local(source, config)


@pytest.mark.usefixtures("ray_session")
def test_t5_uneven_tasks_and_a_resume_on_other_workers_change_nothing(
    source: RowSource, tmp_path: Path
) -> None:
    whole = local(source, CONFIG, count=20)
    log = CommitLog(tmp_path)
    assert CONFIG.first_block(5) % 3 == 2
    assert whole[4].cursor.steps_done == 1
    commit = commit_after(5, whole[4].cursor)
    log.save(commit, {"w": torch.zeros(1)}, {"m": torch.zeros(1)})
    made = through_ray(uneven(source), CONFIG, log, 3, 20)
    assert join(made) == whole[5:]
    # A slot has the rank that it would have had, if these workers had made the run from the start.
    for i in range(15):
        for rank in range(3):
            first = CONFIG.first_block(5 + i)
            mine = [slot for slot in range(CONFIG.slots) if (first + slot) % 3 == rank]
            assert list(made[rank][i].digests) == mine
    assert [(attempt.workers, attempt.commit) for attempt in log.attempts()] == [(3, commit.name)]


def commit_after(step: int, cursor: Cursor) -> Commit:
    return Commit(
        step=step,
        attempt=1,
        parent="",
        cursor=cursor,
        digests=(START_DIGEST,),
        fates={},
        workers=1,
        manifest_sha256="",
    )


# In this process

shapes = st.tuples(st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 4), st.integers(1, 6))


@given(shape=shapes, cut=st.integers(0, 30))
@settings(max_examples=25, deadline=None)
def test_t5_the_steps_after_any_cursor_are_the_tail(
    source: RowSource, shape: tuple[int, int, int], cut: int
) -> None:
    slots, rows_per_slot, steps_per_block = shape
    config = OrderConfig(
        rows_per_step=slots * rows_per_slot,
        slots=slots,
        steps_per_block=steps_per_block,
        blocks_per_order=CONFIG.blocks_per_order,
    )
    whole = local(source, config, count=cut + 9)
    start = whole[cut].cursor
    assert 0 <= start.steps_done < steps_per_block
    assert local(source, config, start, count=8) == whole[cut + 1 :]


@given(size=st.integers(1, 6), slots=st.sampled_from([4, 6]), done=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_t5_t12_ranks_share_the_slots_of_every_step(
    source: RowSource, size: int, slots: int, done: int
) -> None:
    size = min(size, slots)
    config = replace(CONFIG, rows_per_step=2 * slots, slots=slots)
    whole = local(source, config, count=done + 8)
    start = whole[done].cursor
    streams = [
        islice(local_blocks(source, config, start), rank, None, size) for rank in range(size)
    ]
    made = join(by_ranks(streams, source, config, start=start, count=7))
    assert made == whole[done + 1 :]
    assert all(list(step.digests) == list(range(slots)) for step in made)


def test_steps_per_block_moves_rows_between_steps_but_loses_none(source: RowSource) -> None:
    """A superblock holds the same rows however it is cut, as long as its size is the same."""
    first, second = (
        replace(CONFIG, rows_per_step=rows, steps_per_block=steps)
        for rows, steps in ((16, 3), (48, 1))
    )
    assert local(source, first, count=6)[5].cursor == local(source, second, count=2)[1].cursor


def rows_of_epochs(source: RowSource, num_epochs: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of the stream with their epoch."""
    plan = source.plan
    for table in local_blocks(source, CONFIG, START):
        for row in table.to_pylist():
            epoch = row["order"] // plan.orders_per_epoch
            if epoch == num_epochs:
                return
            yield epoch, row


def test_t6_every_epoch_uses_every_token_once(source: RowSource) -> None:
    assert isinstance(source.maker, TextRows)
    used: dict[int, Counter[tuple[int, int]]] = {epoch: Counter() for epoch in range(3)}
    for epoch, row in rows_of_epochs(source, 3):
        num_a, num_b = row["a_length"] - 2, len(row["input_ids"]) - row["a_length"] - 1
        used[epoch].update((row["a_record"], row["a_position"] + i) for i in range(num_a))
        used[epoch].update((row["b_record"], row["b_position"] + i) for i in range(num_b))
    manifest, everything = source.plan.manifest, Counter[tuple[int, int]]()
    for number in manifest.blocks_of("training"):
        for document in manifest.read(number, "training"):
            ids = source.maker.vocabulary.encode([document.text])[0]
            everything.update((document.record, i) for i in range(len(ids)))
    assert sum(everything.values()) > 1000
    assert all(used[epoch] == everything for epoch in range(3))


def test_t6_heldout_documents_are_never_in_the_stream(source: RowSource) -> None:
    manifest = source.plan.manifest
    heldout = {
        document.record
        for number in manifest.blocks_of("heldout")
        for document in manifest.read(number, "heldout")
    }
    assert heldout
    for _, row in rows_of_epochs(source, 2):
        assert not heldout & {row["a_record"], row["b_record"]}


def test_the_stream_is_numbered_without_a_gap(source: RowSource) -> None:
    expected = (0, 0)
    for table in islice(local_blocks(source, CONFIG, START), 50):
        assert table.num_rows == CONFIG.rows_per_block
        for row in table.to_pylist():
            assert (row["order"], row["row"]) == expected
            ends = row["row"] + 1 == row["order_rows"]
            expected = (row["order"] + 1, 0) if ends else (row["order"], row["row"] + 1)


def test_rows_of_an_order_are_shuffled_and_none_is_lost(source: RowSource) -> None:
    order = source.plan.order(1)
    assert {visit for _, visit in order.blocks} == {0}
    documents = [
        d for block, _ in order.blocks for d in source.plan.manifest.read(block, "training")
    ]
    made = source.maker.rows(documents, seed=0, order=1)
    table = source.table(order)
    columns = made.column_names
    assert table.select(columns) != made
    assert sorted(map(str, table.select(columns).to_pylist())) == sorted(map(str, made.to_pylist()))
    assert set(table["order"].to_pylist()) == {1}
    assert set(table["order_rows"].to_pylist()) == {made.num_rows}


def test_t5_golden_digests_hold_for_ever(source: RowSource) -> None:
    digest = START_DIGEST
    for step in local(source, CONFIG):
        digest = chain(digest, list(step.digests.values()))
    assert digest == "bf11ebfc9374175e8c7b4d1b327b382af1dc327e7b7c07f1676c23d6f51482b7"


# A stream that is not the plan's


Harm = Callable[[list[pa.Table], int], list[pa.Table]]


def dropped(blocks: list[pa.Table], i: int) -> list[pa.Table]:
    return [*blocks[:i], *blocks[i + 1 :]]


def doubled(blocks: list[pa.Table], i: int) -> list[pa.Table]:
    return [*blocks[:i], blocks[i], *blocks[i:]]


def swapped(blocks: list[pa.Table], i: int) -> list[pa.Table]:
    return [*blocks[:i], blocks[i + 1], blocks[i], *blocks[i + 2 :]]


def shortened(blocks: list[pa.Table], i: int) -> list[pa.Table]:
    return [*blocks[:i], blocks[i].slice(1), *blocks[i + 1 :]]


def shifted(blocks: list[pa.Table], i: int) -> list[pa.Table]:
    """A row is lost and all later ones move up."""
    rows = pa.concat_tables([*blocks[:i], blocks[i].slice(1), *blocks[i + 1 :]])
    size = blocks[0].num_rows
    return [rows.slice(k * size, size) for k in range(len(blocks) - 1)]


@pytest.mark.parametrize("harm", [dropped, doubled, swapped, shortened, shifted])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("place", [0, 1, 2, 3, 4, 9])
def test_a_harmed_stream_stops_the_run_before_it_is_trained_on(
    source: RowSource, harm: Harm, size: int, place: int
) -> None:
    blocks = list(islice(local_blocks(source, CONFIG, START), 16))
    harmed = harm(blocks, place)
    trained = by_ranks([blocks[rank::size] for rank in range(size)], source, CONFIG, count=8)
    assert join(trained) == local(source, CONFIG, count=8)
    with pytest.raises(RuntimeError, match="rows were lost"):
        by_ranks([harmed[rank::size] for rank in range(size)], source, CONFIG, count=8)
    whole_superblocks = place // CONFIG.slots
    before = 2 * whole_superblocks
    made = by_ranks([harmed[rank::size] for rank in range(size)], source, CONFIG, count=before)
    assert join(made) == join(trained)[:before]


def test_a_stream_of_another_seed_or_cursor_stops_the_run(source: RowSource) -> None:
    later = local(source, CONFIG)[3].cursor
    with pytest.raises(RuntimeError, match=r"slot 0 starts at \(order, row\) \(0, 0\) where"):
        by_ranks([local_blocks(source, CONFIG, START)], source, CONFIG, start=later)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("whole", [3, 8, 11])
@pytest.mark.parametrize("rest", [0, 5])
def test_all_ranks_end_at_the_superblock_that_a_stream_does_not_fill(
    source: RowSource, size: int, whole: int, rest: int
) -> None:
    """Ray deals whole rounds of blocks, then each rank's equal share of the rest in pieces."""
    blocks = list(islice(local_blocks(source, CONFIG, START), 16))
    dealt = whole // size * size
    pieces = [[blocks[dealt].slice(0, rest // 2), blocks[dealt + 1].slice(0, -(-rest // 2))]] * size
    streams = [
        [*blocks[rank:dealt:size], *(piece for piece in pieces[rank] if piece.num_rows)]
        for rank in range(size)
    ]
    made = join(by_ranks(streams, source, CONFIG))
    assert made == local(source, CONFIG)[: dealt // CONFIG.slots * CONFIG.steps_per_block]


# Digests


def test_a_digest_sees_every_byte_type_shape_and_name() -> None:
    def batch() -> ArrayBatch:
        return {
            "ids": np.arange(6, dtype=np.int64).reshape(2, 3),
            "mask": np.array([[True, False, True], [False, True, True]]),
            "labels": np.array([0, 1], dtype=np.int64),
        }

    others = [batch()]
    for name, array in batch().items():
        for i in range(array.nbytes):
            other = batch()
            other[name].view(np.uint8).reshape(-1)[i] ^= 1
            others.append(other)
    others += [
        batch() | {"ids": np.arange(6, dtype=np.uint64).reshape(2, 3)},
        batch() | {"ids": np.arange(6, dtype=np.int64).reshape(3, 2)},
        batch() | {"mask": batch()["mask"].astype(np.uint8)},
        batch() | {"more": np.zeros(0, dtype=np.int64)},
        {("words" if name == "ids" else name): array for name, array in batch().items()},
        {name: array for name, array in batch().items() if name != "labels"},
    ]
    assert len({slot_digest(other) for other in others}) == 1 + 48 + 6 + 16 + 6


def test_a_digest_does_not_depend_on_layout_or_order() -> None:
    array = np.arange(12, dtype=np.int64).reshape(3, 4)
    first = slot_digest({"a": array, "b": array[:, ::2]})
    assert slot_digest({"b": array[:, ::2].copy(), "a": np.asfortranarray(array)}) == first


def test_a_chain_is_the_hash_of_what_came_before_and_the_slots_in_order() -> None:
    slots = [hashlib.sha256(bytes([i])).digest() for i in range(3)]
    expected = hashlib.sha256(bytes(32) + slots[0] + slots[1] + slots[2]).hexdigest()
    assert chain(START_DIGEST, slots) == expected
    assert chain(START_DIGEST, slots[::-1]) != expected
    assert chain(expected, slots) != expected


# Read tasks


@given(
    order=st.integers(0, 10**6),
    num_rows=st.integers(1, 10**12),
    rows_per_order=st.floats(0.01, 10**6),
)
@settings(max_examples=200, deadline=None)
def test_read_tasks_are_consecutive_few_and_enough_for_the_estimate(
    order: int, num_rows: int, rows_per_order: float
) -> None:
    tasks = read_tasks(Cursor(order, 0), num_rows, rows_per_order)
    assert tasks[0].start == order
    for first, second in pairwise(tasks):
        assert first.stop == second.start
    assert all(len(task) > 0 for task in tasks)
    num_orders = tasks[-1].stop - order
    assert 1.25 * num_rows < num_orders * rows_per_order < 1.35 * num_rows + 3 * rows_per_order
    assert len(tasks) <= 1000


def test_read_tasks_are_of_one_order_while_they_can_be() -> None:
    assert read_tasks(Cursor(), 1000, 10.0) == [range(i, i + 1) for i in range(132)]


def test_the_estimated_rows_of_an_order_are_near_the_true_ones(source: RowSource) -> None:
    orders = [source.plan.order(number) for number in range(source.plan.orders_per_epoch)]
    mean = np.mean([source.table(order).num_rows for order in orders])
    assert 0.8 * mean < source.rows_per_order() < 1.25 * mean


def test_the_estimate_is_fair_to_sources_of_other_density_and_weight(
    tmp_path: Path, vocabulary: Vocabulary
) -> None:
    """Half the bytes give hardly a row: the first blocks of one order would tell only of some."""
    folders = [tmp_path / name for name in ("dense", "sparse", "txt")]
    for folder in folders[:2]:
        write_corpus(folder, num_documents=40, num_shards=4, num_sentences=10)
    for path in folders[1].iterdir():
        lines = [json.dumps(json.loads(line) | {"skin": "x" * 9000}) for line in path.open()]
        path.write_text("\n".join(lines[:5]))
    folders[2].mkdir()
    for i in range(6):
        (folders[2] / f"{i}.txt").write_text(make_text(i, 60))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.data.indexing.MIN_BLOCK_BYTES", 2000)
        files = find_shards([str(folder) for folder in folders], separate=True)
        manifest = build(files, SourceConfig(heldout_ratio=0), serial_map)
    maker = TextRows(TextConfig(max_length=32), vocabulary)
    for weights in ((1.0, 1.0, 1.0), (0.25, 3.0, 1.0), (4.0, 0.5, 0.2)):
        source = RowSource(Plan(manifest, 0, 3, weights), maker)
        orders = [source.plan.order(i) for i in range(4 * source.plan.orders_per_epoch)]
        mean = np.mean([source.table(order).num_rows for order in orders])
        assert 0.8 * mean < source.rows_per_order() < 1.25 * mean


def test_a_block_used_twice_in_an_epoch_is_cut_and_masked_anew(
    tmp_path: Path, vocabulary: Vocabulary
) -> None:
    paths = write_corpus(tmp_path, num_documents=12, num_shards=2, num_sentences=10)
    manifest = build_manifest(paths, block_bytes=1500)
    maker = TextRows(TextConfig(max_length=32), vocabulary)
    source = RowSource(Plan(manifest, 0, 100, (2.0,)), maker)
    order = source.plan.order(0)
    assert {visit for _, visit in order.blocks} == {0, 1}
    rows = source.table(order).select(["a_record", "a_position", "input_ids"]).to_pylist()
    places = Counter((row["a_record"], row["a_position"]) for row in rows)
    assert set(places.values()) == {1, 2}  # some cuts moved, and where none did, the masks have
    assert len({str(row) for row in rows}) > 0.95 * len(rows)
