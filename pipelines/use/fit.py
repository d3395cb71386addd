"""Training on labels: the step of the one loop, on examples that fit in memory.

Beside `training/loop.py` it has what labels ask for: a validation after every so many steps, which
all ranks take part in and which can end the training, and the best weights instead of the last.
Step t is a function of (task, t): not of the number of workers, and there is nothing to resume, for
it takes minutes.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pipelines.data.batches import ArrayBatch
from pipelines.data.plan import OrderConfig
from pipelines.data.randomness import key, permutation
from pipelines.training.loop import Learner, Meter, train_step
from pipelines.training.spool import SpoolWriter
from pipelines.use.classifier import probabilities
from pipelines.use.encoder import Encoder
from pipelines.use.finetune_config import FinetuneConfig
from pipelines.use.inputs import inputs_of
from pipelines.use.labelled import Labelled
from ssl_models.classification import Classification, ClassificationConfig
from ssl_models.optim import FlatGradients, OptimizerConfig, build_optimizer

PICTURE_RATE = 5e-4
NARROW_TEXT_RATE, TEXT_RATE_TIMES_AREA = 1e-3, 20.0
"""Peaks of the learning rate: BERT-base takes 2e-5 to 5e-5 (Devlin et al. 2018, appendix A.3), and
narrow encoders much more."""


@dataclass(frozen=True, kw_only=True)
class FitSchedule:
    """What a step knows of its fit."""

    seed: int
    steps: int
    order: OrderConfig
    optimizer: OptimizerConfig
    log_every: int
    """Steps between evaluations."""
    stop_on_collapse: int = 0
    """Labels leave nothing to collapse."""


@dataclass(frozen=True, eq=False, kw_only=True)
class FitTask:
    """All that it takes to train a classifier, the same for every worker."""

    config: FinetuneConfig
    encoder: Encoder
    labelled: Labelled
    from_scratch: bool = False
    """Draw the encoder's weights anew."""

    @property
    def objective(self) -> ClassificationConfig:
        """The encoder, and a head for the classes."""
        pretrained: Any = self.encoder.objective  # every one has an encoder that knows its config
        return ClassificationConfig(
            encoder=pretrained.encoder.config,
            num_classes=len(self.labelled.classes),
            dropout=self.config.dropout,
        )

    @cached_property
    def schedule(self) -> FitSchedule:
        """The steps, and what they are made with."""
        config = self.config
        rate = config.learning_rate or self._usual_rate
        steps = config.steps(len(self.labelled.training))
        return FitSchedule(
            seed=config.seed,
            steps=steps,
            log_every=max(1, steps // config.evaluations),
            order=OrderConfig(rows_per_step=config.rows_per_step, slots=config.slots),
            optimizer=OptimizerConfig(
                learning_rate=rate,
                warmup_ratio=config.warmup_ratio,
                weight_decay=config.weight_decay,
            ),
        )

    @property
    def _usual_rate(self) -> float:
        if not self.encoder.pieces:
            return PICTURE_RATE
        return min(NARROW_TEXT_RATE, TEXT_RATE_TIMES_AREA / self.objective.feature_size**2)

    def build(self) -> Classification:
        """Return the classifier with the weights that it starts with, the same on every rank."""
        torch.manual_seed(key(self.config.seed, "classifier") >> 1)
        made = Classification(self.objective)
        if not self.from_scratch:
            given: Any = self.encoder.objective
            made.encoder.load_state_dict(given.encoder.state_dict())
        return made


class Fitted(NamedTuple):
    """A classifier at its best evaluation."""

    weights: dict[str, Tensor]
    step: int
    """Steps made until then."""
    steps_made: int
    accuracy: float
    """Of the validation examples, as the loss in nats."""
    loss: float

    def line(self) -> str:
        """Return where it was best, in words."""
        return (
            f"best of {self.steps_made} steps after step {self.step}: validation accuracy "
            f"{self.accuracy:.1%}, loss {self.loss:.3f}"
        )


def fit(task: FitTask, device: torch.device, spool: Path) -> Fitted:
    """Train until the last step or the end of the patience; runs on every rank of a group.

    An evaluation is better than another by its accuracy, and where these are equal by its loss.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    schedule, config = task.schedule, task.config
    objective = task.build().to(device)
    optimizer = build_optimizer(objective, schedule.optimizer)
    learner = Learner(schedule, device, objective, optimizer, FlatGradients(objective))
    # Files of its own, so that the steps of one that was killed are not logged twice.
    attempt = f"{len(list(spool.glob('*.jsonl'))) + 1:06}"
    meter = Meter(learner, SpoolWriter(spool / f"{attempt}.jsonl") if rank == 0 else None, None)
    log = SpoolWriter(spool / f"{attempt}-validation.jsonl") if rank == 0 else None
    examples = _Examples(task)
    judge = _Judge(task, rank, size)
    best, waited = None, 0
    mine = range(rank, config.slots, size)
    steps = ({s: examples.slot(step, s) for s in mine} for step in range(schedule.steps))
    for step, slots in enumerate(meter.waits(steps)):
        meter.add(train_step(learner, slots, step))
        if (step + 1) % schedule.log_every and step + 1 < schedule.steps:
            continue
        meter.log(step + 1)
        accuracy, loss = judge.accuracy_and_loss(objective)
        meter.reset()  # its rates are those of training alone
        if log:
            log.append(step + 1, {"validation/accuracy": accuracy, "validation/loss": loss})
        if best is None or (accuracy, -loss) > (best.accuracy, -best.loss):
            best, waited = Fitted(_copied(objective), step + 1, step + 1, accuracy, loss), 0
        else:
            waited += 1
        if waited == config.patience:
            break
    assert best is not None  # the last step is always evaluated
    return best._replace(steps_made=step + 1)


class _Examples:
    """The training examples, and the batch of each slot of each step."""

    def __init__(self, task: FitTask) -> None:
        training = task.labelled.training
        self._config = task.config
        self._inputs = inputs_of(task.encoder)
        self._kept = self._inputs.kept([example.item for example in training])
        self._labels = np.array(task.labelled.numbers(training), dtype=np.int64)
        self._weights = np.ones(len(training), dtype=np.float32)
        if task.config.balance:
            counts = Counter(self._labels.tolist())
            self._weights /= [len(counts) * counts[n] / len(training) for n in self._labels]

    def slot(self, step: int, slot: int) -> ArrayBatch:
        """Return a slot of a step: passes over the examples follow each other without a gap."""
        config, num_examples = self._config, len(self._kept)
        size = config.rows_per_step // config.slots
        first = step * config.rows_per_step + slot * size
        visits, places = np.divmod(np.arange(first, first + size), num_examples)
        chosen = [
            int(_pass(config.seed, visit, num_examples)[place])
            for visit, place in zip(visits.tolist(), places.tolist(), strict=True)
        ]
        kept = [self._kept[i] for i in chosen]
        batch = self._inputs.training_batch(kept, visits.tolist(), config.seed)
        return batch | {"labels": self._labels[chosen], "weight": self._weights[chosen]}


@lru_cache(maxsize=2)
def _pass(seed: int, visit: int, num_examples: int) -> NDArray[np.int64]:
    return permutation(key(seed, visit, "examples"), num_examples)


class _Judge:
    """The validation examples of one rank."""

    def __init__(self, task: FitTask, rank: int, size: int) -> None:
        mine = task.labelled.validation[rank::size]
        self._inputs = inputs_of(task.encoder)
        self._rows = self._inputs.rows([example.item for example in mine])
        self._labels = np.array(task.labelled.numbers(mine), dtype=np.int64)

    def accuracy_and_loss(self, objective: Classification) -> tuple[float, float]:
        """Return accuracy and mean loss over the examples of all ranks; called by all of them."""
        found = probabilities(objective, self._inputs, self._rows)
        told = found[np.arange(len(found)), self._labels]
        right = found.argmax(axis=1) == self._labels
        loss = -np.log(np.maximum(told, np.finfo(np.float32).tiny)).sum()
        device = next(objective.parameters()).device
        sums = torch.tensor([right.sum(), loss, len(found)], device=device, dtype=torch.float64)
        dist.all_reduce(sums)
        num_right, total, count = sums.tolist()
        return num_right / count, total / count


def _copied(objective: Classification) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to("cpu", copy=True)
        for name, tensor in objective.state_dict().items()
    }
