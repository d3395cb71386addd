"""AdamW with BERT's decay groups, learning rate schedules, and gradients as one vector."""

import math
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Loshchilov & Hutter 2019, Decoupled Weight Decay Regularization, arXiv:1711.05101.

    Numbers as in BERT but for the learning rate, which suits small models and short runs. Unlike
    BERT's optimizer this one corrects Adam's bias.
    """

    learning_rate: float = 1e-3
    """The peak, reached at the end of the warm-up."""
    schedule: Literal["linear", "cosine", "wsd"] = "linear"
    """How the rate falls after the warm-up: in a line, as half a cosine (Loshchilov & Hutter 2017,
    SGDR, arXiv:1608.03983), or not before the last `decay_ratio` of the steps (warmup-stable-decay,
    Hu et al. 2024, MiniCPM, arXiv:2404.06395)."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises."""
    decay_ratio: float = 0.2
    """Share of the steps over which `wsd` falls, as 1 minus a square root (Haegele et al. 2024,
    Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations, arXiv:2405.18392)."""
    min_ratio: float = 0.0
    """Share of the peak that every schedule falls to."""
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-6
    clip_norm: float = 1.0
    """Gradients of a larger norm are scaled down to it; infinity turns clipping off."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epsilon", "clip_norm"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not self.weight_decay >= 0.0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if not 0.0 <= self.warmup_ratio <= 1.0:
            raise ValueError(
                f"warmup_ratio must be between 0 and 1, got {self.warmup_ratio}: "
                "it is a share of the steps, not a number of steps"
            )
        if not 0.0 < self.decay_ratio <= 1.0:
            raise ValueError(f"decay_ratio must be above 0 and at most 1, got {self.decay_ratio}")
        if self.schedule == "wsd" and self.warmup_ratio + self.decay_ratio > 1.0:
            raise ValueError(
                "warmup_ratio + decay_ratio must be at most 1, got "
                f"{self.warmup_ratio} + {self.decay_ratio}"
            )
        for name in ("min_ratio", "beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, got {getattr(self, name)}"
                )


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of a step, counted from 0.

    It rises linearly to the peak at the last step of the warm-up and falls to `min_ratio` of it at
    `num_steps`, the first step that is not made: no step is wasted on a rate of 0.
    """
    assert 0 <= step <= num_steps, f"step {step} of {num_steps}"
    warmup = max(1, round(config.warmup_ratio * num_steps))
    last_at_peak = warmup - 1
    if config.schedule == "wsd":
        last_at_peak = max(last_at_peak, num_steps - max(1, round(config.decay_ratio * num_steps)))
    rise = (step + 1) / warmup
    left = min(1.0, (num_steps - step) / (num_steps - last_at_peak))
    fall = config.min_ratio + (1.0 - config.min_ratio) * _fall(config, left)
    return config.learning_rate * min(rise, fall)


def _fall(config: OptimizerConfig, left: float) -> float:
    """Return the share of the way down that is still to go when this share of the decay is left."""
    match config.schedule:
        case "linear":
            return left
        case "cosine":
            return math.sin(0.5 * math.pi * left) ** 2  # (1 + cos) / 2 without its cancellation
        case "wsd":
            return 1.0 - math.sqrt(1.0 - left)
        case _:
            assert_never(config.schedule)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters of a model that is already on its device.

    Matrices (embeddings included) and convolutions decay; vectors, which are the biases and the
    parameters of the norms, do not. Tied parameters are one parameter.
    """
    parameters = _trainable(model)
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


class FlatGradients:
    """The gradients of all trainable parameters in one float32 vector, in the model's order.

    Every parameter's `.grad` is a view of the vector, so one all-reduce sends them, one norm
    measures them and one call zeroes them, always in the same layout. Make it once, when the model
    is on its device, and keep `optimizer.zero_grad()` away: it sets `.grad` to None, which cuts the
    parameters off from the vector. Call `zero` instead.
    """

    vector: Tensor

    def __init__(self, model: nn.Module) -> None:
        parameters = _trainable(model)
        sizes = [parameter.numel() for parameter in parameters]
        self.vector = torch.zeros(sum(sizes), dtype=torch.float32, device=parameters[0].device)
        for parameter, part in zip(parameters, torch.split(self.vector, sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    def zero(self) -> None:
        """Set every gradient to 0."""
        self.vector.zero_()

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients down to a norm of at most `max_norm`; return the norm from before.

        A norm that is not finite scales nothing and is returned as it is: the caller has to look
        at it before the step. Nothing here waits for the device.
        """
        norm: Tensor = torch.linalg.vector_norm(self.vector)
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        self.vector.mul_(torch.where(norm.isfinite(), scale, 1.0))
        return norm


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
