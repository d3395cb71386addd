"""What an encoder is good for: labels told from its frozen features, beside what it has to beat.

That is the same encoder untrained, and what needs none: raw pixels, or TF-IDF of the words. All of
them learn from the same labelled items, by the same protocol (`probe.py`), and are asked for the
same test items. Each seed draws other labelled items and another untrained encoder. The encoder may
have seen any of the items in its pretraining, but never a label.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray

from pipelines.cluster import parallel_map
from pipelines.config import to_record
from pipelines.console import say
from pipelines.data.randomness import draws, key
from pipelines.data.spans import Ints
from pipelines.errors import UserError
from pipelines.run import Run
from pipelines.tables import table
from pipelines.training.loop import load_objective
from pipelines.training.start import untrained
from pipelines.use.encoder import Encoder
from pipelines.use.intervals import interval
from pipelines.use.labelled_features import Embedded, Items, Part, embedded, labelled_items
from pipelines.use.probe import (
    EVERY,
    Mask,
    Rule,
    kept_aside,
    linear_probe,
    nearest_neighbours,
    stratified,
    word_vectorizer,
)

TEST_RATIO = 0.2
"""Share of the data that is the test set where none is named."""
MAX_TEST_ITEMS = 20_000
"""Of more, so many are drawn, each class in its share."""
PROBES = {"linear": "linear probe", "knn": "kNN"}
ENCODER, UNTRAINED, RAW = KINDS = ("encoder", "untrained", "raw")


class Accuracy(NamedTuple):
    """A mean over seeds and test items, or a difference of two, with its 95 % interval."""

    mean: float
    low: float
    high: float
    of_seeds: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class LabelEvaluation:
    """Accuracies of a linear probe and of kNN on test items."""

    things: str
    """What the items are: pictures or documents."""
    raw: str
    """What needs no encoder: raw pixels or TF-IDF."""
    labels: str
    """Name of the field that is told."""
    num_classes: int
    num_labelled: int
    num_test: int
    accuracies: dict[str, dict[str, Accuracy]]
    """By probe and by kind of features."""
    differences: dict[str, dict[str, Accuracy]]
    """By probe and by kind: the encoder's accuracy less that of the kind."""
    notes: tuple[str, ...] = ()
    """What was not used, and why."""

    def metrics(self) -> dict[str, float]:
        """Return all figures by name."""
        found = {
            f"probe/{probe}/{kind}": accuracy
            for probe, kinds in self.accuracies.items()
            for kind, accuracy in kinds.items()
        }
        found |= {
            f"probe/{probe}/encoder_less_{kind}": difference
            for probe, kinds in self.differences.items()
            for kind, difference in kinds.items()
        }
        metrics = {
            "probe/classes": float(self.num_classes),
            "probe/labelled": float(self.num_labelled),
            "probe/test": float(self.num_test),
        }
        for name, (mean, low, high, of_seeds) in found.items():
            metrics |= {name: mean, f"{name}_low": low, f"{name}_high": high}
            metrics |= {f"{name}_seed_{seed}": value for seed, value in enumerate(of_seeds)}
        return metrics

    def lines(self) -> list[str]:
        """Return a table and a verdict on each comparison."""
        names = self._names
        rows = []
        for kind in KINDS:
            cells = [names[kind]]
            for probe in PROBES:
                mean, low, high, _ = self.accuracies[probe][kind]
                cells += [f"{mean:.1%}", f"{100 * low:.1f} to {100 * high:.1f}"]
            rows.append(cells)
        head = ["features"]
        for probe in PROBES.values():
            head += [probe, "95 % interval"]
        num_seeds = len(self.accuracies["linear"][ENCODER].of_seeds)
        return [
            *self.notes,
            f"{self.labels!r} of {self.num_test} test {self.things}, {self.num_classes} classes, "
            f"told by {self.num_labelled} labelled ones; {num_seeds} "
            f"{'seeds' if num_seeds > 1 else 'seed'}",
            table(head, rows),
            *(
                _verdict(name, names[kind], self.differences[probe][kind])
                for probe, name in PROBES.items()
                for kind in (RAW, UNTRAINED)
            ),
        ]

    @property
    def _names(self) -> dict[str, str]:
        return {ENCODER: "encoder", UNTRAINED: "untrained encoder", RAW: self.raw}


def encoder_of(run: Run) -> Encoder:
    """Return the encoder of a run's newest commit."""
    return Encoder(to_record(run.config), run.pieces, load_objective(run).eval())


def evaluate_labels(
    encoder: Encoder, training: Part, test: Part, labels: str, num_labelled: int, seeds: int
) -> LabelEvaluation:
    """Return how well a field is told from frozen features; needs Ray.

    Each seed learns from `num_labelled` training items, drawn by their content, each class in its
    share. Of copies the first counts, and what of the training items is also a test item is left
    out. The intervals are paired, over seeds and test items.

    Raises:
        UserError: If there are too few items or classes, or the encoder is a classifier.
    """
    encoder.refuse_classifier()
    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {seeds}")
    found = [labelled_items(part, labels) for part in (training, test)]
    pool, asked = (items.distinct() for items in found)
    num_copies = sum(map(len, found)) - len(pool) - len(asked)
    is_copy = np.isin(pool.content, asked.content)
    num_unlabelled = pool.num_unlabelled + asked.num_unlabelled
    pool, asked = pool.take(~is_copy), asked.at_most(MAX_TEST_ITEMS, _words(asked, "test"))
    things = "documents" if encoder.pieces else "pictures"
    if not len(pool):
        raise UserError(
            f"all of {len(is_copy)} training {things} are also for testing: name others"
        )
    chosen = _choose(pool, num_labelled, seeds, f"{things} with a {labels!r}")
    encoders = [encoder, *(untrained(encoder, seed) for seed in range(seeds))]
    union = pool.take(np.unique(np.concatenate(chosen)))
    say(f"embeds {len(union) + len(asked)} {things} by the encoder and {seeds} untrained ones")
    known, seen = embedded(union, encoders), embedded(asked, encoders)
    read = [np.isin(known.items.record, pool.record[places]) for places in chosen]
    for seed, is_read in enumerate(read):
        what = f"training {things} that can be read"
        _refuse_few(known.items.take(is_read), seed, what, len(np.unique(pool.label)))
    scores = _scores(known, seen, read)
    is_strange = ~np.isin(seen.items.label, pool.label)
    notes = {
        f"records have no {labels!r}: left out": num_unlabelled,
        f"{things} are copies of others: left out": num_copies,
        f"training {things} are also for testing: left out": int(is_copy.sum()),
        "pictures cannot be decoded: left out": known.num_unreadable + seen.num_unreadable,
        f"test {things} have a {labels!r} that no training item has: told wrong by all": int(
            is_strange.sum()
        ),
    }
    return LabelEvaluation(
        things=things,
        raw="TF-IDF" if encoder.pieces else "raw pixels",
        labels=labels,
        num_classes=len(np.unique(pool.label)),
        num_labelled=min(int(is_read.sum()) for is_read in read),
        num_test=len(seen.items),
        accuracies={
            probe: {kind: _accuracy(score) for kind, score in kinds.items()}
            for probe, kinds in scores.items()
        },
        differences={
            probe: {
                kind: _accuracy(kinds[ENCODER] - kinds[kind], least=-1) for kind in (RAW, UNTRAINED)
            }
            for probe, kinds in scores.items()
        },
        notes=tuple(f"{n} {what}" for what, n in notes.items() if n),
    )


def _scores(known: Embedded, seen: Embedded, read: list[Mask]) -> dict[str, dict[str, Any]]:
    """Return for each probe and kind of features (seeds, test items), 1 where it tells right."""
    told = ray.put((known, seen, read))
    right = parallel_map(partial(_right, told), range(len(read)))
    return {
        probe: {kind: np.stack([found[probe, kind] for found in right]) for kind in KINDS}
        for probe in PROBES
    }


def _choose(pool: Items, count: int, seeds: int, what: str) -> list[Ints]:
    """Return the places of the labelled items of each seed.

    Raises:
        UserError: If there are not so many, or they are too few for their classes.
    """
    if not 0 < count <= len(pool):
        raise UserError(
            f"--num-labelled must be in 1..{len(pool)}, the training {what}, got {count}"
        )
    _, codes = np.unique(pool.label, return_inverse=True)
    chosen = [stratified(codes, _words(pool, seed), count) for seed in range(seeds)]
    for seed, places in enumerate(chosen):
        _refuse_few(pool.take(places), seed, f"training {what}", len(np.unique(pool.label)))
    return chosen


def _refuse_few(items: Items, seed: int, what: str, num_classes: int) -> None:
    """See that items are of two of the classes at least, and that some can be kept aside.

    Raises:
        UserError: If they are not.
    """
    classes, codes = np.unique(items.label, return_inverse=True)
    if len(classes) == 1:
        raise UserError(
            f"all of {len(items)} {what} have {str(classes[0])!r}: there is nothing to tell apart"
        )
    if not kept_aside(codes, _words(items, seed)).any():
        raise UserError(
            f"{len(items)} {what} are too few for {num_classes} classes: give --num-labelled "
            f"{EVERY * num_classes} or more"
        )


def _right(
    told: "ray.ObjectRef[tuple[Embedded, Embedded, list[Mask]]]", seed: int
) -> dict[tuple[str, str], NDArray[np.int8]]:
    """Return which test items are told right, 1 or 0, by each probe on each kind of features."""
    known, seen, read = ray.get(told)
    places = np.flatnonzero(read[seed])
    items = known.items.take(places)
    _, codes = np.unique(np.append(items.label, seen.items.label), return_inverse=True)
    labels, truth = codes[: len(items)], codes[len(items) :]
    aside = kept_aside(labels, _words(items, seed))
    raw = (
        _tf_idf([known.raw[place] for place in places], seen.raw)
        if isinstance(known.raw, list)
        else (known.raw[places].astype(np.float32), seen.raw.astype(np.float32))
    )
    both: tuple[Rule, ...] = ("cosine", "euclidean")
    features: dict[str, tuple[Any, Any, tuple[Rule, ...]]] = {
        ENCODER: (known.features[0, places], seen.features[0], ("cosine",)),
        UNTRAINED: (known.features[1 + seed, places], seen.features[1 + seed], ("cosine",)),
        RAW: (*raw, both),  # embeddings are compared by cosine; the baseline may choose
    }
    right: dict[tuple[str, str], NDArray[np.int8]] = {}
    for kind, (given, asked, rules) in features.items():
        answers = {
            "linear": linear_probe(given, labels, aside, asked),
            "knn": nearest_neighbours(given, labels, aside, asked, rules),
        }
        for probe, answer in answers.items():
            right[probe, kind] = (answer == truth).astype(np.int8)
    return right


def _tf_idf(texts: list[str], asked: list[str]) -> tuple[Any, Any]:
    """Return TF-IDF of words and pairs of words, learned from the first texts alone."""
    vectorizer = word_vectorizer()
    return vectorizer.fit_transform(texts), vectorizer.transform(asked)


def _words(items: Items, seed: int | str) -> NDArray[np.uint64]:
    """Return a draw for each item that depends on its content and the seed alone."""
    return draws(key(seed, "labelled"), items.content)


def _accuracy(scores: NDArray[np.int8], least: float = 0) -> Accuracy:
    of_seeds = tuple(float(mean) for mean in scores.mean(axis=1))
    low, high = interval(scores)
    return Accuracy(float(scores.mean()), max(low, least), min(high, 1.0), of_seeds)


def _verdict(probe: str, other: str, difference: Accuracy) -> str:
    mean, low, high = (100 * value for value in difference[:3])
    if low > 0:
        return f"{probe} beats {other} by {mean:.1f} points ({low:.1f} to {high:.1f})"
    if high < 0:
        return f"{probe} misses {other} by {-mean:.1f} points ({-high:.1f} to {-low:.1f})"
    return f"{probe} is not told from {other}: {mean:+.1f} points ({low:.1f} to {high:.1f})"
