"""The search in tiles finds what all against all finds, and keeps the most alike."""

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.use import neighbours
from pipelines.use.neighbours import find_pairs, nearest, on_sphere


@pytest.fixture(params=[7, 64, 4096])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "TILE", request.param)


def clustered(count: int = 300, size: int = 12) -> NDArray[np.float32]:
    """Return embeddings of which every third is near another, at length 1."""
    dice = np.random.default_rng(0)
    vectors = dice.normal(size=(count, size))
    near = dice.integers(0, count, count // 3)
    vectors[: count // 3] = vectors[near] + 0.2 * dice.normal(size=(count // 3, size))
    return on_sphere(vectors.astype(np.float32))


def all_pairs(unit: NDArray[np.float32], threshold: float) -> dict[tuple[int, int], float]:
    cosines = unit.astype(np.float64) @ unit.T.astype(np.float64)
    return {
        (i, j): cosines[i, j]
        for i in range(len(unit))
        for j in range(i + 1, len(unit))
        if cosines[i, j] >= threshold
    }


def groups_of(pairs: dict[tuple[int, int], float], count: int) -> set[frozenset[int]]:
    groups = [{i} for i in range(count)]
    for i, j in pairs:
        if groups[i] is not groups[j]:
            groups[i] |= groups[j]
            for member in groups[j]:
                groups[member] = groups[i]
    return {frozenset(group) for group in groups}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.9])
def test_tiles_find_the_pairs_and_groups_of_brute_force(threshold: float) -> None:
    unit = clustered()
    expected = all_pairs(unit, threshold)
    found = find_pairs(unit, threshold, max_pairs=10**6)
    assert found.num_pairs == len(expected) > 20
    pairs = {(i, j): cosine for i, j, cosine in zip(*found.pairs, strict=True)}
    assert pairs.keys() == expected.keys()
    assert all(abs(pairs[pair] - cosine) < 1e-5 for pair, cosine in expected.items())
    assert (np.diff(found.pairs.similarity) <= 0).all()
    members = {frozenset(np.flatnonzero(found.groups_n == g).tolist()) for g in found.groups_n}
    assert members == groups_of(expected, len(unit))


@pytest.mark.usefixtures("small_tiles")
def test_of_too_many_pairs_the_most_alike_are_kept_and_all_are_counted_and_grouped() -> None:
    unit = clustered()
    every, some = find_pairs(unit, 0.3, 10**6), find_pairs(unit, 0.3, 10)
    assert some.num_pairs == every.num_pairs > 10
    np.testing.assert_array_equal(some.pairs.similarity, every.pairs.similarity[:10])
    np.testing.assert_array_equal(some.groups_n, every.groups_n)


def test_equal_embeddings_reach_the_threshold_of_1() -> None:
    unit = clustered(40, 100)
    found = find_pairs(np.concatenate([unit, unit]), 1.0, 10**6)
    assert found.num_pairs == 40
    assert (found.pairs.second - found.pairs.first == 40).all()
    assert found.pairs.similarity.max() <= 1


@pytest.mark.usefixtures("small_tiles")
def test_the_nearest_are_those_of_brute_force() -> None:
    unit = clustered()
    queries = unit[[3, 250]]
    numbers, cosines = nearest(unit, queries, 9)
    every = queries.astype(np.float64) @ unit.T.astype(np.float64)
    np.testing.assert_array_equal(numbers, np.argsort(-every, axis=1)[:, :9])
    np.testing.assert_allclose(cosines, np.sort(-every, axis=1)[:, :9] * -1, atol=1e-5)
    assert numbers[:, 0].tolist() == [3, 250]
    assert nearest(unit[:4], queries, 9)[0].shape == (2, 4)


def test_embeddings_have_length_1_and_zeros_stay() -> None:
    vectors = 7 * clustered()
    vectors[5] = 0
    unit = on_sphere(vectors)
    lengths = np.linalg.norm(unit, axis=1)
    assert lengths[5] == 0
    np.testing.assert_allclose(np.delete(lengths, 5), 1, atol=1e-6)
    np.testing.assert_allclose(unit[0] * np.linalg.norm(vectors[0]), vectors[0], rtol=1e-5)
    assert not (find_pairs(unit, 0.1, 10**6).pairs.first == 5).any()
