"""The contract between an objective and the training loop, which knows neither modality nor method.

The loop adds up the weights of every slot before it goes backward, so the gradients of the slots
sum to the gradient of the whole batch, however many workers share the slots:

    totals = sum of objective.weights(slot) over all slots of all ranks
    for slot in slots:
        output = objective(slot)
        joint_loss(output.terms, objective.coefficients, totals).backward()

An objective that compares the rows of all slots of all ranks sets `joins_slots`, and the forward
passes of the slots come before the one loss:

    embedded = [objective.embed(slot) for slot in slots]
    output = objective.join(embedded, slots)
    joint_loss(output.terms, objective.coefficients, totals).backward()
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
Terms = dict[str, tuple[Tensor, Tensor]]
"""Name -> (sum, weight), scalar float32: the mean over slots is sum of sums / sum of weights."""

WATCHED = "collapse/"
"""What the names of watched figures start with."""
DIAGNOSIS = "diagnosis/"
"""What the name of a metric starts with that tells what goes wrong, and for how long."""


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
    joins_slots: bool = False
    """Whether a row's loss depends on rows of other slots: `join` then stands for `forward`."""
    pretraining_only: tuple[str, ...] = ()
    """Prefixes of the state dict's keys that `encode` does not need: a handover may leave them."""
    remedy: str = ""
    """What may help against what `diagnose` names."""

    @abstractmethod
    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Return the weight of each term, scalar float32, from the batch alone."""

    @abstractmethod
    def forward(self, batch: Batch) -> StepOutput:
        """Return the loss terms, with the weights of `weights(batch)`, and the metrics."""

    @abstractmethod
    def encode(self, batch: Batch) -> Tensor:
        """Return float32 features (rows, width) for probes, embedding and handover."""

    def embed(self, batch: Batch) -> Tensor:
        """Return what `join` needs of the forward pass of one slot."""
        raise NotImplementedError(f"{type(self).__name__} does not join slots")

    def join(self, embedded: Sequence[Tensor], batches: Sequence[Batch]) -> StepOutput:
        """Return the loss terms of all slots of this rank, compared with those of all ranks.

        A collective, forward and backward: every rank calls it once in a step. The terms and
        metrics are of this rank's rows alone, so they add up over the ranks like those of slots.
        """
        raise NotImplementedError(f"{type(self).__name__} does not join slots")

    def watch(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Return figures that tell what a loss hides, of the slots of this rank and all others.

        A collective; all ranks get the same figures, whatever their number. Their names start with
        `WATCHED`. There are none of an objective that cannot collapse.
        """
        del batches
        return {}

    def diagnose(self, means: Mapping[str, float]) -> str:
        """Return the name of what means of metrics and figures show to go wrong, or ""."""
        del means
        return ""

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
