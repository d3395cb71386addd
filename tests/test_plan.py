"""Work orders: every block once an epoch, in an order that only (manifest, seed) decides."""

from collections import Counter
from collections.abc import Sequence
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.manifest import Block, Manifest, Shard
from pipelines.data.plan import BlockVisit, OrderConfig, Plan, WorkOrder
from pipelines.data.shards import SourceConfig


def make_manifest(
    blocks_per_shard: list[int],
    idle: frozenset[int] = frozenset(),
    source_of: Sequence[int] | None = None,
) -> Manifest:
    """Return a manifest with so many blocks a shard; `idle` ones hold nothing for training."""
    sources = source_of or [0] * len(blocks_per_shard)
    shard_of = [shard for shard, count in enumerate(blocks_per_shard) for _ in range(count)]
    return Manifest(
        root="",
        source=SourceConfig(),
        block_bytes=1,
        shards=tuple(
            Shard(path=f"{i}", bytes=n, file_bytes=n, form="jsonl", source=sources[i])
            for i, n in enumerate(blocks_per_shard)
        ),
        blocks=tuple(
            Block(
                shard=shard,
                offset=0,
                bytes=1,
                sha256="",
                records=1,
                first_record=number,
                training=int(number not in idle),
                heldout=int(number in idle),
            )
            for number, shard in enumerate(shard_of)
        ),
        ledger={},
        quarantined=(),
    )


shapes = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any)


def epoch_of(plan: Plan, epoch: int) -> list[tuple[int, ...]]:
    first = epoch * plan.orders_per_epoch
    return [blocks_of(plan.order(first + i)) for i in range(plan.orders_per_epoch)]


def blocks_of(order: WorkOrder) -> tuple[int, ...]:
    return tuple(block for block, _ in order.blocks)


@given(shape=shapes, per_order=st.integers(1, 9), seed=st.integers(0, 9), data=st.data())
@settings(max_examples=100, deadline=None)
def test_every_epoch_visits_every_training_block_once(
    shape: list[int], per_order: int, seed: int, data: st.DataObject
) -> None:
    numbers = range(sum(shape))
    idle = frozenset(data.draw(st.sets(st.sampled_from(numbers), max_size=len(numbers) - 1)))
    plan = Plan(make_manifest(shape, idle), seed, per_order)
    for epoch in range(3):
        orders = epoch_of(plan, epoch)
        assert sorted(b for order in orders for b in order) == sorted(set(numbers) - idle)
        sizes = [len(order) for order in orders]
        assert max(sizes) <= per_order
        assert max(sizes) - min(sizes) <= 1


@given(shape=shapes, per_order=st.integers(1, 9), start=st.integers(0, 40))
@settings(max_examples=50, deadline=None)
def test_orders_are_numbered_without_a_gap_and_never_cross_an_epoch(
    shape: list[int], per_order: int, start: int
) -> None:
    plan = Plan(make_manifest(shape), 0, per_order)
    found = list(islice(plan.orders(start), 30))
    assert [order.number for order in found] == list(range(start, start + 30))
    for order in found:
        assert {v for _, v in order.blocks} == {order.number // plan.orders_per_epoch}
        assert order == plan.order(order.number)


@given(shape=shapes, per_order=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_blocks_of_an_order_are_of_different_shards_where_they_can_be(
    shape: list[int], per_order: int, seed: int
) -> None:
    plan = Plan(make_manifest(shape), seed, per_order)
    for order in epoch_of(plan, 0):
        together = Counter(plan.manifest.blocks[block].shard for block in order)
        for shard, count in together.items():
            # One, unless the shard has more blocks than there are orders to deal them to.
            assert count <= -(-shape[shard] // plan.orders_per_epoch)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    manifest = make_manifest([5] * 8)
    epochs = [epoch_of(Plan(manifest, seed, 4), epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    as_sets = [{frozenset(order) for order in orders} for orders in epochs]
    for i, first in enumerate(as_sets):
        for second in as_sets[i + 1 :]:
            assert len(first & second) < 2


def test_neither_the_first_block_nor_its_company_is_favoured() -> None:
    manifest = make_manifest([2] * 6)
    openers: Counter[int] = Counter()
    company: Counter[int] = Counter()
    for seed in range(1200):
        orders = epoch_of(Plan(manifest, seed, 3), 0)
        openers[orders[0][0]] += 1
        company.update(next(set(order) - {0} for order in orders if 0 in order))
    expected = 1200 / 12
    assert sum((openers[i] - expected) ** 2 / expected for i in range(12)) < 37  # p = 1e-4, 11 df
    expected = 2 * 1200 / 10
    assert company[1] == 0  # of the same shard
    assert sum((company[i] - expected) ** 2 / expected for i in range(2, 12)) < 60


def test_golden_orders_hold_for_ever() -> None:
    plan = Plan(make_manifest([3, 1, 4, 2]), 0, 4)
    assert epoch_of(plan, 0) == [(7, 2, 9), (3, 5, 0, 8), (4, 6, 1)]
    assert epoch_of(plan, 1) == [(1, 3, 6), (2, 8, 7), (0, 9, 4, 5)]
    assert plan.row_permutation(5, 8).tolist() == [1, 0, 6, 3, 2, 5, 4, 7]


def test_the_smaller_orders_are_anywhere_in_an_epoch() -> None:
    manifest = make_manifest([3, 1, 4, 2])
    largest: Counter[int] = Counter()
    for seed in range(300):
        sizes = [len(order) for order in epoch_of(Plan(manifest, seed, 4), 0)]
        largest[sizes.index(4)] += 1
    assert min(largest[i] for i in range(3)) > 60


def test_rows_have_an_order_of_their_own_in_every_work_order_and_seed() -> None:
    manifest = make_manifest([4])
    found = [
        tuple(Plan(manifest, seed, 2).row_permutation(number, 50).tolist())
        for seed in (0, 1)
        for number in (0, 1, 2)
    ]
    assert len(set(found)) == 6
    assert all(sorted(rows) == list(range(50)) for rows in found)


# Sources with weights

weighted = st.lists(
    st.tuples(st.integers(1, 9), st.floats(0.05, 4.0)), min_size=1, max_size=4
)  # blocks and weight of each source


def weighted_plan(sources: list[tuple[int, float]], seed: int = 0) -> Plan:
    """Return a plan over sources of two shards each, which have so many blocks."""
    shape = [part for blocks, _ in sources for part in (blocks // 2, blocks - blocks // 2)]
    source_of = [source for source in range(len(sources)) for _ in range(2)]
    weights = tuple(weight for _, weight in sources)
    return Plan(make_manifest(shape, source_of=source_of), seed, 3, weights)


def visits_of(plan: Plan, epoch: int) -> list[BlockVisit]:
    first = epoch * plan.orders_per_epoch
    return [v for i in range(plan.orders_per_epoch) for v in plan.order(first + i).blocks]


@given(sources=weighted, seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_every_epoch_takes_the_share_of_a_source_and_every_pass_each_block_once(
    sources: list[tuple[int, float]], seed: int
) -> None:
    plan = weighted_plan(sources, seed)
    source_of = [plan.manifest.shards[block.shard].source for block in plan.manifest.blocks]
    passes: list[Counter[BlockVisit]] = [Counter() for _ in sources]
    num_epochs = 7
    for epoch in range(num_epochs):
        visits = visits_of(plan, epoch)
        for source, (num_blocks, weight) in enumerate(sources):
            mine = [visit for visit in visits if source_of[visit.block] == source]
            assert len(mine) == max(1, round(weight * num_blocks))
            passes[source].update(mine)
    for source, (num_blocks, weight) in enumerate(sources):
        whole, rest = divmod(num_epochs * max(1, round(weight * num_blocks)), num_blocks)
        assert set(passes[source].values()) == {1}
        in_pass = Counter(visit for _, visit in passes[source])
        assert in_pass == Counter(dict.fromkeys(range(whole), num_blocks)) + Counter({whole: rest})


def test_a_weight_of_one_is_no_weight() -> None:
    plan = weighted_plan([(5, 1.0), (4, 1.0), (7, 1.0)])
    shape = [len([b for b in plan.manifest.blocks if b.shard == i]) for i in range(6)]
    plain = Plan(make_manifest(shape), 0, 3)
    for epoch in range(3):
        assert visits_of(plan, epoch) == visits_of(plain, epoch)
        assert {visit for _, visit in visits_of(plain, epoch)} == {epoch}


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    found = {
        tuple(block for block, visit in visits_of(weighted_plan([(9, 4.0)], seed), 0) if visit == v)
        for seed in (0, 1)
        for v in range(4)
    }
    assert len(found) == 8


def test_half_a_source_is_its_other_half_in_the_next_epoch() -> None:
    plan = weighted_plan([(20, 0.5), (8, 1.0)])
    halves = [{v.block for v in visits_of(plan, epoch) if v.block < 20} for epoch in range(4)]
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(20))
    assert halves[0] != halves[2]


def test_golden_weighted_orders_hold_for_ever() -> None:
    plan = weighted_plan([(4, 1.5), (3, 0.5)])
    assert [[tuple(visit) for visit in plan.order(i).blocks] for i in range(6)] == [
        [(2, 1), (1, 0)],
        [(2, 0), (4, 0), (0, 1)],
        [(3, 0), (0, 0), (5, 0)],
        [(0, 2), (2, 2)],
        [(1, 2), (3, 1), (4, 1)],
        [(1, 1), (6, 0), (3, 2)],
    ]


def test_an_order_config_divides_a_step_into_slots() -> None:
    config = OrderConfig(rows_per_step=24, slots=4, steps_per_block=5)
    assert config.rows_per_slot == 6
    assert config.rows_per_block == 30


@pytest.mark.parametrize("name", ["rows_per_step", "slots", "steps_per_block", "blocks_per_order"])
def test_an_order_config_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        OrderConfig(**{name: 0})


def test_slots_that_do_not_divide_a_step_are_refused() -> None:
    with pytest.raises(ValueError, match="rows_per_step 10 is not a multiple of slots 4"):
        OrderConfig(rows_per_step=10, slots=4)
