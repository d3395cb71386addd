"""The contract between an objective and the training loop, which knows neither modality nor method.

The loop adds up the weights of every slot before it goes backward, so the gradients of the slots
sum to the gradient of the whole batch, however many workers share the slots:

    totals = sum of objective.weights(slot) over all slots of all ranks
    for slot in slots:
        output = objective(slot)
        joint_loss(output.terms, objective.coefficients, totals).backward()
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
Terms = dict[str, tuple[Tensor, Tensor]]
"""Name -> (sum, weight), scalar float32: the mean over slots is sum of sums / sum of weights."""


class StepOutput(NamedTuple):
    """One forward pass. A NamedTuple, so DDP, FSDP2 and torch.compile can see inside it."""

    terms: Terms
    """Differentiable sums of the loss terms; a sum of weight 0 is exactly 0."""
    metrics: Terms
    """Detached sums, only for logging."""


class Objective(nn.Module, ABC):
    """A model together with the self-supervised loss that trains it.

    `forward` is a function of its batch (and of the global torch generator where there is
    dropout), so it can be compiled, sharded and tested against a reference.
    """

    coefficients: dict[str, float]
    """loss = sum over terms of coefficient * (sum over all slots) / (weight over all slots)."""

    @abstractmethod
    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Return the weight of each term, scalar float32, from the batch alone."""

    @abstractmethod
    def forward(self, batch: Batch) -> StepOutput:
        """Return the loss terms, with the weights of `weights(batch)`, and the metrics."""

    @abstractmethod
    def encode(self, batch: Batch) -> Tensor:
        """Return float32 features (rows, width) for probes, embedding and handover."""

    def __call__(self, batch: Batch) -> StepOutput:
        """Run `forward` with its hooks; here so that type checkers see its result."""
        output: StepOutput = super().__call__(batch)
        return output


def joint_loss(terms: Terms, coefficients: dict[str, float], totals: dict[str, Tensor]) -> Tensor:
    """Return one slot's share of the loss: the sum over terms of coefficient * sum / total.

    `totals` holds the weight of each term over all slots of all ranks, so the shares of the slots
    add up to the loss of the batch, and so do their gradients. A term whose total is 0 contributes
    exactly 0.
    """
    shares = []
    for name, (term_sum, _) in terms.items():
        total = totals[name]
        scale = torch.where(total == 0, 0.0, coefficients[name] / total)
        shares.append(term_sum * scale)
    return torch.stack(shares).sum()
