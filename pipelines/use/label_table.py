"""Whether pretraining pays where labels are few: one table, contestants in columns.

    fraction of the labels x seed  ->  one part of the examples, the same for every contestant
    fine-tuned     the encoder, all of it trained further with a head
    from scratch   the same network by the same steps, its weights drawn anew
    linear         logistic regression on TF-IDF of words and pairs of words, or on raw pixels

A part takes its share of the training and of the validation examples, for whoever has few labels
has few to choose by, too. Each contestant has settings to choose from, learning rates or inverse
regularisations: the validation examples of the first seed choose, separately for each fraction. All
are judged on all test examples.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
import ray
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pipelines.cluster import parallel_map
from pipelines.console import say
from pipelines.data.randomness import draws, key
from pipelines.tables import table
from pipelines.use.classifier import probabilities
from pipelines.use.fit import FitTask, fit
from pipelines.use.inputs import inputs_of
from pipelines.use.intervals import interval
from pipelines.use.labelled import Example, Labelled
from pipelines.use.labelled_features import raw_pixels
from pipelines.use.probe import word_vectorizer
from ssl_models.classification import Classification

Contestant = Literal["from scratch", "linear", "fine-tuned"]
RATES = (0.3, 1.0, 3.0, 10.0)
"""Learning rates to choose from, in units of the one that is asked for."""
SETTINGS: dict[Contestant, tuple[float, ...]] = {
    "from scratch": RATES,
    "linear": (0.1, 1.0, 10.0, 100.0),
    "fine-tuned": RATES,
}
"""What each contestant chooses from by validation: multiples of the learning rate, or inverse
strengths of the regularisation."""
MAX_ITERATIONS = 300


class Trial(NamedTuple):
    """One training."""

    contestant: Contestant
    fraction: float
    seed: int
    setting: float


class Outcome(NamedTuple):
    """What came of it."""

    labels: int
    """Training and validation examples that it was given."""
    validation: float
    """Accuracy on them."""
    right: NDArray[np.int64]
    """1 for each test example that is told right."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Row:
    """One fraction of the labels."""

    fraction: float
    labels: int
    settings: dict[Contestant, float]
    """What each has chosen."""
    right: dict[Contestant, NDArray[np.int64]]
    """(seeds, test examples)."""

    def accuracies(self, contestant: Contestant) -> NDArray[np.float64]:
        """Return the test accuracy of each seed."""
        found: NDArray[np.float64] = self.right[contestant].mean(axis=1)
        return found

    def lead(self, other: Contestant) -> tuple[float, float, float]:
        """Return by how much the fine-tuned encoder is better than another, and the interval.

        Paired: 95 % over the seeds and the test examples.
        """
        ahead = self.right["fine-tuned"] - self.right[other]
        return float(ahead.mean()), *interval(ahead)

    def record(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return {
            "fraction": self.fraction,
            "labels": self.labels,
            "settings": self.settings,
            "accuracy": {name: self.accuracies(name).tolist() for name in SETTINGS},
            "lead_over_scratch": self.lead("from scratch"),
            "lead_over_linear": self.lead("linear"),
        }


def label_table(task: FitTask, fractions: Sequence[float], seeds: int) -> list[Row]:
    """Return a row for each fraction; needs Ray, whose tasks train one contestant each."""
    told = ray.put(task)
    run = partial(_run, told)
    tried = [
        Trial(contestant, fraction, 0, setting)
        for fraction in sorted(fractions, reverse=True)  # the longest first
        for contestant, settings in SETTINGS.items()
        for setting in settings
    ]
    said = partial(_say, f"of {len(tried)} trainings to choose settings by")
    first = dict(zip(tried, parallel_map(run, tried, said), strict=True))
    chosen: dict[tuple[float, Contestant], Trial] = {}
    for trial in tried:  # of equals the first
        place = trial.fraction, trial.contestant
        if place not in chosen or first[trial].validation > first[chosen[place]].validation:
            chosen[place] = trial
    others = [trial._replace(seed=seed) for trial in chosen.values() for seed in range(1, seeds)]
    said = partial(_say, f"of {len(others)} trainings with other seeds")
    rest = dict(zip(others, parallel_map(run, others, said), strict=True))
    rights: dict[tuple[float, Contestant], list[NDArray[np.int64]]] = defaultdict(list)
    for place, trial in chosen.items():
        rights[place] = [first[trial].right]
        rights[place] += [rest[trial._replace(seed=seed)].right for seed in range(1, seeds)]
    return [
        Row(
            fraction=fraction,
            labels=first[chosen[fraction, "linear"]].labels,
            settings={name: chosen[fraction, name].setting for name in SETTINGS},
            right={name: np.stack(rights[fraction, name]) for name in SETTINGS},
        )
        for fraction in sorted(fractions)
    ]


def _say(what: str, count: int) -> None:
    say(f"{count} {what}")


def show(rows: Sequence[Row]) -> str:
    """Return the table: mean accuracies over the seeds with their standard deviation."""

    def accuracy(row: Row, name: Contestant) -> str:
        found = row.accuracies(name)
        spread = f" ± {found.std(ddof=1):.1%}" if len(found) > 1 else ""
        return f"{found.mean():.1%}{spread}"

    def lead(row: Row, name: Contestant) -> str:
        mean, low, high = row.lead(name)
        return f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"

    head = ("labels", "", *SETTINGS, "fine-tuned - from scratch", "fine-tuned - linear")
    return table(
        head,
        [
            (
                f"{100 * row.fraction:g}%",
                str(row.labels),
                *(accuracy(row, name) for name in SETTINGS),
                lead(row, "from scratch"),
                lead(row, "linear"),
            )
            for row in rows
        ],
    )


def at_most(data: Labelled, most: int) -> Labelled:
    """Return so many training and validation examples, by their shares; 0 for all of them."""
    there = len(data.training) + len(data.validation)
    return part_of(data, most / there, -1) if 0 < most < there else data


def part_of(data: Labelled, fraction: float, seed: int) -> Labelled:
    """Return a share of the training and validation examples of each class, at least one of each.

    A function of these arguments alone; a larger fraction holds a smaller one of the same seed.
    """
    return replace(
        data,
        training=_share(data.training, fraction, seed),
        validation=_share(data.validation, fraction, seed),
    )


def _share(examples: Sequence[Example], fraction: float, seed: int) -> tuple[Example, ...]:
    content = np.array([example.content for example in examples], dtype=np.uint64)
    order = np.argsort(draws(key(seed, "labels"), content), kind="stable").tolist()
    of_class: dict[str, list[int]] = defaultdict(list)
    for i in order:
        of_class[examples[i].label].append(i)
    kept: list[int] = []
    for members in of_class.values():
        kept += members[: max(1, round(fraction * len(members)))]
    return tuple(examples[i] for i in sorted(kept))


def _run(told: "ray.ObjectRef[FitTask]", trial: Trial) -> Outcome:
    return run_trial(ray.get(told), trial)


def run_trial(whole: FitTask, trial: Trial) -> Outcome:
    """Return what comes of a trial on its part of all examples, a function of these alone."""
    seed = whole.config.seed + trial.seed
    data = part_of(whole.labelled, trial.fraction, seed)
    num_labels = len(data.training) + len(data.validation)
    truth = np.array(data.numbers(data.test))
    if trial.contestant == "linear":
        validation, found = _linear(replace(whole, labelled=data), trial.setting)
    else:
        rate = whole.schedule.optimizer.learning_rate * trial.setting
        task = replace(
            whole,
            labelled=data,
            config=replace(whole.config, seed=seed, learning_rate=rate),
            from_scratch=trial.contestant == "from scratch",
        )
        validation, found = _trained(task)
    return Outcome(num_labels, validation, (found == truth).astype(np.int64))


def _trained(task: FitTask) -> tuple[float, NDArray[np.int64]]:
    """Return validation accuracy and what is told of the test examples."""
    with TemporaryDirectory() as folder:
        alone = f"file://{folder}/group"  # the step adds up over ranks, here over one
        dist.init_process_group("gloo", init_method=alone, rank=0, world_size=1)
        try:
            fitted = fit(task, torch.device("cpu"), Path(folder, "spool"))
        finally:
            dist.destroy_process_group()
    objective = Classification(task.objective)
    objective.load_state_dict(fitted.weights)
    inputs = inputs_of(task.encoder)
    rows = inputs.rows([example.item for example in task.labelled.test])
    return fitted.accuracy, probabilities(objective, inputs, rows).argmax(axis=1)


def _linear(task: FitTask, inverse_strength: float) -> tuple[float, NDArray[np.int64]]:
    """Return validation accuracy and what is told of the test examples."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    data = task.labelled
    parts: list[Any] = [
        [example.item for example in part] for part in (data.training, data.validation, data.test)
    ]
    model = LogisticRegression(C=inverse_strength, max_iter=MAX_ITERATIONS)
    if task.encoder.pieces:
        # A word of one document tells nothing of another; of few documents every word is kept.
        least = 2 if len(data.training) > 1000 else 1
        model = make_pipeline(word_vectorizer(least), model)
        parts = [[" ".join(i) if isinstance(i, tuple) else i for i in part] for part in parts]
    else:
        maker = raw_pixels(task.encoder.image_rows)
        parts = [
            np.stack([maker.plain(item) for item in part]).reshape(len(part), -1) / np.float32(255)
            for part in parts
        ]
    model.fit(parts[0], data.numbers(data.training))
    validation = float(np.mean(model.predict(parts[1]) == data.numbers(data.validation)))
    told: NDArray[np.int64] = model.predict(parts[2])
    return validation, told
