"""Decay groups, the schedule at points computed by hand, and gradients as one vector."""

import copy
from dataclasses import replace

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


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_no_step_is_made_at_a_rate_of_0_and_one_at_the_peak(
    warmup_ratio: float, num_steps: int
) -> None:
    config = OptimizerConfig(warmup_ratio=warmup_ratio)
    rates = [learning_rate(config, step, num_steps) for step in range(num_steps)]
    assert min(rates) > 0
    assert max(rates) == config.learning_rate


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
    ],
)
def test_a_bad_config_is_refused_with_its_value(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*got {value}"):
        replace(OptimizerConfig(), **{field: value})
