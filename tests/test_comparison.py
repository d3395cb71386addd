"""The rule of the gate on arrays: what it lets through, and how often it errs."""

import json
import math

import numpy as np
import pytest

from pipelines.errors import DataError
from pipelines.use.baselines import Floats
from pipelines.use.comparison import MIN_ITEMS, Comparison, Finding, findings_table, judge
from pipelines.use.gate_config import GateConfig


def comparison(
    candidate: Floats, reference: Floats, weight: Floats | None = None, name: str = "score"
) -> Comparison:
    weight = np.ones(len(candidate)) if weight is None else weight
    return Comparison(name=name, candidate=candidate, reference=reference, weight=weight)


def only(found: Comparison, above: float) -> Finding:
    (finding,) = judge([found], [above])
    return finding


def test_the_figures_are_those_of_a_hand_computation() -> None:
    dice = np.random.default_rng(0)
    weight = dice.integers(1, 9, size=50).astype(np.float64)
    candidate, reference = dice.normal(size=(2, 50)) * weight

    found = only(comparison(candidate, reference, weight), -0.5)

    assert found.candidate == pytest.approx(candidate.sum() / weight.sum())
    assert found.difference == pytest.approx(found.candidate - found.reference)
    draws = np.random.default_rng(5).integers(50, size=(20_000, 50))
    means = (candidate - reference)[draws].sum(axis=1) / weight[draws].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)
    assert found.passed == (found.low > -0.5)


def test_what_both_models_find_hard_does_not_widen_the_interval() -> None:
    dice = np.random.default_rng(1)
    hard = dice.normal(scale=100.0, size=200)
    found = only(comparison(hard + 0.1 + dice.normal(scale=0.01, size=200), hard), 0.0)
    assert found.passed
    assert found.high - found.low < 0.01


def test_the_same_model_is_not_inferior_and_not_superior() -> None:
    scores = np.random.default_rng(2).normal(size=100)
    same = comparison(scores, scores.copy())
    assert only(same, GateConfig().bounds(1)[0]).passed
    assert not only(same, GateConfig(rule="superior").bounds(1)[0]).passed


def test_a_superior_candidate_has_to_win_the_first_and_lose_none() -> None:
    gate = GateConfig(rule="superior", margin=0.1, gain=0.2)
    assert gate.bounds(3) == [0.2, -0.1, -0.1]
    assert GateConfig(margin=0.1, gain=0.2).bounds(2) == [-0.1, -0.1]
    zero = np.zeros(40)
    won, lost = comparison(zero + 0.3, zero), comparison(zero - 0.05, zero)
    assert [finding.passed for finding in judge([won, lost], gate.bounds(2))] == [True, True]
    assert [finding.passed for finding in judge([lost, won], gate.bounds(2))] == [False, True]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_never_passes(value: float) -> None:
    candidate = np.ones(100)
    candidate[7] = value
    found = only(comparison(candidate, np.zeros(100)), -1e9)
    assert not found.passed
    json.dumps(found.record(), allow_nan=False)


def test_too_few_items_are_refused() -> None:
    """One item has an interval without width: whatever is above 0 would pass."""
    few = comparison(np.ones(40), np.zeros(40), weight=np.eye(40)[0])
    with pytest.raises(DataError, match="score: 1 items are too few for an interval"):
        judge([few], [0.0])


def test_many_items_are_drawn_in_groups() -> None:
    dice = np.random.default_rng(3)
    gain = dice.normal(loc=0.1, size=50_000)
    found = only(comparison(gain, np.zeros(50_000)), 0.0)
    assert found.items == 50_000
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(50_000), rel=0.15)


def test_equal_models_are_seldom_promoted_as_superior() -> None:
    """The items are uneven and the noise has heavy tails; 2.5 % are nominal."""
    dice = np.random.default_rng(4)
    trials, num_items, promoted = 500, 2 * MIN_ITEMS, 0
    for _ in range(trials):
        weight = dice.geometric(0.05, size=num_items).astype(np.float64)
        champion = -dice.gamma(2.0, size=num_items) * weight
        noise = dice.standard_t(4, size=num_items) * np.sqrt(weight)
        promoted += only(comparison(champion + noise, champion, weight), 0.0).passed
    assert promoted / trials <= 0.05


def test_what_is_too_much_worse_is_seldom_promoted_as_non_inferior() -> None:
    """At the margin itself, which is the worst that may not pass."""
    dice = np.random.default_rng(5)
    gate, trials = GateConfig(margin=0.1), 300
    promoted = 0
    for _ in range(trials):
        champion = dice.normal(size=100)
        worse = champion - 0.1 + dice.normal(scale=0.3, size=100)
        promoted += only(comparison(worse, champion), gate.bounds(1)[0]).passed
    assert promoted / trials <= 0.05


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_margin_below_zero_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="margin must be finite and at least 0"):
        GateConfig(margin=value)
    with pytest.raises(ValueError, match="gain must be finite and at least 0"):
        GateConfig(gain=value)


def test_the_table_tells_what_failed() -> None:
    zero = np.zeros(40)
    findings = judge(
        [comparison(zero, zero), comparison(zero - 1, zero, name="other")], [-0.02, -0.02]
    )
    _, first, second = findings_table(findings, "champion").splitlines()
    assert first.split()[0] == "score"
    assert first.endswith("passed")
    assert second.endswith("FAILED")
    assert "-1.0000 to -1.0000" in second
