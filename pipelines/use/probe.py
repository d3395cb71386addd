"""What frozen features tell of labels: a linear probe, and nearest neighbours.

The same protocol for every kind of features, so that what differs is the features alone: what is
to be chosen is chosen on a fifth of the labelled items, kept aside for it, the test items unseen.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegressionCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipelines.data.randomness import Words64

Features = Any
"""Dense (items, width), or a sparse matrix of scipy."""
Labels = NDArray[np.int64]
Mask = NDArray[np.bool_]
Rule = Literal["cosine", "euclidean"]

INVERSE_STRENGTHS = tuple(10.0**power for power in range(-4, 3))
"""C of the linear probe: the smaller, the more its weights are held down."""
MAX_ITERATIONS = 500
UNPARTED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Kana and Han: Japanese and Chinese part no words."""
WORD = rf"[{UNPARTED}]|\b(?:[^\W{UNPARTED}])" + "{2,}"
NEIGHBOURS = 20
TEMPERATURE = 0.07
EVERY = 5
"""Of so many labelled items of a class, one is kept aside to choose on."""


def word_vectorizer(least: int = 1) -> Any:
    """Return TF-IDF of words, and of two in a row, that are in `least` documents at least.

    A word has two letters or digits; of scripts that part no words each character is one.
    """
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=least, token_pattern=WORD)


def linear_probe(features: Features, labels: Labels, aside: Mask, asked: Features) -> Labels:
    """Return the labels that multinomial logistic regression tells for what is asked.

    Dense features are standardised; sparse ones, of unit rows, are left as they are. C is the one
    of INVERSE_STRENGTHS with the least log loss on the items kept aside, when it has learned from
    the others; then it learns from all. By accuracy, which 200 items measure to a few points, the
    choice cost raw pixels of MNIST 2 points of 10,000 test pictures, and not always.
    """
    regression = LogisticRegressionCV(
        Cs=INVERSE_STRENGTHS,
        cv=[(np.flatnonzero(~aside), np.flatnonzero(aside))],
        l1_ratios=(0.0,),
        scoring="neg_log_loss",
        max_iter=MAX_ITERATIONS,
        use_legacy_attributes=False,
    )
    steps = [regression] if hasattr(features, "tocsr") else [StandardScaler(), regression]
    told: Labels = make_pipeline(*steps).fit(features, labels).predict(asked)
    return told


def nearest_neighbours(
    features: Features, labels: Labels, aside: Mask, asked: Features, rules: Sequence[Rule]
) -> Labels:
    """Return the labels that the nearest labelled items vote for, by the better of some rules.

    `cosine`: the similarities s of the 20 nearest weigh exp(s / 0.07), as in Wu et al. 2018,
    Unsupervised Feature Learning via Non-Parametric Instance Discrimination. `euclidean`: they
    weigh 1 / distance. Of several rules the one that is right most often on the items kept aside
    is taken.
    """
    rule = rules[0]
    if len(rules) > 1:
        others = features[~aside], labels[~aside]
        told = {rule: _vote(rule, *others, features[aside]) for rule in rules}
        rule = max(rules, key=lambda rule: int((told[rule] == labels[aside]).sum()))
    return _vote(rule, features, labels, asked)


def _vote(rule: Rule, features: Features, labels: Labels, asked: Features) -> Labels:
    voters = KNeighborsClassifier(
        min(NEIGHBOURS, len(labels)),
        weights=_softmax_weights if rule == "cosine" else "distance",
        metric=rule,
        algorithm="brute",
    )
    told: Labels = voters.fit(features, labels).predict(asked)
    return told


def _softmax_weights(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp((1 - distances) / TEMPERATURE)


def stratified(labels: Labels, words: Words64, count: int) -> NDArray[np.int64]:
    """Return the places of `count` items, ascending: of each class its share, as the words draw.

    A class of n among N items has n * count / N of them, give or take one.
    """
    rank = _ranks(labels, words)
    share = (rank + 0.5) / np.bincount(labels)[labels]
    return np.sort(np.lexsort((words, share))[:count])


def kept_aside(labels: Labels, words: Words64) -> Mask:
    """Return which labelled items are for choosing: a fifth of each class, as the words draw."""
    aside: Mask = _ranks(labels, words) % EVERY == EVERY - 1
    return aside


def _ranks(labels: Labels, words: Words64) -> NDArray[np.int64]:
    """Return the rank of each item among those of its class, by its word."""
    order = np.lexsort((words, labels))
    sizes = np.bincount(labels)
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rank
