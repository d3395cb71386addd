"""Decay groups, the schedule at points computed by hand, and gradients as one vector."""

import copy
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from torch import nn

from ssl_models.bert import BertConfig
from ssl_models.masked_language import MaskedLanguage, MaskedLanguageConfig
from ssl_models.optim import FlatGradients, OptimizerConfig, build_optimizer, learning_rate


def _small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2))


def _backward(model: nn.Module, scale: float = 1.0) -> None:
    inputs = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)
    (scale * model(inputs).square().sum()).backward()


def test_biases_and_norms_do_not_decay_and_the_tied_decoder_counts_once() -> None:
    encoder = BertConfig(vocab_size=30, hidden_size=8, num_layers=2, intermediate_size=16)
    model = MaskedLanguage(MaskedLanguageConfig(encoder=encoder))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, spared = build_optimizer(model, OptimizerConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)

    expected_spared = {name for name in names.values() if name.endswith("bias") or "norm." in name}
    assert {names[parameter] for parameter in spared["params"]} == expected_spared
    assert len(spared["params"]) == len(expected_spared)
    assert {names[parameter] for parameter in decayed["params"]} == (
        set(names.values()) - expected_spared
    )
    assert [tuple(p.shape) for p in decayed["params"]].count((30, 8)) == 1


def test_frozen_parameters_are_left_out() -> None:
    model = _small_model()
    model[0].requires_grad_(False)
    groups = build_optimizer(model, OptimizerConfig()).param_groups
    assert sum(len(group["params"]) for group in groups) == 4
    assert FlatGradients(model).vector.shape == (5 + 5 + 10 + 2,)


def test_the_optimizer_takes_its_numbers_from_the_config() -> None:
    config = OptimizerConfig(learning_rate=0.5, beta1=0.8, beta2=0.9, epsilon=1e-4)
    group = build_optimizer(_small_model(), config).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.9), 1e-4)


def test_a_step_equals_adamw_written_out() -> None:
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 2.0)
    nn.init.constant_(model.bias, 2.0)
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=0.1, weight_decay=0.5))
    model(torch.tensor([[3.0]])).sum().backward()
    optimizer.step()  # the first step of Adam is the sign of the gradient
    assert model.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, rel=1e-5)
    assert model.bias.item() == pytest.approx(2.0 - 0.1, rel=1e-5)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.25), (1, 0.5), (3, 1.0), (4, 16 / 17), (12, 8 / 17), (19, 1 / 17), (20, 0.0)],
)
def test_the_learning_rate_rises_to_the_peak_and_falls_to_0(step: int, expected: float) -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_ratio=0.2)
    assert learning_rate(config, step, 20) == pytest.approx(2.0 * expected)


Schedule = Literal["linear", "cosine", "wsd"]
SCHEDULES: tuple[Schedule, ...] = ("linear", "cosine", "wsd")


def _rates(config: OptimizerConfig, num_steps: int) -> list[float]:
    return [learning_rate(config, step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize("min_ratio", [0.0, 0.1])
def test_the_cosine_is_that_of_sgdr(min_ratio: float) -> None:
    """Loshchilov & Hutter 2017, equation 5: min + (max - min) / 2 * (1 + cos(pi * t / T))."""
    config = OptimizerConfig(
        learning_rate=2.0, schedule="cosine", warmup_ratio=0.2, min_ratio=min_ratio
    )
    lowest, highest = 2.0 * min_ratio, 2.0
    assert _rates(config, 20)[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    for t in range(17):  # the peak is made in step 3
        expected = lowest + 0.5 * (highest - lowest) * (1 + math.cos(math.pi * t / 17))
        assert learning_rate(config, 3 + t, 20) == pytest.approx(expected)
    assert learning_rate(config, 20, 20) == pytest.approx(lowest)


def test_wsd_is_stable_and_then_falls_as_1_minus_a_square_root() -> None:
    """Haegele et al. 2024, section 4: 1 - sqrt((n - (N - N_decay)) / N_decay) in the decay."""
    config = OptimizerConfig(learning_rate=2.0, schedule="wsd", warmup_ratio=0.05, decay_ratio=0.25)
    total, decay, warmup = 40, 10, 2

    def transcribed(n: int) -> float:
        if n < warmup:
            return 2.0 * (n + 1) / warmup
        return 2.0 if n <= total - decay else 2.0 * (1 - math.sqrt((n - (total - decay)) / decay))

    assert _rates(config, total) == pytest.approx([transcribed(n) for n in range(total)])
    assert _rates(config, total).count(2.0) == total - decay - warmup + 2
    assert learning_rate(config, total, total) == 0.0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.8])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 1000])
def test_no_step_is_made_at_a_rate_of_0_and_one_at_the_peak(
    schedule: Schedule, warmup_ratio: float, num_steps: int
) -> None:
    config = OptimizerConfig(schedule=schedule, warmup_ratio=warmup_ratio)
    rates = _rates(config, num_steps)
    assert min(rates) > 0
    assert max(rates) == config.learning_rate
    peak = rates.index(max(rates))
    assert all(before < after for before, after in pairwise(rates[: peak + 1]))
    assert all(before >= after for before, after in pairwise(rates[peak:]))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_warm_up_may_take_all_steps(schedule: Schedule) -> None:
    rates = _rates(OptimizerConfig(schedule=schedule, warmup_ratio=1.0, learning_rate=7.0), 7)
    assert rates == pytest.approx([1, 2, 3, 4, 5, 6, 7])


def test_the_last_of_a_million_steps_still_learns() -> None:
    for schedule in SCHEDULES:
        assert learning_rate(OptimizerConfig(schedule=schedule), 10**6 - 1, 10**6) > 1e-16


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_floor_is_kept(schedule: Schedule) -> None:
    config = OptimizerConfig(schedule=schedule, warmup_ratio=0.0, min_ratio=0.3)
    assert min(_rates(config, 50)) > 0.3 * config.learning_rate
    assert learning_rate(config, 50, 50) == pytest.approx(0.3 * config.learning_rate)


def test_flat_gradients_equal_the_gradients_of_each_parameter() -> None:
    model = _small_model()
    plain = copy.deepcopy(model)
    _backward(plain)
    gradients = FlatGradients(model)
    _backward(model)
    expected = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])
    assert torch.equal(gradients.vector, expected)
    _backward(model)
    assert torch.equal(gradients.vector, 2 * expected)
    gradients.zero()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_flat_gradients_stay_views_through_steps() -> None:
    model = _small_model()
    plain = copy.deepcopy(model)
    gradients = FlatGradients(model)
    optimizer = build_optimizer(model, OptimizerConfig())
    plain_optimizer = build_optimizer(plain, OptimizerConfig())
    for _ in range(3):
        gradients.zero()
        _backward(model)
        optimizer.step()
        plain_optimizer.zero_grad()
        _backward(plain)
        plain_optimizer.step()
    gradients.vector.fill_(7.0)
    assert all(p.grad is not None and (p.grad == 7.0).all() for p in model.parameters())
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_clip_equals_clip_grad_norm(scale: float) -> None:
    model = _small_model()
    plain = copy.deepcopy(model)
    gradients = FlatGradients(model)
    _backward(model, scale)
    _backward(plain, scale)
    norm = gradients.clip(0.7)
    expected_norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.7)
    torch.testing.assert_close(norm, expected_norm)
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_is_returned_and_scales_nothing(bad: float) -> None:
    model = _small_model()
    gradients = FlatGradients(model)
    _backward(model, 100.0)
    gradients.vector[3] = bad
    before = gradients.vector.clone()
    assert not gradients.clip(1.0).isfinite()
    torch.testing.assert_close(gradients.vector, before, rtol=0, atol=0, equal_nan=True)


def test_an_infinite_clip_norm_turns_clipping_off() -> None:
    model = _small_model()
    gradients = FlatGradients(model)
    _backward(model, 1e3)
    before = gradients.vector.clone()
    gradients.clip(float("inf"))
    assert torch.equal(gradients.vector, before)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("warmup_ratio", 1.5),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("beta2", -0.5),
        ("epsilon", 0.0),
        ("clip_norm", float("nan")),
        ("decay_ratio", 0.0),
        ("min_ratio", 1.0),
    ],
)
def test_a_bad_config_is_refused_with_its_value(field: str, value: float) -> None:
    changes: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=f"{field} must be .*got {value}"):
        replace(OptimizerConfig(), **changes)


def test_warm_up_and_decay_must_fit_into_the_steps() -> None:
    with pytest.raises(ValueError, match=r"at most 1, got 0\.5 \+ 0\.6"):
        OptimizerConfig(schedule="wsd", warmup_ratio=0.5, decay_ratio=0.6)
    OptimizerConfig(schedule="cosine", warmup_ratio=0.5, decay_ratio=0.6)
