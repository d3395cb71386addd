"""Addressed randomness: the same numbers for ever, and unrelated ones for another address."""

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data import randomness
from pipelines.data.randomness import Words64, draws, key, permutation, streams, uniform

SAMPLES = 100_000


def stream(*address: int | str, length: int = SAMPLES) -> Words64:
    return draws(key(*address), np.arange(length, dtype=np.uint64))


def test_draws_are_the_published_splitmix64_vectors() -> None:
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert draws(1234567, np.arange(5, dtype=np.uint64)).tolist() == published


def test_golden_keys_and_streams_hold_for_ever() -> None:
    assert key(0, "mask") == 9482499826282751364
    assert key(7, 3, "blocks") == 2038738791741893989
    assert stream(0, "mask", length=2).tolist() == [2467486297093485543, 15495719122655060014]
    assert uniform(stream(0, "mask", length=4)).tolist() == [
        0.13376270019434844,
        0.8400246168503895,
        0.38593608343009234,
        0.9255053202605186,
    ]
    assert permutation(key(0, "blocks"), 10).tolist() == [6, 2, 0, 5, 9, 3, 4, 1, 8, 7]


def test_the_example_of_the_module_holds() -> None:
    found = doctest.testmod(randomness)
    assert found.attempted > 0
    assert found.failed == 0


def test_addresses_that_look_alike_have_keys_of_their_own() -> None:
    alike = [(12,), (1, 2), ("12",), (1, "2"), ("1", 2), ("1,2",), (1, 2, "")]
    assert len({key(*address) for address in alike}) == len(alike)


def test_t5_neighbouring_seeds_are_uncorrelated() -> None:
    first, second = stream(41, 0, "mask"), stream(42, 0, "mask")
    assert not np.intersect1d(first, second).size
    for lag in range(3):
        correlation = np.corrcoef(uniform(first[lag:]), uniform(second[: SAMPLES - lag]))[0, 1]
        assert abs(correlation) < 4.5 / SAMPLES**0.5
    same_bits = 1 - np.bitwise_count(first ^ second).mean() / 64
    assert abs(same_bits - 0.5) < 4.5 * 0.5 / (64 * SAMPLES) ** 0.5


def test_t5_permutations_of_neighbouring_seeds_are_uncorrelated() -> None:
    first, second = (permutation(key(seed, 0, "blocks"), SAMPLES) for seed in (41, 42))
    assert abs(np.corrcoef(first, second)[0, 1]) < 4.5 / SAMPLES**0.5
    assert np.count_nonzero(first == second) < 10


def test_t5_a_million_addresses_are_distinct_streams() -> None:
    keys = np.array([key(seed, epoch) for seed in range(300) for epoch in range(300)], np.uint64)
    second_draws = draws(keys, np.full(len(keys), 1, dtype=np.uint64))
    assert len(np.unique(keys)) == len(np.unique(second_draws)) == len(keys)
    records = np.repeat(np.arange(100_000, dtype=np.uint64), 12)
    positions = np.tile(np.arange(12, dtype=np.uint64), 100_000)
    row_keys = draws(draws(key(0, 0, "mask"), records), positions)
    assert len(np.unique(row_keys)) == len(row_keys) > 1_000_000


def test_uniform_fills_the_unit_interval_and_stays_below_one() -> None:
    edges = uniform(np.array([0, 2**64 - 1], dtype=np.uint64))
    assert edges[0] == 0
    assert edges[1] == 1 - 2**-53
    bins = np.bincount((uniform(stream(3)) * 100).astype(np.int64), minlength=100)
    chi_square = ((bins - SAMPLES / 100) ** 2 / (SAMPLES / 100)).sum()
    assert chi_square < 160  # 99 degrees of freedom: exceeded once in 10,000 times


def test_a_draw_depends_on_its_key_and_counter_and_not_on_its_neighbours() -> None:
    keys = np.array([5, 6, 7], dtype=np.uint64)
    counters = np.array([9, 9, 1], dtype=np.uint64)
    together = draws(keys, counters)
    for i in range(3):
        assert draws(int(keys[i]), counters[i : i + 1])[0] == together[i]


@given(lengths=st.lists(st.integers(0, 9), max_size=6))
@settings(max_examples=50, deadline=None)
def test_streams_are_the_first_draws_under_each_key(lengths: list[int]) -> None:
    keys = stream("keys", length=len(lengths))
    joined = [
        draw
        for one, length in zip(keys.tolist(), lengths, strict=True)
        for draw in draws(one, np.arange(length, dtype=np.uint64)).tolist()
    ]
    assert streams(keys, np.array(lengths, dtype=np.int64)).tolist() == joined


@given(length=st.integers(0, 2000), seed=st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_a_permutation_visits_everything_once(length: int, seed: int) -> None:
    assert sorted(permutation(key(seed, "rows"), length).tolist()) == list(range(length))


@pytest.mark.parametrize("place", [0, 3, 7])
def test_every_element_is_equally_likely_at_every_place(place: int) -> None:
    found = [permutation(key(seed, "place"), 8)[place] for seed in range(4000)]
    counts = np.bincount(found, minlength=8)
    assert ((counts - 500) ** 2 / 500).sum() < 30  # 7 degrees of freedom, p = 1e-4
