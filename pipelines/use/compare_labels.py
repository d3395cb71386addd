"""Whether a candidate's features tell labels as well as its champion's: a probe for the gate.

labelled items of the data -> half of them to learn from, half to be asked for
frozen features of both    -> a linear probe each (probe.py), asked for the same items
"""

import numpy as np

from pipelines.data.manifest import Manifest
from pipelines.data.randomness import draws, key
from pipelines.errors import UserError
from pipelines.use.comparison import Comparison
from pipelines.use.encoder import Encoder
from pipelines.use.labelled_features import Part, embedded, labelled_items
from pipelines.use.probe import kept_aside, linear_probe, stratified

MOST_ITEMS = 10_000
"""Of more, so many are drawn, each class in its share."""


def compare_labels(
    candidate: Encoder, champion: Encoder | None, data: Manifest, labels: str
) -> Comparison:
    """Return the scores of a linear probe on both, or on one and of the most frequent class.

    Which half an item is in depends on its content, so copies are in the same. Needs Ray.

    Raises:
        UserError: If there are too few labels to learn from.
        DataError: If the data cannot be read.
    """
    items = labelled_items(Part(data, "training"), labels)
    if len(items) > MOST_ITEMS:
        _, codes = np.unique(items.label, return_inverse=True)
        words = draws(key(0, "gate", "items"), items.content)
        items = items.take(stratified(codes, words, MOST_ITEMS))
    # One at a time, for they may differ in width; what can be decoded does not depend on them.
    made = [embedded(items, [encoder]) for encoder in (candidate, champion) if encoder]
    items = made[0].items
    words = draws(key(0, "gate", "half"), items.content)
    learned = words < np.uint64(1 << 63)
    classes, codes = np.unique(items.label, return_inverse=True)
    known, truth = codes[learned], codes[~learned]
    aside = kept_aside(known, words[learned])
    if len(np.unique(known)) < 2 or not aside.any():
        raise UserError(
            f"{learned.sum()} items with a {labels!r}, of {len(classes)} classes, are too few to "
            "learn from: name more --data, or leave --labels out"
        )
    features = [one.features[0] for one in made]
    told = [linear_probe(one[learned], known, aside, one[~learned]) for one in features]
    if not champion:
        told.append(np.full(len(truth), np.bincount(known).argmax()))
    candidate_right, reference_right = ((one == truth).astype(np.float64) for one in told)
    return Comparison(
        name=f"accuracy of a linear probe of {labels!r}",
        candidate=candidate_right,
        reference=reference_right,
        weight=np.ones(len(truth)),
    )
