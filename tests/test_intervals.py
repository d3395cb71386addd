"""Intervals cover the truth as often as they say, whatever it is that differs."""

import math

import numpy as np
import pytest

from pipelines.use.intervals import bootstrap, interval, proportion


def test_the_interval_over_documents_covers_the_true_accuracy() -> None:
    """Documents differ in how easy they are, so the pairs of one document are not independent."""
    dice = np.random.default_rng(1)
    documents = np.repeat(np.arange(60), 8)
    covered = 0
    for _ in range(150):
        ease = dice.beta(7, 3, size=60)
        correct = dice.random(len(documents)) < ease[documents]
        low, high = bootstrap(np.bincount(documents, weights=correct), np.bincount(documents))
        covered += low <= 0.7 <= high
    assert 0.88 <= covered / 150 <= 0.995


def test_the_interval_over_documents_is_as_wide_as_the_documents_make_it() -> None:
    dice = np.random.default_rng(2)
    correct = (dice.random(40) < 0.5).astype(np.float64)
    ones = np.ones(40, dtype=np.int64)

    once = bootstrap(correct, ones)
    repeated = bootstrap(np.append(25 * correct, 0.0), np.append(25 * ones, 0))

    assert repeated == pytest.approx(once)
    assert once[1] - once[0] == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(40), rel=0.2)


@pytest.mark.parametrize("apart", [0.0, 0.1])
def test_an_interval_holds_the_truth_19_times_in_20_however_far_seeds_are_apart(
    apart: float,
) -> None:
    dice = np.random.default_rng(5)
    held = 0
    for _ in range(300):
        ability = 0.7 + apart * (dice.random(3) - 0.5)  # of seeds, around the truth
        low, high = interval((dice.random((3, 1000)) < ability[:, None]).astype(np.int8))
        held += low <= 0.7 <= high
    assert 0.92 <= held / 300 <= 1


def test_the_paired_interval_is_narrow_where_two_methods_err_alike() -> None:
    dice = np.random.default_rng(5)
    difficulty = dice.random(400)
    first, second = ((difficulty < share) * np.ones((3, 1)) for share in (0.8, 0.75))
    low, high = interval(first - second)
    assert 0.01 < low < float((first - second).mean()) < high < 0.08
    one = interval(first)
    assert high - low < 0.7 * (one[1] - one[0])


def test_an_interval_has_the_width_that_items_and_seeds_give_it() -> None:
    dice = np.random.default_rng(7)
    alone = (dice.random((1, 400)) < 0.5).astype(np.int8)
    low, high = interval(alone)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(400), rel=0.1)
    assert interval(np.repeat(alone, 3, axis=0)) == pytest.approx((low, high), abs=0.01)
    apart = np.repeat(np.array([[0], [1], [1]]), 400, axis=1)
    low, high = interval(apart)  # seeds that disagree are in it, too
    half = 4.303 * math.sqrt((2 / 9 * 3 / 2) / 3)  # t of two degrees of freedom
    assert ((low + high) / 2, (high - low) / 2) == pytest.approx((2 / 3, half), rel=1e-3)
    assert interval(np.ones((3, 400))) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("num_right", "count", "expected"),
    [(19, 20, (0.7639, 0.9911)), (20, 20, (0.8389, 1.0)), (0, 20, (0.0, 0.1611))],
)
def test_the_interval_of_a_share_is_that_of_wilson(
    num_right: int, count: int, expected: tuple[float, float]
) -> None:
    assert proportion(num_right, count) == pytest.approx(expected, abs=1e-4)
