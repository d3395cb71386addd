"""Scores of a candidate and its champion on the same held-out data, for the gate to judge.

Text: rows are cut, paired and masked once, as for the champion, and both models are given them.
Pictures: the heads that a loss needs are no part of a model that was handed over, so what is scored
is what every encoder gives: can one view of a picture be told by another view of it?

Labels, where there are some, tell what features are worth whatever a model was trained by: they
come first (`compare_labels.py`), and beside them models are compared that have less in common.

Without a champion, the candidate is compared with what knows nothing.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipelines.data.images import USED, ImageConfig, ImageRows
from pipelines.data.manifest import Manifest, Picture
from pipelines.data.text import TextRows
from pipelines.errors import UserError
from pipelines.use.baselines import Floats, unigram_loss
from pipelines.use.compare_labels import compare_labels
from pipelines.use.comparison import MIN_ITEMS, Compared, Comparison
from pipelines.use.encoder import ROWS_PER_BATCH, Encoder
from pipelines.use.evaluate import MAX_DOCUMENTS, Measured, measure, text_config
from pipelines.use.evaluate_images import MAX_PICTURES
from pipelines.use.heldout import SEED, Held

GALLERY = 256
"""Pictures among which the other view of one is looked for."""


def compare(
    candidate: Encoder, champion: Encoder | None, data: Manifest, labels: str = ""
) -> Compared:
    """Return the scores of two models, or of one and of what knows nothing; first those of labels.

    Raises:
        UserError: If the models cannot be compared.
        DataError: If the data cannot be read.
    """
    for encoder in (candidate, champion):
        if encoder:
            encoder.refuse_classifier()
    if champion and champion.modality != candidate.modality:
        raise UserError(
            f"the candidate is of {candidate.modality}, the champion of {champion.modality}: "
            "register it under another name"
        )
    score = _compare_images if candidate.modality == "images" else _compare_text
    if not labels:
        return score(candidate, champion, data)
    told = compare_labels(candidate, champion, data, labels)
    if champion and (reason := _apart(candidate, champion)):
        return told._replace(notes=[*told.notes, f"compared by labels alone: {reason}"])
    own = score(candidate, champion, data)
    return Compared([*told.comparisons, *own.comparisons], [*told.notes, *own.notes])


def _apart(candidate: Encoder, champion: Encoder) -> str:
    """Return why only labels are a fair comparison of two models; empty if others are, too."""
    mine, other = (encoder.config["objective"]["kind"] for encoder in (candidate, champion))
    if mine != other:
        return f"the candidate was trained as {mine}, the champion as {other}"
    if candidate.pieces and champion.vocabulary.json != candidate.vocabulary.json:
        return "the tokenizers differ"
    return ""


def _compare_text(candidate: Encoder, champion: Encoder | None, data: Manifest) -> Compared:
    """Return log probabilities of masked tokens, and what is told of pairs where both learned it.

    Raises:
        UserError: If the tokenizers differ.
    """
    config = text_config(champion or candidate)
    if champion and champion.vocabulary.json != candidate.vocabulary.json:
        raise UserError(
            "candidate and champion have different tokenizers, so their losses are of different "
            "tokens: start the candidate from the champion with --init-from, or compare the two "
            "by --labels"
        )
    encoders = [encoder for encoder in (candidate, champion) if encoder]
    rows = replace(config, max_length=min(encoder.max_tokens for encoder in encoders))
    maker = TextRows(rows, candidate.vocabulary)
    held = Held(data, "training", MAX_DOCUMENTS)
    measured = [measure(encoder.objective, maker, held, folds=1) for encoder in encoders]
    first, notes = measured[0], []
    reference = -measured[1].losses if champion else _told_by_frequency(first)
    comparisons = [
        Comparison(
            name="log probability of masked tokens, nats",
            candidate=-first.losses,
            reference=reference,
            weight=first.predictions,
        )
    ]
    if champion:
        if (first.pairs > 0).sum() < MIN_ITEMS or not _learned_alike(candidate, champion):
            notes.append(
                "pairs are not compared: too few have a label, or the models were not trained to "
                "tell the same of them"
            )
        else:
            comparisons.append(
                Comparison(
                    name="accuracy on sentence pairs",
                    candidate=first.right,
                    reference=measured[1].right,
                    weight=first.pairs,
                )
            )
        if text_config(candidate) != rows:
            notes.append("rows are made as for the champion, and no longer than both models take")
    return Compared(comparisons, notes)


def _told_by_frequency(measured: Measured) -> Floats:
    """Return what the frequencies of these documents, the best that can be, say on average."""
    (counts,) = measured.folds
    return -unigram_loss(counts.tokens, counts.targets) * measured.predictions


def _learned_alike(candidate: Encoder, champion: Encoder) -> bool:
    """Return whether both were trained to tell the same of a pair."""
    mine, other = (encoder.config for encoder in (candidate, champion))
    if 0 in (mine["objective"]["nsp_coefficient"], other["objective"]["nsp_coefficient"]):
        return False
    order = "sentence-order"
    return bool((mine["text"]["pairing"] == order) == (other["text"]["pairing"] == order))


def _compare_images(candidate: Encoder, champion: Encoder | None, data: Manifest) -> Compared:
    """Return how well views are told apart, as the champion's pretraining draws them."""
    encoders = [encoder for encoder in (candidate, champion) if encoder]
    drawn = (champion or candidate).image_config
    scores: list[Floats] = []
    for pictures in _galleries(data):
        shown = [_as_shown(encoder, drawn) for encoder in encoders]
        made = {config: _views(config, pictures) for config in set(shown)}
        found = [
            (_features(encoder, made[config][0]), made[config][1])
            for encoder, config in zip(encoders, shown, strict=True)
        ]
        content = np.array([picture.content for picture in pictures])
        used = np.logical_and.reduce([usable for _, usable in found])
        if used.sum() > 1:
            ranks = [reciprocal_ranks(views[:, used], content[used]) for views, _ in found]
            by_chance = np.full(used.sum(), (1 / np.arange(1, used.sum() + 1)).mean())
            scores.append(np.stack([*ranks, by_chance][:2]))
    joined = np.concatenate(scores, axis=1) if scores else np.zeros((2, 0))
    comparison = Comparison(
        name=f"reciprocal rank of a picture's other view among {GALLERY}",
        candidate=joined[0],
        reference=joined[1],
        weight=np.ones(joined.shape[1]),
    )
    return Compared([comparison], [])


def reciprocal_ranks(views_2BD: Tensor, content_B: NDArray[Any]) -> Floats:
    """Return 1 / the rank of each picture's second view, by cosine to its first view.

    What is as near as the right one stands half before it, so an encoder to which all pictures are
    one gets what chance gets, or less; copies of the picture are left out.
    """
    first_BD, second_BD = F.normalize(views_2BD.double(), dim=-1)
    cosine_BB = (first_BD @ second_BD.T).numpy()
    own_B1 = cosine_BB.diagonal()[:, None]
    is_other_BB = content_B[:, None] != content_B[None, :]
    before_B = ((cosine_BB > own_B1) & is_other_BB).sum(axis=1)
    beside_B = ((cosine_BB == own_B1) & is_other_BB).sum(axis=1)
    ranks: Floats = 1 / (1 + before_B + beside_B / 2)
    return np.where(np.isfinite(own_B1[:, 0]), ranks, np.nan)


def _as_shown(encoder: Encoder, drawn: ImageConfig) -> ImageConfig:
    """Return how pairs of views are made as another pretraining draws them, at this one's size."""
    own = encoder.image_config
    views = replace(drawn.views, size=own.views.size)
    return replace(own, views=views, rows="pairs", corruption=0.0)


def _views(config: ImageConfig, pictures: list[Picture]) -> tuple[Tensor, NDArray[np.bool_]]:
    """Return two views of each picture, uint8 (2, B, C, H, W), and which could be read."""
    maker = ImageRows(config)
    table = maker.rows(pictures, seed=SEED, order=0)
    arrays = maker.collate(table, seed=SEED, step=0, slot=0)
    views = torch.from_numpy(np.stack([arrays["first"], arrays["second"]]))
    return views, table["fate"].to_numpy() == USED


def _features(encoder: Encoder, views_2BCHW: Tensor) -> Tensor:
    """Return the features (2, B, D) of two views of each picture."""
    encoder.objective.eval()
    with torch.no_grad():
        features = [
            encoder.objective.encode({"image": part})
            for part in torch.split(views_2BCHW.flatten(0, 1), ROWS_PER_BATCH)
        ]
    return torch.cat(features).reshape(*views_2BCHW.shape[:2], -1)


def _galleries(data: Manifest) -> Iterator[list[Picture]]:
    """Yield pictures that are looked for among each other; of too many, every n-th block."""
    stride = -(-data.records_where("training") // MAX_PICTURES) or 1
    blocks = data.blocks_of("training")[::stride]
    pictures = chain.from_iterable(data.read(block, "training") for block in blocks)
    while gallery := list(islice(pictures, GALLERY)):
        yield gallery
