"""Whether a candidate's features tell labels as well as its champion's: a probe for the gate.

labelled items of the data -> half of them to learn from, half to be asked for
frozen features of both    -> a linear probe each (probe.py), asked for the same items
"""

import numpy as np

from pipelines.data.manifest import Manifest
from pipelines.data.randomness import draws, key
from pipelines.errors import UserError
from pipelines.use.baselines import Floats
from pipelines.use.comparison import MIN_ITEMS, Compared, Comparison
from pipelines.use.encoder import Encoder
from pipelines.use.labelled_features import Items, Part, labelled_items, readable_features
from pipelines.use.probe import Features, Labels, Mask, kept_aside, linear_probe

MOST_ITEMS = 10_000
"""Of more, so many are drawn, each class in its share."""


def compare_labels(
    candidate: Encoder, champion: Encoder | None, data: Manifest, labels: str
) -> Compared:
    """Return the scores of a linear probe on both, or on one and of the most frequent class.

    Of copies the first counts, and the half that an item is in is drawn by its content: what is
    asked for was never learned. Needs Ray.

    Raises:
        UserError: If there are too few labels to learn from and to ask for.
        DataError: If the data cannot be read.
    """
    found = labelled_items(Part(data, "training"), labels)
    distinct = found.distinct()
    items = distinct.at_most(MOST_ITEMS, draws(key(0, "gate", "items"), distinct.content))
    _halves(items, labels)  # refused before anything is embedded
    made = [readable_features(items, encoder) for encoder in (candidate, champion) if encoder]
    readable = np.logical_and.reduce([is_read for is_read, _ in made])
    known, truth, aside, learned = _halves(items.take(readable), labels)
    right = [_right(features[readable], known, truth, aside, learned) for _, features in made]
    if not champion:
        right.append((truth == np.bincount(known).argmax()).astype(np.float64))
    comparison = Comparison(
        name=f"accuracy of a linear probe of {labels!r}",
        candidate=right[0],
        reference=right[1],
        weight=np.ones(len(truth)),
    )
    left_out = {
        f"records have no {labels!r}": found.num_unlabelled,
        "records are copies": len(found) - len(distinct),
        f"records are more than the {MOST_ITEMS} that a probe takes": len(distinct) - len(items),
        "pictures cannot be decoded": int((~readable).sum()),
    }
    notes = [f"labels: {count} {what}, left out" for what, count in left_out.items() if count]
    return Compared([comparison], notes)


def _halves(items: Items, labels: str) -> tuple[Labels, Labels, Mask, Mask]:
    """Return labels to learn from, labels to ask for, the first kept aside, and which are learned.

    Raises:
        UserError: If they are too few.
    """
    words = draws(key(0, "gate", "half"), items.content)
    learned = words < np.uint64(1 << 63)
    classes, codes = np.unique(items.label, return_inverse=True)
    known, truth = codes[learned], codes[~learned]
    aside = kept_aside(known, words[learned])
    if len(np.unique(known)) < 2 or not aside.any() or len(truth) < MIN_ITEMS:
        raise UserError(
            f"{len(items)} items with {len(classes)} values of {labels!r} are too few: a probe "
            f"learns two classes from one half of them, and is asked for the other, {MIN_ITEMS} at "
            "least; name more --data, or leave --labels out"
        )
    return known, truth, aside, learned


def _right(features: Features, known: Labels, truth: Labels, aside: Mask, learned: Mask) -> Floats:
    """Return 1 for each item that the probe tells, 0 for others; NaN where features are not finite.

    NaN lies above nothing, so the gate refuses it.
    """
    right: Floats = np.full(len(truth), np.nan)
    if np.isfinite(features).all():
        told = linear_probe(features[learned], known, aside, features[~learned])
        right = (told == truth).astype(np.float64)
    return right
